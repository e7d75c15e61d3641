"""What a run will need and how fast it will be, before any GPU is rented: memory by kind, bytes on the wire, speed.

    python tools/plan.py train_configs/fog_8b.toml --gpus 256 [--tp 2] [--gpu h200] [--tokens 2e12] [--json]

Further arguments override the TOML as in training. Parameters are counted on a meta model; everything else is arithmetic on
its shapes, in the functions below, each with what it assumes. Speeds are rates that were measured inside whole training
steps on one GPU (BENCHMARKS.md); network rates are nominal where the output says so. FSDP traffic hides behind compute as
far as there is compute; tensor parallel's does not. Of the host's launches only the least that was measured is counted: with
tensor parallel 2, full FP8 reached 14,132 tokens/s a GPU on two H200 where this says 14,750, and 8,123 on two H100 with a
slower host, before launches took less.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from titan_fp8 import device

device.install()

import torch  # noqa: E402
from torch import nn  # noqa: E402

from titan_fp8.config import load_config  # noqa: E402
from titan_fp8.errors import UserError, in_one_line  # noqa: E402
from titan_fp8.float8.convert import HEAD, select  # noqa: E402
from titan_fp8.model.activations import GATED  # noqa: E402
from titan_fp8.model.args import FLAVORS, DecoderArgs  # noqa: E402
from titan_fp8.model.decoder import Decoder  # noqa: E402
from titan_fp8.spec import build_tokenizer  # noqa: E402

GIB = 2**30
HOST = "waiting for the host"
# The host's time for a layer of one micro-batch. Stock BF16, the least that was measured: FP8 takes 4.7 to 8 ms, with TP up
# to 16 (BENCHMARKS.md, "The host's time" and "Whole 8B model on two H100"), and hosts differ by a factor of two.
LAUNCHES_MS = 3.4
TAKEN_BY_NCCL = 0.18  # of the multiprocessors, while it communicates: 24 of 132


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU. TFLOP/s as reached by all GEMMs of a step together, TB/s likewise, GB/s per direction."""

    memory_gib: float
    bf16: float
    fp8: float
    attention_bf16: float  # causal FLOPs: half of the square
    attention_fp8: float
    memory_tb: float  # elementwise kernels and casts
    optimizer_tb: float
    node_gb: float
    network_gb: float
    gpus_per_node: int = 8


GPUS = {
    # One H200, benchmarks/2026-11-30_h200_8b-slice.json and _attention.json; node_gb: what NCCL reached inside the steps of
    # two, benchmarks/2026-12-01_h200-x2_8b_fsdp.json and _tp.json. network_gb: 0.8 of one 400 Gbit/s adapter's nominal rate.
    "h200": Gpu(139.8, 706, 1385, 405, 650, 2.6, 1.95, 195, 40),
    # One H100, benchmarks/2026-11-25_h100_8b-slice.json and _attention.json; node_gb: what NCCL reached inside the steps of
    # two H100, benchmarks/2026-11-25_h100-x2_8b_tp.json. network_gb is nominal.
    "h100": Gpu(79.6, 726, 1394, 432, 606, 2.3, 2.0, 170, 40),
}


@dataclass(frozen=True)
class Layout:
    """How a run is split. `sequences`: of one micro-batch on one data-parallel rank; `accumulate`: micro-batches a step."""

    replicate: int
    shard: int
    tensor: int
    sequences: int
    seq_len: int
    accumulate: int

    @property
    def gpus(self) -> int:
        return self.replicate * self.shard * self.tensor

    @property
    def tokens(self) -> int:
        """Of one micro-batch of one data-parallel rank."""
        return self.sequences * self.seq_len


@dataclass(frozen=True)
class Recipe:
    """What the arithmetic needs of a configuration.

    Bytes per element: master, of parameters and gradients; compute; reduce, of gradients on the wire; both moments together.
    """

    linears: str = "delayed"
    attention: bool = True  # forward and backward in FP8
    head_fp8: bool = False
    gather_fp8: bool = True
    master: int = 4
    compute: int = 2
    reduce: int = 4
    moments: float = 8.0  # both together
    ragged_moments: float = 8.0  # where tensor parallel cuts rows inside a block
    block: int = 0  # of FP8 moments; 0: none
    checkpointing: str = "none"
    reshard: bool = True
    history: int = 1024

    @property
    def fp8(self) -> bool:
        return self.linears != "bf16"


@dataclass(frozen=True)
class Parameters:
    total: int
    converted: int  # in FP8 GEMMs
    largest_block: int
    embedding: int  # embedding and, if it has a weight of its own, head

    @classmethod
    def of(cls, args: DecoderArgs, patterns: list[str], fp8: bool) -> Parameters:
        with torch.device("meta"):
            model = Decoder(args)
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != HEAD}
        names = select(list(linears), patterns) if fp8 else []
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.layers.values()]
        total = sum(p.numel() for p in model.parameters())
        return cls(total, sum(linears[n].weight.numel() for n in names), max(blocks), total - sum(blocks))


def kept_per_token(args: DecoderArgs, recipe: Recipe) -> float:
    """Bytes that one block keeps of a token from forward to backward, as our compiled blocks do.

    FP8 operands that backward needs again are kept in FP8 (transposed); a norm keeps its input; the FFN keeps what enters
    its activation, and makes the activation again.
    """
    d, q, kv = args.dim, args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    up = args.hidden_dim * (2 if args.activation in GATED else 1)
    delayed = recipe.linears == "delayed"
    operand = 1 if delayed else 2
    kept = d * operand + q * operand + d * operand  # inputs of wqkv, wo, up
    if recipe.attention:
        kept += 2 * q + 3 * kv + 2 * q + 4 * args.n_heads  # q8, k8 both ways, v8, o, log-sum-exp
    else:
        kept += 2 * (q + 2 * kv) + 2 * q + 4 * args.n_heads
    if args.qk_norm != "none":
        kept += 2 * (q + kv)
    kept += 2 * 2 * d  # the norms' inputs
    kept += 2 * up
    if not delayed:
        kept += 2 * args.hidden_dim  # the input of the down projection
    if recipe.checkpointing == "full":
        return 2 * d
    if recipe.checkpointing == "selective":
        return kept / 2  # results of GEMMs and attention stay
    return kept


def memory(args: DecoderArgs, params: Parameters, recipe: Recipe, layout: Layout) -> dict[str, float]:
    """Peak GiB of one GPU by kind. The peak is where backward begins, or the optimizer's step with all gradients there."""
    tokens, split = layout.tokens, layout.shard * layout.tensor
    fsdp = layout.shard > 1 or layout.replicate > 1
    kinds = {
        "weights": params.total * recipe.master / split,
        "optimizer": moment_bytes(args, params, recipe, layout.tensor) / split,
    }
    gathered = recipe.compute
    if fsdp:
        block = params.largest_block / layout.tensor
        per_element = 1 if recipe.gather_fp8 and recipe.fp8 else gathered
        blocks = 2 if recipe.reshard else args.n_layers  # one in use, one on its way
        kinds["gathered weights"] = block * per_element * blocks + params.embedding * gathered / layout.tensor
        # A block's whole gradient, and two copies in the dtype of the reduction: one being filled, one being sent.
        kinds["gradients being reduced"] = block * (recipe.compute + 2 * recipe.reduce)
    elif recipe.master != gathered:
        kinds["gathered weights"] = (
            params.embedding * gathered / layout.tensor
        )  # autocast's copy of the head's weight
    kept = kept_per_token(args, recipe) * tokens / layout.tensor
    kinds["activations"] = kept * args.n_layers
    rows = min(tokens, 2**29 // args.vocab_size)
    logits = rows * args.vocab_size / layout.tensor
    kinds["logits and head gradient"] = logits * (2 if not recipe.head_fp8 else 3) + (
        args.vocab_size * args.dim * (recipe.compute if rows == tokens else 4) / layout.tensor
        + tokens * args.dim * 2
    )
    slots = 17 * args.n_layers
    kinds["FP8 state"] = recipe.history * slots * 4 if recipe.linears == "delayed" else 0
    # What one block's backward holds at once: the FFN's dz and dh (two layouts), z again, cast weights, a weight gradient.
    hidden = args.hidden_dim * (2 if args.activation in GATED else 1)
    working = tokens / layout.tensor * (2 * args.hidden_dim + 2 * hidden + args.hidden_dim)
    working += args.hidden_dim * args.dim * (1 + 2) / layout.tensor
    if recipe.checkpointing != "none":
        working += (
            kept_per_token(args, Recipe(**(asdict(recipe) | {"checkpointing": "none"})))
            * tokens
            / layout.tensor
        )
    kinds["one block's backward"] = max(0.0, working - kinds["logits and head gradient"])
    gradients = params.total * recipe.master / split
    transient = sum(kinds[k] for k in ("activations", "logits and head gradient", "one block's backward"))
    if layout.accumulate > 1:
        kinds["gradients"] = gradients  # of earlier micro-batches
    elif gradients > transient:
        kinds["gradients"] = gradients - transient  # only what stands above the activations' peak
    kinds = {name: value / GIB for name, value in kinds.items() if value}
    kinds["total"] = sum(kinds.values())
    return kinds


def moment_bytes(args: DecoderArgs, params: Parameters, recipe: Recipe, tensor: int) -> float:
    """Both moments of all parameters. Tensor parallel splits the rows of wo and w2; FP8 moments need whole blocks there."""
    rows = (args.n_heads * args.head_dim, args.hidden_dim)
    ragged = sum(row for row in rows if recipe.block and tensor > 1 and row % (tensor * recipe.block))
    extra = args.n_layers * args.dim * ragged * (recipe.ragged_moments - recipe.moments)
    return params.total * recipe.moments + extra


def flops_per_token(args: DecoderArgs, recipe: Recipe, seq_len: int) -> dict[str, float]:
    """Training FLOPs of a token by precision: 6 per weight, attention with half its square masked."""
    matrix = args.dim * args.head_dim * 2 * (args.n_heads + args.n_kv_heads) + 3 * args.dim * args.ffn_dim
    linears = 6.0 * args.n_layers * matrix
    core = 7.0 * args.n_layers * seq_len * args.n_heads * args.head_dim
    head = 6.0 * args.dim * args.vocab_size
    again = {"none": 0.0, "selective": 0.0, "full": 1 / 3}[recipe.checkpointing]
    result = {"bf16": 0.0, "fp8": 0.0, "attention bf16": 0.0, "attention fp8": 0.0}
    result["fp8" if recipe.fp8 else "bf16"] += linears * (1 + again)
    result["attention fp8" if recipe.attention else "attention bf16"] += core * (1 + again * 6 / 7)
    result["fp8" if recipe.head_fp8 else "bf16"] += head
    return result


def wire(args: DecoderArgs, params: Parameters, recipe: Recipe, layout: Layout) -> dict[str, float]:
    """GB that one GPU receives in a step, by collective."""
    n, t = layout.shard, layout.tensor
    collectives: dict[str, float] = {}
    if n > 1:
        rest = params.total - params.converted
        gathered = params.converted * (1 if recipe.gather_fp8 else recipe.compute) + rest * recipe.compute
        passes = (2 if recipe.reshard else 1) * layout.accumulate
        collectives["FSDP all-gather"] = passes * gathered / t * (n - 1) / n
        collectives["FSDP reduce-scatter"] = (
            layout.accumulate * params.total / t * recipe.reduce * (n - 1) / n
        )
    if layout.replicate > 1:
        shard = params.total / n / t * recipe.reduce
        collectives["HSDP all-reduce"] = (
            layout.accumulate * 2 * shard * (layout.replicate - 1) / layout.replicate
        )
    if t > 1:
        stream = layout.accumulate * layout.tokens * args.dim * (t - 1) / t
        # Per block two all-gathers and two reduce-scatters each way; FP8 where the operand is cast before.
        each = 1 if recipe.linears == "delayed" else 2
        collectives["TP all-gather"] = args.n_layers * 4 * stream * each
        collectives["TP reduce-scatter"] = args.n_layers * 4 * stream * 2
    if recipe.linears == "delayed" and layout.gpus > 1:
        collectives["amax all-reduce"] = 2 * 4 * 17 * args.n_layers
    return {name: value / 1e9 for name, value in collectives.items()}


def speed(
    args: DecoderArgs, params: Parameters, recipe: Recipe, layout: Layout, gpu: Gpu
) -> dict[str, float]:
    """Milliseconds of a step on one GPU by cause, and "tokens_per_second" of one GPU."""
    tokens = layout.tokens * layout.accumulate / layout.tensor
    flops = flops_per_token(args, recipe, layout.seq_len)
    ms = {
        "GEMMs": (flops["fp8"] / gpu.fp8 + flops["bf16"] / gpu.bf16) * tokens / 1e9,
        "attention": (flops["attention fp8"] / gpu.attention_fp8 + flops["attention bf16"] / gpu.attention_bf16)
        * tokens / 1e9,
    }  # fmt: skip
    up = args.hidden_dim * (2 if args.activation in GATED else 1)
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    if recipe.linears == "delayed":
        # Norms, residuals, RoPE and QK regularisation both ways; casts in both layouts; act + cast both ways.
        per_token = 40 * args.dim + 16 * (q + kv) + 4 * 4 * args.dim + 3 * up + 5 * up + 3 * args.hidden_dim
        casts = (
            params.converted / layout.tensor * 2 * (1 if recipe.gather_fp8 and layout.shard > 1 else 2 + 1)
        )
    else:
        per_token = 40 * args.dim + 16 * (q + kv) + (10 * up + 6 * args.hidden_dim) * (2 if recipe.fp8 else 1)
        casts = params.converted / layout.tensor * 2 * (2 + 2 + 1) if recipe.fp8 else 0
    per_token = per_token * args.n_layers + 8 * args.vocab_size
    ms["elementwise and casts"] = (per_token * tokens + casts * layout.accumulate) / gpu.memory_tb / 1e9
    state = 4 * params.total * recipe.master + 2 * moment_bytes(args, params, recipe, layout.tensor)
    ms["optimizer"] = state / layout.shard / layout.tensor / gpu.optimizer_tb / 1e9
    traffic = wire(args, params, recipe, layout)
    one_node = layout.gpus <= gpu.gpus_per_node
    rate = {"TP": gpu.node_gb, "FSDP": gpu.node_gb if one_node else gpu.network_gb}
    rate["HSDP"] = rate["FSDP"]
    time = {name: value / rate.get(name.split()[0], gpu.node_gb) * 1e3 for name, value in traffic.items()}
    hidden_behind = ms["GEMMs"] + ms["attention"] + ms["elementwise and casts"]
    sharded = sum(value for name, value in time.items() if name.startswith(("FSDP", "HSDP")))
    # Nothing hides the gather of embedding and head before the first block, and their gradient's reduction after the last.
    ends = params.embedding / layout.tensor * (recipe.compute + recipe.reduce) * layout.accumulate / 1e6
    ends *= (layout.shard - 1) / layout.shard / rate["FSDP"]
    ms["exposed FSDP"] = max(ends, sharded - hidden_behind)
    if sharded:
        # FSDP2 copies what it has gathered out of one buffer, and gradients into one; and NCCL's kernels take
        # multiprocessors from those that they hide behind.
        gathers = traffic.get("FSDP all-gather", 0.0) * layout.shard / max(layout.shard - 1, 1)
        reduced = params.total / layout.tensor * (recipe.compute + recipe.reduce) * layout.accumulate / 1e9
        ms["FSDP copies"] = (2 * gathers + reduced) / gpu.memory_tb
        ms["compute beside communication"] = TAKEN_BY_NCCL * min(sharded, hidden_behind)
    ms["exposed TP"] = sum(value for name, value in time.items() if name.startswith("TP"))
    ms = {name: value for name, value in ms.items() if value}
    ms["launches and gaps"] = 0.03 * sum(ms.values())
    if (idle := LAUNCHES_MS * args.n_layers * layout.accumulate - sum(ms.values())) > 0:
        ms[HOST] = idle
    step = sum(ms.values())
    return ms | {"step": step, "tokens_per_second": tokens / step * 1e3}


def recipe_of(config: Any) -> Recipe:
    fp8, training = config.fp8, config.training
    size = {"float32": 4, "bfloat16": 2, "float16": 2}
    moment = {"e4m3": 1, "e5m2": 1, "bf16": 2, "fp32": 4}
    mine = config.optimizer.fp8
    scales = 2 * 4 / mine.block_size if mine.block_size else 0
    sizes = [moment[mine.first_moment], moment[mine.second_moment]]
    master = size[training.dtype]
    return Recipe(
        linears=fp8.recipe, attention=fp8.attention == "full", head_fp8=fp8.lm_head == "fp8",
        gather_fp8=fp8.all_gather == "fp8", master=master, compute=size[training.mixed_precision_param],
        reduce=size[training.mixed_precision_reduce],
        moments=sum(sizes) + scales if mine.enable else 2 * master,
        ragged_moments=sum(4 if size == 1 else size for size in sizes),
        block=mine.block_size if mine.enable and 1 in sizes else 0,
        checkpointing=config.activation_checkpoint.mode,
        reshard=config.parallelism.fsdp_reshard_after_forward != "never", history=fp8.amax_history,
    )  # fmt: skip


def layout_of(config: Any, gpus: int, tensor: int) -> Layout:
    """Raises UserError if the degrees do not multiply to `gpus`, or the batch does not divide."""
    replicate, shard = (
        config.parallelism.data_parallel_replicate_degree,
        config.parallelism.data_parallel_shard_degree,
    )
    if gpus < 1 or tensor < 1 or gpus % (tensor * replicate):
        raise UserError(
            f"--gpus must be a positive multiple of --tp (at least 1) times replicas, got {gpus} of TP {tensor} times "
            f"replicas {replicate}: change one of them"
        )
    if shard == -1:
        shard = gpus // tensor // replicate
    if replicate * shard * tensor != gpus:
        raise UserError(
            f"replicas {replicate} x shards {shard} x TP {tensor} must be --gpus {gpus}: leave "
            "parallelism.data_parallel_shard_degree at -1"
        )
    local, whole = config.training.local_batch_size, config.training.global_batch_size
    ranks = replicate * shard
    accumulate = 1 if whole <= 0 else whole // (local * ranks)
    if accumulate < 1 or (whole > 0 and whole % (local * ranks)):
        raise UserError(
            f"training.global_batch_size must be a multiple of local batch {local} x {ranks} data-parallel ranks, got "
            f"{whole}: use {ceil(whole / local / ranks) * local * ranks}"
        )
    return Layout(replicate, shard, tensor, local, config.training.seq_len, accumulate)


def plan(args: DecoderArgs, recipe: Recipe, layout: Layout, gpu: Gpu, patterns: list[str]) -> dict[str, Any]:
    """Everything, JSON-ready."""
    if args.n_heads % layout.tensor or args.n_kv_heads % layout.tensor or args.hidden_dim % layout.tensor:
        raise UserError(
            f"TP must divide {args.n_heads} heads, {args.n_kv_heads} kv heads and {args.hidden_dim} hidden features, got "
            f"{layout.tensor}: choose a common divisor"
        )
    params = Parameters.of(args, patterns, recipe.fp8)
    flops = flops_per_token(args, recipe, layout.seq_len)
    return {
        "parameters": asdict(params), "layout": asdict(layout), "recipe": asdict(recipe),
        "memory_gib": memory(args, params, recipe, layout), "gpu_memory_gib": gpu.memory_gib,
        "gflops_per_token": {name: value / 1e9 for name, value in flops.items() if value},
        "wire_gb_per_step": wire(args, params, recipe, layout),
        "milliseconds": speed(args, params, recipe, layout, gpu),
    }  # fmt: skip


def show(result: dict[str, Any], name: str, tokens: float) -> str:
    layout, ms, mem = result["layout"], dict(result["milliseconds"]), result["memory_gib"]
    gpus = layout["replicate"] * layout["shard"] * layout["tensor"]
    per_gpu, step = ms.pop("tokens_per_second"), ms.pop("step")
    total, converted = (result["parameters"][key] / 1e9 for key in ("total", "converted"))
    lines = [
        f"{total:.3f}B parameters, {converted:.3f}B in FP8 GEMMs",
        f"{gpus} x {name}: replicas {layout['replicate']} x FSDP {layout['shard']} x TP {layout['tensor']}, "
        f"{layout['accumulate']} micro-batches of {layout['sequences']} x {layout['seq_len']} tokens",
        "",
        "memory of one GPU, GiB",
        *(f"  {kind:28s} {value:9.2f}" for kind, value in mem.items()),
        f"  {'there is':28s} {result['gpu_memory_gib']:9.2f}"
        + ("" if mem["total"] < 0.95 * result["gpu_memory_gib"] else "   does not fit"),
        "",
        "GFLOP per token, by precision",
        *(f"  {kind:28s} {value:9.2f}" for kind, value in result["gflops_per_token"].items()),
    ]
    if result["wire_gb_per_step"]:
        lines += ["", "GB that one GPU receives in a step"]
        lines += [f"  {kind:28s} {value:9.3f}" for kind, value in result["wire_gb_per_step"].items()]
    lines += ["", "milliseconds of a step", *(f"  {kind:28s} {value:9.1f}" for kind, value in ms.items())]
    lines += [
        f"  {'step':28s} {step:9.1f}",
        "",
        f"{per_gpu:,.0f} tokens/s per GPU, {per_gpu * gpus:,.0f} in all; most of a step: {max(ms, key=ms.__getitem__)}",
        f"{tokens:.3g} tokens: {tokens / (per_gpu * gpus) / 86400:,.1f} days",
    ]
    if gpus > GPUS[name].gpus_per_node:
        lines.append("(network rates are nominal, not measured)")
    if layout["tensor"] > 1 or HOST in ms:
        lines.append(
            "(the host's launches are counted at their least: with TP, or layers so small, expect less speed)"
        )
    return "\n".join(lines)


@in_one_line
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="TOML file")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--tp", type=int, help="tensor parallel degree; default: the TOML's")
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--tokens", type=float, default=1e12, help="for the days; default 1e12")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options, overrides = parser.parse_known_args()
    config = load_config(["--job.config_file", options.config, *overrides])
    build_tokenizer(config)
    args = FLAVORS[config.model.flavor]
    args.update_from_config(config)
    if options.tp is None:
        options.tp = config.parallelism.tensor_parallel_degree
    layout = layout_of(config, options.gpus, options.tp)
    result = plan(args, recipe_of(config), layout, GPUS[options.gpu], config.fp8.filter)
    print(json.dumps(result) if options.json else show(result, options.gpu, options.tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
