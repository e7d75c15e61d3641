"""Float8Linear: y = x w^T with all three GEMMs in FP8.

    forward      y  [M, N] = x_e4m3 [M, K]     w_e4m3^T [K, N]
    grad input   dx [M, K] = dy_e5m2 [M, N]    w_e4m3 [N, K]
    grad weight  dw [N, K] = dy_e5m2^T [N, M]  x_e4m3 [M, K]

x and dy have delayed scales; w is scaled by its own amax, which is known exactly, once per use. x is kept for backward
in FP8, transposed as its last GEMM wants it; w is cast again there, so that a gathered weight need not stay.
M = batch * sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .formats import E4M3, E5M2, FP8_MAX, amax, saturating_cast, scale_from_amax
from .kernels.cast import cast
from .kernels.gemm import scaled_mm
from .scaling import CastRule, Recipe, TensorScale, scale_in_use


def weight_scale(w_NK: Tensor, power_of_two: bool) -> Tensor:
    """The weight's scale from its own amax; margin does not apply, since nothing can jump."""
    return scale_from_amax(amax(w_NK), FP8_MAX[E4M3], 0, power_of_two)


@torch._dynamo.allow_in_graph
class _Float8Matmul(torch.autograd.Function):
    # Suffix _t: stored transposed. A GEMM's right operand must be contiguous along the summed dimension, as its left one.

    @staticmethod
    def forward(ctx, x_MK, w_NK, x_scale, x_amax, dy_scale, dy_amax, rule: CastRule):
        x_scale = scale_in_use(x_MK, x_scale, E4M3, rule)
        x8_MK, x8_t_KM = cast(x_MK, x_scale, x_amax, E4M3, rule.record, True, ctx.needs_input_grad[1])
        w_scale = weight_scale(w_NK, rule.power_of_two)
        w8_NK = saturating_cast(w_NK, w_scale, E4M3)
        ctx.save_for_backward(x8_t_KM, x_scale, w_NK, w_scale, dy_scale)
        # Not saved: a backward writes it, and autograd would then refuse the next one (two forwards first).
        ctx.dy_amax, ctx.rule = dy_amax, rule
        return scaled_mm(x8_MK, w8_NK.t(), x_scale, w_scale, x_MK.dtype, fast=True)

    @staticmethod
    def backward(ctx, dy_MN):
        x8_t_KM, x_scale, w_NK, w_scale, dy_scale = ctx.saved_tensors
        dy_scale = scale_in_use(dy_MN, dy_scale, E5M2, ctx.rule)
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        dy8_MN, dy8_t_NM = cast(dy_MN, dy_scale, ctx.dy_amax, E5M2, ctx.rule.record, needs_dx, needs_dw)
        dx_MK = dw_NK = None
        if needs_dx:
            _, w8_t_KN = cast(w_NK, w_scale, torch.zeros_like(w_scale), E4M3, False, False, True)
            dx_MK = scaled_mm(dy8_MN, w8_t_KN.t(), dy_scale, w_scale, dy_MN.dtype, fast=False)
        if needs_dw:
            dw_NK = scaled_mm(dy8_t_NM, x8_t_KM.t(), dy_scale, x_scale, w_NK.dtype, fast=False)
        return dx_MK, dw_NK, None, None, None, None, None


class Float8Linear(nn.Linear):
    """nn.Linear without bias whose three GEMMs run in FP8 with delayed scaling. x: [..., K] -> [..., N], in x's dtype.

    Under autocast the product runs in the autocast dtype. In eval mode scales are used and amaxes are not recorded.
    """

    recipe: Recipe

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
            new.dy = TensorScale(E5M2, gradient=True)
        return new

    def slots(self) -> dict[str, TensorScale]:
        return {"x": self.x, "dy": self.dy}

    def forward(self, x: Tensor) -> Tensor:
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        x_MK = x.reshape(-1, x.shape[-1])
        if x_MK.shape[0] % 16:
            raise ValueError(
                f"FP8 GEMMs need batch * sequence to be a multiple of 16, got {x_MK.shape[0]}: change seq_len"
            )
        y_MN = _Float8Matmul.apply(
            x_MK, self.weight.to(x.dtype), self.x.scale, self.x.amax, self.dy.scale, self.dy.amax,
            self.recipe.rule(record=self.training),
        )  # fmt: skip
        return y_MN.view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, x:delayed_e4m3 w:tensorwise_e4m3 dy:delayed_e5m2"
