"""Cast to FP8 in one read: q, its transpose, and the amax that later steps will scale by.

    q[m, k] = cast(clamp(x[m, k] * scale, -max, max))      qt[k, m] = q[m, k]      seen = max(seen, max |x|)

`cast_joined` does several matrices of one scale and puts them together, straight or transposed.

x [M, K] is read once; q [M, K] and qt [K, M] (what Hopper's FP8 matrix unit wants on the other side of a
GEMM: both operands contiguous along the summed dimension) are written as asked. A NaN in x comes out in q, qt and seen.
`reference` is the same in plain PyTorch, and what runs where there is no CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from titan_fp8.float8.formats import FP8_MAX, fold_amax, is_fp8, saturating_cast


def reference(
    x: Tensor, scale: Tensor, seen: Tensor, dtype: torch.dtype, record: bool, straight: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    """(q, qt) in plain PyTorch; the one not asked for is empty. Updates `seen` in place if `record`."""
    if record:
        fold_amax(seen, x)
    q = saturating_cast(x, scale, dtype)
    nothing = q.new_empty((0, 0))
    return q if straight else nothing, q.t().contiguous() if transposed else nothing


@triton.jit
def _cast_tile(
    x_ptr, scale_ptr, seen_ptr, q_ptr, qt_ptr, tile, M, K, stride_m, stride_k, stride_t, first,
    FP8_MAX: tl.constexpr, RECORD: tl.constexpr, STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_m + columns[None, :] * stride_k, mask=inside, other=0.0)
    x = x.to(tl.float32)
    if RECORD:
        # Bit patterns of non-negative floats order like the floats, and NaN's lie above inf's: an integer maximum keeps NaN,
        # and an integer atomic gives the same result in any order.
        bits = tl.abs(x).to(tl.int32, bitcast=True)
        tl.atomic_max(seen_ptr.to(tl.pointer_type(tl.int32)), tl.max(tl.max(bits, 1), 0), sem="relaxed")
    if COLUMNS:
        x *= tl.load(scale_ptr + columns, mask=columns < K, other=0.0)[None, :]
    else:
        x *= tl.load(scale_ptr)
    y = tl.clamp(x, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    q = y.to(q_ptr.dtype.element_ty)
    if STRAIGHT:
        tl.store(q_ptr + (first + rows)[:, None] * K + columns[None, :], q, mask=inside)
    if TRANSPOSED:
        where = columns[:, None].to(tl.int64) * stride_t + first + rows[None, :]
        tl.store(qt_ptr + where, tl.trans(q), mask=tl.trans(inside))


@triton.jit
def _cast_kernel(
    x_ptr, scale_ptr, seen_ptr, q_ptr, qt_ptr, M, K, stride_m, stride_k, stride_t, first,
    FP8_MAX: tl.constexpr, RECORD: tl.constexpr, STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    _cast_tile(
        x_ptr, scale_ptr, seen_ptr, q_ptr, qt_ptr, tl.program_id(0), M, K, stride_m, stride_k, stride_t, first,
        FP8_MAX, RECORD, STRAIGHT, TRANSPOSED, COLUMNS, BLOCK_M, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _join_kernel(
    a_ptr, b_ptr, c_ptr, scale_ptr, q_ptr, qt_ptr, M_a, M_b, M_c, K, stride_m, stride_k, stride_t, first, tiles_a, tiles_b,
    FP8_MAX: tl.constexpr, STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Three matrices of one width, one below the other, from row `first` of the result on."""
    tile = tl.program_id(0)
    if tile < tiles_a:
        _cast_tile(a_ptr, scale_ptr, scale_ptr, q_ptr, qt_ptr, tile, M_a, K, stride_m, stride_k, stride_t, first,
                   FP8_MAX, False, STRAIGHT, TRANSPOSED, COLUMNS, BLOCK_M, BLOCK_K)  # fmt: skip
    elif tile < tiles_a + tiles_b:
        _cast_tile(b_ptr, scale_ptr, scale_ptr, q_ptr, qt_ptr, tile - tiles_a, M_b, K, stride_m, stride_k, stride_t,
                   first + M_a, FP8_MAX, False, STRAIGHT, TRANSPOSED, COLUMNS, BLOCK_M, BLOCK_K)  # fmt: skip
    else:
        _cast_tile(c_ptr, scale_ptr, scale_ptr, q_ptr, qt_ptr, tile - tiles_a - tiles_b, M_c, K, stride_m, stride_k,
                   stride_t, first + M_a + M_b, FP8_MAX, False, STRAIGHT, TRANSPOSED, COLUMNS, BLOCK_M, BLOCK_K)  # fmt: skip


@triton_op("titan_fp8::cast", mutates_args={"seen"})
def cast_op(
    x: Tensor, scale: Tensor, seen: Tensor, dtype: torch.dtype, record: bool, straight: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    """The kernel behind `cast`, with the arguments of `reference`; x is a 16-bit CUDA tensor."""
    rows, columns = x.shape
    q = torch.empty((rows, columns) if straight else (0, 0), dtype=dtype, device=x.device)
    qt = torch.empty((columns, rows) if transposed else (0, 0), dtype=dtype, device=x.device)
    block_m, block_k = (32, 128) if transposed else (4, 2048)
    grid = (triton.cdiv(rows, block_m), triton.cdiv(columns, block_k))
    wrap_triton(_cast_kernel)[grid](
        x, scale, seen, q, qt, rows, columns, x.stride(0), x.stride(1), rows, 0,
        FP8_MAX=FP8_MAX[dtype], RECORD=record, STRAIGHT=straight, TRANSPOSED=transposed, COLUMNS=False,
        BLOCK_M=block_m, BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip
    return q, qt


@triton_op("titan_fp8::cast_joined", mutates_args=())
def cast_joined_op(matrices: list[Tensor], scale: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """The kernels behind `cast_joined`; the matrices are 16-bit or FP8 CUDA tensors."""
    columns = matrices[0].shape[1]
    total = sum(x.shape[0] for x in matrices)
    result = torch.empty(
        (columns, total) if transposed else (total, columns), dtype=dtype, device=scale.device
    )
    nothing = torch.empty((0, 0), dtype=dtype, device=scale.device)
    q, qt = (nothing, result) if transposed else (result, nothing)
    block_m, block_k = (32, 128) if transposed else (4, 2048)
    first = 0
    # Three to a launch, if they lie alike: the host needs as long for a launch as the GPU for a small matrix.
    alike = all(x.stride() == matrices[0].stride() for x in matrices)
    step = 3 if alike else 1
    for start in range(0, len(matrices), step):
        some = matrices[start : start + step]
        rows = [x.shape[0] for x in some] + [0, 0]
        tiles = [triton.cdiv(n, block_m) for n in rows]
        grid = (sum(tiles), triton.cdiv(columns, block_k))
        options = {
            "FP8_MAX": FP8_MAX[dtype], "STRAIGHT": not transposed, "TRANSPOSED": transposed, "COLUMNS": scale.dim() == 1,
            "BLOCK_M": block_m, "BLOCK_K": block_k, "num_warps": 4,
        }  # fmt: skip
        x = some[0]
        if len(some) == 1:
            wrap_triton(_cast_kernel)[grid](
                x, scale, scale, q, qt, rows[0], columns, x.stride(0), x.stride(1), total, first, RECORD=False, **options
            )  # fmt: skip
        else:
            wrap_triton(_join_kernel)[grid](
                x, some[1], some[-1], scale, q, qt, *rows[:3], columns, x.stride(0), x.stride(1), total, first, *tiles[:2],
                **options,
            )  # fmt: skip
        first += sum(rows)
    return result


def cast_rows(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [M, K] times `scale` (0-dim, or [K]) in FP8, eagerly: one pass over x on CUDA, and no operator's dispatch, which
    costs the host more than the launch. For what FSDP2 casts before it gathers, hundreds of tensors a step."""
    if x.device.type != "cuda" or not x.numel():
        return saturating_cast(x, scale, dtype)
    rows, columns = x.shape
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    grid = (triton.cdiv(rows, 4), triton.cdiv(columns, 2048))
    _cast_kernel[grid](
        x, scale, scale, q, q, rows, columns, x.stride(0), x.stride(1), rows, 0,
        FP8_MAX=FP8_MAX[dtype], RECORD=False, STRAIGHT=True, TRANSPOSED=False, COLUMNS=scale.dim() == 1,
        BLOCK_M=4, BLOCK_K=2048, num_warps=4,  # pyrefly: ignore
    )  # fmt: skip
    return q


def cast(
    x: Tensor, scale: Tensor, seen: Tensor, dtype: torch.dtype, record: bool, straight: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    """(q [M, K], qt [K, M]) of x [M, K] times `scale` in FP8; the one not asked for is empty. One read of x on CUDA.

    scale, seen: 0-dim float32. With `record`, the amax of x is folded into `seen` in place. float32 inputs, which only a run
    without mixed precision has, take the plain path: through Triton 3.6's ptxas qt has wrong rows then (M a multiple of 16).
    """
    run = cast_op if x.device.type == "cuda" and x.dtype.itemsize == 2 else reference
    return run(x, scale, seen, dtype, record, straight, transposed)


def cast_joined(matrices: Sequence[Tensor], scale: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """Matrices x_i [M_i, K] times `scale` in FP8, one below the other [M, K], or that transposed [K, M]; M = sum of M_i.

    scale: 0-dim float32, or [K]: each column has its own. Matrices that are FP8 already must be of `dtype`; they are not
    scaled.
    """
    if is_fp8(matrices[0].dtype):
        scale = torch.ones((), device=scale.device)
    if scale.device.type == "cuda" and all(x.dtype.itemsize <= 2 for x in matrices):
        return cast_joined_op(list(matrices), scale, dtype, transposed)
    with torch.autocast(scale.device.type, enabled=False):  # it knows no cat of FP8
        q = torch.cat([saturating_cast(x, scale, dtype) for x in matrices])
    return q.t().contiguous() if transposed else q


def transpose(q: Tensor) -> Tensor:
    """FP8 [M, K] -> [K, M], contiguous."""
    return cast_joined([q], torch.ones((), device=q.device), q.dtype, True)
