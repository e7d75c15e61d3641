"""Float8Attention: causal attention with its seven GEMMs on FP8 values (FOG's "FP8DPA").

Forward, with scales s_q, s_k, s_v delayed and P's fixed, because the unnormalised P lies in (0, 1]:

    S = softmax_scale * (q_e4m3 k_e4m3^T) / (s_q s_k)      m = rowmax S      P = exp(S - m)      l = rowsum P
    O = (P_e4m3 v_e4m3) / (s_P s_v l)                      lse = m + log l

Backward ("full"), with S recomputed from the same q, k (GEMM 3) and D = rowsum(dO * O):

    P = exp(S - lse)                    dV = P_e4m3^T dO_e5m2         dP = dO_e5m2 v_e4m3^T
    dS = P * (dP - D)                   dQ = softmax_scale * dS_e5m2 k_e4m3      dK = softmax_scale * dS_e5m2^T q_e4m3

dO and dS have delayed scales. With "forward" the backward GEMMs take the dequantised q, k, v in the compute dtype.
This is the plain-PyTorch reference: it holds all of S. Fused kernels will stand behind the same `Float8Attention`.

Shapes: B batch, H query heads, K kv heads, R = H / K, S sequence, C head dim. The R query heads of a kv head are folded into
the rows of one batched GEMM: q is [B*K, R*S, C], k and v are [B*K, S, C].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .formats import E4M3, E5M2, saturating_cast
from .kernels.gemm import bmm
from .scaling import CastRule, Recipe, TensorScale, quantize

P_SCALE = 256.0  # exact in every format; P in (0, 1] then fills E4M3 up to 256 of 448


def _scores(q: Tensor, k: Tensor, factor: Tensor, seq_len: int) -> Tensor:
    """factor * q k^T with the causal mask, [G, R*S, S] float32."""
    s = bmm(q, k.transpose(1, 2)) * factor
    # The R heads of a group lie one after the other in the rows; added, since masking costs CPU many times an addition.
    later = torch.full((seq_len, seq_len), -torch.inf, device=s.device).triu(1)
    return (s.view(len(s), -1, seq_len, seq_len) + later).view_as(s)


@torch._dynamo.allow_in_graph
class _Float8AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, state, softmax_scale, rule: CastRule, fp8_backward: bool):
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
        ctx.softmax_scale, ctx.rule, ctx.fp8 = softmax_scale, rule, fp8_backward
        return o

    @staticmethod
    def backward(ctx, do):
        q8, k8, v8, s_q, s_k, s_v, o, lse, s_do, s_ds = ctx.saved_tensors
        seq_len, dtype = k8.shape[1], do.dtype
        p = torch.exp(_scores(q8, k8, ctx.softmax_scale / (s_q * s_k), seq_len) - lse)
        delta = (do.float() * o.float()).sum(-1, keepdim=True)
        if ctx.fp8:
            do8, s_do = quantize(do, s_do, ctx.a_do, E5M2, ctx.rule)
            p8 = saturating_cast(p, P_SCALE, E4M3)
            dv = bmm(p8.transpose(1, 2), do8) / (P_SCALE * s_do)
            dp = bmm(do8, v8.transpose(1, 2)) / (s_do * s_v)
            ds8, s_ds = quantize(p * (dp - delta), s_ds, ctx.a_ds, E5M2, ctx.rule)
            dq = bmm(ds8, k8) * (ctx.softmax_scale / (s_ds * s_k))
            dk = bmm(ds8.transpose(1, 2), q8) * (ctx.softmax_scale / (s_ds * s_q))
        else:
            q, k, v = ((t8.float() / s).to(dtype) for t8, s in ((q8, s_q), (k8, s_k), (v8, s_v)))
            dv = torch.bmm(p.to(dtype).transpose(1, 2), do)
            dp = torch.bmm(do, v.transpose(1, 2)).float()
            ds = (p * (dp - delta) * ctx.softmax_scale).to(dtype)
            dq = torch.bmm(ds, k)
            dk = torch.bmm(ds.transpose(1, 2), q)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None, None, None


class Float8Attention(nn.Module):
    """Drop-in for the decoder's CausalAttention. q: [B, H, S, C], k and v: [B, K, S, C] -> [B, H, S, C], in q's dtype."""

    def __init__(self, softmax_scale: float, recipe: Recipe, fp8_backward: bool):
        super().__init__()
        self.softmax_scale = softmax_scale
        self.recipe = recipe
        self.fp8_backward = fp8_backward
        self.q = TensorScale(E4M3)
        self.k = TensorScale(E4M3)
        self.v = TensorScale(E4M3)
        self.do = TensorScale(E5M2)
        self.ds = TensorScale(E5M2)

    def slots(self) -> dict[str, TensorScale]:
        forward = {"q": self.q, "k": self.k, "v": self.v}
        return forward | {"do": self.do, "ds": self.ds} if self.fp8_backward else forward

    def forward(self, q_BHSC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
        batch, heads, seq_len, dim = q_BHSC.shape
        groups = k_BKSC.shape[1]
        q = q_BHSC.reshape(batch * groups, heads // groups * seq_len, dim)
        k = k_BKSC.reshape(batch * groups, seq_len, dim)
        v = v_BKSC.reshape(batch * groups, seq_len, dim)
        state = tuple((slot.scale, slot.amax) for slot in (self.q, self.k, self.v, self.do, self.ds))
        o = _Float8AttentionFunction.apply(
            q, k, v, state, self.softmax_scale, self.recipe.rule(record=self.training), self.fp8_backward
        )
        return o.view(batch, heads, seq_len, dim)

    def extra_repr(self) -> str:
        backward = "do:delayed_e5m2 ds:delayed_e5m2" if self.fp8_backward else "backward:compute_dtype"
        return f"softmax_scale={self.softmax_scale:.4g}, qkv:delayed_e4m3 p:fixed_e4m3 {backward}, backend=reference"
