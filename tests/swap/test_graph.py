"""The rewrites of torch.compile's graphs: each fires, does not where an intermediate result is read, and is right."""

from __future__ import annotations

import math

import fastlm
import pytest
import torch
import torch.nn.functional as F
from accuracy import Result, assert_as_exact_as_torch
from fastlm import ops
from fastlm.swap.compiled import rewrite_all
from torch import nn

C, D = 64, 16


def rms(z, w, b):
    return w * (z.float() * torch.rsqrt(z.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(z.dtype)


def rms_wide(z, w, b):
    wide = z.float()
    return (wide / torch.sqrt((wide * wide).mean(dim=[-1], keepdim=True) + 1e-6) * (1.0 + w.float())).type_as(z)


def rms_square(z, w, b):
    return z * (z.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def layer(z, w, b):
    return w * (z - z.mean(-1, keepdim=True)) / torch.sqrt(z.var(-1, keepdim=True, unbiased=False) + 1e-6) + b


def layer_centred(z, w, b):
    centred = z - z.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6) * w + b


NORMS = {
    "F.layer_norm": lambda z, w, b: F.layer_norm(z, (C,), w, b, 1e-6),
    "F.rms_norm": lambda z, w, b: F.rms_norm(z, (C,), w, 1e-6),
    "rms": rms,
    "rms, wide, weight + 1, sqrt": rms_wide,
    "rms, square, no weight": rms_square,
    "layer": layer,
    "layer, centred": layer_centred,
}


def rewritten(function, *args, dynamic=False):
    """(events, output) of ``function`` compiled with the rewrites and without inductor."""
    events = []

    def backend(gm, _):
        events.extend(rewrite_all(gm))
        return gm

    torch._dynamo.reset()
    return events, torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*args)


def fired(events):
    return [event.pattern for event in events if not event.why]


def why(events):
    return "; ".join(event.why for event in events if event.why)


def run(function, inputs, through, upstream=None):
    """Outputs and gradients of ``function``, called by ``through``."""
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    out = through(function, *leaves)
    outs = out if isinstance(out, tuple) else (out,)
    upstream = [torch.randn_like(o) for o in outs] if upstream is None else upstream
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(outs, wanted, [u.to(o.dtype) for u, o in zip(upstream, outs)], allow_unused=True)
    return [*outs, *(g for g in grads if g is not None)], upstream


def check(function, shapes, expected):
    """``function`` is rewritten as ``expected`` says, and as exact as PyTorch, gradients too."""

    events = []

    def backend(gm, _):
        events.extend(rewrite_all(gm))
        return gm

    torch._dynamo.reset()
    rewritten_once = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

    def compiled(_, *leaves):
        return rewritten_once(*leaves)

    def draw(generator):
        inputs = [torch.randn(s, generator=generator) for s in shapes]
        truth, upstream = run(function, [t.double() for t in inputs], lambda f, *a: f(*a))
        theirs, _ = run(function, inputs, lambda f, *a: f(*a), upstream)
        ours, _ = run(function, inputs, compiled, upstream)
        assert fired(events) == expected, events
        assert len(ours) == len(truth)
        for a, b in zip(ours, theirs):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
        return {
            str(i): Result(a.detach(), b.detach(), c.detach()) for i, (a, b, c) in enumerate(zip(ours, theirs, truth))
        }

    assert_as_exact_as_torch(draw)


SOME = ("F.layer_norm", "rms, wide, weight + 1, sqrt", "layer")


@pytest.mark.parametrize(
    ("name", "order"),
    [
        *(pytest.param(name, "residual first", marks=() if name in SOME else pytest.mark.slow) for name in NORMS),
        pytest.param("rms", "branch first", marks=pytest.mark.slow),
        pytest.param("layer", "branch first", marks=pytest.mark.slow),
    ],
)
def test_add_and_norm(name, order):
    def chain(x, r, w, b):
        z = r + x if order == "residual first" else torch.add(x, r)
        return NORMS[name](z.float() if z.dtype == torch.float32 else z, w, b), z

    kind = "layer" if "layer" in name else "rms"
    double = lambda x, r, w, b: chain(x, r, w, b)
    # Norms written with .float() are no truth in float64: the truth of those is checked by the others of their kind.
    if "float" in NORMS[name].__code__.co_names:
        double = lambda x, r, w, b: (
            NORMS["rms, square, no weight"](x + r, w, b) * (w if name == "rms" else 1 + w),
            x + r,
        )
        pick = lambda x, r, w, b: (double if x.dtype == torch.float64 else chain)(x, r, w, b)
    else:
        pick = chain
    check(pick, [(4, 32, C), (4, 32, C), (C,), (C,)], [f"add + {kind} norm"])


@pytest.mark.parametrize(
    ("name", "dtype", "dynamic"),
    [
        pytest.param(
            name,
            dtype,
            dynamic,
            marks=() if name in SOME[:2] else pytest.mark.slow,
        )
        for name in NORMS
        for dtype, dynamic in ((torch.float32, True), (torch.bfloat16, False))
    ],
)
def test_dropout_add_norm_is_the_op_with_its_seed(name, dtype, dynamic):
    generator = torch.Generator().manual_seed(1)
    x, r = (torch.randn(3, 7, C, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    w, b = (torch.randn(C, generator=generator).to(dtype).requires_grad_() for _ in range(2))

    def chain(x, r, w, b):
        z = F.dropout(x, 0.3).to(r.dtype) + r
        return NORMS[name](z, w, b), z

    torch.manual_seed(5)
    events, (y, z) = rewritten(chain, x, r, w, b, dynamic=dynamic)
    kind = "layer" if "layer" in name else "rms"
    assert fired(events) == [f"dropout + add + {kind} norm"], events
    torch.manual_seed(5)
    expected_y, expected_z = ops.dropout_add_norm(
        x, r, None if "no weight" in name else w, b if kind == "layer" else None, norm=kind, p=0.3, eps=1e-6,
        weight_offset=1.0 if "weight + 1" in name else 0.0,
    )  # fmt: skip
    assert torch.equal(y, expected_y.to(y.dtype))
    assert torch.equal(z, expected_z)
    ours = torch.autograd.grad(y.float().sum() + (z * z).float().sum(), (x, r))
    theirs = torch.autograd.grad(expected_y.float().sum() + (expected_z * expected_z).float().sum(), (x, r))
    for a, c in zip(ours, theirs):
        assert torch.equal(a, c)


def _leaks_norm(x, r, w, b):
    z = F.dropout(x, 0.1) + r
    spread = z.pow(2).mean(-1, keepdim=True)
    return z * torch.rsqrt(spread + 1e-6), spread


def _dropped_is_read(x, r, w, b):
    dropped = F.dropout(x, 0.1)
    return F.layer_norm(dropped + r, (C,), w, b), dropped


def _broadcasts(x, r, w, b):
    return F.layer_norm(x + r[:1], (C,), w, b)


def _unbiased(x, r, w, b):
    z = x + r
    return (z - z.mean(-1, keepdim=True)) / torch.sqrt(z.var(-1, keepdim=True) + 1e-6)


def _two_axes(x, r, w, b):
    return F.layer_norm(x + r, x.shape[-2:])


def _changed(x, r, w, b):
    z = x + r
    mean = z.pow(2).mean(-1, keepdim=True)
    kept = z.view(-1)
    z.mul_(2.0)
    return z * torch.rsqrt(mean + 1e-6), kept


@pytest.mark.parametrize(
    ("function", "allowed", "reason"),
    [
        (_leaks_norm, ["dropout + add"], "spread is read by output too"),
        (_dropped_is_read, ["add + layer norm", "dropout"], ""),
        (_broadcasts, [], "broadcasts"),
        (_unbiased, [], "columns - 1"),
        (_two_axes, [], "the last axis"),
        (_changed, [], "changed in place|another tensor|not a sum|read by"),
    ],
)
def test_chains_that_stay(function, allowed, reason):
    import re

    args = [torch.randn(2, 3, C), torch.randn(2, 3, C), torch.randn(C), torch.randn(C)]
    events, ours = rewritten(function, *args)
    assert fired(events) == allowed, events
    assert re.search(reason, why(events)), events
    if not allowed:
        theirs = function(*args)
        for a, b in zip((ours,) if torch.is_tensor(ours) else ours, (theirs,) if torch.is_tensor(theirs) else theirs):
            torch.testing.assert_close(a, b)


def test_a_residual_stream_changed_in_place_is_followed_where_nothing_reads_the_old_value():
    def stream(x, f, w, b):
        x = x * 1.0
        x += F.dropout(f, 0.5)
        return F.layer_norm(x, (C,), w, b)

    args = [torch.randn(2, 3, C), torch.randn(2, 3, C), torch.randn(C), torch.randn(C)]
    assert fired(rewritten(stream, *args)[0]) == ["dropout + add + layer norm"]

    def of_an_input(x, f, w, b):
        x += F.dropout(f, 0.5)
        return F.layer_norm(x, (C,), w, b)

    inputs = [t.clone() for t in args]
    events, _ = rewritten(of_an_input, *inputs)
    assert "dropout + add + layer norm" not in fired(events)
    assert not torch.equal(inputs[0], args[0])  # the caller's tensor changes, as it did


def test_a_dropout_that_is_off_is_none():
    def chain(x, r, w, b):
        return F.layer_norm(F.dropout(x, 0.5, training=False) + r, (C,), w, b)

    args = [torch.randn(2, 3, C), torch.randn(2, 3, C), torch.randn(C), torch.randn(C)]
    events, y = rewritten(chain, *args)
    assert fired(events) == ["add + layer norm"]
    torch.testing.assert_close(y, chain(*args))


def _off(x, f, w, b):
    with torch.no_grad():
        h = x + f
    return F.layer_norm(h, (C,), w, b)


def _off_in_place(x, f, w, b):
    h = x * 2.0
    with torch.no_grad():
        h += f
    return F.layer_norm(h, (C,), w, b)


def _inference(x, f, w, b):
    with torch.inference_mode():
        h = x + f
    return F.layer_norm(h.clone(), (C,), w, b)


def _on_again(x, f, w, b):
    h = x + f
    with torch.no_grad():
        y = F.layer_norm(h, (C,))
    return F.layer_norm(h * y, (C,), w, b)


@pytest.mark.parametrize("function", [_off, _off_in_place, _inference, _on_again])
def test_gradients_that_are_off_stay_off(function):
    shapes = [(2, 3, C), (2, 3, C), (C,), (C,)]
    results = []
    draws = [torch.randn(s) for s in shapes]
    for through in (lambda *a: function(*a), lambda *a: rewritten(function, *a)[1]):
        leaves = [t.clone().requires_grad_() for t in draws]
        y = through(*leaves)
        grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        results.append([y, *grads])
    for ours, theirs in zip(*results):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "module",
    [
        nn.LeakyReLU(0.1, True), nn.ELU(1.0, True), nn.CELU(1.0, True), nn.SELU(True), nn.Hardswish(True), nn.ReLU(True),
        nn.ReLU6(True), nn.SiLU(True), nn.Mish(True), nn.Hardsigmoid(True), nn.Hardtanh(-1.0, 1.0, True),
        nn.Threshold(0.1, 20.0, True), nn.RReLU(0.1, 0.1, True), nn.Dropout1d(1.0, True),
    ],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_modules_that_work_in_place_are_seen(module):
    def chain(x, r, w, b):
        z = x + r
        module(z)
        return F.layer_norm(z, (C,), w, b), z

    args = [torch.randn(2, 3, C), torch.randn(2, 3, C), torch.randn(C), torch.randn(C)]
    events, ours = rewritten(chain, *args)
    assert fired(events) == []
    assert "in place" in why(events)
    for a, b in zip(ours, chain(*args)):
        torch.testing.assert_close(a, b)


def test_inplace_is_found_by_position_and_name():
    from fastlm.swap.graph.nodes import changed

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for function in (F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.dropout):
        assert changed(graph.call_function(function, (x, 0.5, True, True))) == [x]
        assert changed(graph.call_function(function, (x, 0.5, True, False))) == []
        assert changed(graph.call_function(function, (), {"input": x, "inplace": True})) == [x]


def _clamped_cast(x, r, w, b):
    z = x + r
    c = z.float()
    c.clamp_(-0.5, 0.5)
    return (c * torch.rsqrt(c.pow(2).mean(-1, keepdim=True) + 1e-6)).to(z.dtype) * w


def _clamped_centre(x, r, w, b):
    z = x + r
    c = z.float()
    c.clamp_(-0.5, 0.5)
    return (c - c.mean(-1, keepdim=True)) / torch.sqrt(c.var(-1, keepdim=True, unbiased=False) + 1e-6)


def _clamped_weight(x, r, w, b):
    wide = w.float()
    wide.clamp_(-0.1, 0.1)
    z = x + r
    return z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6) * wide


@pytest.mark.parametrize("function", [_clamped_cast, _clamped_centre, _clamped_weight])
def test_casts_that_are_changed_in_place_stay(function):
    args = [torch.randn(s).bfloat16() for s in ((2, 3, C), (2, 3, C), (C,), (C,))]
    events, ours = rewritten(function, *args)
    assert fired(events) == []
    torch.testing.assert_close(ours, function(*args))


def test_one_dropout_added_to_itself_has_one_mask():
    x = torch.rand(64, C) + 1

    def doubled(x):
        d = F.dropout(x, 0.5)
        return d + d

    _, y = rewritten(doubled, x)
    assert set((y / x).round().unique().tolist()) == {0.0, 4.0}


def test_a_dropout_switched_off_by_torchs_own_name():
    x, r = torch.randn(2, C), torch.randn(2, C)
    events, y = rewritten(lambda x, r: torch.dropout(x, 0.5, train=False) + r, x, r)
    assert fired(events) == []
    assert torch.equal(y, x + r)
    assert fired(rewritten(lambda x, r: torch.dropout(x, 0.5, train=True) + r, x, r)[0]) == ["dropout + add"]


def test_a_cast_through_float64_is_kept():
    def wide(x, r):
        return F.layer_norm((x + r).double(), (C,))

    x, r = torch.randn(2, C), torch.randn(2, C)
    events, y = rewritten(wide, x, r)
    assert fired(events) == []
    assert y.dtype == torch.float64
    assert torch.equal(y, wide(x, r))


# Attention.


def plain(q, k, v, m):
    return (q @ k.transpose(-2, -1) / math.sqrt(D)).softmax(-1) @ v


def added(q, k, v, m):
    scores = torch.matmul(q, k.mT.contiguous().mT.transpose(2, 3)) * 0.3 + m[:, :1]
    return torch.matmul(
        F.softmax(scores, dim=-1, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32).to(q.dtype), v
    )


def filled(q, k, v, m):
    scores = (q @ k.transpose(-2, -1)).mul(0.25)
    return torch.softmax(scores.masked_fill(m > 1, float("-inf")), -1) @ v


def filled_finite(q, k, v, m):
    """A whole row hidden, too: even weights there, and no gradient to q and k."""
    hidden = m[:, :1] > 1
    hidden = hidden | (torch.arange(hidden.shape[2])[:, None] == 2)
    scores = (q @ k.transpose(-2, -1)) * 0.25 + m
    return torch.softmax(scores.masked_fill(hidden, torch.finfo(torch.float32).min), -1) @ v


def chosen(q, k, v, m):
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return torch.softmax(torch.where(causal, (q @ k.transpose(-2, -1)) * 0.25, -1e9), -1) @ v


def capped(q, k, v, m):
    scores = torch.tanh(q @ k.transpose(-2, -1) * 0.25 / 5.0) * 5.0
    return (scores + m).softmax(-1) @ v


def folded(q, k, v, m):
    """As BLOOM does it: heads in the batch, ALiBi by baddbmm, the mask with heads apart."""
    b, h, lq, d = q.shape
    q, k, v = (t.reshape(b * h, -1, d) for t in (q, k, v))
    scores = m.reshape(b * h, lq, -1)[:, :1].baddbmm(batch1=q, batch2=k.transpose(-1, -2), beta=1.0, alpha=0.25)
    probabilities = F.softmax(scores.view(b, h, lq, -1) + m[:, :1], dim=-1)
    return torch.bmm(probabilities.view(b * h, lq, -1), v)


def three_axes(q, k, v, m):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.25 + m.flatten(0, 1), dim=-1), v)


def narrow_values(q, k, v, m):
    return (q @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v[..., :8]


WRITTEN = {
    narrow_values: "attention (scale, softmax)",
    plain: "attention (scale, softmax)",
    added: "attention (scale, bias, softmax)",
    filled: "attention (scale, mask, softmax)",
    filled_finite: "attention (scale, bias, mask, softmax)",
    chosen: "attention (scale, mask, softmax)",
    capped: "attention (scale, softcap, bias, softmax)",
    folded: "attention (scale, bias, bias, softmax)",
    three_axes: "attention (scale, bias, softmax)",
}
SHAPES = [(2, 3, 9, D), (2, 3, 9, D), (2, 3, 9, D), (2, 3, 9, 9)]


@pytest.mark.parametrize("function", WRITTEN, ids=lambda f: f.__name__)
def test_attention_written_out(function):
    check(function, SHAPES, [WRITTEN[function]])


@pytest.mark.parametrize(
    "function", [filled_finite, *(pytest.param(f, marks=pytest.mark.slow) for f in (added, folded))]
)
def test_attention_under_dynamic_shapes(function):
    """One graph serves other lengths and batches, without a guard of ours."""
    graphs = []

    def backend(gm, _):
        graphs.append(fired(rewrite_all(gm)))
        return gm

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    for b, n in ((2, 9), (4, 12), (3, 17)):
        args = [torch.randn(b, 3, n, D), torch.randn(b, 3, n, D), torch.randn(b, 3, n, D), torch.randn(b, 3, n, n)]
        torch.testing.assert_close(compiled(*args), function(*args))
    assert graphs == [[WRITTEN[function]]]


def test_attention_with_dropout_is_the_op_with_its_seed():
    q, k, v = (torch.randn(2, 3, 9, D) for _ in range(3))

    def dropped(q, k, v):
        return F.dropout((q @ k.transpose(-2, -1) * 0.25).softmax(-1), 0.4) @ v

    torch.manual_seed(1)
    events, out = rewritten(dropped, q, k, v)
    assert fired(events) == ["attention (scale, softmax, dropout)"]
    torch.manual_seed(1)
    assert torch.equal(out, ops.attention(q, k, v, scale=0.25, dropout_p=0.4))


def _weights_out(q, k, v, m):
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    return weights @ v, weights


def _scores_out(q, k, v, m):
    scores = q @ k.transpose(-2, -1)
    return (scores * 0.25).softmax(-1) @ v, scores


def _scaled_late(q, k, v, m):
    return ((q @ k.transpose(-2, -1) + m) * 0.25).softmax(-1) @ v


def _clamped(q, k, v, m):
    return ((q @ k.transpose(-2, -1) + m).clamp(min=-5.0) * 1.0).softmax(-1) @ v


def _small_fill(q, k, v, m):
    return (q @ k.transpose(-2, -1)).masked_fill(m > 0, -10.0).softmax(-1) @ v


def _wide_values(q, k, v, m):
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v.repeat(1, 1, 1, 33)


def _adds_truth(q, k, v, m):
    return (q @ k.transpose(-2, -1) + (m > 0)).softmax(-1) @ v


def _adds_whole(q, k, v, m):
    return (q @ k.transpose(-2, -1) + m.long()).softmax(-1) @ v


def _capped_in_place(q, k, v, m):
    capped = torch.tanh(q @ k.transpose(-2, -1) / 5.0).to(torch.bfloat16)
    wide = capped.float()
    wide.clamp_(-0.1, 0.1)
    return (wide * 5.0).softmax(-1) @ v


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_weights_out, "read by output too"),
        (_scores_out, "read by output too"),
        (_scaled_late, "scaled after"),
        (_clamped, ""),
        (_small_fill, "below -1000"),
        (_wide_values, "head sizes up to 512"),
        (_adds_truth, "its bias is not floating"),
        (_adds_whole, "its bias is not floating"),
        (_capped_in_place, ""),
    ],
)
def test_attention_that_stays(function, reason):
    args = [torch.randn(s) for s in SHAPES]
    events, ours = rewritten(function, *args)
    assert not fired(events), events
    assert reason in why(events), events
    torch.testing.assert_close(ours, function(*args))


def test_a_router_is_no_attention():
    def router(x, w):
        return (x @ w).softmax(-1).topk(2)[0]

    assert rewritten(router, torch.randn(5, C), torch.randn(C, 8))[0] == []


def test_autocast_keeps_dtypes():
    w = torch.randn(C)

    def block(x, q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            z = x + F.linear(x, torch.eye(C))
            return F.layer_norm(z, (C,), w, w), (q @ k.transpose(-2, -1) * 0.25).softmax(-1) @ v

    args = [torch.randn(2, 3, C), *(torch.randn(2, 3, 9, D) for _ in range(3))]
    events, ours = rewritten(block, *args)
    assert fired(events) == ["attention (scale, softmax)", "add + layer norm"]
    for a, b in zip(ours, block(*args)):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


# In whole graphs.


class Block(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p, self.qkv, self.out = p, nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.drop, self.norm = nn.Dropout(p), nn.LayerNorm(C)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen.add_(1)
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, C // D, D).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = F.dropout((q @ k.transpose(-2, -1) / math.sqrt(D)).softmax(-1), self.p, self.training)
        y = (weights @ v).transpose(1, 2).reshape(b, n, C)
        return self.norm(x + self.drop(self.out(y)))


@pytest.mark.parametrize("training", [False, True])
def test_the_joint_graph_holds_the_ops_alone(training):
    """Forward and backward that AOTAutograd traces: our operators, and none of PyTorch's in their place."""
    from torch._dynamo.backends.common import aot_autograd

    names: list[str] = []

    def keep(gm, _):
        names.extend(str(n.target) for n in gm.graph.nodes if n.op == "call_function")
        return gm

    def backend(gm, inputs):
        rewrite_all(gm)
        return aot_autograd(fw_compiler=keep, bw_compiler=keep, inference_compiler=keep)(gm, inputs)

    torch._dynamo.reset()
    model = Block(0.1)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    if training:
        compiled(torch.randn(2, 5, C)).sum().backward()
    else:
        with torch.no_grad():
            compiled.eval()(torch.randn(2, 5, C))
    kinds = ["fastlm.dropout_add_norm", "fastlm.attention"]
    for kind in kinds:
        assert sum(name.startswith(kind) and "backward" not in name for name in names) == 1
        assert sum(name.startswith(f"{kind}_backward") for name in names) == int(training)
    assert not any("softmax" in name or "layer_norm" in name or "dropout.default" in name for name in names)


def test_explain_says_what_fired_and_what_nearly_did_and_changes_nothing():
    model = nn.Sequential(Block(0.1), Block(0.1), nn.LayerNorm(C))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    found = fastlm.explain(model, torch.randn(2, 5, C, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert model[0].seen == 0
    assert [e.pattern for e in found.fired].count("attention (scale, softmax, dropout)") == 2
    assert [e.pattern for e in found.fired].count("dropout + add + layer norm") == 2
    assert "not a sum" in found.missed[0].why
    text = str(found)
    for part in ("1 graph: 4 rewrites", "2 x dropout + add + layer norm", "nearly:"):
        assert part in text
    with pytest.raises(TypeError, match="inputs is a int"):
        fastlm.explain(model, 3)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_with_the_backend_by_name(dynamic):
    """Dropout off: outputs and gradients are PyTorch's; mode and options reach inductor."""
    torch._dynamo.reset()
    model = Block(0.0)
    x = torch.randn(3, 6, C, requires_grad=True)
    expected = model(x)
    grad = torch.autograd.grad(expected.square().sum(), x)[0]
    for how in ({"options": {"max_fusion_size": 8}}, {"mode": "default"}):
        out = torch.compile(model, backend="fastlm", dynamic=dynamic, **how)(x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], grad)


@pytest.mark.slow
def test_inductor_with_checkpointing_and_dropout():
    """A recomputed region draws what it drew: the gradients are those of one mask."""
    from torch.utils.checkpoint import checkpoint

    torch._dynamo.reset()
    w = torch.randn(C, C, requires_grad=True)
    x, r = torch.randn(4, 6, C, requires_grad=True), torch.randn(4, 6, C)

    def region(x, w):
        return F.dropout(x @ w, 0.5) + r

    out = torch.compile(lambda x, w: checkpoint(region, x, w, use_reentrant=False), backend="fastlm")(x, w)
    kept = (out - r).detach() / (x @ w).detach()  # 0, or the inverse of the keep-probability
    grad = torch.autograd.grad(out.sum(), x)[0]
    torch.testing.assert_close(grad, kept @ w.detach().T, rtol=1e-3, atol=1e-3)
