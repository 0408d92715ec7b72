"""attention on a GPU, by the Triton kernels: values, gradients, masks, determinism, strides, streams, graphs, decoding,
memory, large tensors, opcheck, compilation, autocast. What passes is the evidence that `fastlm bench --status` tells.

Compiling a kernel takes seconds, so that half of the features run only with --slow.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import fastlm
import pytest
import torch
from accuracy import Result, assert_as_exact_as_torch
from attention_cases import (
    BF16,
    F16,
    F32,
    FEATURES,
    FEW,
    LENGTHS,
    Case,
    arguments,
    compose,
    draw,
    draw_mixed,
    inputs,
    run,
    truth,
)
from fastlm import _native
from fastlm.ops.attention import _arguments
from fastlm.reference.attention import dropout_mask
from paths import python_path

pytestmark = pytest.mark.gpu("attention", "triton")
op = fastlm.ops.attention
DEVICE = "cuda"
TRAINING = Case(heads=4, kv_heads=2, queries=300, keys=300, head_size=64, dtype=BF16, causal=True, p=0.1)
GENERATION = Case(heads=8, kv_heads=2, queries=1, keys=3000, head_size=64, dtype=BF16, causal=True, valid=(3000, 700))
QUICK = (1, 3, 4, 6, 8, 10, 11, 14, 15, 16, 17, 18)


@pytest.fixture(autouse=True)
def _forced():
    with fastlm.backend.use("triton"):
        yield


def given(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    return inputs(case, torch.Generator().manual_seed(seed), DEVICE)


@pytest.mark.parametrize("number", [
    pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in range(len(FEATURES))
])  # fmt: skip
def test_as_exact_as_torch(number):
    case = replace(FEATURES[number], dtype=(F32, BF16, F16)[number % 3])
    assert_as_exact_as_torch(lambda generator: draw(case, generator, DEVICE))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("number", range(len(FEATURES)))
def test_as_exact_as_torch_in_every_dtype(number, dtype):
    case = replace(FEATURES[number], dtype=dtype)
    assert_as_exact_as_torch(lambda generator: draw(case, generator, DEVICE))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_lengths(lengths, dtype):
    case = replace(TRAINING, batch=2, heads=8, kv_heads=4, queries=lengths[0], keys=lengths[1], dtype=dtype)
    assert_as_exact_as_torch(lambda generator: draw(case, generator, DEVICE))


@pytest.mark.parametrize("size,dtype", [
    (16, BF16), (40, BF16), (72, F16), (128, BF16), (256, BF16), (128, F32), (256, F32), (13, BF16),
])  # fmt: skip
def test_head_sizes(size, dtype):
    case = replace(TRAINING, head_size=size, dtype=dtype)
    assert_as_exact_as_torch(lambda generator: draw(case, generator, DEVICE))


@pytest.mark.parametrize("axes", [
    pytest.param(a, marks=() if a in ("hqk", "qk", "bq", "bhk", "h") else pytest.mark.slow)
    for a in ("bhqk", "hqk", "bqk", "qk", "bhq", "hq", "bq", "q", "bhk", "hk", "bk", "k", "bh", "h", "b", "")
])  # fmt: skip
def test_gradient_of_a_bias_of_every_shape(axes):
    case = replace(TRAINING, queries=150, keys=200, bias=axes)
    assert_as_exact_as_torch(lambda generator: draw(case, generator, DEVICE))


@pytest.mark.parametrize("case", [GENERATION, replace(GENERATION, dtype=F32), *FEW[:3]], ids=str)
def test_decoding_in_pieces(case):
    def decoded(generator: torch.Generator) -> dict[str, Result]:
        tensors = inputs(case, generator, DEVICE)
        with torch.no_grad():
            ours = op(tensors["q"], tensors["k"], tensors["v"], **arguments(case, tensors), return_lse=True)
        real, measure = truth(case, tensors), compose(case, tensors, F32)
        return {n: Result(value, measure[n], real[n]) for n, value in zip(("out", "lse"), ours, strict=True)}

    assert_as_exact_as_torch(decoded)


def kept(device: str, p: float, keys: int, k0: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Which probabilities out and dv show to be kept, two sequences of two heads with 60 queries."""
    seed = torch.tensor(-1234567890123456789, device=device)
    ids = torch.tensor([5, 2**31 + 7], device=device)
    q, zero = (torch.zeros(2, 2, n, 64, device=device, dtype=dtype) for n in (60, keys))
    seen = []
    for first in range(0, keys, 64):
        v = torch.zeros_like(zero)
        v[:, :, first : first + 64] = torch.eye(64, device=device, dtype=dtype)[: min(64, keys - first)]
        v.requires_grad_()
        out = op(q, zero, v, dropout_p=p, seed=seed, offset=(ids, 4, 120, k0))
        seen.append(out[..., : keys - first] != 0)
    (dv,) = torch.autograd.grad(out, v, torch.eye(60, 64, device=device, dtype=dtype).expand_as(out))
    return torch.cat(seen, -1).cpu(), (dv[..., :60].mT != 0).cpu()


@pytest.mark.parametrize("p", [2**-16, 0.1, 0.5, 1 - 2**-17])
@pytest.mark.parametrize("keys,k0", [(1, 0), (60, 3), (300, 100), (1030, 0)])
def test_mask_is_that_of_the_reference_and_of_the_cpu_forward_and_backward(p, keys, k0):
    dtype = BF16 if p < 0.6 else F32
    ids = torch.tensor([5, 2**31 + 7])
    mask = dropout_mask((2, 6, 180, k0 + keys), torch.tensor(-1234567890123456789), p, ids)[:, 4:6, 120:, k0:]
    for got in kept(DEVICE, p, keys, k0, dtype):
        assert torch.equal(got, mask)
    if not _native.missing():
        with fastlm.backend.use("cpu"):
            for got in kept("cpu", p, keys, k0, dtype):
                assert torch.equal(got, mask)


def digest(case: Case) -> str:
    results = run(case, given(case))
    whole = hashlib.sha256()
    for value in results.values():
        whole.update(value.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return whole.hexdigest()


DETERMINED = [
    TRAINING, replace(TRAINING, bias="hk", dtype=F32), replace(TRAINING, bias="qk"), GENERATION,
    replace(TRAINING, lengths=((170, 200), (0, 3), (129, 129))),
]  # fmt: skip


def test_same_bits_every_time_and_in_every_process():
    first = [digest(case) for case in DETERMINED]
    for _ in range(3):
        assert [digest(case) for case in DETERMINED] == first
    code = "import fastlm, test_gpu_attention as t\nwith fastlm.backend.use('triton'):\n"
    code += "    print(*(t.digest(c) for c in t.DETERMINED))"
    env = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == first


def test_a_transposed_view_changes_no_bit():
    case = replace(TRAINING, bias="hqk", layout="bhld")
    tensors = given(case)
    view = lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)
    got = run(case, {k: view(v) if v.dim() == 4 else v for k, v in tensors.items()})
    assert all(torch.equal(got[key], value) for key, value in run(case, tensors).items())


VIEWS = {
    "length last": lambda t: t.mT.contiguous().mT,
    "every second element": lambda t: torch.stack([t, t], -1)[..., 0],
    "unaligned": lambda t: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[1:].view(t.shape),
}


@pytest.mark.parametrize("name", VIEWS)
def test_odd_strides_are_as_exact(name):
    """Elements loaded one by one lie in other threads, which may add a row up in another order."""
    case = replace(TRAINING, layout="bhld")

    def viewed(generator: torch.Generator) -> dict[str, Result]:
        tensors = inputs(case, generator, DEVICE)
        ours = run(case, {k: VIEWS[name](v) if v.dim() == 4 else v for k, v in tensors.items()})
        measure, real = compose(case, tensors, F32), truth(case, tensors)
        return {n: Result(ours[n], measure[n], real[n]) for n in real}

    assert_as_exact_as_torch(viewed)


def test_pieces_by_batch_and_heads_are_the_bits_of_the_whole():
    case = replace(TRAINING, batch=3, bias="bhqk")
    tensors = given(case)
    whole = run(case, tensors)
    for batches, heads in ((slice(0, 1), slice(0, 2)), (slice(1, 3), slice(2, 4))):
        keys = slice(heads.start // 2, heads.stop // 2)
        pick = lambda name, b=batches, h=heads, k=keys: (b, k if name in ("k", "v", "dk", "dv") else h)
        cut = {name: t if name == "seed" else t[pick(name)] for name, t in tensors.items()}
        ids = torch.arange(3, device=DEVICE)[batches]
        for name, value in run(case, cut, offset=(ids, heads.start, None, None)).items():
            assert torch.equal(value, whole[name][pick(name)]), name


def test_rows_that_attend_to_nothing_are_zero_and_have_no_gradient():
    for keys in (64, 192, 320):
        q, k, v = (torch.randn(2, 2, keys, 64, dtype=BF16, device=DEVICE, requires_grad=True) for _ in range(3))
        mask = torch.ones(1, 1, keys, keys, dtype=torch.bool, device=DEVICE)
        mask[..., :3, :] = False
        mask[..., :, 10:40] = False
        added = torch.zeros_like(mask, dtype=BF16).masked_fill(~mask, float("-inf")).requires_grad_()
        for bias, leaves in ((mask, (q, k, v)), (added, (q, k, v, added))):
            out, lse = op(q, k, v, bias=bias, return_lse=True)
            grads = torch.autograd.grad(out.float().square().sum() + lse[..., 3:].sum(), leaves)
            assert all(g.isfinite().all() for g in grads)
            assert not out[:, :, :3].any()
            assert not grads[0][:, :, :3].any()
            assert not grads[1][:, :, 10:40].any()
            assert (lse[:, :, :3] == float("-inf")).all()


def test_what_lies_behind_the_valid_part_of_a_cache_never_leaks():
    q = torch.randn(3, 4, 2, 64, device=DEVICE, dtype=BF16)
    cache = torch.randn(2, 3, 2, 700, 64, device=DEVICE, dtype=BF16)
    seqlens = torch.tensor([700, 130, 0], dtype=torch.int32, device=DEVICE)
    clean = op(q, *cache, seqlens_k=seqlens, causal=True)
    for b, n in enumerate((700, 130, 0)):
        cache[:, b, :, n:] = float("nan")
    k, v = cache[0].requires_grad_(), cache[1].requires_grad_()
    out = op(q, k, v, seqlens_k=seqlens, causal=True)
    assert torch.equal(out, clean)
    for grad in torch.autograd.grad(out.float().sum(), (k, v)):
        assert grad.isfinite().all()
        assert not grad[1, :, 130:].any()


def test_forward_and_backward_may_run_on_different_backends():
    assert_as_exact_as_torch(lambda generator: draw_mixed(TRAINING, generator, ("reference", "triton"), DEVICE))


def test_other_streams():
    tensors = given(TRAINING)
    expected = run(TRAINING, tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(10):
            got = run(TRAINING, tensors)
    stream.synchronize()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_nothing_waits_for_the_device():
    cases = [replace(TRAINING, bias="hk"), replace(TRAINING, lengths=((170, 200), (0, 3), (129, 129))), GENERATION]
    calls = [(case, given(case)) for case in cases]
    for case, tensors in calls:
        run(case, tensors)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for case, tensors in calls:
            run(case, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_current_device_stays_on_any_of_the_gpus():
    for number in range(torch.cuda.device_count()):
        q = torch.randn(1, 2, 64, 64, device=f"cuda:{number}", dtype=BF16)
        expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        torch.testing.assert_close(op(q, q, q), expected, rtol=2e-2, atol=2e-2)
        assert torch.cuda.current_device() == 0


def captured(step):
    """(graph, what ``step`` returned while it was captured), after a warm-up on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def test_graph_replays_a_training_step_with_new_values_and_seeds():
    tensors = given(TRAINING)
    t = {name: tensors[name].clone().requires_grad_() for name in "qkv"}
    seed = torch.tensor(1, device=DEVICE)

    def step():
        out = op(t["q"], t["k"], t["v"], causal=True, dropout_p=0.3, seed=seed)
        return out, *torch.autograd.grad(out, tuple(t.values()), tensors["dout"])

    graph, results = captured(step)
    for value in (1, 2, -5):
        seed.fill_(value)
        t["q"].detach().normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


@torch.no_grad()
def test_one_captured_graph_decodes_many_tokens():
    tokens, room = 70, 600
    q, k, v = (torch.randn(2, heads, room, 64, device=DEVICE, dtype=BF16) for heads in (8, 2, 2))
    cache = torch.zeros(2, 2, 2, room, 64, device=DEVICE, dtype=BF16)
    seqlens = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    place = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    now = [t[:, :, :1].clone() for t in (q, k, v)]

    def step():
        cache[0].index_copy_(2, place, now[1])
        cache[1].index_copy_(2, place, now[2])
        seqlens.copy_((place + 1).expand(2))
        return op(now[0], *cache, seqlens_k=seqlens, causal=True)

    graph, out = captured(step)
    start = 300  # the prompt
    cache.zero_()
    cache[0, :, :, :start], cache[1, :, :, :start] = k[:, :, :start], v[:, :, :start]
    outs = []
    for i in range(start, start + tokens):
        place.fill_(i)
        for own, t in zip(now, (q, k, v), strict=True):
            own.copy_(t[:, :, i : i + 1])
        graph.replay()
        outs.append(out.clone())
    end = start + tokens
    whole = op(q[:, :, :end], k[:, :, :end], v[:, :, :end], causal=True)[:, :, start:]
    torch.testing.assert_close(torch.cat(outs, 2), whole, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bias", ["1x8192", "8192x1", "1x1"])
def test_memory_is_linear_in_the_length(bias):
    shape = [int(n) for n in bias.split("x")]

    def peak(length: int) -> int:
        q, k, v = (torch.randn(2, 2, length, 64, device=DEVICE, dtype=BF16, requires_grad=True) for _ in range(3))
        added = torch.randn(1, 1, *(min(n, length) for n in shape), device=DEVICE, dtype=BF16, requires_grad=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        op(q, k, v, bias=added, causal=True, dropout_p=0.1, seed=1).float().sum().backward()
        return torch.cuda.max_memory_allocated() - before

    peak(300)
    # One tensor has 4 MiB; scores, a mask or an expanded bias at one byte each would have 256 MiB.
    assert peak(8192) < 48 * 2**20


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    length, tail = 2**23 + 256, 512
    drawn = [torch.randn(1, 2, 1024, 128, device=DEVICE, dtype=BF16) for _ in range(4)]
    q, k, v, dout = (t.repeat(1, 1, length // 1024 + 1, 1)[:, :, :length] for t in drawn)
    assert q.numel() > 2**31
    options = dict(causal="upper_left", window=(100, -1), dropout_p=0.1, seed=3)

    def call(parts: list[torch.Tensor], dout: torch.Tensor, start: int) -> list[torch.Tensor]:
        parts = [t.detach().requires_grad_() for t in parts]
        out = op(*parts, offset=(None, 0, start, start), **options)
        return [out.detach(), *torch.autograd.grad(out, parts, dout)]

    whole = [t[:, :, -256:].clone() for t in call([q, k, v], dout, 0)]
    part = call([t[:, :, -tail:] for t in (q, k, v)], dout[:, :, -tail:], length - tail)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a, b[:, :, -256:])


OPCHECKED = [
    Case(p=0.2, causal=True, kv_heads=2), Case(bias="hk"), Case(mask="qk", softcap=2.0), Case(valid=(3, 20)),
    Case(lengths=((3, 9), (0, 1))),
]  # fmt: skip


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck_passes(case):
    case = replace(case, queries=9, keys=24, head_size=16)
    t = given(case)
    x = {n: t[n].requires_grad_() for n in ("q", "k", "v", "bias") if n in t}
    _, args = _arguments(x["q"], x["k"], x["v"], **arguments(case, {**t, **x}))
    torch.library.opcheck(torch.ops.fastlm.attention.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break_to_the_same_bits(dynamic):
    def block(q, k, v, seed):
        return op(q, k, v, causal=True, dropout_p=0.25, seed=seed) * 2

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    for length, seed in ((64, 1), (64, 2), (130, 3)):
        q, k, v = (torch.randn(2, h, length, 64, device=DEVICE, dtype=BF16, requires_grad=True) for h in (4, 2, 2))
        results = []
        for f in (compiled, block):
            out = f(q, k, v, torch.tensor(seed, device=DEVICE))
            results.append([out, *torch.autograd.grad(out.float().sum(), (q, k, v))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_casts_float32():
    q, k = (torch.randn(1, 2, 80, 64, device=DEVICE, requires_grad=True) for _ in range(2))
    with torch.autocast(DEVICE, BF16):
        out = op(q, k, k.bfloat16(), causal=True)
    assert out.dtype == BF16
    assert torch.equal(out, op(q.bfloat16(), k.bfloat16(), k.bfloat16(), causal=True))
    out.float().sum().backward()
    assert q.grad.dtype == F32
