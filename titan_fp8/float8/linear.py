"""Float8Linear: y = x w^T with all three GEMMs in FP8.

    forward      y  [M, N] = x_e4m3 [M, K]     w_e4m3^T [K, N]
    grad input   dx [M, K] = dy_e5m2 [M, N]    w_e4m3 [N, K]
    grad weight  dw [N, K] = dy_e5m2^T [N, M]  x_e4m3 [M, K]

x and dy have delayed scales; w is scaled by its own amax, which is known exactly, once per use. x is kept for backward in
FP8; w is cast again there, so that a gathered weight need not stay. M = batch * sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .formats import E4M3, E5M2, FP8_MAX, amax, saturating_cast, scale_from_amax
from .kernels.gemm import column_major, scaled_mm
from .scaling import CastRule, Recipe, TensorScale, quantize


def quantize_weight(w_NK: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """(w in E4M3, its scale) from the weight's own amax; margin does not apply, since nothing can jump."""
    scale = scale_from_amax(amax(w_NK), FP8_MAX[E4M3], 0, power_of_two)
    return saturating_cast(w_NK, scale, E4M3), scale


@torch._dynamo.allow_in_graph
class _Float8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MK, w_NK, x_scale, x_amax, dy_scale, dy_amax, rule: CastRule):
        x_fp8, x_scale = quantize(x_MK.contiguous(), x_scale, x_amax, E4M3, rule)
        w_fp8, w_scale = quantize_weight(w_NK, rule.power_of_two)
        ctx.save_for_backward(x_fp8, x_scale, w_NK, dy_scale)
        # Not saved: a backward writes it, and autograd would then refuse the next one (two forwards first).
        ctx.dy_amax, ctx.rule = dy_amax, rule
        return scaled_mm(x_fp8, w_fp8.t(), x_scale, w_scale, x_MK.dtype, fast=True)

    @staticmethod
    def backward(ctx, dy_MN):
        x_fp8, x_scale, w_NK, dy_scale = ctx.saved_tensors
        dy_fp8, dy_scale = quantize(dy_MN.contiguous(), dy_scale, ctx.dy_amax, E5M2, ctx.rule)
        w_fp8, w_scale = quantize_weight(w_NK, ctx.rule.power_of_two)
        dx_MK = scaled_mm(dy_fp8, column_major(w_fp8), dy_scale, w_scale, dy_MN.dtype, fast=False)
        dw_NK = scaled_mm(
            dy_fp8.t().contiguous(), column_major(x_fp8), dy_scale, x_scale, w_NK.dtype, fast=False
        )
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
            new.dy = TensorScale(E5M2)
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
