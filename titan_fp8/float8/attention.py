"""Float8Attention: causal attention with its seven GEMMs on FP8 values (FOG's "FP8DPA").

Forward, with scales s_q, s_k, s_v delayed and P's fixed, because the unnormalised P lies in (0, 1]:

    S = softmax_scale * (q_e4m3 k_e4m3^T) / (s_q s_k)      m = rowmax S      P = exp(S - m)      l = rowsum P
    O = (P_e4m3 v_e4m3) / (s_P s_v l)                      lse = m + log l

Backward ("full"), with S recomputed from the same q, k (GEMM 3) and D = rowsum(dO * O):

    P = exp(S - lse)                    dV = P_e4m3^T dO_e5m2         dP = dO_e5m2 v_e4m3^T
    dS = P * (dP - D)                   dQ = softmax_scale * dS_e5m2 k_e4m3      dK = softmax_scale * dS_e5m2^T q_e4m3

dO and dS have delayed scales, in E5M2 or E4M3. With "forward" the backward GEMMs take the dequantised q, k, v in the compute
dtype. Two backends compute the same function: `_Reference` in plain PyTorch, which holds all of S, and `_Kernels`, the
fused ones of kernels/attention.py (P against a running row maximum, dS recomputed nowhere: five GEMMs backward).

Shapes: B batch, H query heads, K kv heads, R = H / K, S sequence, C head dim. The R query heads of a kv head are folded into
the rows of one batched GEMM: q is [B*K, R*S, C], k and v are [B*K, S, C].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .formats import E4M3, E5M2, FP8_MAX, saturating_cast, scale_from_amax, short_name
from .kernels import attention as kernels
from .kernels.attention import P_SCALE  # 256: exact in every format; P in (0, 1] fills E4M3 up to 256 of 448
from .kernels.gemm import bmm
from .scaling import CastRule, Recipe, TensorScale, quantize, scale_in_use


def _scores(q: Tensor, k: Tensor, factor: Tensor, seq_len: int) -> Tensor:
    """factor * q k^T with the causal mask, [G, R*S, S] float32."""
    s = bmm(q, k.transpose(1, 2)) * factor
    # The R heads of a group lie one after the other in the rows; added, since masking costs CPU many times an addition.
    later = torch.full((seq_len, seq_len), -torch.inf, device=s.device).triu(1)
    return (s.view(len(s), -1, seq_len, seq_len) + later).view_as(s)


@torch._dynamo.allow_in_graph
class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, state, softmax_scale, rule: CastRule, fp8_backward: bool, grad_dtype):
        (s_q, a_q), (s_k, a_k), (s_v, a_v), (s_do, a_do), (s_ds, a_ds) = state
        seq_len = k.shape[1]
        q8, s_q = quantize(q, s_q, a_q, E4M3, rule)
        k8, s_k = quantize(k, s_k, a_k, E4M3, rule)
        v8, s_v = quantize(v, s_v, a_v, E4M3, rule)
        s = _scores(q8, k8, softmax_scale / (s_q * s_k), seq_len)
        m = s.amax(-1, keepdim=True)
        p = torch.exp(s - m)
        l = p.sum(-1, keepdim=True)  # noqa: E741  (the literature's name)
        o = bmm(saturating_cast(p, P_SCALE, E4M3), v8) / (P_SCALE * s_v * l)
        o = o.to(q.dtype)
        ctx.save_for_backward(q8, k8, v8, s_q, s_k, s_v, o, m + torch.log(l), s_do, s_ds)
        # Not saved: a backward writes them, and autograd would then refuse the next one (two forwards first).
        ctx.a_do, ctx.a_ds = a_do, a_ds
        ctx.softmax_scale, ctx.rule, ctx.fp8, ctx.grad_dtype = softmax_scale, rule, fp8_backward, grad_dtype
        return o

    @staticmethod
    def backward(ctx, do):
        q8, k8, v8, s_q, s_k, s_v, o, lse, s_do, s_ds = ctx.saved_tensors
        seq_len, dtype = k8.shape[1], do.dtype
        p = torch.exp(_scores(q8, k8, ctx.softmax_scale / (s_q * s_k), seq_len) - lse)
        delta = (do.float() * o.float()).sum(-1, keepdim=True)
        if ctx.fp8:
            do8, s_do = quantize(do, s_do, ctx.a_do, ctx.grad_dtype, ctx.rule)
            p8 = saturating_cast(p, P_SCALE, E4M3)
            dv = bmm(p8.transpose(1, 2), do8) / (P_SCALE * s_do)
            dp = bmm(do8, v8.transpose(1, 2)) / (s_do * s_v)
            ds8, s_ds = quantize(p * (dp - delta), s_ds, ctx.a_ds, ctx.grad_dtype, ctx.rule)
            dq = bmm(ds8, k8) * (ctx.softmax_scale / (s_ds * s_k))
            dk = bmm(ds8.transpose(1, 2), q8) * (ctx.softmax_scale / (s_ds * s_q))
        else:
            q, k, v = ((t8.float() / s).to(dtype) for t8, s in ((q8, s_q), (k8, s_k), (v8, s_v)))
            dv = torch.bmm(p.to(dtype).transpose(1, 2), do)
            dp = torch.bmm(do, v.transpose(1, 2)).float()
            ds = (p * (dp - delta) * ctx.softmax_scale).to(dtype)
            dq = torch.bmm(ds, k)
            dk = torch.bmm(ds.transpose(1, 2), q)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None, None, None, None


@torch._dynamo.allow_in_graph
class _Kernels(torch.autograd.Function):
    """q [B, H, S, C], k and v [B, K, S, C] bfloat16; all seven products in FP8."""

    @staticmethod
    def forward(ctx, q, k, v, state, softmax_scale, rule: CastRule, grad_dtype):
        (s_q, a_q), (s_k, a_k), (s_v, a_v), (s_do, a_do), (s_ds, a_ds) = state
        seq_len, backward = q.shape[2], any(ctx.needs_input_grad[:3])
        s_q, s_k, s_v = (scale_in_use(x, s, E4M3, rule) for x, s in ((q, s_q), (k, s_k), (v, s_v)))
        q8, q8_t = kernels.attention_cast(q, s_q, a_q, E4M3, rule.record, True, backward, False)
        k8, k8_t = kernels.attention_cast(k, s_k, a_k, E4M3, rule.record, True, backward, True)
        v8, v8_t = kernels.attention_cast(v, s_v, a_v, E4M3, rule.record, backward, True, False)
        o, shift = kernels.attention_forward(q8, k8, v8_t, s_q, s_k, s_v, softmax_scale, seq_len)
        ctx.save_for_backward(q8, k8, q8_t, k8_t, v8, s_q, s_k, s_v, o, shift, s_do, s_ds)
        ctx.a_do, ctx.a_ds = a_do, a_ds
        ctx.softmax_scale, ctx.seq_len, ctx.rule, ctx.grad_dtype = softmax_scale, seq_len, rule, grad_dtype
        return o

    @staticmethod
    def backward(ctx, do):
        q8, k8, q8_t, k8_t, v8, s_q, s_k, s_v, o, shift, s_do, s_ds = ctx.saved_tensors
        rule, dtype = ctx.rule, ctx.grad_dtype
        s_do = scale_in_use(do, s_do, dtype, rule)

        def run(s_ds: Tensor, a_do: Tensor, a_ds: Tensor, record: bool) -> tuple[Tensor, Tensor, Tensor]:
            do8, do8_t, delta = kernels.attention_cast_gradient(do, o, s_do, s_ds, a_do, dtype, record)
            return kernels.attention_backward(
                q8, k8, q8_t, k8_t, v8, do8, do8_t, shift, delta, s_q, s_k, s_v, s_do, s_ds, a_ds,
                ctx.softmax_scale, ctx.seq_len, dtype, record,
            )  # fmt: skip

        if rule.calibrating:
            # dS lives inside the kernel: a first pass for its amax, which gives the scale of the second.
            first = torch.zeros_like(s_ds)
            run(torch.ones_like(s_ds), torch.zeros_like(s_ds), first, True)
            s_ds = scale_from_amax(first, FP8_MAX[dtype], rule.margin, rule.power_of_two)
        return *run(s_ds, ctx.a_do, ctx.a_ds, rule.record), None, None, None, None


class Float8Attention(nn.Module):
    """Drop-in for the decoder's CausalAttention. q: [B, H, S, C], k and v: [B, K, S, C] -> [B, H, S, C], in q's dtype.

    `grad_dtype` is the format of dO and dS; `fused` chooses the kernels, which need `fp8_backward` and a Hopper GPU.
    """

    def __init__(
        self,
        softmax_scale: float,
        recipe: Recipe,
        fp8_backward: bool,
        grad_dtype: torch.dtype = E5M2,
        fused: bool = False,
    ):
        super().__init__()
        assert fp8_backward or not fused
        self.softmax_scale = softmax_scale
        self.recipe = recipe
        self.fp8_backward = fp8_backward
        self.grad_dtype = grad_dtype
        self.fused = fused
        self.q = TensorScale(E4M3)
        self.k = TensorScale(E4M3)
        self.v = TensorScale(E4M3)
        self.do = TensorScale(grad_dtype, gradient=True)
        self.ds = TensorScale(grad_dtype, gradient=True)

    def slots(self) -> dict[str, TensorScale]:
        forward = {"q": self.q, "k": self.k, "v": self.v}
        return forward | {"do": self.do, "ds": self.ds} if self.fp8_backward else forward

    def forward(self, q_BHSC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
        state = tuple((slot.scale, slot.amax) for slot in (self.q, self.k, self.v, self.do, self.ds))
        rule = self.recipe.rule(record=self.training)
        if self.fused:
            kernels.check_operands(q_BHSC, k_BKSC, v_BKSC)
            return _Kernels.apply(q_BHSC, k_BKSC, v_BKSC, state, self.softmax_scale, rule, self.grad_dtype)
        batch, heads, seq_len, dim = q_BHSC.shape
        groups = k_BKSC.shape[1]
        q = q_BHSC.reshape(batch * groups, heads // groups * seq_len, dim)
        k = k_BKSC.reshape(batch * groups, seq_len, dim)
        v = v_BKSC.reshape(batch * groups, seq_len, dim)
        o = _Reference.apply(q, k, v, state, self.softmax_scale, rule, self.fp8_backward, self.grad_dtype)
        return o.view(batch, heads, seq_len, dim)

    def extra_repr(self) -> str:
        form = f"delayed_{short_name(self.grad_dtype)}"
        backward = f"do:{form} ds:{form}" if self.fp8_backward else "backward:compute_dtype"
        backend = "triton" if self.fused else "reference"
        return f"softmax_scale={self.softmax_scale:.4g}, qkv:delayed_e4m3 p:fixed_e4m3 {backward}, backend={backend}"
