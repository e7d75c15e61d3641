"""The two FP8 formats, their scales, and the ONE cast.

    format                  bits (s-e-m)  bias  largest  smallest normal  smallest subnormal  inf   NaN codes
    E4M3 (float8_e4m3fn)    1-4-3         7     448      2^-6             2^-9                none  S.1111.111
    E5M2 (float8_e5m2)      1-5-2         15    57344    2^-14            2^-16               yes   S.11111.{01,10,11}

E4M3 carries activations and weights (precision), E5M2 gradients (range). A tensor x travels as (q, scale):

    q = cast(clamp(x * scale, -max, max))        x is about q / scale        scale = max / (2^margin * amax)

The clamp saturates: PyTorch's plain casts turn what is too large into NaN (E4M3) or inf (E5M2). NaN stays NaN.
The product is taken in float32 and rounded once more, to nearest even, by the cast.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2

FP8_MAX = {E4M3: 448.0, E5M2: 57344.0}
ROUNDS_TO_ZERO = {E4M3: 2.0**-10, E5M2: 2.0**-17}  # up to here: half the smallest subnormal, a tie to even

# Scales stay within the normal float32 numbers whose reciprocals are normal too, since kernels flush subnormals.
MIN_SCALE, MAX_SCALE = 2.0**-126, 2.0**126
_EXPONENT_MASK = -(1 << 23)  # 0xff800000 as int32: keeps sign and exponent of a float32


BY_NAME = {"e4m3": E4M3, "e5m2": E5M2}


def short_name(dtype: torch.dtype) -> str:
    """`e4m3` or `e5m2`."""
    return next(name for name, known in BY_NAME.items() if known == dtype)


def is_fp8(dtype: torch.dtype) -> bool:
    return dtype in FP8_MAX


def amax(x: Tensor) -> Tensor:
    """Largest magnitude of x, as a 0-dim float32 tensor. NaN if x holds a NaN, inf if it holds an inf."""
    return x.detach().abs().amax().float()


def fold_amax(seen: Tensor, x: Tensor) -> None:
    """Raise `seen` (0-dim float32, in place) to the amax of x. NaN in either stays: torch.maximum keeps it."""
    seen.copy_(torch.maximum(seen, amax(x)))


def scale_from_amax(
    amax: Tensor, fp8_max: float | Tensor, margin: int = 0, power_of_two: bool = False
) -> Tensor:
    """Scale that maps `amax` (float32, any shape) to 2^-margin of the format's largest number `fp8_max`.

    An amax of 0 (nothing seen, or all zeros) or one that is not finite gives scale 1. With `power_of_two` the scale is
    rounded down to a power of two, so that scaling by it is exact.
    """
    usable = (amax > 0) & (amax < torch.inf)  # `isfinite` is four launches
    scale = fp8_max / 2.0**margin / torch.where(usable, amax, 1.0)
    scale = scale.clamp(MIN_SCALE, MAX_SCALE)
    if power_of_two:
        scale = (scale.view(torch.int32) & _EXPONENT_MASK).view(torch.float32)
    return torch.where(usable, scale, 1.0)


def saturating_cast(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """x * scale in FP8 (same shape). Beyond the format's range, inf included: its largest number. NaN stays NaN."""
    limit = FP8_MAX[dtype]
    return (x.float() * scale).clamp(-limit, limit).to(dtype)
