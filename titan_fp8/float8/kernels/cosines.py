"""|cos| of the angles between the rows of two matrices, in one read of both.

`reference` is the same in plain PyTorch, and what runs where there is no CUDA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 1 << 24  # elements that the reference takes together: temporaries of 64 MiB
ROWS, WIDTH = 4, 1024


def reference(a: Tensor, b: Tensor) -> Tensor:
    """[R] float32 in plain PyTorch; see `row_cosines`."""
    found = []
    rows = max(1, PIECE // a.shape[1])
    for x, y in zip(a.split(rows), b.split(rows), strict=True):
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) * torch.linalg.vector_norm(
            y, dim=1, dtype=torch.float32
        )
        cosines = (x.float() * y.float()).sum(1).abs() / norms
        found.append(torch.where(cosines.isfinite(), cosines, 0.0).clamp(max=1.0))
    return torch.cat(found)


@triton.jit
def _cosines_kernel(
    a_ptr, b_ptr, out_ptr, R, K, a_stride_r, a_stride_k, b_stride_r, b_stride_k, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    aa = tl.zeros((ROWS, WIDTH), tl.float32)
    ab, bb = aa, aa
    for left in range(0, K, WIDTH):
        columns = left + tl.arange(0, WIDTH)
        inside = (rows < R)[:, None] & (columns < K)[None, :]
        a_at = a_ptr + rows[:, None] * a_stride_r + columns[None, :] * a_stride_k
        b_at = b_ptr + rows[:, None] * b_stride_r + columns[None, :] * b_stride_k
        a = tl.load(a_at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_at, mask=inside, other=0.0).to(tl.float32)
        aa += a * a
        ab += a * b
        bb += b * b
    cosines = tl.abs(tl.sum(ab, 1)) / (tl.sqrt(tl.sum(aa, 1)) * tl.sqrt(tl.sum(bb, 1)))
    cosines = tl.where(cosines < float("inf"), tl.minimum(cosines, 1.0), 0.0)
    tl.store(out_ptr + rows, cosines, mask=rows < R)


def row_cosines(a: Tensor, b: Tensor) -> Tensor:
    """[R] float32: |cos| of the rows of a, b [R, K], eagerly. 0 where a row is zero or not finite."""
    return (_launch if a.device.type == "cuda" and a.numel() else reference)(a, b)


def _launch(a: Tensor, b: Tensor) -> Tensor:
    rows, width = a.shape
    cosines = torch.empty(rows, dtype=torch.float32, device=a.device)
    _cosines_kernel[(triton.cdiv(rows, ROWS),)](
        a, b, cosines, rows, width, *a.stride(), *b.stride(),
        ROWS=ROWS, WIDTH=min(WIDTH, triton.next_power_of_2(width)), num_warps=4,  # pyrefly: ignore
    )  # fmt: skip
    return cosines
