"""Activations and their gradients against formulas written out here, and Smooth-SwiGLU against SwiGLU, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from titan_fp8.model.activations import XIELU, gelu, smooth_swiglu, swiglu, xielu

# Zero, the kink at -1e-6 from both sides, tiny, ordinary, saturated, huge.
POINTS = [0.0, 1e-12, 1e-7, 1e-6, 1e-3, 0.3, 1.0, 5.0, 30.0, 1e4]
POINTS += [-x for x in POINTS]
BETA, EPS = 0.5, -1e-6


def softplus(a: float) -> float:
    return math.log1p(math.exp(a))


def xielu_written_out(x: float, a_p: float, a_n: float) -> tuple[float, float, float, float]:
    """Value and derivatives by x, a_p, a_n."""
    alpha_p, alpha_n = softplus(a_p), BETA + softplus(a_n)
    slope_p, slope_n = 1 / (1 + math.exp(-a_p)), 1 / (1 + math.exp(-a_n))  # of softplus
    if x > 0:
        return alpha_p * x * x + BETA * x, 2 * alpha_p * x + BETA, slope_p * x * x, 0.0
    bent = math.expm1(min(x, EPS)) - x
    inner = math.exp(x) if x <= EPS else 0.0  # min(x, eps) is constant above eps
    return alpha_n * bent + BETA * x, alpha_n * (inner - 1) + BETA, 0.0, slope_n * bent


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_xielu_and_its_derivatives(dtype, tolerance):
    """Tolerance: a few roundings, taken of |x| where expm1(x) - x cancels."""
    for a_p, a_n in ((0.2, -1.05), (-3.0, 2.0)):
        for point in POINTS:
            if dtype == torch.float32 and point == EPS:
                continue  # which side of the kink -1e-6 falls on is a matter of rounding
            x = torch.tensor([point], dtype=dtype, requires_grad=True)
            parameters = [torch.tensor([a], dtype=dtype, requires_grad=True) for a in (a_p, a_n)]
            y = xielu(x, *parameters)
            y.sum().backward()
            got = [y.item(), *(t.grad.item() for t in (x, *parameters))]
            # The formula gets the numbers as the dtype has them.
            exact = xielu_written_out(x.item(), *(p.item() for p in parameters))
            assert got == pytest.approx(exact, rel=tolerance, abs=tolerance * abs(x.item()) / 8), (
                point,
                a_p,
                a_n,
            )


def test_xielu_gradcheck():
    x = torch.tensor([p for p in POINTS if abs(p) > 1e-4 and abs(p) < 100], dtype=torch.float64)
    a_p, a_n = (torch.tensor([a], dtype=torch.float64, requires_grad=True) for a in (0.2, -1.0))
    assert gradcheck(xielu, (x.requires_grad_(), a_p, a_n))


def test_xielu_module_starts_at_the_papers_alphas():
    act = XIELU()
    act.init_weights()
    assert softplus(act.a_p.item()) == pytest.approx(0.8, rel=1e-6)
    assert 0.5 + softplus(act.a_n.item()) == pytest.approx(0.8, rel=1e-6)
    x = torch.linspace(-3, 3, 101)
    expected = [xielu_written_out(v, act.a_p.item(), act.a_n.item())[0] for v in x.tolist()]
    torch.testing.assert_close(act(x), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    act(x).sum().backward()
    assert act.a_p.grad is not None and act.a_p.grad.item() > 0
    assert act.a_n.grad is not None and act.a_n.grad.item() > 0


def test_gelu_and_swiglu_against_written_out_formulas():
    x = torch.tensor(POINTS, dtype=torch.float64, requires_grad=True)
    tanh_form = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    (expected,) = torch.autograd.grad(tanh_form.sum(), x)
    y = gelu(x)
    torch.testing.assert_close(y, tanh_form, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected, rtol=1e-12, atol=1e-12)

    gate, up = (t.flatten().requires_grad_() for t in torch.meshgrid(x.detach(), x.detach(), indexing="ij"))
    swish = gate * torch.sigmoid(gate)
    slope = torch.sigmoid(gate) * (1 + gate * torch.sigmoid(-gate))
    y = swiglu(gate, up)
    d_gate, d_up = torch.autograd.grad(y.sum(), (gate, up))
    torch.testing.assert_close(y, up * swish, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(d_gate, up * slope, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d_up, swish, rtol=1e-12, atol=1e-15)


def smooth_path(gate, up, w2):
    """Smooth-SwiGLU as the feed-forward block uses it: w2(z) / s."""
    z, inverse_scale = smooth_swiglu(gate, up)
    return F.linear(z, w2) * inverse_scale


def test_gated_activations_gradcheck():
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (3, 4), (5, 4))
    gate, up, w2 = (torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes)
    assert gradcheck(smooth_path, (gate, up * 37.0, w2))
    assert gradcheck(swiglu, (gate, up))
    assert gradcheck(gelu, (gate,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smooth_swiglu_is_swiglu_to_the_last_bit(dtype):
    """s is a power of two and scales a whole row, so every rounding is the same with and without it."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.tensor([1e-6, 1.0, 300.0, 1e5, 0.0]).view(5, 1)
    gate = torch.randn(5, 64, generator=generator).to(dtype).requires_grad_()
    up = (torch.randn(5, 64, generator=generator) * rows).to(dtype).requires_grad_()
    w2 = torch.randn(32, 64, generator=generator).to(dtype).requires_grad_()
    plain = F.linear(swiglu(gate, up), w2)
    smooth = smooth_path(gate, up, w2)
    assert torch.equal(plain, smooth)
    dy = torch.randn(5, 32, generator=generator).to(dtype)
    for a, b in zip(*(torch.autograd.grad(y, (gate, up, w2), dy) for y in (plain, smooth)), strict=True):
        assert torch.equal(a, b)


def test_smooth_swiglu_scale():
    rows = [0.0, 1e-44, 1e-38, 3e-5, 0.5, 0.75, 1.0, 1e4, 3e38]
    up = torch.tensor(rows).view(-1, 1) * torch.tensor([1.0, -0.25, 0.0])
    # silu(40) is 40 to float32's last digit, so that z / 40 = s * up.
    z, inverse = smooth_swiglu(torch.full_like(up, 40.0), up)
    mantissa, _ = torch.frexp(inverse)
    assert (mantissa == 0.5).all(), "a power of two"
    assert inverse[0] == 1 and not z[0].any(), "a zero row keeps scale 1"
    assert z.isfinite().all() and inverse.isfinite().all()
    torch.testing.assert_close(z / 40 * inverse, up, rtol=1e-6, atol=1e-44)
    largest = (z / 40).abs().amax(-1)[3:8]
    assert ((largest > 0.5) & (largest <= 1)).all(), "the cast sees magnitudes just below 1"
    # What is broken stays visible instead of being scaled to something ordinary.
    z, inverse = smooth_swiglu(torch.ones(2, 2), torch.tensor([[math.inf, 1.0], [math.nan, 1.0]]))
    assert (inverse == 1).all() and z[0, 0].isinf() and z[1, 0].isnan() and z[:, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["xielu", "gelu", "swiglu", "smooth_swiglu"])
def test_gradients_stay_finite_at_the_extremes(name, dtype):
    x = torch.tensor([*POINTS, 1e-40, -1e-40], dtype=dtype)
    gate, up = (t.flatten().clone().requires_grad_() for t in torch.meshgrid(x, x, indexing="ij"))
    leaves = [gate, up]
    if name == "xielu":
        act = XIELU().to(dtype)
        act.init_weights()
        # Far below zero the square that is not taken would overflow; its gradient is 0 times that.
        gate = torch.cat((gate, torch.tensor([-1e20], dtype=dtype, requires_grad=True)))
        leaves = [gate, act.a_p, act.a_n]
        y = act(gate)
    elif name == "gelu":
        leaves = [gate]
        y = gelu(gate)
    elif name == "swiglu":
        y = swiglu(gate, up)
    else:
        z, inverse = smooth_swiglu(gate.view(-1, 1), up.view(-1, 1))  # every element a token of its own
        y = z * inverse
    assert y.dtype == dtype and y.isfinite().all()
    for gradient in torch.autograd.grad(y.float().sum(), leaves):
        assert gradient.isfinite().all()
