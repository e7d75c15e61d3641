"""Float8Linear: each of its GEMMs against float64, first on the same FP8 values, then on the values before the cast."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from titan_fp8.float8.formats import E4M3, E5M2
from titan_fp8.float8.linear import Float8FanOut, Float8Linear
from titan_fp8.float8.scaling import DelayedScaling, Recipe

M, K, N = 48, 64, 32


def make(seed: int = 0, dtype: torch.dtype = torch.float32, **recipe) -> tuple[Float8Linear, DelayedScaling]:
    torch.manual_seed(seed)
    linear = Float8Linear.from_linear(
        nn.Linear(K, N, bias=False, dtype=dtype), Recipe(**({"history": 4} | recipe))
    )
    state = DelayedScaling(linear.slots(), linear.recipe)
    state.init_weights()
    return linear, state


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(linear, x, dy) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, dx, dw) of one forward and backward."""
    x = x.clone().requires_grad_()
    linear.weight.grad = None
    y = linear(x)
    y.backward(dy)
    return y.detach(), x.grad, linear.weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_three_gemms_on_fp8_values(fp8, dtype, power_of_two):
    """Error: float32 sums of exact products (K - 1 roundings and 5 of scaling, 2^-24 each), then rounding to the dtype."""
    linear, state = make(dtype=dtype, power_of_two=power_of_two)
    w = linear.weight.detach()
    half_ulp = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}[dtype]

    def exact(t, scale, format):
        """t through FP8 and back, float64; rounding by hand."""
        if power_of_two:
            scale = torch.exp2(scale.log2().floor())
        return fp8.rounded((t.float() * scale).double(), format) / scale.double()

    first = {"x": draw(M, K, seed=1, dtype=dtype), "dy": draw(M, N, seed=2, dtype=dtype)}
    second = {"x": draw(M, K, seed=3, dtype=dtype), "dy": draw(M, N, seed=4, dtype=dtype)}
    for now in (first, second):
        y, dx, dw = step(linear, **now)
        state.update()
        # both steps: scaled by the first step's amaxes
        x8 = exact(now["x"], fp8.scale_for(first["x"], E4M3), E4M3)
        dy8 = exact(now["dy"], fp8.scale_for(first["dy"], E5M2), E5M2)
        w8 = exact(w, fp8.scale_for(w, E4M3), E4M3)
        for got, a, b in ((y, x8, w8.T), (dx, dy8, w8), (dw, dy8.T, x8)):
            assert got.dtype == dtype
            allowed = (a.shape[1] + 4) * 2.0**-24 * (1 + half_ulp) * (a.abs() @ b.abs()) + half_ulp * (
                a @ b
            ).abs()
            assert ((got.double() - a @ b).abs() <= allowed).all()
        # FP8's own error is far outside those bounds: a GEMM in higher precision would be seen
        assert fp8.relative(x8 @ w8.T, now["x"].double() @ w.double().T) > 0.01


def test_error_against_no_quantisation(fp8):
    """A cast is off by at most half an ulp: 2^-4 (E4M3) or 2^-3 (E5M2) of the value, or half the smallest subnormal."""
    linear, _ = make()
    x, dy, w = draw(M, K, seed=1), draw(M, N, seed=2), linear.weight.detach()

    def with_error(t, format, relative, smallest):
        t = t.double()
        return t, relative * t.abs() + smallest / 2 / fp8.scale_for(t, format).double()

    x64, dx64 = with_error(x, E4M3, 2.0**-4, 2.0**-9)
    w64, dw64 = with_error(w, E4M3, 2.0**-4, 2.0**-9)
    dy64, ddy64 = with_error(dy, E5M2, 2.0**-3, 2.0**-16)
    cases = ((x64, dx64, w64.T, dw64.T), (dy64, ddy64, w64, dw64), (dy64.T, ddy64.T, x64, dx64))
    typical = []
    for got, (a, da, b, db) in zip(step(linear, x, dy), cases, strict=True):
        bound = da @ b.abs() + a.abs() @ db + da @ db
        assert ((got.double() - a @ b).abs() <= bound * (1 + 1e-5)).all()
        typical.append(fp8.relative(got, a @ b))
    # measured on unit-normal inputs: 3.5 %, 5.9 %, 5.9 %
    assert 0.02 < typical[0] < 0.05
    assert all(0.04 < error < 0.08 for error in typical[1:])


def test_dtypes_under_autocast():
    linear, _ = make()
    x = draw(4, 8, K, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    y.float().square().sum().backward()
    assert (y.dtype, y.shape) == (torch.bfloat16, (4, 8, N))
    assert (x.grad.dtype, x.grad.shape) == (torch.float32, (4, 8, K))
    assert (linear.weight.grad.dtype, linear.weight.grad.shape) == (torch.float32, (N, K))
    assert linear.x.amax == x.detach().bfloat16().abs().max()


def test_batch_and_sequence_are_folded_into_rows(fp8):
    x, dy = draw(3, 16, K, seed=1), draw(3, 16, N, seed=2)
    y, dx, dw = step(make()[0], x, dy)
    flat = step(make()[0], x.flatten(0, 1), dy.flatten(0, 1))
    assert (
        torch.equal(y.flatten(0, 1), flat[0])
        and torch.equal(dx.flatten(0, 1), flat[1])
        and torch.equal(dw, flat[2])
    )


@pytest.mark.parametrize("shape", [(40, K), (3, 8, K)])
def test_rows_must_be_a_multiple_of_16(shape):
    rows = 40 if len(shape) == 2 else 24
    with pytest.raises(ValueError, match=f"multiple of 16, got {rows}: change seq_len"):
        make()[0](draw(*shape, seed=1))


@pytest.mark.parametrize("transposed", [False, True])
def test_x_is_kept_for_backward_in_fp8_only(transposed):
    linear, _ = make(dtype=torch.bfloat16)
    x = draw(M, K, seed=1, dtype=torch.bfloat16)
    x = (x.t().contiguous().t() if transposed else x).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x)
    of_size_x = [t for t in kept if t.numel() == M * K]
    assert [t.dtype for t in of_size_x] == [E4M3]
    # Transposed, as the weight gradient's GEMM wants it, whatever x was.
    assert of_size_x[0].shape == (K, M) and of_size_x[0].stride() == (M, 1)
    assert all(t is linear.weight or t.numel() == 1 for t in kept if t is not of_size_x[0])


def test_two_forwards_before_two_backwards():
    linear, state = make()
    xs, dys = [draw(M, K, seed=s) for s in (1, 2)], [draw(M, N, seed=s) for s in (3, 4)]
    ys = [linear(x) for x in xs]
    for y, dy in zip(ys, dys, strict=True):
        y.backward(dy)
    alone = make()[0]
    expected = [step(alone, x, dy)[2] for x, dy in zip(xs, dys, strict=True)]
    assert torch.equal(linear.weight.grad, expected[0] + expected[1])
    assert linear.x.amax == torch.stack(xs).abs().max() and linear.dy.amax == torch.stack(dys).abs().max()
    state.update()


def test_checkpointing_recomputes_the_same():
    plain, ours = make(), make()
    for seed in (1, 3):  # the first step, which calibrates, and one with delayed scales
        x, dy = draw(M, K, seed=seed), draw(M, N, seed=seed + 1)
        expected = step(plain[0], x, dy)
        x = x.requires_grad_()
        ours[0].weight.grad = None
        y = checkpoint(ours[0], x, use_reentrant=False)
        y.backward(dy)
        for got, known in zip((y, x.grad, ours[0].weight.grad), expected, strict=True):
            assert torch.equal(got, known)
        for slot in ("x", "dy"):
            assert torch.equal(ours[0].slots()[slot].amax, plain[0].slots()[slot].amax)
        plain[1].update()
        ours[1].update()


def test_evaluation_records_nothing_and_uses_the_scales():
    linear, state = make()
    x, dy = draw(M, K, seed=1), draw(M, N, seed=2)
    step(linear, x, dy)
    state.update()
    trained = linear(4 * x)
    assert linear.x.amax == 4 * x.abs().max()
    linear.x.amax.zero_()
    assert torch.equal(linear.eval()(4 * x), trained)  # saturates alike
    assert linear.x.amax == 0


def test_nan_and_inf_in_x_reach_the_amax():
    for bad in (torch.nan, torch.inf):
        linear, state = make()
        x = draw(M, K, seed=1)
        x[5, 7] = bad
        y = linear(x)
        if bad != bad:
            assert y[5].isnan().all() and y[:5].isfinite().all() and y[6:].isfinite().all()
        state.update()
        assert state.nonfinite_steps.tolist() == [1, 0, 0]


def test_compiled_equals_eager_bit_for_bit():
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    eager, compiled = make(), make()
    run = torch.compile(compiled[0], backend=backend, fullgraph=True)
    for seed in range(4):
        x, dy = draw(2, 16, K, seed=seed), draw(2, 16, N, seed=10 + seed)
        expected = step(eager[0], x, dy)
        x = x.requires_grad_()
        compiled[0].weight.grad = None
        y = run(x)
        y.backward(dy)
        for got, known in zip((y, x.grad, compiled[0].weight.grad), expected, strict=True):
            assert torch.equal(got, known)
        for slot in ("x", "dy"):
            assert compiled[0].slots()[slot].amax > 0
            assert torch.equal(compiled[0].slots()[slot].amax, eager[0].slots()[slot].amax)
        eager[1].update()
        compiled[1].update()
    assert backend.frame_count == 2  # one graph for the calibrating step, one for all others


def test_weight_is_taken_over_and_the_recipe_is_shown():
    plain = nn.Linear(K, N, bias=False)
    linear = Float8Linear.from_linear(plain, Recipe())
    assert linear.weight is plain.weight
    assert list(linear.state_dict()) == ["weight"]
    assert "in_features=64, out_features=32, x:delayed_e4m3 w:tensorwise_e4m3 dy:delayed_e5m2" in repr(linear)


def test_a_fan_out_is_one_linear_of_all_weights():
    """Bit for bit what Float8Linear computes with the weights one below the other, split."""
    torch.manual_seed(0)
    parts = [nn.Linear(K, n, bias=False) for n in (32, 16, 48)]
    whole = Float8Linear.from_linear(nn.Linear(K, 96, bias=False), Recipe(history=4))
    with torch.no_grad():
        whole.weight.copy_(torch.cat([part.weight for part in parts]))
    fan_out = Float8FanOut(dict(zip("abc", parts, strict=True)), Recipe(history=4))
    states = [DelayedScaling(module.slots(), module.recipe) for module in (whole, fan_out)]
    for state in states:
        state.init_weights()
    for seed in (1, 2):  # calibrating, then with delayed scales
        x, dy = draw(3, 16, K, seed=seed), draw(3, 16, 96, seed=seed + 2)
        y, dx, dw = step(whole, x, dy)
        x = x.requires_grad_()
        for part in parts:
            part.weight.grad = None
        ys = fan_out(x, *parts)
        assert [t.shape for t in ys] == [(3, 16, n) for n in (32, 16, 48)]
        torch.autograd.backward(ys, dy.split((32, 16, 48), -1))
        assert torch.equal(torch.cat(ys, -1), y) and torch.equal(x.grad, dx)
        assert torch.equal(torch.cat([part.weight.grad for part in parts]), dw)
        for state in states:
            state.update()
        assert torch.equal(states[0].history, states[1].history)
    assert "(x): TensorScale(delayed_e4m3)" in repr(fan_out) and "a+b+c, x:delayed_e4m3" in repr(fan_out)


def test_the_weights_scale_is_that_of_the_weight_now(fp8):
    """After an optimizer step and `update` the next forward scales by the new weight's amax, whatever the old one was."""
    linear, state = make(history=4, margin=2)
    x, dy = draw(M, K, seed=1), draw(M, N, seed=2)
    step(linear, x, dy)
    for factor in (8.0, 1 / 64):
        with torch.no_grad():
            linear.weight *= factor
        state.update()
        assert linear.w.scale == fp8.scale_for(linear.weight, E4M3)
        y = step(linear, x, dy)[0]
        assert fp8.relative(y, x.double() @ linear.weight.detach().double().T) < 0.05
        assert state.report()["w"]["saturation"] <= 1.0
    assert int(state.saturated_steps.sum()) == 0
    with torch.no_grad():
        linear.weight[3, 5] = torch.nan
    state.update()
    assert state.report()["w"]["nonfinite_steps"] == 1.0
