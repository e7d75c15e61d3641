"""Float8Linear: y = x w^T with all three GEMMs in FP8; Float8FanOut: the same for several weights of one x.

    forward      y  [M, N] = x_e4m3 [M, K]     w_e4m3^T [K, N]
    grad input   dx [M, K] = dy_e5m2 [M, N]    w_e4m3 [N, K]
    grad weight  dw [N, K] = dy_e5m2^T [N, M]  x_e4m3 [M, K]

x and dy have delayed scales; w is scaled by its own amax, taken when the optimizer has changed it (scaling.py). x is kept
for backward in FP8, transposed as its last GEMM wants it; w is cast again there, so that a gathered weight need not stay.
M = batch * sequence. Weights that share x (those of q, k and v) are cast into one FP8 matrix, N = N_1 + N_2 + ..., with one
scale: x is cast and kept once, and each of the three GEMMs runs once. The parameters stay apart.

Tensor parallel, T ranks (titan_fp8/tensor_parallel.py): what is gathered is gathered in FP8, what is scattered in x's dtype.

    by columns   x8 [M/T, K] --gather--> [M, K]    y  [M, N/T]                    w [N/T, K]
                 dy8 [M, N/T]                      dx [M, K] --scatter--> [M/T, K]
    by rows      x8 [M, K/T]                       y  [M, N] --scatter--> [M/T, N]                    w [N, K/T]
                 dy8 [M/T, N] --gather--> [M, N]   dx [M, K/T]

By columns, x8 [M/T, K] is kept and gathered again backward, while the GEMM for dx runs: M K bytes of traffic that nobody
waits for, where x8 kept whole would take T times the memory in every layer. dx is scattered while the GEMM for dw runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from titan_fp8.tensor_parallel import (
    Ranks,
    all_gather,
    begin_gather,
    begin_scatter,
    by_rank,
    by_sequence,
    finish,
    local,
    reduce_scatter,
)

from .formats import E4M3, E5M2
from .kernels.cast import cast, cast_joined, transpose
from .kernels.gemm import scaled_mm
from .scaling import CastRule, Recipe, TensorScale, WeightScale, observe, scales_in_use
from .weights import GatheredWeight


def join(weights: Sequence[Tensor], scale: Tensor, transposed: bool) -> Tensor:
    """Weights [N_i, K] in E4M3, one below the other [N, K], or that transposed [K, N]. Gathered ones are in E4M3 already."""
    weights = [w.q if isinstance(w, GatheredWeight) else w for w in weights]
    if len(weights) == 1 and not transposed and weights[0].dtype == E4M3:
        return weights[0]
    return cast_joined(weights, scale, E4M3, transposed)


def matrix(x: Tensor) -> Tensor:
    """x [..., K] as [M, K], in the autocast dtype under autocast. Raises ValueError if M is no multiple of 16."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        x = x.to(torch.get_autocast_dtype(device_type))
    x_MK = x.reshape(-1, x.shape[-1])
    if x_MK.shape[0] % 16:
        raise ValueError(
            f"FP8 GEMMs need batch * sequence to be a multiple of 16, got {x_MK.shape[0]}: change seq_len"
        )
    return x_MK


@torch._dynamo.allow_in_graph
class _Float8Matmul(torch.autograd.Function):
    # Suffix _t: stored transposed. A GEMM's right operand must be contiguous along the summed dimension, as its left one.

    @staticmethod
    def forward(
        ctx, x_MK, x, w, dy, rule: CastRule, columns: Ranks | None, rows: Ranks | None, *weights
    ):  # fmt: skip
        (x_scale, x_inverse, x_amax, x_sums), (w_scale, w_inverse) = x, w
        dy_scale, dy_inverse, dy_amax, dy_sums = dy
        needs_dw = any(ctx.needs_input_grad[7:])
        x_scale, x_inverse = scales_in_use(x_MK, x_scale, x_inverse, E4M3, rule)
        x8_MK, x8_t_KM = cast(x_MK, x_scale, x_amax, E4M3, rule.record, True, needs_dw and columns is None)
        if rule.observe:
            observe(x_MK, x_sums, x_scale, E4M3, rows)
        w8_NK = join(weights, w_scale, False)
        kept = x8_t_KM if columns is None else x8_MK
        ctx.save_for_backward(kept, x_inverse, w_scale, w_inverse, dy_scale, dy_inverse, *weights)
        # Not saved: a backward writes them, and autograd would then refuse the next one (two forwards first).
        ctx.dy_amax, ctx.dy_sums = dy_amax, dy_sums
        ctx.rule, ctx.needs_dw, ctx.columns, ctx.rows = rule, needs_dw, columns, rows
        y_MN = scaled_mm(all_gather(x8_MK, columns), w8_NK.t(), x_inverse, w_inverse, x_MK.dtype, fast=True)
        return reduce_scatter(y_MN, rows)

    @staticmethod
    def backward(ctx, dy_MN):
        kept, x_inverse, w_scale, w_inverse, dy_scale, dy_inverse, *weights = ctx.saved_tensors
        needs_dx, needs_dw, columns, rows = ctx.needs_input_grad[0], ctx.needs_dw, ctx.columns, ctx.rows
        dy_scale, dy_inverse = scales_in_use(dy_MN, dy_scale, dy_inverse, E5M2, ctx.rule)
        dy8_MN, dy8_t_NM = cast(
            dy_MN, dy_scale, ctx.dy_amax, E5M2, ctx.rule.record, needs_dx or rows is not None, needs_dw and rows is None
        )  # fmt: skip
        if ctx.rule.observe:
            observe(dy_MN, ctx.dy_sums, dy_scale, E5M2, columns, ctx.dy_amax)
        dy8_MN = all_gather(dy8_MN, rows)
        if needs_dw:
            kept = begin_gather(kept, columns)
        dx_MK, dws = None, (None,) * len(weights)
        if needs_dx:
            w8_t_KN = join(weights, w_scale, True)
            dx_MK = scaled_mm(dy8_MN, w8_t_KN.t(), dy_inverse, w_inverse, dy_MN.dtype, fast=False)
            dx_MK = begin_scatter(dx_MK, columns)
        if needs_dw:
            x8_t_KM = kept if columns is None else transpose(finish(kept, columns, E4M3))
            dy8_t_NM = dy8_t_NM if rows is None else transpose(dy8_MN)
            dw_NK = scaled_mm(dy8_t_NM, x8_t_KM.t(), dy_inverse, x_inverse, weights[0].dtype, fast=False)
            dws = dw_NK.split([w_NK.shape[0] for w_NK in weights])
        if needs_dx:
            dx_MK = finish(dx_MK, columns, dy_MN.dtype)
        return dx_MK, *(None,) * 6, *dws


class Float8Linear(nn.Linear):
    """nn.Linear without bias whose three GEMMs run in FP8 with delayed scaling. x: [..., K] -> [..., N], in x's dtype.

    Under autocast the product runs in the autocast dtype. In eval mode scales are used and amaxes are not recorded.
    With `tp` it is split by rows: x [B, S, K/T] -> [B, S/T, N].
    """

    recipe: Recipe
    tp: Ranks | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe) -> Float8Linear:
        """Take over a linear's weight. Its dimensions must be multiples of 16 (checked by convert)."""
        assert linear.bias is None
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, bias=False)
        new.weight = linear.weight
        new.recipe = recipe
        with linear.weight.device:
            new.x = TensorScale(E4M3)
            new.w = WeightScale((new,))
            new.dy = TensorScale(E5M2, gradient=True)
        return new

    def slots(self) -> dict[str, TensorScale]:
        return {"x": self.x, "w": self.w, "dy": self.dy}

    def forward(self, x: Tensor) -> Tensor:
        x_MK = matrix(x if self.tp is None else by_rank(x, self.tp))
        rule = self.recipe.rule(record=self.training)
        y_MN = _Float8Matmul.apply(
            x_MK, self.x.state(rule), (self.w.scale, self.w.inverse), self.dy.state(rule), rule, None,
            self.tp, local(self.weight).to(x_MK.dtype),
        )  # fmt: skip
        return y_MN.view(*x.shape[:-1], -1) if self.tp is None else y_MN.unflatten(0, (len(x), -1))

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, x:delayed_e4m3 w:tensorwise_e4m3 dy:delayed_e5m2"


class Float8FanOut(nn.Module):
    """Drop-in for the decoder's FanOut: x [..., K], linears with weights [N_i, K] -> a tuple of [..., N_i], in x's dtype.

    With `tp` it is split by columns: x [B, S/T, K] -> [B, S, N_i/T].
    """

    tp: Ranks | None = None

    def __init__(self, linears: dict[str, nn.Linear], recipe: Recipe):
        super().__init__()
        self.names = tuple(linears)
        self.recipe = recipe
        self.x = TensorScale(E4M3)
        self.w = WeightScale(tuple(linears.values()))
        self.dy = TensorScale(E5M2, gradient=True)

    def slots(self) -> dict[str, TensorScale]:
        return {"x": self.x, "w": self.w, "dy": self.dy}

    def forward(self, x: Tensor, *linears: nn.Linear) -> tuple[Tensor, ...]:
        x_MK = matrix(x)
        weights = [local(linear.weight) for linear in linears]
        rule = self.recipe.rule(record=self.training)
        y_MN = _Float8Matmul.apply(
            x_MK, self.x.state(rule), (self.w.scale, self.w.inverse), self.dy.state(rule), rule, self.tp,
            None, *(w.to(x_MK.dtype) for w in weights),
        )  # fmt: skip
        y = y_MN.view(*x.shape[:-1], -1) if self.tp is None else by_sequence(y_MN, len(x), self.tp)
        return y.split([len(w) for w in weights], -1)

    def extra_repr(self) -> str:
        return f"{'+'.join(self.names)}, x:delayed_e4m3 w:tensorwise_e4m3 dy:delayed_e5m2"
