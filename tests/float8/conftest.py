"""FP8 written out by hand, for all tests of this room: decoding, encoding, and a small FOG to convert.

Nothing here uses torch's float8 conversions: that is what the tests compare against.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
# exponent bits, mantissa bits, exponent bias, code of the largest finite number
LAYOUT = {E4M3: (4, 3, 7, 0x7E), E5M2: (5, 2, 15, 0x7B)}


def decode(code: int, dtype: torch.dtype) -> float:
    """The number that an 8-bit code stands for, from its bit fields."""
    exponent_bits, mantissa_bits, bias, _ = LAYOUT[dtype]
    sign = -1.0 if code & 0x80 else 1.0
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    if exponent == (1 << exponent_bits) - 1:
        if dtype == E5M2:
            return sign * float("inf") if mantissa == 0 else float("nan")
        if mantissa == (1 << mantissa_bits) - 1:
            return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


def positive_values(dtype: torch.dtype) -> Tensor:
    """All finite values from 0 up, float64; a value's index is its code."""
    largest = LAYOUT[dtype][3]
    return torch.tensor([decode(code, dtype) for code in range(largest + 1)], dtype=torch.float64)


def encode(x: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 codes of float64 x, NaN excepted: nearest value, ties to the even code, saturating at the largest."""
    values = positive_values(dtype)
    size = x.abs().clamp(max=values[-1])
    above = torch.searchsorted(values, size).clamp(min=1)  # values[above - 1] < size <= values[above]
    below = above - 1
    middle = (values[below] + values[above]) / 2  # exact in float64
    up = (size > middle) | ((size == middle) & (above % 2 == 0))
    return torch.where(up, above, below).to(torch.uint8) + 0x80 * torch.signbit(x).to(torch.uint8)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 x rounded to the nearest FP8 value, saturating, as float64."""
    codes = encode(x, dtype).long()
    return torch.where(codes < 0x80, 1.0, -1.0) * positive_values(dtype)[codes % 0x80]


def scale_for(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 scale that maps x's largest magnitude to the format's largest number."""
    return torch.tensor(positive_values(dtype)[-1].item()) / x.detach().abs().max().float()


def codes(x: Tensor) -> Tensor:
    """The bits of a float8 tensor."""
    return x.contiguous().view(torch.uint8)


def relative(x: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.fixture(scope="session")
def fp8() -> SimpleNamespace:
    """The functions above (test modules cannot import a conftest by name: there are several)."""
    return SimpleNamespace(
        decode=decode, positive_values=positive_values, encode=encode, rounded=rounded, scale_for=scale_for,
        codes=codes, relative=relative,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_decoder() -> Callable[..., Any]:
    """tiny_decoder(preset="fog_max", seed=0, **shape) -> an initialised Decoder, not converted."""
    from titan_fp8.config import Architecture
    from titan_fp8.model.args import DecoderArgs
    from titan_fp8.model.decoder import Decoder

    shape = {
        "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 128, "vocab_size": 64, "seq_len": 32,
    }  # fmt: skip

    def build(preset: str = "fog_max", seed: int = 0, **changes: Any) -> Decoder:
        args = DecoderArgs(**(shape | changes))
        args.apply(Architecture(preset=preset))
        model = Decoder(copy.copy(args))
        torch.manual_seed(seed)
        model.init_weights()
        return model

    return build


@pytest.fixture
def launched(monkeypatch) -> Callable[..., list[tuple]]:
    """launched(module, operator, *arguments) -> (kernel, arguments, options) of each Triton kernel it would launch."""

    def launched(module, operator, *arguments) -> list[tuple]:
        launches = []

        def launcher(kernel):
            class Launcher:
                def __getitem__(self, grid):
                    return lambda *args, **options: launches.append((kernel, args, options))

            return Launcher()

        with monkeypatch.context() as patch:
            patch.setattr(module, "wrap_triton", launcher)
            getattr(operator, "_init_fn", operator)(*arguments)
        return launches

    return launched
