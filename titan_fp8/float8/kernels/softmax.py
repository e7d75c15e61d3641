"""The gradient of the softmax cross-entropy in FP8, in both layouts, in one read of the logits.

    q[n, v] = cast(SCALE * (exp(logits[n, v] - lse[n]) - [v == label[n]]))      qt[v, n] = q[n, v]      format E5M2

Every value lies in [-1, 1], so the scale is a constant, 2^15 (exact; E5M2 ends at 1.75 * 2^15): no amax, no clamp, no state.
E5M2, not E4M3: in a vocabulary of 131072 an even spread is p = 2^-17, E4M3's smallest number at a scale of 256, and most
tokens lie below; E5M2 keeps its two bits of mantissa down to 2^-29. A NaN comes out; lse = inf gives a row of zeros.
`reference` is the same in plain PyTorch, and what runs where there is no CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from titan_fp8.float8.formats import E5M2, saturating_cast

SCALE = 2.0**15


def reference(logits: Tensor, labels: Tensor, lse: Tensor, qt: Tensor) -> Tensor:
    """`softmax_gradient` in plain PyTorch."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    gradient = torch.exp(logits.float() - lse[:, None]) - (columns == labels[:, None]).float()
    q = saturating_cast(gradient, SCALE, E5M2)
    qt.copy_(q.t())
    return q


@triton.jit
def _softmax_gradient_kernel(
    logits_ptr, labels_ptr, lse_ptr, q_ptr, qt_ptr, N, V, stride_qt,
    SCALE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (rows < N)[:, None] & (columns < V)[None, :]
    offsets = rows[:, None].to(tl.int64) * V + columns[None, :]
    x = tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)
    label = tl.load(labels_ptr + rows, mask=rows < N, other=-1)
    gradient = tl.exp(x - lse[:, None]) - tl.where(columns[None, :] == label[:, None], 1.0, 0.0)
    q = (gradient * SCALE).to(q_ptr.dtype.element_ty)
    tl.store(q_ptr + offsets, q, mask=inside)
    offsets = columns[:, None].to(tl.int64) * stride_qt + rows[None, :]
    tl.store(qt_ptr + offsets, tl.trans(q), mask=tl.trans(inside))


@triton_op("titan_fp8::softmax_gradient", mutates_args={"qt"})
def softmax_gradient_op(logits: Tensor, labels: Tensor, lse: Tensor, qt: Tensor) -> Tensor:
    """The kernel behind `softmax_gradient`, with its arguments; logits are 16-bit CUDA tensors."""
    rows, vocabulary = logits.shape
    q = torch.empty((rows, vocabulary), dtype=E5M2, device=logits.device)
    block_n, block_v = 128, 64
    wrap_triton(_softmax_gradient_kernel)[(triton.cdiv(rows, block_n), triton.cdiv(vocabulary, block_v))](
        logits, labels, lse, q, qt, rows, vocabulary, qt.stride(0),
        SCALE=SCALE, BLOCK_N=block_n, BLOCK_V=block_v, num_warps=4,
    )  # fmt: skip
    return q


def softmax_gradient(logits: Tensor, labels: Tensor, lse: Tensor, qt: Tensor) -> Tensor:
    """q [n, V] in E5M2 at scale SCALE; fills qt [V, n], which may be columns of a wider matrix.

    Contiguous logits [n, V], labels [n] int64, lse [n] float32. float32 logits, which only a run without mixed precision
    has, take the plain path (see kernels/cast.py).
    """
    run = softmax_gradient_op if logits.device.type == "cuda" and logits.dtype.itemsize == 2 else reference
    return run(logits, labels, lse, qt)
