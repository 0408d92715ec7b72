"""fastlm.swap of blocks: dropout, residual add and norm are found by structure and run as one op."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections import Counter

import fastlm
import pytest
import torch
import torch.nn.functional as F
from test_swap import RMS, compare
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

C, B, L = 256, 4, 5


class FF(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x):
        return self.b(F.gelu(self.a(x)))


class PreNorm(nn.Module):
    def __init__(self, p=0.2):
        super().__init__()
        self.norm1, self.attn, self.drop1 = nn.LayerNorm(C), FF(), nn.Dropout(p)
        self.norm2, self.mlp, self.drop2 = nn.LayerNorm(C), FF(), nn.Dropout(p)

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        x = x + self.drop1(self.attn(self.norm1(x)))
        x = x + self.drop2(self.mlp(self.norm2(x)))
        return x


class Wordy(nn.Module):
    """Pre-norm as libraries write it: one thing a line, one dropout module for two places, own norm class, helper."""

    def __init__(self, p=0.2):
        super().__init__()
        self.ln_before, self.ln_after, self.mixer, self.expand = RMS(C), RMS(C), FF(), FF()
        self.regularise = nn.Dropout(p)

    def _second(self, hidden):
        hidden = self.expand(hidden)
        return self.regularise(hidden)

    def forward(self, hidden, mask=None, **unused):
        shortcut = hidden
        hidden = self.ln_before(hidden)
        hidden = self.mixer(hidden)
        hidden = self.regularise(hidden)
        hidden = hidden + shortcut
        if mask is not None:
            hidden = hidden * mask
        shortcut = hidden
        hidden = self.ln_after(hidden)
        return shortcut + self._second(hidden)


class PostNorm(nn.Module):
    def __init__(self, p=0.2):
        super().__init__()
        self.first, self.second, self.ln_a, self.ln_b = FF(), FF(), nn.LayerNorm(C), RMS(C)
        self.p = p

    def forward(self, x):
        h = self.ln_a(x + F.dropout(self.first(x), self.p, self.training))
        out = F.dropout(self.second(h), p=self.p, training=self.training)
        return self.ln_b(torch.add(out, h))


class Parallel(nn.Module):
    """Attention and MLP side by side from one norm, on a float32 residual stream; the branches may be of another dtype."""

    def __init__(self, p=0.2, branch=None):
        super().__init__()
        self.pre, self.left, self.right, self.final = nn.LayerNorm(C), FF(), FF(), nn.LayerNorm(C)
        self.hide, self.branch = nn.Dropout(p), branch

    def forward(self, stream):
        y = self.pre(stream)
        left, right = self.left(y), self.right(y)
        if self.branch is not None:
            left, right = left.to(self.branch), right.to(self.branch)
        stream = stream + self.hide(left) + self.hide(right)
        return self.final(stream), stream


BLOCKS = {  # block: (how to make it, ops that run in training, kinds reported)
    "pre-norm": (PreNorm, 3, "fused: dropout + add, dropout + add + norm"),
    "wordy": (Wordy, 3, "fused: dropout + add, dropout + add + norm"),
    "post-norm": (PostNorm, 2, "fused: 2 x dropout + add + norm"),
    "parallel": (Parallel, 3, "fused: dropout + add, dropout + add + norm"),
    "torch, post": (lambda p=0.2: nn.TransformerEncoderLayer(C, 4, C, p, batch_first=True), 3, "dropout + add + norm"),
    "torch, pre": (lambda p=0.2: nn.TransformerEncoderLayer(C, 4, C, p, norm_first=True), 4, "dropout + add + norm"),
}


def call(module, x):
    out = module(x)
    return out[0] + out[1] if isinstance(out, tuple) else out


class Ops(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", BLOCKS)
def test_training_runs_one_op_a_chain(name):
    make, expected, label = BLOCKS[name]
    block = make()
    report = fastlm.swap(block)
    row = next(row for row in report.rows if row.module == "")
    assert label in row.now
    assert not [row for row in report.left if row[1] != "MultiheadAttention"]
    with Ops() as ops:
        call(block, torch.randn(B, L, C))
    assert ops.seen["fastlm::dropout_add_norm_forward"] == expected, ops.seen
    assert not {"aten::native_layer_norm", "aten::native_dropout"} & set(ops.seen)
    bernoulli = [n for n in ops.seen if "bernoulli" in n]
    assert not bernoulli or "torch" in name  # nn.MultiheadAttention's own, inside the attention


@pytest.mark.grid(fast=6)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("mode", ["eval", "train, p 0"])
def test_as_exact_as_the_original(name, mode):
    make = BLOCKS[name][0]

    def ready():
        return make(p=0.0).train(mode != "eval")

    compare(ready, (B, L, C), call=call)


def test_a_branch_in_bfloat16_joins_a_float32_stream():
    block = Parallel(p=0.0, branch=torch.bfloat16)
    original = copy.deepcopy(block)
    fastlm.swap(block)
    x = torch.randn(B, L, C)
    for ours, theirs in zip(block(x), original(x)):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 0.02  # a last bit of bfloat16 may turn
    y, stream = Parallel(branch=torch.bfloat16)(x)
    assert y.dtype == stream.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y, stream = block.train()(x)
    assert (y.dtype, stream.dtype) == (torch.float32, torch.float32)  # as the original's


def test_the_source_says_what_is_fused():
    block = PreNorm()
    fastlm.swap(block)
    text = inspect.getsource(type(block).forward)
    assert "self._fastlm_both(0, self.norm2, self.drop1, residual=x, x=self.attn(self.norm1(x)))" in text
    assert "self._fastlm_add(1, self.drop2, residual=x" in text


@pytest.mark.parametrize("name", ["pre-norm", "wordy", "parallel"])
def test_hooks_on_parts_run_and_give_the_same_result(name):
    torch.manual_seed(0)
    block = BLOCKS[name][0]()
    fastlm.swap(block)
    x = torch.randn(B, L, C)

    def run():
        fastlm.rng.set(block, 1, 2, list(range(B)))
        return call(block, x)

    fused, seen = run(), []
    norm = [m for m in block.children() if isinstance(m, nn.LayerNorm | RMS)][-1]
    handle = norm.register_forward_hook(lambda *_: seen.append("norm"))
    torch.testing.assert_close(run(), fused)
    assert seen == ["norm"]
    handle.remove()
    assert torch.equal(run(), fused)
    dropout = next(m for m in block.children() if isinstance(m, nn.Dropout))
    dropout.register_forward_hook(lambda *_: seen.append("dropout"))
    run()
    assert "dropout" in seen


def test_p_and_training_are_read_at_each_call():
    block = PostNorm(p=0.5)
    fastlm.swap(block)
    x = torch.randn(B, L, C)
    assert not torch.equal(block(x), block(x))
    block.p = 0.0
    assert torch.equal(block(x), block(x))
    block.p = 0.5
    block.eval()
    assert torch.equal(block(x), block(x))
    pre = PreNorm()
    fastlm.swap(pre)
    pre.drop1.p = pre.drop2.p = 1.0
    assert torch.equal(pre(x), x)
    pre.drop1.p, pre.drop2 = 0.0, nn.Identity()
    assert torch.equal(pre(x), pre(x))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", BLOCKS)
def test_copies_and_unswap(name, clone):
    block = BLOCKS[name][0]()
    classes = [type(m) for m in block.modules()]
    keys = list(block.state_dict())
    fastlm.swap(block)
    fastlm.rng.set(block, 1, 2, list(range(B)))
    other = clone(block)
    x = torch.randn(B, L, C)
    if "torch" not in name:
        assert torch.equal(call(block, x), call(other, x))
    assert list(other.state_dict()) == keys
    swapped = [type(m) for m in block.modules()]
    fastlm.swap(block)
    assert [type(m) for m in block.modules()] == swapped
    fastlm.unswap(other)
    assert [type(m) for m in other.modules()] == classes


def test_masks_do_not_depend_on_how_the_batch_is_cut():
    stack = nn.Sequential(PreNorm(), Wordy(), PostNorm())
    fastlm.swap(stack)
    x = torch.randn(B, L, C)

    def run(ids):
        fastlm.rng.set(stack, 5, 6, ids)
        return stack(x[ids])

    whole = run(list(range(B)))
    for piece in ([0, 1], [2, 3], [3], [1, 3, 0]):
        torch.testing.assert_close(run(piece), whole[piece])


@pytest.mark.parametrize("make", [PreNorm, Wordy, PostNorm])
def test_checkpointing_recomputes_the_same_masks(make):
    torch.manual_seed(0)
    block = make()
    fastlm.swap(block)
    x = torch.randn(B, L, C, requires_grad=True)
    grads = []
    for recompute in (False, True):
        context = fastlm.rng.checkpoint_context(block)
        fastlm.rng.set(block, 5, 6, list(range(B)))
        y = checkpoint(block, x, use_reentrant=False, context_fn=context) if recompute else block(x)
        block.zero_grad()
        grads.append(torch.autograd.grad(y.square().sum(), [x, *block.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_compiles_whole_once_for_a_stack_of_layers():
    stack = nn.Sequential(*(PreNorm() for _ in range(3)))
    fastlm.swap(stack)
    x = torch.randn(B, L, C)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    for step in range(3):
        results = []
        for module in (stack, compiled):
            fastlm.rng.set(stack, 5, step, list(range(step, step + B)))
            out = module(x)
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad for p in stack.parameters())])
            stack.zero_grad()
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_layers_compiled_one_by_one_share_a_graph():
    stack = nn.Sequential(*(PreNorm() for _ in range(4)))
    fastlm.swap(stack)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in stack:
        layer.compile(fullgraph=True, backend="aot_eager")
    for step in range(2):
        fastlm.rng.set(stack, 5, step, list(range(B)))
        stack(torch.randn(B, L, C))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def opaque(function):
    """A decorator that keeps what it wraps where no one can put another in its place."""
    held = [function]
    return functools.wraps(function)(lambda *args, **kwargs: held[0](*args, **kwargs))


class Keyed(PreNorm):
    @opaque
    def forward(self, x):
        x = x + self.drop1(self.attn(self.norm1(x)))
        return self.norm2(x)


class Decorated(PreNorm):
    @torch.no_grad()
    def forward(self, x):
        x = x + self.drop1(self.attn(self.norm1(x)))
        return self.norm2(x)


def test_a_decorator_goes_around_the_edited_forward():
    block = Decorated(p=0.0)
    original = copy.deepcopy(block)
    report = fastlm.swap(block)
    assert "fused: dropout + add + norm" in {row.now for row in report.rows}
    x = torch.randn(B, L, C)
    torch.testing.assert_close(block(x), original(x))
    assert not block(x).requires_grad
    assert Decorated.forward.__wrapped__ is not type(block).forward.__wrapped__


class Reader(PreNorm):
    """The sum is read by a dropout's other user, changed in place, or normed on one branch alone: nothing to fuse."""

    def forward(self, x):
        f = self.drop1(self.attn(x))
        x = x + f
        x.mul_(2.0)
        y = self.norm1(x)
        x = y + self.mlp(y) * f
        if x.shape[0] > 1:
            x = self.norm2(x)
        return x


def test_what_cannot_be_fused_keeps_its_parts_and_says_why():
    block = Keyed()
    report = fastlm.swap(block)
    assert type(block) is Keyed
    assert ("", "Keyed", "its chains stay apart: its forward is decorated") in report.left
    assert {row.module for row in report.rows} == {"norm1", "norm2", "drop1", "drop2"}


def test_values_with_other_readers_are_not_fused():
    block = Reader(p=0.0)
    original = copy.deepcopy(block)
    fastlm.swap(block)
    x = torch.randn(B, L, C)
    torch.testing.assert_close(block(x), original(x))
    assert type(block) is Reader


def test_functional_dropout_alone_is_swapped_too():
    class Embedding(nn.Module):
        def forward(self, x):
            return F.dropout(x * 2, 0.5, training=self.training) if x.dim() > 2 else nn.functional.dropout(x, 0.25)

    module = Embedding()
    fastlm.swap(module)
    assert fastlm.rng.set(module, 0, 0, list(range(B))) == 2
    with Ops() as ops:
        y = module(torch.ones(B, L, C))
    assert ops.seen["fastlm::dropout_add_norm_forward"] == 1
    assert set(y.unique().tolist()) == {0.0, 4.0}


@pytest.mark.parametrize("library", ["gpt2", "llama"])
def test_models_of_transformers(library):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    if library == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, **sizes)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **sizes
        )
        model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(0, 50, (2, 9))
    before = model.eval()(tokens).logits
    report = fastlm.swap(model)
    assert "fused: add + norm" in {row.now for row in report.rows}
    torch.testing.assert_close(model(tokens).logits, before)
    fastlm.unswap(model)
    assert torch.equal(model(tokens).logits, before)
