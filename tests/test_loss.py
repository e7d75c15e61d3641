"""The chunked loss against float64, with bounds from counted roundings; what it must never hold; its kernel on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titan_fp8.loss import IGNORE_INDEX, ChunkedLoss, chunk_rows, cross_entropy_, reference

N, D, V = 300, 32, 97  # with `small_chunks`: 128 + 128 + 44 rows
CHUNKS = 3


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(ChunkedLoss, "chunk_logits", 128 * V)


def draw(dtype=torch.float32, device="cpu", seed=1, ignored=0.2) -> tuple[Tensor, Tensor, Tensor]:
    """h and w, whose logits have a spread of 2, and labels."""
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g) * 2 / D**0.5
    labels = torch.randint(0, V, (N,), generator=g)
    labels[torch.rand(N, generator=g) < ignored] = IGNORE_INDEX
    return h.to(device, dtype), w.to(device, dtype), labels.to(device)


def step(h: Tensor, w: Tensor, labels: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dh, dw); the gradients are those of factor * loss."""
    h, w = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    loss = ChunkedLoss()(h, w, labels)
    (loss * factor).backward()
    return loss.detach(), h.grad, w.grad


def exact(h: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dh, dw) by PyTorch in float64."""
    h, w = h.double().requires_grad_(), w.double().requires_grad_()
    loss = F.cross_entropy(h @ w.t(), labels, reduction="sum", ignore_index=IGNORE_INDEX)
    return loss.detach(), *torch.autograd.grad(loss, (h, w))


def bounds(h: Tensor, w: Tensor, labels: Tensor, half_ulp: float) -> tuple[Tensor, Tensor, Tensor]:
    """Largest errors of (loss, dh, dw). float32: u = 2^-24 an operation; what is stored rounds by `half_ulp` more.

    A logit sums D products: D u of the sum of magnitudes, and half_ulp of itself. An error e of all logits of a row moves
    lse and the label's logit by e each, and so log p by 2 e; exp, the sum over V and the subtraction add V + 16 roundings
    relative to 1 and to the largest logit. Then each GEMM: its inputs' error, and its own roundings.
    """
    u = 2.0**-24
    h, w = h.double(), w.double()
    logits, counted = h @ w.t(), labels != IGNORE_INDEX
    e = (D * u * (h.abs() @ w.abs().t()) + half_ulp * logits.abs()).amax(1)
    r = counted * (2 * e + (V + 16 + 4 * logits.abs().amax(1)) * u)
    p = logits.softmax(1) * counted[:, None]
    onehot = F.one_hot(labels.clamp(min=0), V) * counted[:, None]
    dl = (p - onehot).abs()
    error = p * torch.expm1(r)[:, None] + (half_ulp + u) * dl
    losses = -logits.log_softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0] * counted
    loss = r.sum() + (N + CHUNKS) * u * losses.sum()
    # CPU rounds every chunk's part of dw to the storage dtype, and the sum once more; backward once more.
    dh = error @ w.abs() + ((V + 1) * u + 2 * half_ulp) * (dl @ w.abs())
    dw = error.t() @ h.abs() + ((N + CHUNKS + 1) * u + 3 * half_ulp) * (dl.t() @ h.abs())
    return loss * 1.01, dh * 1.01, dw * 1.01


@pytest.mark.parametrize(("dtype", "half_ulp"), [(torch.float32, 0.0), (torch.bfloat16, 2.0**-9)])
@pytest.mark.parametrize("chunked", [False, True])
def test_loss_and_gradients_against_float64(dtype, half_ulp, chunked, request):
    if chunked:
        request.getfixturevalue("small_chunks")
    inputs = draw(dtype)
    for got, right, bound in zip(step(*inputs), exact(*inputs), bounds(*inputs, half_ulp), strict=True):
        assert got.dtype == (torch.float32 if got.dim() == 0 else dtype)
        assert ((got.double() - right).abs() <= bound).all()
        # A label moved, or a row left out, is far outside.
        assert bound.max() < right.abs().max() / 8


def test_the_scalar_that_arrives_scales_the_gradients(small_chunks):
    """In bfloat16 too, to one rounding: 1 / 3 must not itself be rounded to bfloat16 (2^-9 on all gradients alike)."""
    inputs = draw(torch.bfloat16)
    for one, third in zip(step(*inputs)[1:], step(*inputs, factor=1 / 3)[1:], strict=True):
        assert torch.equal(third, (one.float() / 3).bfloat16())


def test_rows_per_chunk():
    for rows in (1, 127, 128, 4096, 8192, 10_000, 16_384, 100_000):
        for vocabulary in (16, 259, 32_768, 131_072, 1 << 23):
            size, largest = chunk_rows(rows, vocabulary, 1 << 29), 1 << 29
            fewest = -(-rows * vocabulary // largest)
            assert size % 128 == 0 and (size - 128) * vocabulary < largest
            assert -(-rows // size) <= fewest  # equal: the last one lacks less than 128 rows for each chunk
    assert chunk_rows(16_384, 131_072, 1 << 29) == 4096 and chunk_rows(8192, 32_768, 1 << 29) == 8192


class Largest(TorchDispatchMode):
    """The largest tensor that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_logits_never_stand_whole(small_chunks):
    with Largest() as seen:
        step(*draw())
    assert seen.numel == 128 * V
    with Largest() as seen:
        exact(*draw())
    assert seen.numel == N * V


def test_without_gradients_only_the_loss(small_chunks):
    h, w, labels = draw()
    expected = step(h, w, labels)[0]
    w.requires_grad_()
    with torch.no_grad(), Largest() as seen:
        loss = ChunkedLoss()(h, w, labels)
    assert torch.equal(loss, expected) and not loss.requires_grad
    assert seen.numel == 128 * V
    loss = ChunkedLoss()(h, w.detach(), labels)
    assert not loss.requires_grad
    # A frozen head: the hidden states alone have a gradient.
    h.requires_grad_()
    ChunkedLoss()(h, w.detach(), labels).backward()
    assert torch.equal(h.grad, step(h.detach(), w, labels)[1])


def test_under_autocast_float32_weights_keep_a_float32_gradient(small_chunks):
    h, w, labels = draw()
    inputs = h.bfloat16(), w.bfloat16(), labels
    with torch.autocast("cpu", torch.bfloat16):
        got = step(h, w, labels)
    assert [t.dtype for t in got] == [torch.float32] * 3
    assert not torch.equal(got[2], got[2].bfloat16().float())  # summed and kept in float32
    for ours, right, bound in zip(got, exact(*inputs), bounds(*inputs, 2.0**-9), strict=True):
        assert ((ours.double() - right).abs() <= bound).all()


def test_ignored_rows_have_no_loss_and_no_gradient(small_chunks):
    h, w, labels = draw()
    ignored = labels == IGNORE_INDEX
    assert 0 < ignored.sum() < N
    loss, dh, dw = step(h, w, labels)
    assert (dh[ignored] == 0).all() and (dh[~ignored] != 0).any(1).all()
    h[ignored] *= 3
    again = step(h, w, labels)
    assert torch.equal(again[0], loss) and torch.equal(again[2], dw)
    loss, dh, dw = step(h, w, torch.full_like(labels, IGNORE_INDEX))
    assert loss == 0 and (dh == 0).all() and (dw == 0).all()


def test_nan_comes_out(small_chunks):
    h, w, labels = draw(ignored=0)
    h[200, 3] = torch.nan
    loss, dh, dw = step(h, w, labels)
    assert loss.isnan() and dw.isnan().all() and dh.isnan().any(1).nonzero().tolist() == [[200]]
    h, w, labels = draw(ignored=0)
    w[5, 3] = torch.nan
    assert all(t.isnan().all() for t in step(h, w, labels))


def test_what_is_no_label_is_refused():
    h, w, labels = draw()
    for bad in (V, -1):
        labels[7] = bad
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            step(h, w, labels)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_second_backward_is_refused_not_wrong(device):
    h, w, labels = draw(device=device)
    loss = ChunkedLoss()(h.requires_grad_(), w, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- On a GPU ----


def poison() -> None:
    """Fill the allocator's free memory with NaN: what a kernel leaves unwritten shows."""
    torch.full((1 << 30,), 0xFF, dtype=torch.uint8, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [16, 97, 8192, 8193, 50_000, 131_072])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernel_equals_reference(vocabulary, dtype):
    """exp and log are approximations to some ulps: 32 u on p and, with the logits' size, on the loss."""
    torch.manual_seed(vocabulary)
    logits = (5 * torch.randn(33, vocabulary, device="cuda")).to(dtype)
    labels = torch.randint(0, vocabulary, (33,), device="cuda")
    labels[3] = IGNORE_INDEX
    logits[9, : vocabulary // 2] = -torch.inf
    labels[9] = vocabulary - 1
    logits[11] += 50.0
    ours, plain = logits.clone(), logits.clone()
    poison()
    expected = reference(plain, labels, True)
    for gradient in (False, True):
        for got, right in zip(cross_entropy_(ours, labels, gradient), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=2.0**-19, atol=2.0**-19 * 100)
        if not gradient:
            assert torch.equal(ours, logits)
    # One ulp of the stored dtype beside the 2^-17 that an error of 2^-19 * 100 on x - lse is at most.
    torch.testing.assert_close(
        ours.float(), plain.float(), rtol=torch.finfo(dtype).eps + 2.0**-12, atol=2.0**-22
    )
    assert (ours[3] == 0).all()


@pytest.mark.gpu
def test_kernel_keeps_nan_and_refuses_what_is_no_token():
    logits = torch.randn(8, 20_000, device="cuda").bfloat16()
    labels = torch.tensor([1, 2, 3, 20_000, -1, 5, IGNORE_INDEX, 19_999], device="cuda")
    logits[1, 15_000], logits[2, 7] = torch.nan, torch.inf
    loss, _ = cross_entropy_(logits, labels, True)
    bad = torch.tensor([False, True, True, True, True, False, False, False], device="cuda")
    assert torch.equal(loss.isnan(), bad) and torch.equal(logits.isnan().all(1), bad)
    assert torch.equal(logits.isnan().any(1), bad)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_on_a_gpu_against_float64(weights, small_chunks):
    h, w, labels = draw(torch.bfloat16, "cuda")
    poison()
    got = step(h, w.to(weights), labels)
    assert got[2].dtype == weights
    for ours, right, bound in zip(got, exact(h, w, labels), bounds(h, w, labels, 2.0**-9), strict=True):
        assert ((ours.double() - right).abs() <= bound).all()
