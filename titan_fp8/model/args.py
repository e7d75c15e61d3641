"""Shapes (flavors) and presets of the decoder."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn
from torchtitan.protocols.model import BaseModelArgs

from titan_fp8.errors import UserError

from .activations import GATED


@dataclass
class DecoderArgs(BaseModelArgs):
    """One decoder's shape and knobs. `ffn_dim` is the hidden size of a gated FFN; without a gate it is 1.5 times that."""

    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    ffn_dim: int = 256
    vocab_size: int = 0
    """0: not known yet; the tokeniser's, rounded up to 16, is filled in before the model is built."""
    max_seq_len: int = 2048
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    tie_embeddings: bool = False

    norm_placement: str = "post"
    qk_norm: str = "rms"
    activation: str = "xielu"
    softmax_scale: float = 0.0
    """0: as the preset computes it from head_dim."""
    input_scale: float = 1.0
    post_norm_gain: float = 1.0
    final_norm: bool = False
    seq_len: int = 0
    """Training's sequence length; the RoPE table is made for it."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Hidden size of the FFN as built: equal parameters with and without a gate (2/3 of three matrices = two)."""
        return self.ffn_dim if self.activation in GATED else self.ffn_dim * 3 // 2

    def apply(self, architecture: Any) -> None:
        """Fill the knobs from an `[architecture]` section (preset first, then what the user set)."""
        if architecture.n_layers is not None:
            if not 1 <= architecture.n_layers <= self.n_layers:
                raise UserError(
                    f"[architecture] n_layers must lie between 1 and the flavor's {self.n_layers}, got "
                    f"{architecture.n_layers}: choose a larger flavor or fewer layers"
                )
            self.n_layers = architecture.n_layers
        for knob, value in preset(architecture.preset, self).items():
            setattr(self, knob, value)
        for knob in (
            "norm_placement", "qk_norm", "softmax_scale", "activation", "input_scale", "post_norm_gain",
            "final_norm", "tie_embeddings", "vocab_size",
        ):  # fmt: skip
            value = getattr(architecture, knob)
            if value is not None:
                setattr(self, knob, value)
        self._check()

    def _check(self) -> None:
        if self.dim % self.n_heads or self.n_heads % self.n_kv_heads:
            raise UserError(
                f"heads must divide dim and kv heads must divide heads, got dim {self.dim}, heads {self.n_heads}, "
                f"kv heads {self.n_kv_heads}: choose divisors"
            )
        for knob in ("softmax_scale", "input_scale", "post_norm_gain"):
            if not getattr(self, knob) > 0:
                raise UserError(
                    f"[architecture] {knob} must be positive, got {getattr(self, knob)}: leave it out for the preset's"
                )
        if self.vocab_size % 16:
            raise UserError(
                f"[architecture] vocab_size must be a multiple of 16 (FP8 and tensor-core alignment), got "
                f"{self.vocab_size}: use {-(-self.vocab_size // 16) * 16}"
            )

    def update_from_config(self, job_config: Any, **kwargs: Any) -> None:
        """Take the knobs and the sequence length from the job's configuration (called by torchtitan's Trainer)."""
        self.apply(job_config.architecture)
        self.seq_len = job_config.training.seq_len
        if self.seq_len > self.max_seq_len:
            raise UserError(
                f"[training] seq_len must not exceed the model's maximum, got {self.seq_len} for flavor "
                f"{job_config.model.flavor} (maximum {self.max_seq_len}): shorten it or choose another flavor"
            )

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """(parameters, training FLOPs per token): 6 per matrix weight, 12 per layer, head dim and position of attention.

        Attention is counted without the causal mask's saving and recomputation is not counted (PaLM, appendix B).
        """
        total = sum(p.numel() for p in model.parameters())
        looked_up = 0 if self.tie_embeddings else self.vocab_size * self.dim
        attention = 12 * self.n_layers * self.n_heads * self.head_dim * seq_len
        return total, 6 * (total - looked_up) + attention


def preset(name: str, args: DecoderArgs) -> dict[str, Any]:
    """Knobs of a preset for the given shape.

    The FOG paper's table names variants by activation and QK regularisation; the authors' code names only xIELU + rms
    ("FOG-strong"). Which name stands for which pair here is ours: fog_max = xIELU + rms, fog_opt = xIELU + tanh,
    fog_flash = GELU + rms (no transcendental beyond GELU's, nothing trained in the activation: the fastest).
    FOG's softmax scale was 0.125 at head_dim 128 in the authors' runs; sqrt(2 / head_dim) is that for any head_dim.
    """
    if name == "llama":
        return {
            "norm_placement": "pre", "qk_norm": "none", "activation": "swiglu", "softmax_scale": args.head_dim**-0.5,
            "input_scale": 1.0, "post_norm_gain": 1.0, "final_norm": True,
        }  # fmt: skip
    activation, qk_norm = {
        "fog_max": ("xielu", "rms"),
        "fog_opt": ("xielu", "tanh"),
        "fog_flash": ("gelu", "rms"),
    }[name]
    return {
        "norm_placement": "post", "qk_norm": qk_norm, "activation": activation,
        "softmax_scale": (2 / args.head_dim) ** 0.5, "input_scale": 1 / args.init_std,
        "post_norm_gain": args.n_layers**-0.5, "final_norm": False,
    }  # fmt: skip


class Flavors(Mapping[str, DecoderArgs]):
    """Flavor name -> a fresh copy of its args, so that one run's settings never leak into the next."""

    def __init__(self, table: dict[str, DecoderArgs]):
        self._table = table

    def __getitem__(self, name: str) -> DecoderArgs:
        if name not in self._table:
            close = get_close_matches(name, self._table, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(self._table)}"
            raise UserError(f"[model] flavor must be a known size, got {name!r}: {hint}")
        return copy.deepcopy(self._table[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


# 390m, 1.5b, 8b: the FOG paper's sizes (appendix, training details). llama*: Meta's shapes.
FLAVORS = Flavors(
    {
        "debug": DecoderArgs(
            dim=128, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=256, max_seq_len=2048, tie_embeddings=True
        ),
        "3m": DecoderArgs(
            dim=256, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=768, max_seq_len=2048, tie_embeddings=True
        ),
        "50m": DecoderArgs(
            dim=512, n_layers=12, n_heads=8, n_kv_heads=4, ffn_dim=1536, max_seq_len=4096, tie_embeddings=True
        ),
        "390m": DecoderArgs(
            dim=1024, n_layers=16, n_heads=8, n_kv_heads=4, ffn_dim=4096, max_seq_len=8192, tie_embeddings=True
        ),
        "1.5b": DecoderArgs(
            dim=2048, n_layers=16, n_heads=16, n_kv_heads=8, ffn_dim=8192, max_seq_len=8192
        ),
        "8b": DecoderArgs(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14336, max_seq_len=8192),
        "llama2_7b": DecoderArgs(
            dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, ffn_dim=11008, max_seq_len=4096, rope_theta=10_000.0
        ),
        "llama3_8b": DecoderArgs(
            dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14336, max_seq_len=8192
        ),
        "llama3_70b": DecoderArgs(
            dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28672, max_seq_len=8192
        ),
    }
)  # fmt: skip
