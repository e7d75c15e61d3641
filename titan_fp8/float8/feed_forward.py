"""Float8FeedForward: a whole FFN y = act(x w1^T) w2^T with its six (gated: nine) GEMMs in FP8 and two casts fused away.

    forward   x8 = cast(x)      h [M, N] = x8 up8^T                        up = w1, or [w1; w3] with a gate: N = F or 2 F
              z8 = cast(act(h))                       one kernel           y [M, K] = z8 w2_8^T
    backward  dy8 = cast(dy)    dz [M, F] = dy8 w2_8
              dh8 = cast(act'(h) dz), z8 again        one kernel           dw2 = dy8^T z8    dx = dh8 up8    dup = dh8^T x8

The activation never stands in memory in 16 bits: what backward needs of it is made again from h, on the way. Kept for
backward: x8 transposed (a byte per element) and h (two). x, z, dh, dy have delayed scales, weights exact ones (linear.py).

Smooth-SwiGLU (arXiv 2409.12517, section 4): z8 = cast(z_i s_i), w2_8 = cast(w2_i / s_i) by features i, s constant to
autograd. The GEMMs do not know of it. The activation's kernel multiplies z, and dz on its way back, by s; the cast of w2
divides by it; dw2 is divided by it, a pass of its own. Where z_i s_i is clipped, as that of a feature can be which jumps
beyond all that earlier steps foresaw, no gradient flows. s is known before the step (scaling.py), so w2 travels cast and
folded under FSDP2. With `dynamic` s is the call's own, which costs a pass over h, and w2 must be there in 16 bits.

Tensor parallel, up is split by columns and w2 by rows (linear.py): x8 and dy8 are gathered, x8 again backward; y and dx are
scattered. All between is the rank's own, F/T features of every row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from titan_fp8.tensor_parallel import (
    Ranks,
    all_gather,
    begin_gather,
    begin_scatter,
    finish,
    local,
    reduce_scatter,
)

from .formats import E4M3, E5M2, FP8_MAX, scale_from_amax
from .kernels.activation import (
    KINDS,
    _activation,
    _gradient,
    activate,
    activate_backward,
    channel_amax,
    channel_gradient,
)
from .kernels.cast import cast, transpose
from .kernels.gemm import scaled_mm
from .kernels.moments import look, some_rows
from .linear import join, matrix
from .scaling import (
    CastRule,
    ChannelScale,
    FoldedScale,
    Recipe,
    TensorScale,
    WeightScale,
    cast_of,
    channel_scales,
    folded,
    measured_scale,
    observe,
    scales_in_use,
)

SMOOTH = "smooth_swiglu"


def _short(x: Tensor, like: Tensor) -> Tensor:
    """float32 x to be looked at: in 16 bits if `like` has 16. float16 could overflow."""
    return x.bfloat16() if like.dtype.itemsize == 2 else x


@torch._dynamo.allow_in_graph
class _Float8FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_MK, alphas, state, channels, sites, kind: str, rule: CastRule, tp: Ranks | None, w2_KF, *ups
    ):  # fmt: skip
        # channels: None; or (s, z_i's amaxes to be, None), or (None, None, amaxes of w2's columns) if s is dynamic; all [F].
        # Of each tensor: its scale s, the inverse i, its amax to be, and sums o.
        (s_x, i_x, a_x, o_x), (s_up, i_up, *_), (s_z, i_z, a_z, o_z), (s_w2, i_w2, *_) = state[:4]
        (s_dh, i_dh, a_dh, o_dh), (s_dy, i_dy, a_dy, o_dy) = state[4:]
        s_x, i_x = scales_in_use(x_MK, s_x, i_x, E4M3, rule)
        x8_MK, x8_t_KM = cast(
            x_MK, s_x, a_x, E4M3, rule.record, True, tp is None and any(ctx.needs_input_grad)
        )
        kept = x8_t_KM if tp is None else x8_MK
        x8_MK = all_gather(x8_MK, tp)
        h_MN = scaled_mm(x8_MK, join(ups, s_up, False).t(), i_x, i_up, x_MK.dtype, fast=True)
        s_F, a_F, columns_F = channels or (None, None, None)
        m_w2 = s_w2  # what w2 is multiplied by as it is cast
        if columns_F is not None:
            s_F = channel_scales(channel_amax(h_MN), columns_F, 0)
            s_z, s_w2 = (
                torch.ones_like(s_z),
                scale_from_amax((columns_F / s_F).amax(), FP8_MAX[E4M3], 0, rule.power_of_two),
            )
            i_z, i_w2 = s_z, s_w2.reciprocal()
        elif rule.measuring:
            # z lives inside the kernel: a first pass for its amax, which gives the scale of the second.
            first = torch.zeros_like(s_z)
            activate(h_MN, alphas, torch.ones_like(s_z), first, kind, True, s_F)
            s_z = measured_scale(first, s_z, E4M3, rule)
            i_z = s_z.reciprocal()
        if s_F is not None:
            m_w2 = folded(s_w2, s_F)
        z8_MF = activate(h_MN, alphas, s_z, a_z, kind, rule.record and s_F is None, s_F)
        if rule.observe:
            # z never stands in memory: some rows are made again in plain PyTorch. Its amax is that of all rows.
            o_up, o_act = sites
            groups = 1 if tp is None else tp.size
            z_mF = _activation(some_rows(h_MN.detach(), len(o_act), groups), alphas, kind)
            z_mF, known = (z_mF, a_z) if s_F is None else (z_mF * s_F, (channel_amax(h_MN) * s_F).amax())
            z_mF = _short(z_mF, h_MN)
            observe(x_MK, o_x, s_x, E4M3)
            look(z_mF, o_z, groups, moments=False, cast=cast_of(s_z, E4M3))
            look(h_MN, o_up, groups)
            look(z_mF, o_act, groups, known=known)
        ctx.save_for_backward(
            kept, h_MN, alphas, i_x, s_z, i_z, s_dh, i_dh, s_dy, i_dy, s_up, i_up, i_w2, m_w2, s_F, w2_KF, *ups
        )  # fmt: skip
        # Not saved: a backward writes them, and autograd would then refuse the next one (two forwards first).
        ctx.a_dh, ctx.a_dy, ctx.a_F, ctx.o_dh, ctx.o_dy, ctx.kind, ctx.rule, ctx.tp = (
            a_dh,
            a_dy,
            a_F,
            o_dh,
            o_dy,
            kind,
            rule,
            tp,
        )
        y_MK = scaled_mm(z8_MF, join([w2_KF], m_w2, False).t(), i_z, i_w2, x_MK.dtype, fast=True)
        return reduce_scatter(y_MK, tp)

    @staticmethod
    def backward(ctx, dy_MK):
        (
            kept,
            h_MN,
            alphas,
            i_x,
            s_z,
            i_z,
            s_dh,
            i_dh,
            s_dy,
            i_dy,
            s_up,
            i_up,
            i_w2,
            m_w2,
            s_F,
            w2_KF,
            *ups,
        ) = ctx.saved_tensors
        rule, kind, tp = ctx.rule, ctx.kind, ctx.tp
        s_dy, i_dy = scales_in_use(dy_MK, s_dy, i_dy, E5M2, rule)
        dy8_MK, dy8_t_KM = cast(dy_MK, s_dy, ctx.a_dy, E5M2, rule.record, True, tp is None)
        dy8_MK = all_gather(dy8_MK, tp)
        kept = begin_gather(kept, tp)
        if tp is not None:
            dy8_t_KM = transpose(dy8_MK)
        w2_t_FK = join([w2_KF], m_w2, True)
        dz_MF = scaled_mm(dy8_MK, w2_t_FK.t(), i_dy, i_w2, dy_MK.dtype, fast=False)
        if rule.measuring:
            first = torch.zeros_like(s_dh)
            activate_backward(dz_MF, h_MN, alphas, s_z, torch.ones_like(s_dh), first, kind, E5M2, True, s_F)
            s_dh = measured_scale(first, s_dh, E5M2, rule)
            i_dh = s_dh.reciprocal()
        dh8_MN, dh8_t_NM, z8_t_FM, dalphas = activate_backward(
            dz_MF, h_MN, alphas, s_z, s_dh, ctx.a_dh, kind, E5M2, rule.record, s_F, ctx.a_F
        )
        if rule.observe:
            observe(dy_MK, ctx.o_dy, s_dy, E5M2, amax=ctx.a_dy)
            batch, groups = len(ctx.o_dh), 1 if tp is None else tp.size
            dz_mF, h_mN = (some_rows(x, batch, groups) for x in (dz_MF, h_MN))
            if s_F is not None:
                dz_mF = channel_gradient(dz_mF, _activation(h_mN, alphas, kind), s_F, s_z)
            dh_mN, _ = _gradient(dz_mF, h_mN, alphas, kind)
            look(_short(dh_mN, h_MN), ctx.o_dh, groups, moments=False, cast=cast_of(s_dh, E5M2))
        up_t_KN = join(ups, s_up, True)
        dx_MK = begin_scatter(scaled_mm(dh8_MN, up_t_KN.t(), i_dh, i_up, dy_MK.dtype, fast=False), tp)
        dw2_KF = scaled_mm(dy8_t_KM, z8_t_FM.t(), i_dy, i_z, w2_KF.dtype, fast=False)
        if s_F is not None:
            dw2_KF = dw2_KF.mul_(s_F.reciprocal())
        x8_t_KM = kept if tp is None else transpose(finish(kept, tp, E4M3))
        dup_NK = scaled_mm(dh8_t_NM, x8_t_KM.t(), i_dh, i_x, w2_KF.dtype, fast=False)
        return (
            finish(dx_MK, tp, dy_MK.dtype),
            None if alphas is None else dalphas,
            *(None,) * 6,
            dw2_KF,
            *dup_NK.split([w.shape[0] for w in ups]),
        )


class Float8FeedForward(nn.Module):
    """Drop-in for the decoder's FeedForward, any activation. x: [..., K] -> [..., K], in x's dtype.

    `dynamic` is for Smooth-SwiGLU: scale features by their amaxes in this call, not in earlier steps.

    Under autocast the products run in the autocast dtype. In eval mode scales are used and amaxes are not recorded.
    With `tp`: x [B, S/T, K] -> [B, S/T, K], F/T features on a rank.
    """

    tp: Ranks | None = None

    def __init__(self, plain: Any, recipe: Recipe, dynamic: bool = False):
        """Take over the linears w1, w2, w3 (or None) and the activation of the decoder's FeedForward `plain`."""
        super().__init__()
        assert plain.activation in (*KINDS, SMOOTH), plain.activation
        self.activation = plain.activation
        self.w1, self.w2, self.w3, self.act = plain.w1, plain.w2, plain.w3, plain.act
        self.probes = plain.probes
        self.recipe = recipe
        self.x = TensorScale(E4M3)
        self.up = WeightScale(self.ups())
        if self.activation == SMOOTH:
            self.z: TensorScale = ChannelScale(self.w2.in_features)
            self.down: WeightScale = FoldedScale(self.w2, self.z)
        else:
            self.z = TensorScale(E4M3)
            self.down = WeightScale((self.w2,))
        self.dynamic = dynamic
        self.dh = TensorScale(E5M2, gradient=True)
        self.dy = TensorScale(E5M2, gradient=True)

    def slots(self) -> dict[str, TensorScale]:
        return {"x": self.x, "up": self.up, "z": self.z, "down": self.down, "dh": self.dh, "dy": self.dy}

    def ups(self) -> tuple[nn.Linear, ...]:
        return (self.w1,) if self.w3 is None else (self.w1, self.w3)

    def forward(self, x: Tensor) -> Tensor:
        x_MK = matrix(x)
        rule = self.recipe.rule(record=self.training)
        state = tuple(slot.state(rule) for slot in self.slots().values())
        sites = self.probes["ffn_up"].sums, self.probes["ffn_act"].sums
        alphas = None if self.act is None else self.act.alphas()
        channels, z = None, self.z
        if isinstance(z, ChannelScale):
            used = (None, None, z.column_amax) if self.dynamic else (z.channel_scale, z.channel_amax, None)
            channels = tuple(None if t is None else z.own(t) for t in used)
        kind = "swiglu" if self.activation == SMOOTH else self.activation
        y_MK = _Float8FeedForward.apply(
            x_MK, alphas, state, channels, sites, kind, rule, self.tp,
            *(local(linear.weight).to(x_MK.dtype) for linear in (self.w2, *self.ups())),
        )  # fmt: skip
        return self.probes["ffn_out"](y_MK.view(*x.shape[:-1], -1))

    def extra_repr(self) -> str:
        channels = (
            f", channels={'dynamic' if self.dynamic else 'delayed'}" if self.activation == SMOOTH else ""
        )
        return (
            f"activation={self.activation}{channels}, x,z:delayed_e4m3 w:tensorwise_e4m3 dh,dy:delayed_e5m2"
        )
