"""Sums of a tensor that statistics are made of, of every sample, in one read.

Over the elements that are finite (those that are not are counted, and blind nothing):

    [B, 8] float64 = sum x, sum x^2, sum x^4, elements, non-finite elements, saturated and underflowed elements, max |x|

Fourth powers overflow float32 beyond |x| = 2^32 and vanish below 2^-32, where gradients are. So a few elements at a time are
scaled by their largest magnitude, summed in float32, and the scale a comes in, as a, a^2, a^4, where such sums are added in
float64. `reference` (plain PyTorch, and what runs where there is no CUDA) divides each row of N by its own a: every term
lies in [0, 1] and one of them is 1, so the relative error is N 2^-24 at most. The kernel multiplies ROWS elements of one
column by a power of two: that is exact, and what is left are ROWS + 1 roundings.

The kernel takes `partials` programs for each sample, and each writes a row of its own: no atomics, so two runs give the same
bits, and whoever reads adds the rows up, for all tensors of the model at once. No thread waits for another before the end.

Bytes of a layer of the 8B shape (D 4096, F 14336 with a gate, 21504 without, K 8 of H 32, C 128; bfloat16, 8192 tokens), MB:

    residual, qkv_in, q, attention_out, ffn_out 67 each; k, v 17 each                       369
    ffn_up                                                              with a gate 470, without 352
    FP8 tensors that stand in memory, 603, every 8th row                                     75
    every 8th row of z (ffn_act) and dh, made in bfloat16, then read                         350

That is 1.2 GB, 0.4 ms at 3 TB/s: 3.2 ms of eight layers. All rows of z and dh in float32 alone would be 4 GB.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

SUM, SQUARES, FOURTHS, ELEMENTS, NONFINITE, SATURATED, UNDERFLOWED, AMAX = range(8)
COLUMNS = AMAX + 1
EVERY = 8  # of a sample's rows, one of so many stands for all where an estimate will do
PIECE = 1 << 24  # elements that the reference takes together where nothing is compiled: temporaries of 64 MiB
PROGRAMS = 384  # on a GPU, at once: an H100's 132 multiprocessors have registers for three each
# A thread holds eight neighbours (16 bytes) of each of ROWS rows, so it adds rows up alone.
ROWS, WIDTH, WARPS = 8, 1024, 4


class Cast(NamedTuple):
    """How a tensor goes to FP8: |x| * scale saturates above `largest` and rounds to zero up to `smallest`."""

    scale: Tensor  # 0-dim float32
    largest: float
    smallest: float


def partials(batch: int, device: torch.device) -> int:
    """How many rows of `sums` [B, P, 8] a sample has on this device."""
    return max(1, PROGRAMS // batch) if device.type == "cuda" else 1


def some_rows(x: Tensor, batch: int, groups: int = 1) -> Tensor:
    """Every EVERY-th row of x [..., positions, N], or of each stretch of [M, N] in the order (group, sample, position)."""
    if x.dim() > 2:
        return x[..., ::EVERY, :]
    return x.unflatten(0, (groups * batch, -1))[:, ::EVERY].flatten(0, 1)


def _row_sums(x_RN: Tensor, moments: bool, cast: Cast | None) -> tuple[Tensor, Tensor]:
    """([R, 7] float64, max |x| [R] float32)."""
    wide = x_RN.float()
    finite = wide.isfinite()
    wide = torch.where(finite, wide, 0.0)
    size = wide.abs()
    amax = size.amax(-1)
    elements = finite.sum(-1)
    nothing = torch.zeros_like(elements)
    sums = [nothing, nothing, nothing, elements, x_RN.shape[-1] - elements, nothing, nothing]
    if moments:
        unit = torch.where(amax > 0, amax, 1.0)
        y = wide / unit[:, None]
        y2 = y * y
        a = unit.double()
        sums[SUM] = y.sum(-1).double() * a
        sums[SQUARES] = y2.sum(-1).double() * a**2
        sums[FOURTHS] = (y2 * y2).sum(-1).double() * a**4
    if cast is not None:
        scaled = size * cast.scale
        sums[SATURATED] = (scaled > cast.largest).sum(-1)
        sums[UNDERFLOWED] = ((scaled <= cast.smallest) & (size > 0)).sum(-1)
    return torch.stack([column.double() for column in sums], -1), amax


@torch._dynamo.allow_in_graph
def reference(
    x: Tensor, batch: int, groups: int = 1, moments: bool = True, cast: Cast | None = None
) -> Tensor:
    """The sums [B, 8] of x [..., N], whose rows lie in the order (group, sample, position); B = `batch`.

    Without `moments` those of x, x^2 and x^4 are 0; without `cast` so are the counts of what it does.
    """
    with torch.no_grad():
        x_RN = x.detach().reshape(-1, x.shape[-1])
        # A compiler fuses all of it into one pass; without one, temporaries must stay small.
        compiling = torch._guards.TracingContext.try_get() is not None
        pieces = [x_RN] if compiling else x_RN.split(max(1, PIECE // x_RN.shape[1]))
        parts = [_row_sums(piece, moments, cast) for piece in pieces]
        sums, amax = (
            torch.cat(column) if len(column) > 1 else column[0] for column in zip(*parts, strict=True)
        )
        sums = sums.view(groups, batch, -1, AMAX).sum((0, 2))
        amax = amax.view(groups, batch, -1).amax((0, 2)).double()
        return torch.cat((sums, amax[:, None]), 1)


def total(sums: Tensor) -> Tensor:
    """[..., P, 8] partial sums -> [..., 8]."""
    return torch.cat((sums[..., :AMAX].sum(-2), sums[..., AMAX:].amax(-2)), -1)


@triton.jit
def _sums(
    x_ptr, scale_ptr, G, L, Q, N, stride_g, stride_b, stride_l, stride_q, stride_n,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, MOMENTS: tl.constexpr, CAST: tl.constexpr, FINITE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """This program's sums, in the order of the columns. FINITE: all elements are; if not, the squares' sum tells."""
    sample, first = tl.program_id(0), tl.program_id(1)
    across, down = tl.cdiv(N, WIDTH), tl.cdiv(L, ROWS)
    sum1 = tl.zeros((WIDTH,), tl.float64)
    sum2, sum4 = sum1, sum1
    nonfinite = tl.zeros((WIDTH,), tl.int32)
    saturated, underflowed = nonfinite, nonfinite
    largest = tl.zeros((WIDTH,), tl.float32)
    elements = tl.full((), 0, tl.int64)
    for tile in range(first, across * down * Q * G, tl.num_programs(1)):
        top, left = (tile // across % down) * ROWS, (tile % across) * WIDTH
        outer = tile // (across * down)
        rows, columns = top + tl.arange(0, ROWS), left + tl.arange(0, WIDTH)
        inside = (rows < L)[:, None] & (columns < N)[None, :]
        elements += (tl.minimum(ROWS, L - top) * tl.minimum(WIDTH, N - left)).to(tl.int64)
        base = sample.to(tl.int64) * stride_b + (outer // Q).to(tl.int64) * stride_g
        base += (outer % Q).to(tl.int64) * stride_q
        at = base + rows.to(tl.int64)[:, None] * stride_l + columns[None, :] * stride_n
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if not FINITE:
            finite = tl.abs(x) < float("inf")
            x = tl.where(finite, x, 0.0)
            nonfinite += tl.sum((~finite).to(tl.int32), 0)
        size = tl.abs(x)
        a = tl.max(size, 0)
        largest = tl.maximum(largest, a)
        if MOMENTS:
            # a's power of two and its inverse, by their exponents' bits; |x| * inverse is below 4, so y^4 is finite.
            exponent = tl.minimum(tl.maximum(a.to(tl.int32, bitcast=True) >> 23, 1), 253)
            unit = (exponent << 23).to(tl.float32, bitcast=True).to(tl.float64)
            y = x * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[None, :]
            y2 = y * y
            sum1 += tl.sum(y, 0).to(tl.float64) * unit
            unit *= unit
            sum2 += tl.sum(y2, 0).to(tl.float64) * unit
            sum4 += tl.sum(y2 * y2, 0).to(tl.float64) * (unit * unit)
        if CAST:
            scaled = size * tl.load(scale_ptr)
            saturated += tl.sum((scaled > LARGEST).to(tl.int32), 0)
            underflowed += tl.sum(((scaled <= SMALLEST) & (size > 0)).to(tl.int32), 0)
    bad = tl.sum(nonfinite, 0)
    return (
        tl.sum(sum1, 0), tl.sum(sum2, 0), tl.sum(sum4, 0), (elements - bad).to(tl.float64), bad.to(tl.float64),
        tl.sum(saturated, 0).to(tl.float64), tl.sum(underflowed, 0).to(tl.float64), tl.max(largest, 0),
    )  # fmt: skip


@triton.jit
def _moments_kernel(
    x_ptr, sums_ptr, scale_ptr, known_ptr, G, L, Q, N, stride_g, stride_b, stride_l, stride_q, stride_n,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, MOMENTS: tl.constexpr, CAST: tl.constexpr, KNOWN: tl.constexpr,
    ADD: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # To ask of each element whether it is finite takes a third of the instructions. So all are taken for finite, and where
    # one was not, its square is in the sum: once more. (Without moments there is no such sum.)
    sum1, sum2, sum4, elements, bad, saturated, underflowed, amax = _sums(
        x_ptr, scale_ptr, G, L, Q, N, stride_g, stride_b, stride_l, stride_q, stride_n,
        LARGEST, SMALLEST, MOMENTS, CAST, MOMENTS, ROWS, WIDTH,
    )  # fmt: skip
    if MOMENTS:  # noqa: SIM102  (for the compiler: one is known to it, the other a tensor)
        if not (sum2 < float("inf")):
            sum1, sum2, sum4, elements, bad, saturated, underflowed, amax = _sums(
                x_ptr, scale_ptr, G, L, Q, N, stride_g, stride_b, stride_l, stride_q, stride_n,
                LARGEST, SMALLEST, MOMENTS, CAST, False, ROWS, WIDTH,
            )  # fmt: skip
    if KNOWN:
        known = tl.load(known_ptr)
        amax = tl.where(known < float("inf"), known, amax)
    amax = amax.to(tl.float64)
    out = sums_ptr + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 8
    if ADD:
        amax = tl.maximum(amax, tl.load(out + 7))
    tl.store(out + 7, amax)
    values = (sum1, sum2, sum4, elements, bad, saturated, underflowed)
    for i in tl.static_range(7):
        value = values[i]
        if ADD:
            value += tl.load(out + i)
        tl.store(out + i, value)


@triton_op("titan_fp8::moments", mutates_args={"sums"})
def moments_op(
    x: Tensor, sums: Tensor, scale: Tensor | None, known: Tensor | None, largest: float, smallest: float,
    moments: bool, add: bool,
) -> None:  # fmt: skip
    """The kernel behind `look`. x [G, B, L, Q, N], 16-bit or float32, any strides; sums [B, P, 8] float64."""
    groups, batch, length, heads, width = x.shape
    block = min(WIDTH, triton.next_power_of_2(width))
    wrap_triton(_moments_kernel)[(batch, sums.shape[1])](
        x, sums, x if scale is None else scale, x if known is None else known,
        groups, length, heads, width, *x.stride(),
        LARGEST=largest, SMALLEST=smallest, MOMENTS=moments, CAST=scale is not None, KNOWN=known is not None, ADD=add,
        ROWS=ROWS, WIDTH=block, num_warps=WARPS,
    )  # fmt: skip


def _five(x: Tensor, batch: int, groups: int) -> Tensor:
    """A view [G, B, L, Q, N] of x, with rows N that are long and lie together if there are such.

    What is a row, and in which order rows are added, is all the same to the sums: the inner dimensions are sorted by their
    strides, short rows are joined with their neighbours, and so is what is more than three dimensions. L is the longer one.
    """
    x = x.unflatten(0, (groups, batch, -1))
    x = x.squeeze([i for i in range(2, x.dim()) if x.shape[i] == 1])
    x = x.permute(0, 1, *sorted(range(2, x.dim()), key=lambda i: -x.stride(i)))
    while x.dim() > 3 and x.shape[-1] < WIDTH and _adjoin(x, -2):
        x = x.flatten(-2)
    if x.dim() == 3 and x.shape[-1] % WIDTH == 0:
        x = x.unflatten(-1, (-1, WIDTH))
    while x.dim() > 5:
        x = x.flatten(2, 3) if _adjoin(x, 2) else x.flatten(3, 4)
    while x.dim() < 5:
        x = x.unsqueeze(-2 if x.dim() > 3 else 2)
    return x.transpose(2, 3) if x.shape[2] < x.shape[3] else x


def _adjoin(x: Tensor, i: int) -> bool:
    """Whether dimensions i and i + 1 lie in memory as one."""
    return x.stride(i) == x.shape[i + 1] * x.stride(i + 1)


def launch(
    x: Tensor, sums: Tensor, groups: int, moments: bool, cast: Cast | None, known: Tensor | None, add: bool
) -> None:  # fmt: skip
    """`look` by the kernel."""
    scale, largest, smallest = (None, 0.0, 0.0) if cast is None else cast
    moments_op(_five(x, len(sums), groups), sums, scale, known, largest, smallest, moments, add)


def look(
    x: Tensor, sums: Tensor, groups: int = 1, moments: bool = True, cast: Cast | None = None,
    known: Tensor | None = None, add: bool = False,
) -> None:  # fmt: skip
    """Write the sums of x into `sums` [B, P, 8] float64 (P from `partials`); with `add`, add them to what is there.

    x, groups, moments, cast: as for `reference`; on CUDA x is read once, and strides are all the same to it. known: 0-dim
    float32, the amax of all those rows that x stands for; if it is finite, it is told instead of x's.
    """
    with torch.no_grad():
        x = x.detach()
        if x.device.type == "cuda":
            launch(x, sums, groups, moments, cast, known, add)
            return
        found = reference(x, len(sums), groups, moments, cast)
        if known is not None:
            amax = torch.where(known.isfinite(), known.double(), found[:, AMAX:])
            found = torch.cat((found[:, :AMAX], amax), 1)
        if add:
            found = total(torch.stack((sums[:, 0], found), 1))
        sums.copy_(found[:, None])
