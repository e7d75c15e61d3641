"""Float8Attention: causal attention with its seven GEMMs on FP8 values (FOG's "FP8DPA").

Forward, with scales s_q, s_k, s_v delayed and P's fixed, because the unnormalised P lies in (0, 1]:

    S = softmax_scale * (q_e4m3 k_e4m3^T) / (s_q s_k)      m = rowmax S      P = exp(S - m)      l = rowsum P
    O = (P_e4m3 v_e4m3) / (s_P s_v l)                      lse = m + log l

Backward ("full"), with S recomputed from the same q, k (GEMM 3) and D = rowsum(dO * O):

    P = exp(S - lse)                    dV = P_e4m3^T dO_e5m2         dP = dO_e5m2 v_e4m3^T
    dS = P * (dP - D)                   dQ = softmax_scale * dS_e5m2 k_e4m3      dK = softmax_scale * dS_e5m2^T q_e4m3

dO and dS have delayed scales, in E5M2 or E4M3. With "forward" the backward GEMMs take the dequantised q, k, v in the compute
dtype. With `recipe.attention_16bit` all seven run in it, by PyTorch's attention: the policy's way out.

Backends compute the same function: "reference" in plain PyTorch, which holds all of S, "triton", the fused kernels of
kernels/attention.py (P against a running row maximum, dS recomputed nowhere: five GEMMs backward), and, forward only,
"cudnn" (kernels/attention_cudnn.py: O is rounded to E4M3). `resolve` says which one "auto" is, and why.

Shapes: B batch, H query heads, K kv heads, R = H / K, S sequence, C head dim. The R query heads of a kv head are folded into
the rows of one batched GEMM: q is [B*K, R*S, C], k and v are [B*K, S, C].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_fp8.errors import UserError

from .formats import E4M3, E5M2, fold_amax, saturating_cast, short_name
from .kernels import attention as kernels
from .kernels import attention_cudnn as cudnn
from .kernels.attention_cast import (
    P_SCALE,  # 256: exact in every format; P in (0, 1] fills E4M3 up to 256 of 448
)
from .kernels.attention_forward import require_hopper
from .kernels.gemm import bmm
from .scaling import CastRule, Recipe, TensorScale, measured_scale, observe, quantize, scale_in_use

BACKENDS = {"forward": ("triton", "cudnn", "reference"), "backward": ("triton", "reference")}
# "auto" on Hopper. cudnn's forward is faster, but it rounds O once more, and it needs a package: a run's numbers must not
# depend on whether that happens to be installed. From tools/benchmark.py --attention-only, one H200, 2026-11-22, torch 2.11,
# cuDNN 9.19: ms, H32 KV8 C128, causal. cudnn's forward holds the pass that brings O back to bfloat16; "all" is casts,
# forward and our backward.
#     B, S       forward triton  cudnn      backward triton  cudnn      all, forward triton  cudnn
#     8, 2048             0.486  0.438                0.963   2.21                    1.699  1.624
#     4, 4096             0.842  0.695                1.751   3.98                    2.838  2.608
#     2, 8192             1.588  1.364                3.357   5.01                    5.456  4.947
# Error against float32 at S 1024, o / dq / dk / dv in %: triton 4.6 / 6.6 / 6.5 / 5.0, with cudnn forward
# 5.3 / 6.7 / 6.6 / 5.0, cuDNN both ways 5.3 / 7.0 / 7.0 / 5.7. Its backward is slower and writes FP8: not offered.
AUTO = {"forward": "triton", "backward": "triton"}


def resolve(backend: str, which: str, device: torch.device) -> str:
    """The backend that `backend`, "auto" or a name, is for `which`, "forward" or "backward", on `device`.

    "auto" is "reference" on CPU. Raises UserError if there is no such backend, or if the device or a package it needs is
    missing. "triton" and "cudnn" on CPU are their plain-PyTorch forms: for tests.
    """
    if backend not in ("auto", *BACKENDS[which]):
        names = ", ".join(("auto", *BACKENDS[which]))
        raise UserError(f'FP8 attention has no {which} backend "{backend}": choose one of {names}')
    if device.type == "cpu":
        return "reference" if backend == "auto" else backend
    if backend != "reference":
        require_hopper(device)
    if backend == "auto":
        backend = AUTO[which]
    if backend == "cudnn":
        cudnn.library()
    return backend


def check_pair(forward: str, backward: str, fp8_backward: bool) -> None:
    """Raises UserError for resolved backends that do not go together: the kernels' backward reads what a kernel kept."""
    if (forward == "reference") != (backward == "reference"):
        raise UserError(
            f'FP8 attention needs backend "reference" in both directions or in none, got forward "{forward}",'
            f' backward "{backward}": make them "reference" both, or choose backward "triton"'
        )
    if forward != "reference" and not fp8_backward:
        raise UserError(
            f'FP8 attention with backend "{forward}" needs [fp8] attention = "full", got "forward":'
            ' write attention = "full", or backend "reference"'
        )


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
        (s_q, a_q, o_q), (s_k, a_k, o_k), (s_v, a_v, o_v), (s_do, a_do, o_do), (s_ds, a_ds, _) = state
        seq_len = k.shape[1]
        q8, s_q = quantize(q, s_q, a_q, E4M3, rule)
        k8, s_k = quantize(k, s_k, a_k, E4M3, rule)
        v8, s_v = quantize(v, s_v, a_v, E4M3, rule)
        if rule.observe:
            for x, o_x, s_x in ((q, o_q, s_q), (k, o_k, s_k), (v, o_v, s_v)):
                observe(x, o_x, s_x, E4M3)
        s = _scores(q8, k8, softmax_scale / (s_q * s_k), seq_len)
        m = s.amax(-1, keepdim=True)
        p = torch.exp(s - m)
        l = p.sum(-1, keepdim=True)  # noqa: E741  (the literature's name)
        o = bmm(saturating_cast(p, P_SCALE, E4M3), v8) / (P_SCALE * s_v * l)
        o = o.to(q.dtype)
        ctx.save_for_backward(q8, k8, v8, s_q, s_k, s_v, o, m + torch.log(l), s_do, s_ds)
        # Not saved: a backward writes them, and autograd would then refuse the next one (two forwards first).
        ctx.a_do, ctx.a_ds, ctx.o_do = a_do, a_ds, o_do
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
            if ctx.rule.observe:
                observe(do, ctx.o_do, s_do, ctx.grad_dtype, amax=ctx.a_do)
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
    """q [B, H, S, C], k and v [B, K, S, C] bfloat16; all seven products in FP8. `backend` of the forward."""

    @staticmethod
    def forward(ctx, q, k, v, state, softmax_scale, rule: CastRule, grad_dtype, backend: str):
        (s_q, a_q, o_q), (s_k, a_k, o_k), (s_v, a_v, o_v), (s_do, a_do, o_do), (s_ds, a_ds, _) = state
        seq_len, backward = q.shape[2], any(ctx.needs_input_grad[:3])
        s_q, s_k, s_v = (scale_in_use(x, s, E4M3, rule) for x, s in ((q, s_q), (k, s_k), (v, s_v)))
        if rule.observe:
            for x, o_x, s_x in ((q, o_q, s_q), (k, o_k, s_k), (v, o_v, s_v)):
                observe(x, o_x, s_x, E4M3)
        q8, q8_t = kernels.attention_cast(q, s_q, a_q, E4M3, rule.record, True, backward, False)
        k8, k8_t = kernels.attention_cast(k, s_k, a_k, E4M3, rule.record, True, backward, True)
        if backend == "cudnn":
            v8, _ = kernels.attention_cast(v, s_v, a_v, E4M3, rule.record, True, False, False)
            o, shift = cudnn.forward(q8, k8, v8, s_q, s_k, s_v, softmax_scale, seq_len)
        else:
            v8, v8_t = kernels.attention_cast(v, s_v, a_v, E4M3, rule.record, backward, True, False)
            o, shift = kernels.attention_forward(q8, k8, v8_t, s_q, s_k, s_v, softmax_scale, seq_len)
        ctx.save_for_backward(q8, k8, q8_t, k8_t, v8, s_q, s_k, s_v, o, shift, s_do, s_ds)
        ctx.a_do, ctx.a_ds, ctx.o_do = a_do, a_ds, o_do
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

        if rule.measuring:
            # dS lives inside the kernel: a first pass for its amax, which gives the scale of the second.
            first = torch.zeros_like(s_ds)
            run(torch.ones_like(s_ds), torch.zeros_like(s_ds), first, True)
            s_ds = measured_scale(first, s_ds, dtype, rule)
        gradients = run(s_ds, ctx.a_do, ctx.a_ds, rule.record)
        if rule.observe:
            observe(do, ctx.o_do, s_do, dtype, amax=ctx.a_do)
        return *gradients, None, None, None, None, None


class Float8Attention(nn.Module):
    """Drop-in for the decoder's CausalAttention. q: [B, H, S, C], k and v: [B, K, S, C] -> [B, H, S, C], in q's dtype.

    `grad_dtype` is the format of dO and dS. The backends are names that `resolve` returned: both "reference", or
    "triton" or "cudnn" forward and "triton" backward, which need `fp8_backward`.

    Raises UserError for backends that do not go together.
    """

    def __init__(
        self,
        softmax_scale: float,
        recipe: Recipe,
        fp8_backward: bool,
        grad_dtype: torch.dtype = E5M2,
        forward_backend: str = "reference",
        backward_backend: str = "reference",
    ):
        super().__init__()
        check_pair(forward_backend, backward_backend, fp8_backward)
        self.softmax_scale = softmax_scale
        self.recipe = recipe
        self.fp8_backward = fp8_backward
        self.grad_dtype = grad_dtype
        self.forward_backend = forward_backend
        self.backward_backend = backward_backend
        self.q = TensorScale(E4M3)
        self.k = TensorScale(E4M3)
        self.v = TensorScale(E4M3)
        self.do = TensorScale(grad_dtype, gradient=True)
        self.ds = TensorScale(grad_dtype, gradient=True)

    def slots(self) -> dict[str, TensorScale]:
        forward = {"q": self.q, "k": self.k, "v": self.v}
        return forward | {"do": self.do, "ds": self.ds} if self.fp8_backward else forward

    def forward(self, q_BHSC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
        rule = self.recipe.rule(record=self.training)
        state = tuple(
            (slot.scale, slot.amax, slot.sums if rule.observe else None)
            for slot in (self.q, self.k, self.v, self.do, self.ds)
        )
        if self.recipe.attention_16bit:
            if rule.record:  # the scales of q, k and v stay those of now; dO and dS are not seen
                for slot, x in ((self.q, q_BHSC), (self.k, k_BKSC), (self.v, v_BKSC)):
                    fold_amax(slot.amax, x)
            return F.scaled_dot_product_attention(
                q_BHSC, k_BKSC, v_BKSC, is_causal=True, scale=self.softmax_scale, enable_gqa=True
            )
        if self.forward_backend != "reference":
            kernels.check_operands(q_BHSC, k_BKSC, v_BKSC)
            return _Kernels.apply(
                q_BHSC, k_BKSC, v_BKSC, state, self.softmax_scale, rule, self.grad_dtype, self.forward_backend
            )  # fmt: skip
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
        backends = f"forward={self.forward_backend} backward={self.backward_backend}"
        return f"softmax_scale={self.softmax_scale:.4g}, qkv:delayed_e4m3 p:fixed_e4m3 {backward}, {backends}"
