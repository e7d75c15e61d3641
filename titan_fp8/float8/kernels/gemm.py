"""FP8 GEMMs: scaled_mm for linears, bmm for attention's reference backend.

Both take operands that ARE float8 tensors and accumulate in float32. An operand's layout is what Hopper's FP8 matrix unit
asks for: contiguous along the summed dimension (a row-major, b column-major), every dimension a multiple of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils.flop_counter import bmm_flop, register_flop_formula

_ROWWISE_ON_CPU = TorchVersion(torch.__version__) >= (
    2,
    12,
)  # 2.11's kernel takes one scale per tensor only, and is slow


def scaled_mm(
    a_MK: Tensor, b_KN: Tensor, inverse_a: Tensor, inverse_b: Tensor, out_dtype: torch.dtype, fast: bool
) -> Tensor:
    """(a * inverse_a) @ (b * inverse_b) as [M, N] in out_dtype. a, b: float8; inverses of their scales: 0-dim float32.

    `fast`: Hopper may keep partial sums in fewer bits; used forward, where Transformer Engine and torchao do too.
    """
    if a_MK.device.type == "cpu" and not _ROWWISE_ON_CPU:
        return (bmm(a_MK[None], b_KN[None])[0] * (inverse_a * inverse_b)).to(out_dtype)
    if a_MK.device.type == "cpu":
        # Same product with the scale repeated per row: oneDNN has no fast kernel for two E4M3 operands with one scale each.
        inverse_a = inverse_a.expand(a_MK.shape[0], 1).contiguous()
        inverse_b = inverse_b.expand(1, b_KN.shape[1]).contiguous()
        # Under autocast the CPU's kernel would round operand * scale to bfloat16 first.
        with torch.autocast("cpu", enabled=False):
            return torch._scaled_mm(a_MK, b_KN, scale_a=inverse_a, scale_b=inverse_b, out_dtype=out_dtype)
    return torch._scaled_mm(
        a_MK, b_KN, scale_a=inverse_a, scale_b=inverse_b, out_dtype=out_dtype, use_fast_accum=fast
    )


@torch.library.custom_op("titan_fp8::bmm", mutates_args=())
def bmm(a_BMK: Tensor, b_BKN: Tensor) -> Tensor:
    """a @ b as [B, M, N] float32, unscaled. a, b: float8.

    Every FP8 value is a bfloat16 value, and bfloat16 products summed in float32 are FP8 products summed in float32: the
    matrix unit used differs from an FP8 kernel's, the numbers do not.
    """
    if a_BMK.device.type == "cuda":
        return torch.bmm(a_BMK.bfloat16(), b_BKN.bfloat16(), out_dtype=torch.float32)
    with torch.autocast(a_BMK.device.type, enabled=False):
        return torch.bmm(_decode(a_BMK), _decode(b_BKN))


def _decode(x: Tensor) -> Tensor:
    """float8 -> float32 on CPU. PyTorch's own E4M3 conversion takes three times as long as a look-up of the 256 codes."""
    if x.dtype != torch.float8_e4m3fn:
        return x.float()
    codes = torch.arange(256, dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn).float()
    return codes.index_select(0, x.reshape(-1).view(torch.uint8).int()).view(x.shape)


@bmm.register_fake
def _(a_BMK: Tensor, b_BKN: Tensor) -> Tensor:
    return a_BMK.new_empty((a_BMK.shape[0], a_BMK.shape[1], b_BKN.shape[2]), dtype=torch.float32)


@register_flop_formula(torch.ops.titan_fp8.bmm)
def _bmm_flops(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    return bmm_flop(a_shape, b_shape)
