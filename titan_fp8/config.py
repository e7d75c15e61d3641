"""Our TOML sections, added to torchtitan's JobConfig. Plain dataclasses: a type, a default, one line of meaning.

Everything else that reads a configuration starts from here: `load_config` (below) reads a TOML file and the command
line, refuses what cannot run, and says which file, key and value, which rule, and what to do instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Architecture:
    """The decoder's knobs. `None` (or leaving the key out) means: as the preset has it."""

    preset: Literal["fog_max", "fog_opt", "fog_flash", "llama"] = "fog_max"
    """Starting point: fog_max = xIELU + rms, fog_opt = xIELU + tanh, fog_flash = GELU + rms, llama = pre-norm SwiGLU."""

    norm_placement: Literal["pre", "post"] | None = None
    """Normalise each branch's input (pre, Llama) or its output before the residual add (post, FOG)."""

    qk_norm: Literal["rms", "tanh", "none"] | None = None
    """Regularise q and k per head before RoPE: frozen RMS norm, tanh(alpha * q) with a scalar alpha, or nothing."""

    softmax_scale: float | None = None
    """Multiplies q.k before the softmax; the presets take 1/sqrt(head_dim) for llama and 0.125 at head_dim 128 for FOG."""

    activation: Literal["xielu", "gelu", "swiglu", "smooth_swiglu"] | None = None
    """Feed-forward activation; the hidden size is 1.5x for those without a gate, so that parameters match."""

    input_scale: float | None = None
    """Embeddings are multiplied by this (FOG: 1/init_std = 50, so that the residual stream starts at unit scale)."""

    post_norm_gain: float | None = None
    """Initial gain of the post-norms (FOG: 1/sqrt(n_layers))."""

    final_norm: bool | None = None
    """RMSNorm before the LM head (llama: true, FOG: false)."""

    tie_embeddings: bool | None = None
    """The LM head shares the embedding's weight; otherwise as the flavor has it."""

    n_layers: int | None = None
    """Keep only this many layers of the flavor (a slice, for benchmarks and debugging)."""

    vocab_size: int | None = None
    """Vocabulary size; must be at least the tokeniser's and a multiple of 16. Otherwise the tokeniser's, rounded up."""


@dataclass
class LossScale:
    """Dynamic loss scaling for E5M2 gradients: back off on overflow, grow after a calm stretch, skip the bad step."""

    enable: bool = False
    """Scale the loss before backward and the gradients back before the optimizer."""

    init: float = 65536.0
    """First scale."""

    growth_factor: float = 2.0
    """The scale is multiplied by this after growth_interval steps without overflow."""

    backoff_factor: float = 0.5
    """The scale is multiplied by this after a step whose gradients overflowed; that step is skipped."""

    growth_interval: int = 2000
    """Steps without overflow before the scale grows."""

    min: float = 1.0
    """The scale never falls below this; an overflow at the minimum stops the run."""

    max: float = 4294967296.0
    """The scale never grows above this."""


@dataclass
class Fp8:
    """Which GEMMs run in FP8, and how their tensors are scaled."""

    recipe: Literal["bf16", "tensorwise", "delayed"] = "delayed"
    """bf16: none; tensorwise: torchao's dynamic scaling; delayed: ours, scales from the amaxes of earlier steps."""

    attention: Literal["off", "forward", "full"] = "off"
    """FP8 for the two GEMMs of attention forward, or also for its backward; needs recipe "delayed"."""

    filter: list[str] = field(default_factory=lambda: ["layers.*"])
    """Glob patterns of linear modules to convert; "!pattern" takes names out. One that matches nothing is an error."""

    amax_history: int = 1024
    """Steps whose amaxes are kept; the scale comes from their maximum."""

    margin: int = 0
    """Scales are divided by 2^margin: head-room against an amax that jumps."""

    power_of_two_scales: bool = False
    """Round scales down to a power of two, so that scaling is exact."""

    loss_scale: LossScale = field(default_factory=LossScale)


@dataclass
class Data:
    """Where text comes from and how it becomes tokens."""

    source: Literal["builtin", "files", "shards", "hf"] = "builtin"
    """builtin: Python's own library sources; files: jsonl/parquet/txt; shards: tools/prepare_data.py's; hf: torchtitan's loader."""

    path: str = ""
    """File or folder for "files", shard folder for "shards"; "hf" reads [training] dataset and dataset_path instead."""

    text_key: str = "text"
    """Field that holds the text in jsonl and parquet."""

    tokenizer: str = "byte"
    """"byte", "tekken" (from the mistral-common package), or the path of a tiktoken BPE file or a Tekken JSON."""

    held_out: float = 0.02
    """Share of documents kept for validation, chosen by hash; never trained on. Prepared shards carry their own split."""

    shuffle: bool = True
    """Visit documents (or, with shards, sequences) in an order drawn from debug.seed."""


@dataclass
class Stability:
    """What to do about a step whose loss or gradients are not finite."""

    skip_nonfinite_steps: int = 0
    """Skip up to this many bad steps in a row (weights and optimizer untouched) before stopping the run."""


@dataclass
class Prometheus:
    """The metrics endpoint of rank 0."""

    enable: bool = False
    """Serve metrics over HTTP."""

    host: str = "127.0.0.1"
    """Address to listen on; "0.0.0.0" opens it to the network."""

    port: int = 9464
    """Port to listen on."""

    next_free_port: bool = False
    """If the port is taken, use the next free one (and log it) instead of stopping."""


@dataclass
class JobConfig:
    """What titan_fp8 adds to torchtitan's configuration (`[job] custom_config_module`)."""

    architecture: Architecture = field(default_factory=Architecture)
    fp8: Fp8 = field(default_factory=Fp8)
    data: Data = field(default_factory=Data)
    stability: Stability = field(default_factory=Stability)
    prometheus: Prometheus = field(default_factory=Prometheus)
