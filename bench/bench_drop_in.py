"""The training step of models that people have: unswapped, compiled, swapped, swapped and compiled, and backend "fastlm".

Six layers, 384 wide, context 256. One step is forward, backward and fused AdamW on the same batch, in PyTorch's defaults; no
``rng.set``, as whoever drops fastlm in would run it. nanoGPT and nanochat stand for models that are a file of their own: their
structure is written anew here. Liger stands beside where it serves, which is on a GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import fastlm
import torch
import torch.nn.functional as F
from fastlm.bench import peers
from fastlm.bench.harness import Case, Contender, Goal, Missing, Prepared, pytest_cases
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """What all families share."""

    layers: int = 6
    width: int = 384
    heads: int = 6
    context: int = 256
    vocab: int = 4096
    dropout: float = 0.1


FULL, SMALL = Size(), Size(layers=2, width=64, heads=2, context=32, vocab=128)
BATCH = 8


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise Missing("transformers is not installed (pip install transformers)") from error
    return transformers


def gpt2(s: Size) -> nn.Module:
    """GPT-2 (Radford et al. 2019): LayerNorm, learnt positions, dropout everywhere."""
    t, p = _transformers(), s.dropout
    return t.GPT2LMHeadModel(  # type: ignore[no-any-return]
        t.GPT2Config(vocab_size=s.vocab, n_positions=s.context, n_embd=s.width, n_layer=s.layers, n_head=s.heads,
                     resid_pdrop=p, embd_pdrop=p, attn_pdrop=p, use_cache=False)
    )  # fmt: skip


def llama(s: Size) -> nn.Module:
    """Llama (Touvron et al. 2023): RMSNorm, rotary, SwiGLU, grouped keys, no dropout."""
    t = _transformers()
    return t.LlamaForCausalLM(  # type: ignore[no-any-return]
        t.LlamaConfig(vocab_size=s.vocab, hidden_size=s.width, intermediate_size=4 * s.width, num_hidden_layers=s.layers,
                      num_attention_heads=s.heads, num_key_value_heads=s.heads // 2, use_cache=False,
                      max_position_embeddings=s.context)
    )  # fmt: skip


def bert(s: Size) -> nn.Module:
    """BERT (Devlin et al. 2018): norm behind the sum, both directions."""
    t, p = _transformers(), s.dropout
    return t.BertForMaskedLM(  # type: ignore[no-any-return]
        t.BertConfig(vocab_size=s.vocab, hidden_size=s.width, intermediate_size=4 * s.width, num_hidden_layers=s.layers,
                     num_attention_heads=s.heads, hidden_dropout_prob=p, attention_probs_dropout_prob=p,
                     max_position_embeddings=s.context)
    )  # fmt: skip


def t5(s: Size) -> nn.Module:
    """T5 (Raffel et al. 2019): encoder and decoder, learnt biases of relative positions."""
    t = _transformers()
    return t.T5ForConditionalGeneration(  # type: ignore[no-any-return]
        t.T5Config(vocab_size=s.vocab, d_model=s.width, d_kv=s.width // s.heads, d_ff=4 * s.width, use_cache=False,
                   num_layers=s.layers // 2, num_heads=s.heads, dropout_rate=s.dropout, decoder_start_token_id=0)
    )  # fmt: skip


def mixtral(s: Size) -> nn.Module:
    """Mixtral (Jiang et al. 2024): Llama with four experts, two for each token."""
    t = _transformers()
    return t.MixtralForCausalLM(  # type: ignore[no-any-return]
        t.MixtralConfig(vocab_size=s.vocab, hidden_size=s.width, intermediate_size=s.width, num_hidden_layers=s.layers,
                        num_attention_heads=s.heads, num_key_value_heads=s.heads // 2, num_local_experts=4,
                        use_cache=False, sliding_window=None, max_position_embeddings=s.context)
    )  # fmt: skip


class _Loss(nn.Module):
    """``forward(input_ids, labels)`` gives the loss, as transformers' models do."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


class _Biasless(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class _NanoBlock(nn.Module):
    def __init__(self, s: Size) -> None:
        super().__init__()
        self.heads, self.p = s.heads, s.dropout
        self.norm_in, self.norm_mid = _Biasless(s.width), _Biasless(s.width)
        self.qkv, self.out = nn.Linear(s.width, 3 * s.width, bias=False), nn.Linear(s.width, s.width, bias=False)
        self.up, self.down = nn.Linear(s.width, 4 * s.width, bias=False), nn.Linear(4 * s.width, s.width, bias=False)
        self.drop_attention, self.drop_mlp = nn.Dropout(s.dropout), nn.Dropout(s.dropout)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0, is_causal=True)
        return self.drop_attention(self.out(y.transpose(1, 2).flatten(-2)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm_in(x))
        return x + self.drop_mlp(self.down(F.gelu(self.up(self.norm_mid(x)))))


class NanoGPT(_Loss):
    """nanoGPT's structure: norms without biases, SDPA, dropout, tied embeddings."""

    def __init__(self, s: Size) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(s.vocab, s.width), nn.Embedding(s.context, s.width)
        self.drop, self.norm = nn.Dropout(s.dropout), _Biasless(s.width)
        self.blocks = nn.ModuleList(_NanoBlock(s) for _ in range(s.layers))
        self.head = nn.Linear(s.width, s.vocab, bias=False)
        self.tokens.weight = self.head.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.drop(self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device)))
        for block in self.blocks:
            x = block(x)
        return self.loss(self.head(self.norm(x)), labels)


def rms(x: Tensor) -> Tensor:
    """A norm without parameters, called as a function, as nanochat and modded-nanogpt have it."""
    return F.rms_norm(x, (x.shape[-1],))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)


class _ChatBlock(nn.Module):
    def __init__(self, s: Size) -> None:
        super().__init__()
        self.heads, self.size = s.heads, s.width // s.heads
        self.q, self.out = nn.Linear(s.width, s.width, bias=False), nn.Linear(s.width, s.width, bias=False)
        self.k, self.v = (nn.Linear(s.width, s.width // 2, bias=False) for _ in range(2))
        self.up, self.down = nn.Linear(s.width, 4 * s.width, bias=False), nn.Linear(4 * s.width, s.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = rms(x)
        q, k, v = (f(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = rms(turn(q, cos, sin)), rms(turn(k, cos, sin))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.down(F.relu(self.up(rms(x))).square())


class NanoChat(_Loss):
    """nanochat's structure: functional norms, norms of q and k, rotary, squared ReLU, grouped keys, capped logits."""

    def __init__(self, s: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(s.vocab, s.width)
        self.blocks = nn.ModuleList(_ChatBlock(s) for _ in range(s.layers))
        self.head = nn.Linear(s.width, s.vocab, bias=False)
        half = s.width // s.heads // 2
        angles = torch.arange(s.context)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x, n = rms(self.tokens(input_ids)), input_ids.shape[1]
        cos, sin = self.get_buffer("cos")[:n], self.get_buffer("sin")[:n]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.loss(15 * torch.tanh(self.head(rms(x)) / 15), labels)


FAMILIES: dict[str, Callable[[Size], nn.Module]] = {
    "GPT-2": gpt2, "Llama": llama, "BERT": bert, "T5": t5, "Mixtral": mixtral, "nanoGPT": NanoGPT, "nanochat": NanoChat,
}  # fmt: skip
_DROPS = ("GPT-2", "BERT", "T5", "nanoGPT")
WAYS = {"swapped": (True, ""), "eager": (False, ""), "compiled": (False, "inductor"),
        "swapped compiled": (True, "inductor"), "backend fastlm": (False, "fastlm")}  # fmt: skip
_LIGER = {"Llama": "apply_liger_kernel_to_llama", "Mixtral": "apply_liger_kernel_to_mixtral"}


def _step(family: str, size: Size, device: str, dtype: str, swapped: bool, compiler: str, liger: bool, tokens: Tensor
          ) -> Prepared:  # fmt: skip
    torch.manual_seed(0)
    if liger:
        _patch_with_liger(family, device)
    model = FAMILIES[family](size).to(device).train()
    if swapped:
        fastlm.swap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model, backend=compiler) if compiler else model

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            out = forward(input_ids=tokens, labels=tokens)
            loss: Tensor = out if isinstance(out, Tensor) else out.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _patch_with_liger(family: str, device: str) -> None:
    if family not in _LIGER:
        raise Missing(f"Liger has no patch that this suite uses for {family}")
    if torch.device(device).type == "cpu":
        raise Missing("Liger's kernels need a GPU")
    getattr(peers.load("liger-kernel", "liger_kernel.transformers"), _LIGER[family])()


def _wrong_by(
    prepare: Callable[..., Prepared], family: str, size: Size, compiled: bool, result: Any, tokens: Tensor
) -> float:
    """How far three steps' losses without dropout are from eager PyTorch's in float32, relative to them.

    A compiled model is compiled anew for it, with two layers in place of all.
    """
    if not torch.isfinite(result):
        return math.inf
    calm = replace(size, dropout=0.0, layers=2 if compiled else size.layers)
    few = tokens[:2]
    ours, eager = prepare(calm, few), _step(family, calm, str(tokens.device), "float32", False, "", False, few)
    return max(abs(ours().item() / eager().item() - 1) for _ in range(3))


def _case(family: str, size: Size, batch: int, device: str, dtype: str, ways: tuple[str, ...], smoke: bool) -> Case:
    def inputs(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, size.vocab, (batch, size.context), generator=generator).to(device)

    def contender(name: str) -> Contender:
        liger = name == "liger"
        swapped, compiler = WAYS.get(name, (False, ""))

        def prepare(of: Size, tokens: Tensor) -> Prepared:
            return _step(family, of, device, dtype, swapped, compiler, liger, tokens)

        kind = (
            "peer"
            if liger
            else "ours"
            if name == "swapped"
            else "self"
            if swapped or compiler == "fastlm"
            else "baseline"
        )
        check = functools.partial(_wrong_by, prepare, family, size, bool(compiler))
        return Contender(name, functools.partial(prepare, size), kind, check=check)

    goal = Goal("eager", 1.25 if family == "GPT-2" else 1.0)
    dropout = f"dropout {size.dropout:g} " if family in _DROPS else ""
    name = f"{family} {size.layers}x{size.width} context {size.context} batch {batch} {dropout}{dtype}"
    return Case(
        "drop_in", name, inputs, tuple(contender(way) for way in ways), dtype=dtype, device=device,
        parameters={"tokens": batch * size.context}, setting="step", goals=() if smoke else (goal,), smoke=smoke,
        timed=not smoke, tolerance=1e-4 if dtype == "float32" else 2e-2, longer=5.0,
    )  # fmt: skip


def cases(device: str) -> Iterator[Case]:
    """Goals: GPT-2 with dropout 0.1 swapped in at most 0.8 of eager's time, every family in no more than eager's."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    for family in FAMILIES:
        yield _case(family, SMALL, 2, device, dtype, ("swapped", "eager"), smoke=True)
        yield _case(family, FULL, BATCH, device, dtype, (*WAYS, "liger"), smoke=False)


test_bench = pytest_cases(cases)
