"""The LM head and its cross-entropy, a chunk of rows at a time: the logits [N, V] never stand in memory whole.

    logits_nV = h_nD w_DV^T         lse = log sum_v exp logits_v         loss = sum over counted rows of lse - logits[label]
    dl_nV = softmax(logits) - onehot(label)         dh_nD = dl w         dw_VD = sum over chunks of dl^T h

A chunk's gradients are computed with its loss, in forward, while its logits are at hand: three GEMMs, where recomputing the
logits in backward would take a fourth. Backward multiplies dh and dw, which were kept, by the scalar that arrives. Rows
labelled IGNORE_INDEX are not counted: loss 0, gradient 0. A label that is no token gives NaN on a GPU and an IndexError on
CPU. Softmax and loss are float32 inside; dw is summed over chunks in float32.

Tensor parallel, T ranks: every rank has N/T rows of h and V/T tokens of w. h is gathered once; of a chunk a rank computes
its tokens' logits, and all ranks tell each other their lse and the label's logit of each row, [T, n, 2] float32:

    lse = log sum_ranks exp lse_rank      logits[label] = sum_ranks (0 where another rank has the token)

dh is then a part of a sum, which is scattered over the rows; dw is the rank's own.

`ChunkedLoss` computes in 16 bits, the one in `titan_fp8.float8.head` in FP8; both walk over chunks in `_Loss`.
Shapes: N rows (batch * sequence), n rows of a chunk, D dim, V vocabulary (of this rank).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton

from titan_fp8.tensor_parallel import Ranks, all_gather, reduce_scatter

IGNORE_INDEX = -100  # PyTorch's and torchtitan's default


def chunk_rows(rows: int, vocabulary: int, largest: int) -> int:
    """Rows per chunk: as few chunks of about `largest` logits as can be, equally long, a multiple of 128 (a GEMM's tile)."""
    chunks = -(-rows * vocabulary // largest)
    return -(-rows // (chunks * 128)) * 128


def reference(logits_nV: Tensor, labels_n: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """`cross_entropy_` in plain PyTorch."""
    counted = labels_n != IGNORE_INDEX
    wide = logits_nV.float()
    labels_n1 = torch.where(counted, labels_n, 0)[:, None]
    lse = wide.logsumexp(-1)
    loss = torch.where(counted, lse - wide.gather(1, labels_n1)[:, 0], 0.0)
    lse = torch.where(counted, lse, torch.inf)
    if gradient:
        dl = torch.exp(wide - lse[:, None])
        logits_nV.copy_(dl.scatter_add_(1, labels_n1, -counted[:, None].float()))
    return loss, lse


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, loss_ptr, lse_ptr, V, IGNORE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    label = tl.load(labels_ptr + row)
    counted, token = label != IGNORE, (label >= 0) & (label < V)
    at_label = tl.load(logits_ptr + label, mask=token, other=float("nan")).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    largest = -3.0e38  # finite: a block of -inf must not give inf - inf
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        x = tl.load(logits_ptr + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))  # passes over NaN, which stays in total
        total = total * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    lse = largest + tl.log(tl.sum(total, 0))
    tl.store(loss_ptr + row, tl.where(counted, lse - at_label, 0.0))
    lse = tl.where(token, lse, tl.where(counted, float("nan"), float("inf")))  # exp(x - inf) = 0
    tl.store(lse_ptr + row, lse)
    if GRADIENT:
        # Backwards: what was read last is still in the cache.
        for i in range(tl.cdiv(V, BLOCK), 0, -1):
            column = (i - 1) * BLOCK + columns
            x = tl.load(logits_ptr + column, mask=column < V).to(tl.float32)
            dl = tl.exp(x - lse) - tl.where(column == label, 1.0, 0.0)
            tl.store(logits_ptr + column, dl.to(logits_ptr.dtype.element_ty), mask=column < V)


@triton_op("titan_fp8::cross_entropy_", mutates_args={"logits_nV"})
def cross_entropy_op(logits_nV: Tensor, labels_n: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """The kernel behind `cross_entropy_`: one row a program, which reads it from memory once and again from the cache."""
    rows, vocabulary = logits_nV.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits_nV.device)
    lse = torch.empty_like(loss)
    block = min(8192, triton.next_power_of_2(vocabulary))
    wrap_triton(_cross_entropy_kernel)[(rows,)](
        logits_nV, labels_n, loss, lse, vocabulary,
        IGNORE=IGNORE_INDEX, GRADIENT=gradient, BLOCK=block, num_warps=max(1, block // 1024),
    )  # fmt: skip
    return loss, lse


def cross_entropy_(logits_nV: Tensor, labels_n: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """(loss, lse) [n] float32 of contiguous logits in any float dtype and int64 labels; lse is inf in rows not counted.

    With `gradient` the logits are overwritten with d loss / d logits = exp(logits - lse) - onehot(label).
    """
    run = cross_entropy_op if logits_nV.device.type == "cuda" else reference
    return run(logits_nV, labels_n, gradient)


def reference_gradient(logits_nV: Tensor, labels_n: Tensor, lse_n: Tensor) -> None:
    """`cross_entropy_gradient_` in plain PyTorch."""
    columns = torch.arange(logits_nV.shape[1], device=logits_nV.device)
    dl = torch.exp(logits_nV.float() - lse_n[:, None]) - (columns == labels_n[:, None]).float()
    logits_nV.copy_(dl)


@triton.jit
def _gradient_kernel(logits_ptr, labels_ptr, lse_ptr, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits_ptr += row * V
    x = tl.load(logits_ptr + column, mask=column < V).to(tl.float32)
    dl = tl.exp(x - tl.load(lse_ptr + row)) - tl.where(column == tl.load(labels_ptr + row), 1.0, 0.0)
    tl.store(logits_ptr + column, dl.to(logits_ptr.dtype.element_ty), mask=column < V)


@triton_op("titan_fp8::cross_entropy_gradient_", mutates_args={"logits_nV"})
def gradient_op(logits_nV: Tensor, labels_n: Tensor, lse_n: Tensor) -> None:
    """The kernel behind `cross_entropy_gradient_`: some columns of one row a program."""
    rows, vocabulary = logits_nV.shape
    block = min(8192, triton.next_power_of_2(vocabulary))
    wrap_triton(_gradient_kernel)[(rows, triton.cdiv(vocabulary, block))](
        logits_nV, labels_n, lse_n, vocabulary, BLOCK=block, num_warps=max(1, block // 1024)
    )


def cross_entropy_gradient_(logits_nV: Tensor, labels_n: Tensor, lse_n: Tensor) -> None:
    """Overwrite contiguous logits with exp(logits - lse) - onehot(label), given lse [n] float32; label may be no column."""
    run = gradient_op if logits_nV.device.type == "cuda" else reference_gradient
    run(logits_nV, labels_n, lse_n)


def split_cross_entropy_(
    logits_nV: Tensor, labels_n: Tensor, gradient: bool, tp: Ranks | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`cross_entropy_` of logits whose columns are split over `tp`'s ranks: (loss, lse, labels as this rank's columns) [n].

    labels are tokens of the whole vocabulary, loss and lse those of whole rows. A label that is no token gives NaN.
    """
    if tp is None:
        return *cross_entropy_(logits_nV, labels_n, gradient), labels_n
    vocabulary = logits_nV.shape[1]
    column = labels_n - tp.rank * vocabulary
    here = (column >= 0) & (column < vocabulary)
    _, lse = cross_entropy_(logits_nV, torch.zeros_like(labels_n), False)
    at_label = logits_nV.gather(1, torch.where(here, column, 0)[:, None])[:, 0].float()
    parts_Tn2 = all_gather(torch.stack((lse, torch.where(here, at_label, 0.0)), -1), tp).unflatten(
        0, (tp.size, -1)
    )
    lse, at_label = parts_Tn2[..., 0].logsumexp(0), parts_Tn2[..., 1].sum(0)
    counted, token = labels_n != IGNORE_INDEX, (labels_n >= 0) & (labels_n < tp.size * vocabulary)
    lse = torch.where(token, lse, torch.where(counted, torch.nan, torch.inf))  # exp(x - inf) = 0
    loss = torch.where(counted, lse - at_label, 0.0)
    if gradient:
        cross_entropy_gradient_(logits_nV, column, lse)
    return loss, lse, column


def add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a b in `dtype`, in place; a b where there is no total yet."""
    if dtype == a.dtype:
        return a @ b if total is None else total.addmm_(a, b)
    if a.device.type == "cuda":
        if total is None:
            return torch.mm(a, b, out_dtype=dtype)
        return torch.addmm(total, a, b, out_dtype=dtype, out=total)
    product = (a @ b).to(dtype)  # CPU has no product of bfloat16 in float32
    return product if total is None else total.add_(product)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size).to(tl.float32)
    tl.store(x_ptr + at, (x * tl.load(factor_ptr)).to(x_ptr.dtype.element_ty), mask=at < size)


@triton_op("titan_fp8::scale_", mutates_args={"x"})
def scale_op(x: Tensor, factor: Tensor) -> None:
    """The kernel behind `scale_`. PyTorch's own product with type promotion takes three times as long."""
    wrap_triton(_scale_kernel)[(triton.cdiv(x.numel(), 4096),)](x, factor, x.numel(), BLOCK=4096, num_warps=4)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """Contiguous x times `factor` (0-dim float32), in place, in float32 and rounded once."""
    if x.device.type == "cuda":
        scale_op(x, factor)
        return x
    return x.mul_(factor.view(1))  # as a vector it counts in type promotion


class Head:
    """The head's products in h's dtype. `chunk` gives a chunk's loss and, if `gradients`, adds its part to dh and dw.

    h, w_VD: not differentiable here; h is this rank's rows [N/T, D], and `gather_h` makes them all. dw comes in `dw_dtype`.
    """

    def __init__(self, h: Tensor, w_VD: Tensor, gradients: bool, dw_dtype: torch.dtype, tp: Ranks | None):
        self.dtype, self.tp = h.dtype, tp
        self.w_VD = w_VD.to(h.dtype)
        self.gradients, self.dw_dtype = gradients, dw_dtype
        self.gather_h(h)
        rows = len(h) * (1 if tp is None else tp.size)
        self.dh_ND = h.new_empty((rows, h.shape[1])) if gradients else None
        self.dw_VD: Tensor | None = None

    def gather_h(self, h: Tensor) -> None:
        self.h_ND = all_gather(h, self.tp)

    def dh(self) -> Tensor:
        """The gradient of `h`, when all chunks are through."""
        assert self.dh_ND is not None
        return reduce_scatter(self.dh_ND, self.tp)

    def chunk(self, rows: slice, labels_n: Tensor) -> Tensor:
        """The summed loss of these rows, 0-dim float32."""
        h_nD = self.h_ND[rows]
        logits_nV = h_nD @ self.w_VD.t()
        loss, _, _ = split_cross_entropy_(logits_nV, labels_n, self.gradients, self.tp)
        if self.dh_ND is not None:
            torch.mm(logits_nV, self.w_VD, out=self.dh_ND[rows])
            self.dw_VD = add_product(self.dw_VD, logits_nV.t(), h_nD, self.dw_dtype)
        return loss.sum()


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w_VD, labels_N, make_head, rows: int, gradients: bool):
        # float32 also for a weight of another 16-bit type than h: CUDA has no product that mixes the two.
        dw_dtype = h.dtype if rows >= len(labels_N) and w_VD.dtype == h.dtype else torch.float32
        with torch.autocast(h.device.type, enabled=False):
            head = make_head(h, w_VD, gradients, dw_dtype)
            loss = torch.zeros((), dtype=torch.float32, device=h.device)
            for start in range(0, len(labels_N), rows):
                part = slice(start, start + rows)
                loss += head.chunk(part, labels_N[part])
        if gradients:
            ctx.save_for_backward(head.dh(), head.dw_VD.to(w_VD.dtype))
        return loss

    @staticmethod
    def backward(ctx, dloss):
        # In place, since dw is large; autograd refuses a second backward, because what it saved has changed.
        dh, dw_VD = (scale_(gradient, dloss) for gradient in ctx.saved_tensors)
        return dh, dw_VD, None, None, None, None


class ChunkedLoss(nn.Module):
    """h [N, D], w [V, D], labels [N] int64 -> the summed cross-entropy of h w^T, 0-dim float32.

    The products run in h's dtype, or in the autocast dtype under autocast. Without gradients only the loss is computed.
    With `tp`: h [N/T, D], w [V/T, D], and the labels of all N rows, in `by_rank` order; the loss is that of all.
    """

    tp: Ranks | None = None

    # 1 GiB of bfloat16. With fewer rows a dw GEMM is short beside the traffic of its float32 sum, which takes about 500 / n
    # of the GEMM's time (700 TFLOP/s against 4.3 TB/s on an H200).
    chunk_logits = 1 << 29

    def forward(self, h_ND: Tensor, w_VD: Tensor, labels_N: Tensor) -> Tensor:
        device_type = h_ND.device.type
        if torch.is_autocast_enabled(device_type):
            h_ND = h_ND.to(torch.get_autocast_dtype(device_type))
        gradients = torch.is_grad_enabled() and (h_ND.requires_grad or w_VD.requires_grad)
        rows = chunk_rows(len(labels_N), len(w_VD), self.chunk_logits)
        return _Loss.apply(h_ND.contiguous(), w_VD, labels_N, self.head, rows, gradients)

    def head(self, h: Tensor, w_VD: Tensor, gradients: bool, dw_dtype: torch.dtype) -> Head:
        return Head(h, w_VD, gradients, dw_dtype, self.tp)
