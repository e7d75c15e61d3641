"""The FP8 head: its products against float64 on the same FP8 values, its gradient's format, its error, its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titan_fp8.float8 import head
from titan_fp8.float8.formats import E4M3, E5M2
from titan_fp8.float8.head import Float8ChunkedLoss
from titan_fp8.float8.kernels.softmax import SCALE, reference, softmax_gradient
from titan_fp8.float8.scaling import DelayedScaling, Recipe
from titan_fp8.loss import IGNORE_INDEX, ChunkedLoss

N, D, V = 432, 64, 96  # with `small_chunks`: 256 + 176 rows in pieces of 128, 128, 128, 48
CHUNKS = 2


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(Float8ChunkedLoss, "chunk_logits", 256 * V)
    monkeypatch.setattr(head, "PIECE_LOGITS", 128 * V)
    monkeypatch.setattr(ChunkedLoss, "chunk_logits", 128 * V)


def draw(seed: int = 1, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    """h and w, whose logits have a spread of 2, and labels, one in five ignored."""
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g) * 2 / D**0.5
    labels = torch.randint(0, V, (N,), generator=g)
    labels[torch.rand(N, generator=g) < 0.2] = IGNORE_INDEX
    return h.to(device, dtype), w.to(device, dtype), labels.to(device)


def make(device="cpu", **recipe) -> tuple[Float8ChunkedLoss, DelayedScaling]:
    loss = Float8ChunkedLoss(Recipe(**({"history": 4} | recipe))).to(device)
    state = DelayedScaling(loss.slots(), loss.recipe).to(device)
    state.init_weights()
    return loss, state


def step(loss, h: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, w = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    value = loss(h, w, labels)
    value.backward()
    return value.detach(), h.grad, w.grad


@pytest.mark.parametrize("power_of_two", [False, True])
def test_loss_and_gradients_on_fp8_values(fp8, power_of_two):
    """Float32 logits of exact products are off by e <= (D + 4) u of the magnitudes, u = 2^-24; so log p by 2 e and V + 16
    more roundings. Rounding to E5M2 is monotonic: dl8 lies between those of the ends of dl's interval. Then GEMMs' sums.
    """
    loss, state = make(power_of_two=power_of_two)
    u = 2.0**-24

    def exact(t, scale):
        if power_of_two:
            scale = torch.exp2(scale.log2().floor())
        return fp8.rounded((t * scale).double(), E4M3) / scale.double()

    first = draw(1)
    for h, w, labels in (first, draw(2)):  # both steps: h scaled by the first step's amax
        got = step(loss, h, w, labels)
        state.update()
        h8, w8 = exact(h, fp8.scale_for(first[0], E4M3)), exact(w, fp8.scale_for(w, E4M3))
        logits, counted = h8 @ w8.T, (labels != IGNORE_INDEX)[:, None]
        at_label = labels.clamp(min=0)[:, None]
        e = ((D + 4) * u * (h8.abs() @ w8.abs().T)).amax(1, keepdim=True)
        r = (2 * e + (V + 16 + 4 * logits.abs().amax(1, keepdim=True)) * u) * counted
        losses = -logits.log_softmax(1).gather(1, at_label) * counted
        assert (got[0].double() - losses.sum()).abs() <= r.sum() + (N + CHUNKS) * u * losses.sum()

        p = logits.softmax(1)
        dl = (p - torch.zeros_like(p).scatter(1, at_label, 1.0)) * counted
        error = p * torch.expm1(r) + u
        low, middle, high = (
            fp8.rounded(x * SCALE, E5M2) / SCALE * counted for x in (dl - error, dl, dl + error)
        )
        off = torch.maximum(high - middle, middle - low)
        for ours, a, plain, da, b in ((got[1], middle, dl, off, w8), (got[2], middle.T, dl.T, off.T, h8)):
            bound = da @ b.abs() + (a.shape[1] + CHUNKS + 4) * u * (a.abs() @ b.abs())
            assert ((ours.double() - a @ b).abs() <= bound).all()
            # A gradient of the logits in higher precision would be seen.
            assert ((plain @ b - a @ b).abs() > 2 * bound).float().mean() > 0.2


def test_error_against_no_quantisation(fp8):
    """E4M3 rounds h and w by at most 2^-4, 2.5 % rms each, so logits of spread 2 move by 2 * 3.6 % = 0.07, and p by 7 %;
    E5M2 rounds dl by at most 2^-3, 5 % rms. Together 9 % of p. The labels' entries 1 - p, most of the norm, fare better:
    measured 4 %."""
    h, w, labels = draw()
    loss, dh, dw = step(make()[0], h, w, labels)
    right = step(ChunkedLoss(), h, w, labels)
    assert abs(loss / right[0] - 1) < 0.01
    for got, known in ((dh, right[1]), (dw, right[2])):
        assert 0.03 < fp8.relative(got, known) < 0.05


def test_small_probabilities_survive_in_the_gradient():
    """An even spread over 131072 tokens and 2^-11 of that: E5M2 holds both (E4M3 at scale 256 would lose the second)."""
    logits = torch.tensor([[0.0, -11 * 0.6931472, 0.0]])
    qt = torch.empty(3, 1, dtype=E5M2)
    q = softmax_gradient(logits, torch.tensor([2]), torch.tensor([17 * 0.6931472]), qt)
    assert (q.float() / SCALE).tolist() == [[2.0**-17, 2.0**-28, -1.0]] and torch.equal(
        qt.float(), q.float().T
    )
    assert 2.0**-28 * 256 < 2.0**-9 / 2


@pytest.mark.parametrize("where", ["h", "w"])
def test_nan_comes_out_and_is_counted(where):
    loss, state = make()
    h, w, labels = draw()
    {"h": h, "w": w}[where][7, 3] = torch.nan
    labels[7] = 1
    value, dh, dw = step(loss, h, w, labels)
    assert value.isnan() and dh[7].isnan().all() and dw.isnan().all()
    assert dh.isnan().any(1).all() == (where == "w")
    state.update()
    assert state.nonfinite_steps.tolist() == [where == "h"]


def test_ignored_rows_and_a_batch_without_labels():
    loss, _ = make()
    h, w, labels = draw()
    value, dh, _ = step(loss, h, w, labels)
    assert value > 0 and torch.equal((dh == 0).all(1), labels == IGNORE_INDEX)
    value, dh, dw = step(loss, h, w, torch.full_like(labels, IGNORE_INDEX))
    assert value == 0 and (dh == 0).all() and (dw == 0).all()


def test_autocast_evaluation_and_the_amax():
    loss, state = make()
    h, w, labels = draw()
    with torch.autocast("cpu", torch.bfloat16):
        _, dh, dw = step(loss, h, w, labels)
    assert dh.dtype == dw.dtype == torch.float32
    assert loss.h.amax == h.bfloat16().abs().max()
    state.update()
    with torch.no_grad():
        trained = loss(4 * h, w, labels)  # saturates
        assert loss.h.amax == 4 * h.abs().max()
        loss.h.amax.zero_()
        assert torch.equal(loss.eval()(4 * h, w, labels), trained) and loss.h.amax == 0


def test_logits_stand_in_pieces_and_their_gradient_in_8_bits():
    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and V in out.shape:
                seen[out.dtype == E5M2] = max(seen[out.dtype == E5M2], out.numel())
            return out

    seen = {True: 0, False: 0}
    with Largest():
        step(make()[0], *draw())
    assert seen == {True: 256 * V, False: 128 * V}


def test_rows_must_be_a_multiple_of_16():
    h, w, labels = draw()
    with pytest.raises(ValueError, match="multiple of 16, got 200: change seq_len"):
        make()[0](h[:200], w, labels[:200])


# ---- On a GPU ----


def poison() -> None:
    """Fill the allocator's free memory with NaN (0xff in every format): what a kernel leaves unwritten shows."""
    torch.full((1 << 30,), 0xFF, dtype=torch.uint8, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 16), (48, 272), (272, 1008), (128, 131_072)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_equals_reference(shape, dtype):
    """exp of x - lse is off by some 2^-19, so a code may differ by one where a value lies that near to a boundary of two.
    E5M2 has boundaries every 2^-3 of the value at most: about 2 * 2^-19 * 2^3 = 2^-15 of all codes; 2^-12 are allowed."""
    torch.manual_seed(shape[1])
    logits = (4 * torch.randn(shape, device="cuda")).to(dtype)
    labels = torch.randint(0, shape[1], shape[:1], device="cuda")
    lse = logits.float().logsumexp(1)
    labels[1], lse[1] = IGNORE_INDEX, torch.inf
    logits[2, 5] = torch.nan
    poison()
    wide = torch.zeros(shape[1], shape[0] + 48, dtype=E5M2, device="cuda")
    qt = wide[:, 16:-32]
    qt.view(torch.uint8).fill_(0xFF)
    q = softmax_gradient(logits, labels, lse, qt)
    assert (wide.float()[:, :16] == 0).all() and (wide.float()[:, -32:] == 0).all()
    right = reference(logits, labels, lse, torch.empty_like(qt))
    codes, expected = q.view(torch.uint8).int(), right.view(torch.uint8).int()
    assert torch.equal(qt.view(torch.uint8), q.view(torch.uint8).t())
    assert q[2, 5].float().isnan() and right[2, 5].float().isnan()
    codes[2, 5] = expected[2, 5] = 0
    off = (codes - expected).abs()
    assert off.max() <= 1 and (off > 0).sum() <= 8 + off.numel() * 2.0**-12
    assert (q[1].float() == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_on_a_gpu_on_fp8_values(fp8, weights):
    """Logits are rounded to bfloat16, 2^-9, and sum in Hopper's fewer bits: p moves by some 0.5 %, a tenth of E5M2's step,
    so about a tenth of dl's codes differ, by one step of 2^-2 at most. Against 4 % for a head without FP8."""
    h, w, labels = draw(dtype=torch.bfloat16)
    h8, w8 = (
        fp8.rounded((t.float() * s).double(), E4M3) / s.double()
        for t in (h, w)
        for s in [fp8.scale_for(t, E4M3)]
    )
    logits, at_label = h8 @ w8.T, labels.clamp(min=0)[:, None]
    counted = (labels != IGNORE_INDEX)[:, None]
    dl = (logits.softmax(1) - torch.zeros_like(logits).scatter(1, at_label, 1.0)) * counted
    dl = fp8.rounded(dl * SCALE, E5M2) / SCALE
    losses = -logits.log_softmax(1).gather(1, at_label) * counted
    poison()
    got = [t.cpu() for t in step(make("cuda")[0], h.cuda(), w.to(weights).cuda(), labels.cuda())]
    assert [t.dtype for t in got] == [torch.float32, torch.bfloat16, weights]
    assert abs(got[0] / losses.sum() - 1) < 1e-3
    assert fp8.relative(got[1], dl @ w8) < 0.015 and fp8.relative(got[2], dl.T @ h8) < 0.015
