"""Tiny decoders for the model tests: `make_args` shapes one, `make_model` builds and fills it as the trainer does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from titan_fp8.config import Architecture, Fp8

SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 64}
SEQ_LEN = 16


def _make_args(preset: str = "fog_max", seq_len: int = SEQ_LEN, shape: dict | None = None, **knobs):
    """DecoderArgs of a tiny `preset`; `shape` changes DecoderArgs' sizes, `knobs` are keys of [architecture]."""
    from titan_fp8.model.args import DecoderArgs

    args = DecoderArgs(**(SHAPE | {"seq_len": seq_len} | (shape or {})))
    args.apply(Architecture(**({"preset": preset, "vocab_size": 96} | knobs)))  # type: ignore[arg-type]
    return args


def _make_model(args, seed: int = 0, fp8: Fp8 | None = None, wrap: Callable | None = None):
    """Meta device -> FP8 -> `wrap` (parallelize) -> CPU, poisoned with NaN -> init_weights: the trainer's order."""
    from titan_fp8.float8.convert import convert
    from titan_fp8.model.decoder import Decoder

    with torch.device("meta"):
        model = Decoder(args)
    if fp8 is not None:
        convert(model, fp8)
    if wrap is not None:
        model = wrap(model)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
    torch.manual_seed(seed)
    with torch.no_grad():
        model.init_weights()
    return model


@pytest.fixture(scope="session")
def make_args():
    return _make_args


@pytest.fixture(scope="session")
def make_model():
    return _make_model


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """[2, 16] tokens below 96, always the same."""
    return torch.randint(0, 96, (2, SEQ_LEN), generator=torch.Generator().manual_seed(7))
