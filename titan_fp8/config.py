"""Our TOML sections, added to torchtitan's JobConfig, and the loader that checks all of it.

First the sections: plain dataclasses; each key has a type, a default and one line of meaning. Then
`load_config`, which reads a TOML file and the command line against those types and torchtitan's.
Last `validate`, which refuses what cannot run. An error says which file, key, value and rule, and what to do.

No `from __future__ import annotations` here: torchtitan and tyro read the types as objects, not as strings.
"""

import dataclasses
import json
import math
import operator
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from titan_fp8.errors import UserError

if TYPE_CHECKING:  # At run time torchtitan is imported inside the functions: it takes seconds.
    from torchtitan.config import JobConfig as TorchtitanConfig


@dataclass
class Architecture:
    """The decoder's knobs. `None` (or leaving the key out) means: as the preset has it."""

    preset: Literal["fog_max", "fog_opt", "fog_flash", "llama"] = "fog_max"
    """fog_max = xIELU + rms, fog_opt = xIELU + tanh, fog_flash = GELU + rms, llama = pre-norm SwiGLU."""

    norm_placement: Literal["pre", "post"] | None = None
    """Normalise each branch's input (pre, Llama) or its output before the residual add (post, FOG)."""

    qk_norm: Literal["rms", "rms_gain", "tanh", "none"] | None = None
    """Regularise q, k per head before RoPE: RMS norm, frozen or with a trained gain, tanh(alpha * q), or none."""

    softmax_scale: float | None = None
    """Multiplies q.k before the softmax; presets: llama 1/sqrt(head_dim), FOG sqrt(2/head_dim)."""

    activation: Literal["xielu", "gelu", "swiglu", "smooth_swiglu"] | None = None
    """Feed-forward activation; the hidden size is 1.5x for those without a gate, so that parameters match."""

    input_scale: float | None = None
    """Multiplies the embeddings (FOG: 1/init_std = 50, so the residual stream starts at unit scale)."""

    post_norm_gain: float | None = None
    """Initial gain of the post-norms (FOG: 1/sqrt(n_layers))."""

    final_norm: bool | None = None
    """RMSNorm before the LM head (llama: true, FOG: false)."""

    tie_embeddings: bool | None = None
    """The LM head shares the embedding's weight; otherwise as the flavor has it."""

    n_layers: int | None = None
    """Keep only this many layers of the flavor (a slice, for benchmarks and debugging)."""

    vocab_size: int | None = None
    """At least the tokeniser's, and a multiple of 16. Left out: the tokeniser's, rounded up."""


@dataclass
class LossScale:
    """Dynamic loss scaling for E5M2 gradients: on overflow skip the step and back off; grow when calm."""

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

    recipe: Literal["bf16", "tensorwise", "rowwise", "delayed"] = "delayed"
    """bf16: no FP8; tensorwise, rowwise: torchao's dynamic scaling; delayed: scales from earlier steps' amaxes."""

    attention: Literal["off", "forward", "full"] = "off"
    """FP8 for the two GEMMs of attention forward, or also for its backward; needs recipe "delayed"."""

    attention_forward: Literal["auto", "triton", "cudnn", "reference"] = "auto"
    """What computes FP8 attention forward. auto: our kernels on a Hopper GPU, plain PyTorch ("reference") on CPU."""

    attention_backward: Literal["auto", "triton", "reference"] = "auto"
    """The same for backward."""

    attention_gradients: Literal["e5m2", "e4m3"] = "e5m2"
    """Format of dO and dS in FP8 attention: range (e5m2, the papers') or a third less error (e4m3)."""

    lm_head: Literal["bf16", "fp8"] = "bf16"
    """Precision of the LM head's three GEMMs; fp8 needs recipe "delayed"."""

    all_gather: Literal["fp8", "bf16"] = "fp8"
    """What FSDP2 gathers converted weights in: fp8 halves the bytes and changes no number; bf16 with "rowwise"."""

    smooth_scale: Literal["channel_delayed", "channel_dynamic", "token_dynamic"] = "channel_delayed"
    """Smooth-SwiGLU's scales: one per feature, from earlier steps (free) or this one; or per token (torchao's recipes)."""

    filter: list[str] = field(default_factory=lambda: ["layers.*"])
    """Globs of linear modules to convert; "!pattern" takes names out. One matching nothing is an error."""

    amax_history: int = 1024
    """Steps whose amaxes are kept; the scale comes from their maximum."""

    margin: int = 0
    """Scales are divided by 2^margin: head-room against an amax that jumps."""

    power_of_two_scales: bool = False
    """Round scales down to a power of two, so that scaling is exact."""

    loss_scale: LossScale = field(default_factory=LossScale)


@dataclass
class Fp8Adam:
    """AdamW whose moments take one byte each. lr, betas, eps and weight_decay are those of [optimizer]."""

    enable: bool = False
    """Use it instead of torch's AdamW."""

    first_moment: Literal["e4m3", "e5m2", "bf16", "fp32"] = "e4m3"
    """Format of the averaged gradient."""

    second_moment: Literal["e4m3", "e5m2", "bf16", "fp32"] = "e5m2"
    """Format of the averaged squared gradient, which needs range."""

    block_size: int = 256
    """Elements of a row that share a scale, a power of two from 16; 0: one scale per parameter, as in the paper."""

    round_moments: Literal["nearest", "stochastic"] = "nearest"
    """stochastic: without bias; needed for the second moment to fall where beta2 is above 0.99. Costs random bits."""

    round_parameters: Literal["nearest", "stochastic"] = "nearest"
    """stochastic: small updates are not lost in bf16 parameters; needs [training] dtype = "bfloat16"."""


@dataclass
class Optimizer:
    """What we add to torchtitan's [optimizer]."""

    fp8: Fp8Adam = field(default_factory=Fp8Adam)


@dataclass
class Data:
    """Where text comes from and how it becomes tokens."""

    source: Literal["builtin", "files", "shards", "hf"] = "builtin"
    """builtin: Python's sources; files: jsonl/parquet/txt; shards: of prepare_data.py; hf: torchtitan's."""

    path: str = ""
    """File or folder for "files", folder for "shards"; "hf" reads [training] dataset instead."""

    text_key: str = "text"
    """Field that holds the text in jsonl and parquet."""

    tokenizer: str = "byte"
    """"byte", "tekken" (from package mistral-common), or the path of a tiktoken BPE file or Tekken JSON."""

    held_out: float = 0.02
    """Share of documents kept for validation, by hash; never trained on. Shards carry their own split."""

    shuffle: bool = True
    """Visit documents and sequences in an order drawn from debug.seed."""


@dataclass
class Stability:
    """What is watched, and what to do about steps that go wrong and about predicted divergence. For each cause: "off",
    "warn" (a line and an "action" row, nothing done) or "act". Decided at logged steps; the gradient's norm alone is
    judged at every step, on the device."""

    statistics: bool = True
    """In logged steps, look at activations, gradients, FP8 tensors and weights: what foretells divergence."""

    skip_nonfinite_steps: int = 0
    """Skip up to this many bad steps in a row (weights and optimizer untouched) before stopping the run, or rolling back."""

    nonfinite: Literal["off", "warn", "act"] = "warn"
    """More of them in a row. act: roll back (see loss_spike) while max_rollbacks allow; otherwise the run stops."""

    gradient_outlier: Literal["off", "warn", "act"] = "warn"
    """A gradient norm beyond sigma. act: skip that step, weights and optimizer untouched; costs its batch."""

    loss_spike: Literal["off", "warn", "act"] = "warn"
    """A loss beyond sigma in spike_rows logged steps. act: roll back, go on after its data; costs the steps since."""

    predicted: Literal["off", "warn", "act"] = "warn"
    """A predicted risk of divergence. act: write a checkpoint now; costs the time of one."""

    fp8_range: Literal["off", "warn", "act"] = "warn"
    """A risk led by an FP8 tensor's range. act: scale it by its own amax for answer_steps; all casts then read twice."""

    attention: Literal["off", "warn", "act"] = "warn"
    """A risk led by attention's logits. act: attention of all layers in 16 bits for answer_steps, at that speed."""

    risk: float = 0.5
    """The least risk, of 0 to 1, that counts. 0.5: one witness; 0.9: two (stability/predictor.py)."""

    answer_steps: int = 200
    """How long current scaling and attention in 16 bits last; they end at the first logged step after."""

    cooldown_steps: int = 200
    """Steps between two answers, or warnings, to the same cause; skipped steps and roll-backs do not wait."""

    sigma: float = 6.0
    """Standard deviations of ln(loss) or ln(norm) above its running mean that are too many."""

    warmup_steps: int = 100
    """Steps before losses and norms are judged: until then they fall too fast to have a spread."""

    spike_rows: int = 3
    """Logged steps in a row that make a spike; more: later and surer. A loss that recovers by itself costs nothing."""

    max_skips_in_a_row: int = 3
    """Steps in a row that gradient_outlier may skip; the next is taken, so a norm that stays high is accepted in time."""

    max_rollbacks: int = 2
    """In the whole run. Then a spike is only warned of, and non-finite steps stop the run."""


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

    certfile: str = ""
    """PEM certificate; with it and keyfile, HTTPS."""

    keyfile: str = ""
    """PEM key of certfile, without a passphrase."""

    basic_auth_file: str = ""
    """File of one line NAME:PASSWORD that a scraper must send. Beyond this machine only with HTTPS."""

    textfile: str = ""
    """Also, or instead, keep this *.prom file current, for node_exporter's textfile collector. Removed at an orderly end."""


@dataclass
class JobConfig:
    """What titan_fp8 adds to torchtitan's configuration (`[job] custom_config_module`)."""

    architecture: Architecture = field(default_factory=Architecture)
    fp8: Fp8 = field(default_factory=Fp8)
    optimizer: Optimizer = field(default_factory=Optimizer)
    data: Data = field(default_factory=Data)
    stability: Stability = field(default_factory=Stability)
    prometheus: Prometheus = field(default_factory=Prometheus)


if TYPE_CHECKING:

    class RunConfig(TorchtitanConfig, JobConfig):
        """What `load_config` returns, for type checkers: torchtitan's sections and ours in one dataclass."""


CONVERTER = "titan_fp8.float8"
_DEFAULTS = {
    "model.name": "titan_fp8",
    "model.flavor": "debug",
    "job.custom_config_module": "titan_fp8.config",
    "experimental.custom_import": "titan_fp8.spec",
}


def load_config(args: list[str] | None = None) -> "RunConfig":
    """Read `--job.config_file` and the command line (`args`, else `sys.argv[1:]`) into one checked config.

    A flag is `--section.key=value` or `--section.key value`, - or _ alike; lists are comma separated; a
    bool is `--compile.enable`, `--compile.no-enable` or `--compile.enable=false`; `None` unsets a key that
    allows it. The command line wins over the file, the file over the defaults. `--help` prints every key and
    exits with status 0.

    The result is torchtitan's JobConfig with our sections. Model name, config module, import and converter
    are filled in where left out; your own `experimental.custom_import` must itself import `titan_fp8.spec`.

    Raises:
        UserError: the file cannot be read, or a key, a type, a choice, a value or a combination is wrong.
    """
    args = sys.argv[1:] if args is None else args
    cls = _merged_class()
    if "-h" in args or "--help" in args:
        _print_help(cls)
    schema = dict(_schema(cls))
    flags = dict(_read_flags(args, schema))
    path = flags.get("job.config_file")
    values = dict(_read_file(path, schema)) if path is not None else {}
    values |= flags
    for key, default in _DEFAULTS.items():
        values[key] = values.get(key) or default
    converters = values.get("model.converters", [])
    values["model.converters"] = converters if CONVERTER in converters else [*converters, CONVERTER]
    sources = [path] if path is not None else []
    if flags.keys() - {"job.config_file"}:
        sources.append("command line")
    try:
        config = _build(cls, values)
        validate(config)
    except UserError as error:
        raise UserError(f"{' and '.join(sources) or 'defaults'}: {error}") from None
    return config


@cache
def _merged_class() -> Any:
    from torchtitan.config import ConfigManager
    from torchtitan.config import JobConfig as TorchtitanConfig

    return ConfigManager._merge_configs(TorchtitanConfig, JobConfig)


def _schema(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every section and key; a section's type is its dataclass."""
    for f in dataclasses.fields(cls):
        yield prefix + f.name, f.type
        if dataclasses.is_dataclass(f.type):
            yield from _schema(f.type, f"{prefix}{f.name}.")


def _build(cls: Any, values: dict[str, Any], prefix: str = "") -> Any:
    """An instance of `cls` from dotted keys, section by section."""
    chosen = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            chosen[f.name] = _build(f.type, values, f"{prefix}{f.name}.")
        elif prefix + f.name in values:
            chosen[f.name] = values[prefix + f.name]
    try:
        return cls(**chosen)
    except (AssertionError, ValueError) as error:  # torchtitan's own __post_init__ checks
        raise UserError(f"[{prefix[:-1]}] {' '.join(str(error).split())}") from None


def _print_help(cls: Any) -> None:
    """Print every key with its meaning, torchtitan's way, and exit."""
    import tyro
    from torchtitan.config.manager import ConfigManager, custom_registry

    ConfigManager()  # registers torchtitan's rule for lists in `custom_registry`
    tyro.cli(cls, args=["--help"], default=_build(cls, _DEFAULTS), registry=custom_registry)


# ---- The file and the flags, key by key ----


def _read_file(path: str, schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        rule = f"--job.config_file must be a readable file, got {_show(path)} ({error.strerror})"
        raise UserError(f"{rule}: give one of train_configs/*.toml or your own") from None
    except UnicodeDecodeError as error:
        rule = f"the file must be UTF-8, got another encoding at byte {error.start}"
        raise UserError(f"{path}: {rule}: save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        message = " ".join(str(error).split())
        raise UserError(f"{path}: the file must be valid TOML, got: {message}: correct it there") from None
    yield from _read_table(table, path, "", schema)


def _read_table(
    table: dict[str, Any], path: str, section: str, schema: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        key = f"{section}.{name}" if section else name
        kind = schema.get(key)
        where = f"{path}: [{section}] {name}" if section else f"{path}: {name}"
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                remedy = f"write [{key}] and its keys below it"
                raise UserError(f"{where} must be a section, got {_show(value)}: {remedy}")
            yield from _read_table(value, path, key, schema)
        elif kind is not None:
            yield key, _checked(key, value, kind, where)
        elif isinstance(value, dict):
            sections = [k for k, kind in schema.items() if dataclasses.is_dataclass(kind)]
            near = [s for s in sections if s.endswith(f".{name}")] or get_close_matches(key, sections, n=1)
            remedy = f"did you mean [{near[0]}]?" if near else "--help lists the sections"
            raise UserError(f"{path}: every section must be known, got [{key}]: {remedy}")
        else:
            rule = "is not a key" if section else "is not a key outside the sections"
            raise UserError(f"{where} {rule}, got {_show(value)}: {_suggest_key(section, name, schema)}")


def _read_flags(args: list[str], schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        flag, has_value, text = arg.partition("=")
        if not flag.startswith("--"):
            remedy = "write --section.key=value, and the file as --job.config_file=PATH"
            raise UserError(f"command line: every argument must be a flag, got {_show(arg)}: {remedy}")
        where = f"command line: {flag}"
        key = flag[2:].replace("-", "_")
        kind = schema.get(key)
        positive = key.replace(".no_", ".")
        if kind is None and positive != key and _is_bool(schema.get(positive)):
            if has_value:
                raise UserError(f"{where} takes no value, got {_show(text)}: write --{positive}={text}")
            yield positive, False
            continue
        if kind is None:
            raise UserError(
                f"command line: every flag must be known, got {arg}: {_suggest_flag(key, schema)}"
            )
        if dataclasses.is_dataclass(kind):
            names = ", ".join(f.name for f in dataclasses.fields(kind))
            raise UserError(f"{where} is a section, got {_show(text)}: set one of its keys: {names}")
        if not has_value:
            if _is_bool(kind) and not (rest and rest[0].lower() in ("true", "false")):
                text = "true"
            elif rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            else:
                raise UserError(f"{where} must have a value, got none: write {flag}=VALUE")
        yield key, _checked(key, _from_text(text, kind), kind, where)


def _suggest_key(section: str, name: str, schema: dict[str, Any]) -> str:
    """The sections that have such a key, else a similar key: of this section first, then of any."""
    known = [k.rpartition(".")[::2] for k in _keys(schema)]
    if homes := [f"[{home}]" for home, key in known if key == name]:
        return f"{name} belongs to {', '.join(homes)}"
    if near := get_close_matches(name, [key for home, key in known if home == section], n=1):
        return f'did you mean "{near[0]}"?'
    if near := get_close_matches(name, [key for _, key in known], n=1):
        homes = [f"[{home}]" for home, key in known if key == near[0]]
        return f'did you mean "{near[0]}" of {", ".join(homes)}?'
    return "--help lists the keys"


def _suggest_flag(key: str, schema: dict[str, Any]) -> str:
    """The flags with this last name, else the most similar one."""
    known = _keys(schema)
    near = [k for k in known if k.endswith(f".{key.rpartition('.')[2]}")] or get_close_matches(
        key, known, n=1
    )
    return f"did you mean --{' or --'.join(near)}?" if near else "--help lists the flags"


def _keys(schema: dict[str, Any]) -> list[str]:
    """The keys worth suggesting: no sections, and not torchtitan's [quantize], which `validate` refuses."""
    return [
        k for k, kind in schema.items() if not (dataclasses.is_dataclass(kind) or k.startswith("quantize."))
    ]


# ---- One value: its type and its range ----


class _Misfit(Exception):
    """(rule, remedy): a value that its key cannot take. The rule continues "must be"."""


_TYPES: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "write true or false"),
    int: ("an integer", "write a whole number"),
    float: ("a number", "write a number"),
    str: ("a string", "put it in quotes"),
}
# The words are both the message and the test; -1 stands for "not set".
_RANGES = {
    "at least 1": """
        training.steps training.local_batch_size training.seq_len training.gc_freq lr_scheduler.total_steps
        validation.local_batch_size validation.seq_len validation.freq checkpoint.interval metrics.log_freq
        profiling.profile_freq profiling.profiler_active comm.init_timeout_seconds comm.train_timeout_seconds
        parallelism.data_parallel_replicate_degree parallelism.tensor_parallel_degree
        parallelism.pipeline_parallel_degree parallelism.context_parallel_degree
        parallelism.expert_parallel_degree parallelism.expert_tensor_parallel_degree
        fp8.amax_history fp8.loss_scale.growth_interval
        stability.answer_steps stability.spike_rows stability.max_skips_in_a_row""",
    "-1 or at least 1": "training.global_batch_size validation.steps parallelism.data_parallel_shard_degree",
    "-1 or at least 0": "checkpoint.load_step",
    "at least 0": """
        lr_scheduler.warmup_steps optimizer.weight_decay checkpoint.keep_latest_k profiling.profiler_warmup
        training.dataloader.num_workers validation.dataloader.num_workers stability.skip_nonfinite_steps
        stability.cooldown_steps stability.warmup_steps stability.max_rollbacks""",
    "above 0": """
        optimizer.lr optimizer.eps training.max_norm
        stability.sigma fp8.loss_scale.init fp8.loss_scale.min fp8.loss_scale.max""",
    "above 1": "fp8.loss_scale.growth_factor",
    "above 0 and below 1": "fp8.loss_scale.backoff_factor",
    "at least 0 and below 1": "optimizer.beta1 optimizer.beta2",
    "at least 0 and at most 1": """
        lr_scheduler.decay_ratio lr_scheduler.min_lr_factor activation_checkpoint.memory_budget""",
    "above 0 and at most 1": "stability.risk",
    "at least 0 and at most 0.5": "data.held_out",
    "at least 0 and at most 8": "fp8.margin",
    "at least 0 and at most 8192": "optimizer.fp8.block_size",
    "at least 0 and at most 65535": "prometheus.port",
}
_RANGE_OF = {key: words for words, keys in _RANGES.items() for key in keys.split()}
_BOUNDS = {"least": operator.ge, "above": operator.gt, "below": operator.lt, "most": operator.le}


def _checked(key: str, value: Any, kind: Any, where: str) -> Any:
    """The value, of type `kind` (None: taken as it is) and in its range; `where` opens the error's line."""
    try:
        value = value if kind is None else _coerce(value, kind)
        _check_range(key, value)
    except _Misfit as misfit:
        rule, remedy = misfit.args
        raise UserError(f"{where} must be {rule}, got {_show(value)}: {remedy}") from None
    return value


def _coerce(value: Any, kind: Any) -> Any:
    """The value as `kind` takes it (an int becomes a float where a float is due), or `_Misfit`."""
    origin, members = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in members:
            return None
        misfits = []
        for member in members:
            try:
                return _coerce(value, member)
            except _Misfit as misfit:
                misfits.append(misfit)
        raise misfits[0]
    if origin is Literal:
        if isinstance(value, str) and value in members:
            return value
        near = get_close_matches(str(value), members, n=1)
        remedy = f"did you mean {_show(near[0])}?" if near else "choose one of them"
        raise _Misfit("one of " + ", ".join(_show(m) for m in members), remedy)
    if origin is list:
        if not isinstance(value, list):
            remedy = f"write {_show(value.split(','))}" if isinstance(value, str) else "put it in [ ]"
            raise _Misfit("a list", remedy)
        try:
            return [_coerce(element, members[0]) for element in value]
        except _Misfit as misfit:
            rule, remedy = misfit.args
            raise _Misfit(f"a list whose every element is {rule}", f"for each: {remedy}") from None
    if kind is type(None):
        raise _Misfit("left out", "leave it out")
    rule, remedy = _TYPES[kind]
    if type(value) is int and kind in (int, float):
        if abs(value) >= 2**63:
            raise _Misfit("below 2^63", "write a smaller number")
        return kind(value)
    if type(value) is not kind or value != value:
        quoted = isinstance(value, str) and not isinstance(_from_text(value, kind), str)
        raise _Misfit(rule, "remove the quotes" if quoted else remedy)
    return value


def _from_text(text: str, kind: Any) -> Any:
    """What a flag's text stands for; the text itself where it is not of that kind (`_coerce` says so)."""
    origin, members = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if text == "None" and type(None) in members else _from_text(text, members[0])
    if origin is list:
        return text.split(",") if text else []
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _check_range(key: str, value: Any) -> None:
    """`_Misfit` if the value lies outside the range that `_RANGES` has for the key."""
    words = _RANGE_OF.get(key)
    if words is None or value is None or (words.startswith("-1 or ") and value == -1):
        return
    bounds = [(_BOUNDS[a], float(b)) for a, b in pairwise(words.split()) if a in _BOUNDS]
    finite = math.isfinite(value) or key == "training.max_norm"  # inf: never clip
    if not (finite and all(holds(value, bound) for holds, bound in bounds)):
        default = _get(_merged_class()(), key)
        words += "" if finite else " and finite"
        raise _Misfit(words, "leave it out" if default is None else f"the default is {_show(default)}")


def _is_bool(kind: Any) -> bool:
    return kind is bool or bool in get_args(kind)


def _show(value: Any) -> str:
    """The value on one line, nearly as TOML writes it, cut if long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else text[:97] + "..."


def _get(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


# ---- What cannot run ----


def validate(config: Any) -> None:
    """Refuse values out of range and combinations that cannot run; `config` is what `load_config` builds.

    What needs the model (flavors, longest sequence) or the process count is checked where those are known.

    Raises:
        UserError: one line, for the first rule that is broken.
    """
    for key in _RANGE_OF:
        section, _, name = key.rpartition(".")
        _checked(key, _get(config, key), None, f"[{section}] {name}")
    for key, rule, remedy in _broken_rules(config):
        section, _, name = key.rpartition(".")
        raise UserError(f"[{section}] {name} {rule}, got {_show(_get(config, key))}: {remedy}")


def _broken_rules(c: Any) -> Iterator[tuple[str, str, str]]:
    """(key, rule, remedy) of each combination that cannot run."""
    if c.model.name != "titan_fp8":
        yield "model.name", 'must be "titan_fp8"', "leave it out; [architecture] and flavor shape the model"
    if c.model.tokenizer_path is not None:
        yield "model.tokenizer_path", "is not read here", "use [data] tokenizer"
    if any(name.startswith("quantize.") for name in c.model.converters):
        yield "model.converters", "must not hold torchtitan's quantize.*", "use [fp8]; it needs no converter"
    if c.experimental.custom_import == _DEFAULTS["experimental.custom_import"] and set(
        c.model.converters
    ) != {CONVERTER}:
        rule = "must be ones that [experimental] custom_import registers"
        yield "model.converters", rule, "use [fp8]; it needs no converter"
    for key in (
        "quantize.linear.float8",
        "quantize.linear.mx",
        "quantize.grouped_mm.float8",
        "quantize.grouped_mm.mx",
    ):
        section = _get(c, key)
        for f in dataclasses.fields(section):
            if getattr(section, f.name) != getattr(type(section)(), f.name):
                yield f"{key}.{f.name}", "has no effect here", "use [fp8]"
    if c.job.custom_config_module != "titan_fp8.config":
        yield "job.custom_config_module", 'must be "titan_fp8.config"', "leave it out; no others are merged"
    if c.experimental.custom_args_module:
        yield "experimental.custom_args_module", "is not read here", "leave it out"

    fp8, scale = c.fp8, c.fp8.loss_scale
    if fp8.attention != "off" and fp8.recipe != "delayed":
        yield (
            "fp8.attention",
            f'needs recipe "delayed", not "{fp8.recipe}"',
            'set it to "off" or change recipe',
        )
    for key in ("attention_forward", "attention_backward"):
        if getattr(fp8, key) in ("triton", "cudnn") and fp8.attention != "full":
            yield (
                f"fp8.{key}",
                f'"{getattr(fp8, key)}" needs attention "full", not "{fp8.attention}"',
                'set attention to "full", or write "auto"',
            )
    if (fp8.attention_forward == "reference") != (fp8.attention_backward == "reference"):
        yield (
            "fp8.attention_backward",
            f'must be "reference" if attention_forward is, and only then ("{fp8.attention_forward}")',
            'write "reference" or "auto" for both',
        )
    if fp8.lm_head == "fp8" and fp8.recipe != "delayed":
        yield "fp8.lm_head", f'needs recipe "delayed", not "{fp8.recipe}"', 'write "bf16" or change recipe'
    if not fp8.filter and fp8.recipe != "bf16":
        yield (
            "fp8.filter",
            f'must name modules with recipe "{fp8.recipe}"',
            'write ["layers.*"], or recipe = "bf16"',
        )
    if scale.enable and fp8.recipe == "bf16":
        yield "fp8.loss_scale.enable", 'needs FP8, got recipe "bf16"', "set it to false"
    if c.optimizer.implementation != "fused":
        # The others cannot be told on the device to leave the weights alone when gradients are not finite.
        yield (
            "optimizer.implementation",
            'must be "fused" (it skips bad steps on the device)',
            'write "fused"',
        )
    if not scale.min <= scale.init <= scale.max:
        rule = f"must lie between min ({scale.min:g}) and max ({scale.max:g})"
        yield "fp8.loss_scale.init", rule, "move init, min or max"
    if c.optimizer.early_step_in_backward:
        rule = "must be false: FP8 scales and clipping need the whole backward first"
        yield "optimizer.early_step_in_backward", rule, "leave it out"
    moments = c.optimizer.fp8
    if moments.block_size and (moments.block_size < 16 or moments.block_size.bit_count() > 1):
        yield "optimizer.fp8.block_size", "must be a power of two from 16, or 0", "write 256"
    names = ["AdamW"] if moments.enable else ["Adam", "AdamW"]
    if c.optimizer.name not in names:
        rule = (
            f"must be {' or '.join(names)}{' with [optimizer.fp8] enable = true' if moments.enable else ''}"
        )
        yield "optimizer.name", rule, 'write "AdamW"'
    if moments.enable and moments.round_parameters == "stochastic" and c.training.dtype != "bfloat16":
        rule = f'"stochastic" needs [training] dtype = "bfloat16", not "{c.training.dtype}"'
        yield "optimizer.fp8.round_parameters", rule, 'set that, or write "nearest"'

    supported = "use FSDP (data_parallel_shard_degree) or HSDP (data_parallel_replicate_degree too)"
    for name in ("pipeline", "context", "expert", "expert_tensor"):
        if _get(c, key := f"parallelism.{name}_parallel_degree") > 1:
            yield key, "must be 1: this parallelism is not supported", supported
    yield from _unfit_shapes(c)
    if c.parallelism.data_parallel_replicate_degree > 1 and c.parallelism.data_parallel_shard_degree == 1:
        rule = (
            "must be 1 where the shard degree is 1: plain DDP in torchtitan 0.2.2 shrinks the gradient norm"
        )
        yield "parallelism.data_parallel_replicate_degree", rule, "use FSDP (1, -1) or HSDP (both above 1)"
    for key in ("memory_estimation.enable", "fault_tolerance.enable", "training.enable_cpu_offload"):
        if _get(c, key):
            yield key, "must be false: it is not supported", "leave it out"

    recompute = c.activation_checkpoint
    if recompute.mode == "memory_budget" and not (c.compile.enable and "model" in c.compile.components):
        rule = 'needs [compile] enable = true with "model" in components'
        yield "activation_checkpoint.mode", rule, 'set that, or mode = "selective"'
    option = recompute.selective_ac_option
    if recompute.mode == "selective" and option != "op" and not (option.isdecimal() and int(option) > 0):
        rule = 'must be "op" or a positive whole number in quotes'
        yield "activation_checkpoint.selective_ac_option", rule, 'write "op"'

    training, validation, data = c.training, c.validation, c.data
    if training.global_batch_size > 0 and training.global_batch_size % training.local_batch_size:
        rule = f"must be a multiple of local_batch_size ({training.local_batch_size})"
        yield "training.global_batch_size", rule, "change one of them"
    if data.source in ("files", "shards") and not data.path:
        yield "data.path", f'must be set with source "{data.source}"', "write the file or folder to read"
    text = Path(data.path).expanduser().resolve()
    if data.source == "files" and data.path and Path(c.job.dump_folder).resolve().is_relative_to(text):
        rule = f"must lie outside [data] path ({data.path}), or a restart would read what the run has written"
        yield "job.dump_folder", rule, "write another folder"
    if data.source in ("builtin", "hf") and data.path:
        rule = f'is not read with source "{data.source}"'
        yield "data.path", rule, 'set source = "files" or "shards", or leave path out'
    if validation.enable and data.source in ("builtin", "files") and data.held_out == 0:
        rule = "must be above 0 while [validation] enable = true"
        yield "data.held_out", rule, "write 0.02, or switch validation off"
    if validation.enable and validation.seq_len > training.seq_len:
        rule = f"must not exceed [training] seq_len ({training.seq_len})"
        yield "validation.seq_len", rule, "shorten it"

    yield from _unanswerable(c)
    checkpoint, profiling = c.checkpoint, c.profiling
    if checkpoint.keep_latest_k == 1:
        rule = "must be 0 (keep all) or at least 2: the newest may still be in the writing"
        yield "checkpoint.keep_latest_k", rule, "write 2"
    if checkpoint.create_seed_checkpoint and (not checkpoint.enable or checkpoint.load_only):
        rule = "needs [checkpoint] enable = true and load_only = false: nothing would be written"
        yield "checkpoint.create_seed_checkpoint", rule, "set them"
    if checkpoint.last_save_in_hf and not checkpoint.last_save_model_only:
        rule = "needs last_save_model_only = true: the Hugging Face format holds no optimizer"
        yield "checkpoint.last_save_in_hf", rule, "set that, or export later"
    if profiling.profiler_warmup + profiling.profiler_active > profiling.profile_freq:
        rule = "must be at least profiler_warmup + profiler_active"
        yield "profiling.profile_freq", rule, f"write {profiling.profiler_warmup + profiling.profiler_active}"


def _unanswerable(c: Any) -> Iterator[tuple[str, str, str]]:
    """Causes of [stability] that are to be acted upon, where the action cannot be."""
    saves = c.checkpoint.enable and not c.checkpoint.load_only
    for name in ("predicted", "loss_spike", "nonfinite"):
        if getattr(c.stability, name) == "act" and not saves:
            rule = 'must be "off" or "warn" in a run that writes no checkpoints'
            yield f"stability.{name}", rule, "set [checkpoint] enable = true"
    if c.stability.fp8_range == "act" and c.fp8.recipe != "delayed":
        rule = f'"act" needs [fp8] recipe "delayed", not "{c.fp8.recipe}"'
        yield "stability.fp8_range", rule, 'write "warn"'
    if c.stability.attention == "act" and c.fp8.attention == "off":
        rule = '"act" needs FP8 attention, and [fp8] attention is "off"'
        yield "stability.attention", rule, 'write "warn"'
    kept, every = c.checkpoint.keep_latest_k, c.metrics.log_freq
    if c.stability.loss_spike == "act" and kept and (kept - 1) * c.checkpoint.interval < every:
        rule = f"must let a checkpoint live for {every} steps (metrics.log_freq, a spike is seen so late), or be 0"
        yield "checkpoint.keep_latest_k", rule, f"write {-(-every // c.checkpoint.interval) + 1}"


def _unfit_shapes(c: Any) -> Iterator[tuple[str, str, str]]:
    """What tensor-parallel ranks cannot share, and rows of a micro-batch that FP8 GEMMs cannot take."""
    degree, off = c.parallelism.tensor_parallel_degree, "leave it out"
    if c.parallelism.enable_async_tensor_parallel:
        yield "parallelism.enable_async_tensor_parallel", "must be false: it is not supported", off
    if degree > 1 and c.parallelism.disable_loss_parallel:
        yield (
            "parallelism.disable_loss_parallel",
            "must be false: the loss is always computed in parallel",
            off,
        )
    sections = ("training", "validation") if c.validation.enable else ("training",)
    for name in sections:
        section = _get(c, name)
        key, rows = f"{name}.seq_len", section.seq_len * section.local_batch_size
        if section.seq_len % degree:
            rule = f"must be a multiple of tensor_parallel_degree ({degree}): every rank has a stretch of each sequence"
            fits = -(-section.seq_len // degree) * degree
            yield key, rule, f"choose a degree that divides it and the model's heads, or write {fits}"
        elif c.fp8.recipe != "bf16" and rows // degree % 16:
            many = f"16 * tensor_parallel_degree ({16 * degree})" if degree > 1 else "16"
            rule = (
                f"* local_batch_size ({section.local_batch_size}) must be a multiple of {many} for FP8 GEMMs"
            )
            yield key, rule, "change one of them"
