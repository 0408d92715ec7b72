"""torch.func, forward-mode differentiation and the flop counter on every op: right, or a sentence that says what to do."""

from __future__ import annotations

import subprocess
import sys
import warnings

import fastlm
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import func
from torch.nn import functional as F

Q, K, V, T = torch.randn(4, 1, 2, 8, 16, generator=torch.Generator().manual_seed(0))
COS, SIN = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1))
W = torch.ones(16)


def _turned(x):
    a, b = x.chunk(2, -1)
    return torch.cat([a * COS - b * SIN, b * COS + a * SIN], -1)


OPS = {
    "attention": (lambda x: fastlm.ops.attention(x, K, V), lambda x: F.scaled_dot_product_attention(x, K, V)),
    "dropout_add_norm": (
        lambda x: fastlm.ops.dropout_add_norm(x, weight=W, norm="rms", return_residual=False),
        lambda x: F.rms_norm(x, (16,), W, 1e-5),
    ),
    "rotary": (lambda x: fastlm.ops.rotary(x, COS, SIN), _turned),
}


def _loss(f):
    return lambda x: f(x).square().sum()


def _dual(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(Q, T))).tangent


def _dual_and_gradient(f):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(Q.clone().requires_grad_(), T)
        return forward_ad.unpack_dual(torch.autograd.grad(f(x).square().sum(), x, create_graph=False)[0]).tangent


def _vmap_and_gradient(f):
    x = torch.stack([Q, T]).requires_grad_()
    return torch.autograd.grad(func.vmap(f)(x).square().sum(), x)[0]


SERVED = {
    "vmap": lambda f: func.vmap(f)(torch.stack([Q, T])),
    "vmap, then autograd": _vmap_and_gradient,
    "functionalize": lambda f: func.functionalize(f)(Q),
}
REFUSED = {
    "jvp": lambda f: func.jvp(f, (Q,), (T,)),
    "dual level": _dual,
    "forward over reverse": _dual_and_gradient,
    "jacfwd": lambda f: func.jacfwd(f)(Q),
    "linearize": lambda f: func.linearize(f, Q),
    "hessian": lambda f: func.hessian(_loss(f))(Q),
    "jvp of grad": lambda f: func.jvp(func.grad(_loss(f)), (Q,), (T,)),
    "grad of jvp": lambda f: func.grad(lambda x: func.jvp(f, (x,), (T,))[1].square().sum())(Q),
    "vmap of jvp": lambda f: func.vmap(lambda t: func.jvp(f, (Q,), (t,))[1])(torch.stack([T, Q])),
    "grad": lambda f: func.grad(_loss(f))(Q),
    "grad of grad": lambda f: func.grad(lambda x: func.grad(_loss(f))(x).square().sum())(Q),
    "vjp": lambda f: func.vjp(f, Q),
    "jacrev": lambda f: func.jacrev(f)(Q),
    "vmap of grad": lambda f: func.vmap(func.grad(_loss(f)))(torch.stack([Q, T])),
    "functional_call": lambda f: func.grad(lambda w: func.functional_call(_Module(f), {"w": w}, (Q,)).square().sum())(
        W
    ),
}


class _Module(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.w, self.f = torch.nn.Parameter(W.clone()), f

    def forward(self, x):
        return self.f(x * self.w)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", SERVED)
def test_a_transform_that_is_served_is_right(name, op):
    ours, theirs = OPS[op]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap says that it goes one by one
        torch.testing.assert_close(SERVED[name](ours), SERVED[name](theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_transform_that_is_not_served_says_so(name, op):
    with pytest.raises(RuntimeError, match=rf"fastlm\.{op} .*fastlm\.unswap"):
        REFUSED[name](OPS[op][0])


def test_a_dual_level_without_tangents_is_served():
    with forward_ad.dual_level():
        torch.testing.assert_close(fastlm.ops.attention(Q, K, V), F.scaled_dot_product_attention(Q, K, V))


def test_flops_are_those_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    q = torch.randn(2, 4, 10, 16, requires_grad=True)
    k, v = torch.randn(2, 2, 30, 16, requires_grad=True), torch.randn(2, 2, 30, 24, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        out = fastlm.ops.attention(q, k, v, causal=True)
    pairs = 2 * 4 * 10 * 30
    assert counter.get_total_flops() == 2 * pairs * (16 + 24)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (3 * 16 + 2 * 24)
    x, cu = torch.randn(10, 4, 16), torch.tensor([0, 3, 3, 10])
    for inference in (False, True):
        with FlopCounterMode(display=False) as counter, torch.inference_mode(inference):
            fastlm.ops.attention(x, x, x, cu_seqlens_q=cu)
        assert counter.get_total_flops() == 2 * 4 * (3 * 3 + 7 * 7) * 32


def test_flops_are_those_of_attention_written_out():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for f in (lambda q: fastlm.ops.attention(q, q, q), lambda q: (q @ q.mT / 4).softmax(-1) @ q):
        with FlopCounterMode(display=False) as counter:
            f(torch.randn(2, 4, 10, 16))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_importing_fastlm_imports_no_flop_counter_and_registers_whichever_comes_first():
    """The counter imports triton, which must not be imported before a program has said whether it interprets."""
    for first, second in (("fastlm", "torch.utils.flop_counter"), ("torch.utils.flop_counter", "fastlm")):
        code = (
            f"import sys, {first}\n"
            f"assert {first == 'torch.utils.flop_counter'} or 'torch.utils.flop_counter' not in sys.modules\n"
            f"import {second}, torch\n"
            "from torch.utils.flop_counter import flop_registry\n"
            "import fastlm.ops\n"
            "assert torch.ops.fastlm.attention_backward in flop_registry\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
