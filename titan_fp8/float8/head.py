"""The LM head and its loss with all three GEMMs in FP8, a chunk of rows at a time (titan_fp8/loss.py).

    logits  [n, V] = h_e4m3 [n, D]       w_e4m3^T [D, V]        in the compute dtype
    dh      [n, D] = dl_e5m2 [n, V]      w_e4m3 [V, D]
    dw      [V, D] = dl_e5m2^T [V, n]    h_e4m3 [n, D]          summed over chunks in float32

h has a delayed scale and is cast once for all chunks, w is scaled by its own amax, and the gradient of the logits, which
lies in [-1, 1], by a constant (kernels/softmax.py). An FP8 GEMM cannot add to what is there, and adding its result costs
1800 / n of its time (n rows, 1290 TFLOP/s against 4.3 TB/s on an H200). So dw's chunks are long: of a chunk dl^T is held
whole, in 8 bits, while its logits and dl come in pieces of rows. Tensor parallel, h is gathered in FP8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titan_fp8.loss import ChunkedLoss, Head, chunk_rows, split_cross_entropy_
from titan_fp8.tensor_parallel import Ranks, all_gather, all_max

from .formats import E4M3, E5M2, FP8_MAX, scale_from_amax
from .kernels.cast import cast, transpose
from .kernels.gemm import scaled_mm
from .kernels.softmax import SCALE, softmax_gradient
from .scaling import CastRule, Recipe, TensorScale, observe, scales_in_use

PIECE_LOGITS = 1 << 28  # 512 MiB of bfloat16, 256 MiB of E5M2


class Float8Head(Head):
    """titan_fp8.loss.Head with FP8 operands. scale, seen and sums are h's; suffix _t: stored transposed."""

    def __init__(
        self, h, w_VD, gradients, dw_dtype, tp: Ranks | None, state: tuple, rule: CastRule
    ):  # fmt: skip
        (self.scale, self.inverse, self.seen, self.sums), self.rule = state, rule
        super().__init__(h, w_VD, gradients, dw_dtype, tp)
        # The amax in one pass: abs().amax() would hold a copy of w outside of torch.compile.
        w_amax = torch.linalg.vector_norm(self.w_VD, torch.inf, dtype=torch.float32)
        w_amax = all_max(w_amax, tp)
        self.w_scale = scale_from_amax(w_amax, FP8_MAX[E4M3], 0, rule.power_of_two)
        self.w8_VD, self.w8_t_DV = cast(
            self.w_VD, self.w_scale, torch.zeros_like(w_amax), E4M3, False, True, gradients
        )
        del self.w_VD  # under autocast a copy
        self.w_inverse = self.w_scale.reciprocal()
        self.dl_inverse = torch.full_like(self.h_scale, 1 / SCALE)

    def gather_h(self, h: Tensor) -> None:
        self.h_scale, self.h_inverse = scales_in_use(h, self.scale, self.inverse, E4M3, self.rule)
        if self.rule.observe:
            observe(h, self.sums, self.h_scale, E4M3)
        whole = self.tp is None
        self.h8_ND, self.h8_t_DN = cast(
            h, self.h_scale, self.seen, E4M3, self.rule.record, True, whole and self.gradients
        )
        if not whole:
            self.h8_ND = all_gather(self.h8_ND, self.tp)
            self.h8_t_DN = transpose(self.h8_ND) if self.gradients else self.h8_t_DN

    def chunk(self, rows: slice, labels_n: Tensor) -> Tensor:
        n, vocabulary = len(labels_n), len(self.w8_VD)
        dl_t_Vn = self.h8_ND.new_empty((vocabulary, n) if self.gradients else (0, n), dtype=E5M2)
        loss = torch.zeros_like(self.h_scale)
        length = chunk_rows(n, vocabulary, PIECE_LOGITS)
        for start in range(0, n, length):
            part = slice(start, min(start + length, n))
            inside = slice(rows.start + part.start, rows.start + part.stop)
            loss += self._piece(inside, labels_n[part], dl_t_Vn[:, part])
        if self.gradients:
            first = self.dw_VD is None
            dw_VD = scaled_mm(
                dl_t_Vn, self.h8_t_DN[:, rows].t(), self.dl_inverse, self.h_inverse,
                self.dw_dtype if first else self.dtype, fast=False,
            )  # fmt: skip
            self.dw_VD = dw_VD if first else self.dw_VD.add_(dw_VD)
        return loss

    def _piece(self, rows: slice, labels_p: Tensor, dl_t_Vp: Tensor) -> Tensor:
        """The loss of these rows; with gradients their dh and dl_t_Vp. Its own tensors are gone when the next starts."""
        dtype = self.dtype
        logits_pV = scaled_mm(
            self.h8_ND[rows], self.w8_VD.t(), self.h_inverse, self.w_inverse, dtype, fast=True
        )
        loss, lse, columns_p = split_cross_entropy_(logits_pV, labels_p, False, self.tp)
        if self.dh_ND is not None:
            dl_pV = softmax_gradient(logits_pV, columns_p, lse, dl_t_Vp)
            self.dh_ND[rows] = scaled_mm(
                dl_pV, self.w8_t_DV.t(), self.dl_inverse, self.w_inverse, dtype, fast=False
            )
        return loss.sum()


class Float8ChunkedLoss(ChunkedLoss):
    """Drop-in for ChunkedLoss in FP8. N, D and V must be multiples of 16: config, convert, DecoderArgs check.

    In eval mode the scale is used and the amax is not recorded.
    """

    chunk_logits = 1 << 30  # 1 GiB of E5M2

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe = recipe
        self.h = TensorScale(E4M3)

    def slots(self) -> dict[str, TensorScale]:
        return {"h": self.h}

    def head(self, h: Tensor, w_VD: Tensor, gradients: bool, dw_dtype: torch.dtype) -> Head:
        if len(h) % 16:
            raise ValueError(
                f"FP8 GEMMs need batch * sequence to be a multiple of 16, got {len(h)}: change seq_len"
            )
        rule = self.recipe.rule(record=self.training)
        return Float8Head(h, w_VD, gradients, dw_dtype, self.tp, self.h.state(rule), rule)

    def extra_repr(self) -> str:
        return "h:delayed_e4m3 w:tensorwise_e4m3 dl:fixed_e5m2"
