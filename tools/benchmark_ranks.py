"""Whole training steps of a model spread over the GPUs of one host, ours beside stock torchtitan and torchao.

    torchrun --nproc-per-node 2 tools/benchmark_ranks.py --model 8b [--layers 32] [--tp 2] [--variants "a,b"] --out r.json

Every variant is the whole model in bf16, its optimizer's moments too (the gradients' reduction is float32, torchtitan's
default), FSDP2 over all ranks or over those that --tp leaves, torch.compile per block, fused AdamW, clipping; stock
torchtitan's Llama is parallelised by torchtitan's own function, with torchao's float8 linears, float8 all-gather and
precomputed scales as its documentation recommends. Variants run one after another, since two 8B models do not fit. A
step's time is the host's clock over --steps of them back to back, their mean; the slowest rank counts.

From a profile of rank 0: time of NCCL kernels, how much of it no other kernel covers ("exposed"), and the bytes that each
kind of collective receives. Beside them stands what tools/plan.py says of the same layout. With gloo, on CPU, there is no
profile and the times mean nothing: for tests.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

from titan_fp8 import device

device.install()  # before anything of torchtitan is imported

import benchmark  # noqa: E402  # pyrefly: ignore
import plan  # noqa: E402  # pyrefly: ignore
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torchtitan.config import JobConfig  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.distributed import utils as dist_utils  # noqa: E402
from torchtitan.tools.logging import logger  # noqa: E402

from titan_fp8.config import Architecture, Fp8  # noqa: E402
from titan_fp8.errors import UserError, in_one_line  # noqa: E402
from titan_fp8.files import save  # noqa: E402
from titan_fp8.float8.convert import convert, scaling_state  # noqa: E402
from titan_fp8.model.args import FLAVORS, DecoderArgs  # noqa: E402
from titan_fp8.model.decoder import Decoder  # noqa: E402
from titan_fp8.model.parallelize import parallelize  # noqa: E402
from titan_fp8.optim import Fp8AdamW  # noqa: E402

MAX_NORM, SEED = 1.0, 0


NAMES = (
    *("torchtitan bf16", "torchao tensorwise", "llama fp8 linears", "fog_max fp8 full"),
    *("fog_max fp8 full + head + adam", "fog_max bf16"),
)
VARIANTS = {name: benchmark.VARIANTS[name] for name in NAMES}


def shape_args(options: argparse.Namespace, preset: str) -> DecoderArgs:
    args = FLAVORS[options.model]
    args.apply(
        Architecture(preset=preset, n_layers=options.layers, vocab_size=options.vocab, tie_embeddings=False)  # type: ignore
    )
    args.seq_len = options.seq_len
    return args


def ours(
    options: argparse.Namespace, recipe: benchmark.Recipe, dims: ParallelDims, config: JobConfig
) -> nn.Module:
    """On meta, converted and parallelised."""
    assert recipe.preset is not None
    fp8 = Fp8(recipe=recipe.linears, lm_head="fp8" if recipe.head else "bf16")  # type: ignore
    if recipe.attention:
        fp8.attention, fp8.attention_gradients = "full", "e4m3"
    with torch.device("meta"):
        model = Decoder(shape_args(options, recipe.preset)).to(torch.bfloat16)
        convert(model, fp8, sharded=dims.fsdp_enabled)
    given = SimpleNamespace(**vars(config) | {"fp8": fp8})
    return parallelize(model, dims, given)


def stock(
    options: argparse.Namespace, recipe: benchmark.Recipe, dims: ParallelDims, config: JobConfig
) -> tuple[nn.Module, Any]:
    """(torchtitan's Llama on meta, parallelised; its float8 converter or None)."""
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs
    from torchtitan.models.llama3.infra.parallelize import parallelize_llama

    own = shape_args(options, "llama")
    # torchtitan computes the hidden size as round_up(2/3 * 4 dim * multiplier, multiple_of).
    args = TransformerModelArgs(
        dim=own.dim, n_layers=own.n_layers, n_heads=own.n_heads, n_kv_heads=own.n_kv_heads, vocab_size=own.vocab_size,
        ffn_dim_multiplier=own.ffn_dim / (8 * own.dim / 3), multiple_of=options.multiple_of, rope_theta=own.rope_theta,
        max_seq_len=options.seq_len,
    )  # fmt: skip
    with torch.device("meta"):
        model = Transformer(args).to(torch.bfloat16)
    hidden = model.layers["0"].feed_forward.w1.out_features
    assert hidden == own.ffn_dim, f"stock hidden size {hidden}, ours {own.ffn_dim}"
    converter = None
    if recipe.linears != "bf16":
        from torchtitan.components.quantization.float8 import Float8LinearConverter

        float8 = config.quantize.linear.float8
        float8.filter_fqns = ["output"]
        float8.enable_fsdp_float8_all_gather = float8.precompute_float8_dynamic_scale_for_fsdp = True
        converter = Float8LinearConverter(config, dims)
        converter.convert(model)
    return device.gloo_safe(parallelize_llama(model, dims, config)), converter


def job_config(options: argparse.Namespace) -> JobConfig:
    config = JobConfig()
    config.activation_checkpoint.mode = options.ac
    config.compile.enable = not options.no_compile
    config.training.seq_len = options.seq_len
    return config


class Run:
    """A variant on this rank: model, optimizer, and a step."""

    def __init__(self, name: str, options: argparse.Namespace, dims: ParallelDims, kind: str):
        self.recipe, self.dims = VARIANTS[name], dims
        device.launch_quickly()  # the peers too
        config = job_config(options)
        self.converter = None
        if self.recipe.preset is None:
            model, self.converter = stock(options, self.recipe, dims, config)
        else:
            model = ours(options, self.recipe, dims, config)
        model.to_empty(device=kind)
        torch.manual_seed(SEED)
        with torch.no_grad():
            model.init_weights(buffer_device=torch.device(kind))
        self.model = model.train()
        self.scaling = scaling_state(model)
        settings: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
        if self.recipe.moments == "fp8":
            self.optimizer: torch.optim.Optimizer = Fp8AdamW(model.parameters(), **settings)
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), **settings, fused=True)
        self.context = dist_utils.get_train_context(dims.tp_enabled and self.recipe.preset is None)
        loss = torch.nn.functional.cross_entropy
        self.loss = loss if options.no_compile else torch.compile(loss)
        # What a parameter's local square sum counts: once over all ranks, however many hold it.
        self.parameters = list(model.parameters())
        self.shares = torch.tensor([1.0 / _copies(p) for p in self.parameters], device=kind)

    def step(self, tokens: Tensor, count: int) -> Tensor:
        """tokens [B, S + 1]; count: tokens of all ranks. This rank's share of the mean loss."""
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        with (
            self.context(),
            sdpa_kernel(
                [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True
            ),
        ):
            if self.recipe.preset is None:
                logits = self.model(inputs)
                loss = self.loss(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / count
                del logits
            else:
                loss = self.model(inputs, labels) / count
            loss.backward()
        if self.recipe.preset is None:
            dist_utils.clip_grad_norm_(self.parameters, MAX_NORM, foreach=True)
        else:
            grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in self.parameters]
            squares = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).square()
            total = (squares * self.shares).sum()
            dist.all_reduce(total)
            self.optimizer.grad_scale = ((total.sqrt() + 1e-6) / MAX_NORM).clamp(min=1.0)
            self.optimizer.found_inf = (~total.isfinite()).float()
        self.optimizer.step()
        if self.converter is not None:
            self.converter.post_optimizer_hook(self.model)
        if self.scaling is not None:
            self.scaling.update()
        self.optimizer.zero_grad()
        loss = loss.full_tensor() if isinstance(loss, DTensor) else loss
        return loss.detach()


def _copies(p: Tensor) -> int:
    if not isinstance(p, DTensor):
        return dist.get_world_size()
    sizes = [p.device_mesh.size(i) for i, place in enumerate(p.placements) if place.is_replicate()]
    return int(torch.tensor(sizes).prod()) if sizes else 1


def tokens_of(options: argparse.Namespace, dims: ParallelDims, kind: str, batches: int) -> list[Tensor]:
    """The same text whatever the layout: a noisy walk through the vocabulary, learnable; this rank's rows."""
    ranks = dims.dp_shard
    generator = torch.Generator().manual_seed(SEED)
    shape = (batches, options.batch * ranks, options.seq_len + 1)
    steps = torch.randint(1, 4, shape, generator=generator)
    start = torch.randint(0, options.vocab, (*shape[:2], 1), generator=generator)
    tokens = (start + steps.cumsum(-1)) % min(options.vocab, 4096)
    rank = dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0
    return [batch.chunk(ranks)[rank].to(kind) for batch in tokens]


def covered(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Their union, in order."""
    union: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def overlap(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    """Length of what two unions have in common."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


SIZES = {
    "Float": 4,
    "BFloat16": 2,
    "Half": 2,
    "Byte": 1,
    "Float8_e4m3fn": 1,
    "Int": 4,
    "Long": 8,
    "Double": 8,
}


def traffic(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Of a chrome trace's events: {"nccl_ms", "exposed_ms", "received_gb": {collective: GB}} of one step on this rank.

    A rank of n receives (n - 1) / n of an all-gather's output and of a reduce-scatter's input, twice that in an all-reduce.
    """
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    nccl = [e for e in kernels if "nccl" in e["name"].lower()]
    spans = covered([(e["ts"], e["ts"] + e["dur"]) for e in nccl])
    others = covered([(e["ts"], e["ts"] + e["dur"]) for e in kernels if "nccl" not in e["name"].lower()])
    length = sum(end - start for start, end in spans)
    received: Counter[str] = Counter()
    for e in nccl:
        args = e.get("args", {})
        what, n = str(args.get("Collective name", "unknown")), int(args.get("Group size", 1))
        size = SIZES.get(str(args.get("dtype")), 0)
        ins, outs = int(args.get("In msg nelems", 0)), int(args.get("Out msg nelems", 0))
        factor = 2 * ins if what.startswith("allreduce") else max(ins, outs)
        received[f"{what} {args.get('dtype')}"] += factor * size * (n - 1) // n
    return {
        "nccl_ms": length / 1e3 / steps,
        "exposed_ms": (length - overlap(spans, others)) / 1e3 / steps,
        "busy_ms": sum(end - start for start, end in others) / 1e3 / steps,
        "received_gb": {what: number / 1e9 / steps for what, number in received.most_common()},
    }


def profiled(run: Run, tokens: list[Tensor], count: int, steps: int = 2) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for i in range(steps):
            run.step(tokens[i % len(tokens)], count)
        torch.cuda.synchronize()
    if dist.get_rank():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        recorded.export_chrome_trace(path)
        return traffic(json.loads(Path(path).read_text())["traceEvents"], steps)


def measure(name: str, options: argparse.Namespace, dims: ParallelDims, kind: str) -> dict[str, Any]:
    """One variant; the same row on every rank, the profile on rank 0 only."""
    cuda = kind == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    run = Run(name, options, dims, kind)
    tokens = tokens_of(options, dims, kind, 8)
    count = options.batch * dims.dp_shard * options.seq_len
    losses = [run.step(tokens[i % 8], count) for i in range(options.warm_up)]
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    warm = time.perf_counter() - started
    times = []
    for i in range(options.steps):
        before = time.perf_counter()
        losses.append(run.step(tokens[i % 8], count))
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    # Back to back, as a run trains: the host does not wait for the device.
    dist.barrier()
    before = time.perf_counter()
    for i in range(options.steps):
        losses.append(run.step(tokens[i % 8], count))
    if cuda:
        torch.cuda.synchronize()
    step_ms = (time.perf_counter() - before) / options.steps * 1e3
    slowest = torch.tensor([step_ms, median(times) * 1e3, peak, warm], dtype=torch.float64, device=kind)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    step_ms, alone_ms, peak, warm = slowest.tolist()
    total = torch.stack([loss.double() for loss in losses])
    if dims.dp_enabled:
        dist.all_reduce(total, group=dims.get_mesh("batch").get_group())
    row = {
        "variant": name, "step_ms": step_ms, "step_ms_synchronised": alone_ms, "warm_up_s": warm,
        "tokens_per_second_per_gpu": count / dist.get_world_size() / step_ms * 1e3, "peak_memory_gib": peak,
        "losses": [round(x, 5) for x in total.tolist()],
    }  # fmt: skip
    if cuda:
        row |= profiled(run, tokens, count)
    del run, tokens, losses
    torch._dynamo.reset()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return row


def predicted(name: str, options: argparse.Namespace, dims: ParallelDims, gpu: str) -> dict[str, Any]:
    """What tools/plan.py says of a variant on this layout."""
    recipe = VARIANTS[name]
    args = shape_args(options, recipe.preset or "llama")
    mine = plan.Recipe(
        linears=recipe.linears, attention=recipe.attention, head_fp8=recipe.head, master=2, compute=2, reduce=4,
        moments=2 + 8 / 256 if recipe.moments == "fp8" else 4, checkpointing=options.ac,
    )  # fmt: skip
    layout = plan.Layout(1, dims.dp_shard, dims.tp, options.batch, options.seq_len, 1)
    result = plan.plan(args, mine, layout, plan.GPUS[gpu], ["layers.*"])
    return {
        "tokens_per_second_per_gpu": result["milliseconds"]["tokens_per_second"],
        "peak_memory_gib": result["memory_gib"]["total"],
        "received_gb": result["wire_gb_per_step"],
    }


def table(result: dict[str, Any]) -> str:
    size = f"{result['parameters'] / 1e9:.2f}B parameters, {result['layers']} layers, vocabulary {result['vocab']}"
    where = f"{result['layout']} on {result['ranks']} x {result['gpu']}, torch {result['torch']}"
    lines = [
        f"{result['model']}: {size}; {where}; {result['batch']} x {result['seq_len']} tokens a data-parallel rank",
        f"{'variant':32s} {'tok/s/GPU':>9s} {'ratio':>7s} {'step ms':>8s} {'GiB':>6s} {'NCCL ms':>8s} {'exposed':>8s} "
        f"{'GB in':>6s} {'loss':>16s} | plan: {'tok/s':>7s} {'GiB':>6s} {'GB in':>6s}",
    ]
    base = result["rows"][0]["tokens_per_second_per_gpu"]
    for row in result["rows"]:
        said = row["plan"]
        received = sum(row.get("received_gb", {}).values())
        lines.append(
            f"{row['variant']:32s} {row['tokens_per_second_per_gpu']:9,.0f} "
            f"{row['tokens_per_second_per_gpu'] / base:6.3f}x {row['step_ms']:8.1f} {row['peak_memory_gib']:6.1f} "
            f"{row.get('nccl_ms', 0):8.1f} {row.get('exposed_ms', 0):8.1f} {received:6.2f} "
            f"{row['losses'][0]:7.3f} -> {row['losses'][-1]:5.3f} |       {said['tokens_per_second_per_gpu']:7,.0f} "
            f"{said['peak_memory_gib']:6.1f} {sum(said['received_gb'].values()):6.2f}"
        )
    for row in result["rows"]:
        parts = "  ".join(f"{what} {number:.3f}" for what, number in row.get("received_gb", {}).items())
        lines.append(f"{row['variant']:32s} GB received: {parts}")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(options, names of the variants). Raises UserError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=FLAVORS, default="8b")
    parser.add_argument("--layers", type=int, help="default: the model's")
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument(
        "--multiple-of", type=int, default=256, help="torchtitan's rounding of the hidden size"
    )
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1, help="sequences on a data-parallel rank")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ac", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--variants", default=",".join(NAMES[:5]), help=f"of: {', '.join(VARIANTS)}")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before the clock starts")
    parser.add_argument(
        "--steps", type=int, default=6, help="timed steps, twice: synchronised, and back to back"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="for CPU, where compiled tensor parallel fails"
    )
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args(arguments)
    if options.layers is None:
        options.layers = FLAVORS[options.model].n_layers
    names = options.variants.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(
            f"--variants must name known ones, got {unknown[0]!r}: choose of {', '.join(VARIANTS)}"
        )
    ranks = int(os.environ.get("WORLD_SIZE", 0))
    if not ranks or ranks % options.tp:
        raise UserError(
            f"--tp must divide the number of ranks, got {options.tp} and {ranks}: start it with torchrun --nproc-per-node N"
        )
    return options, names


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    options, names = parse(arguments)
    logger.setLevel("WARNING")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    ranks = dist.get_world_size()
    dims = ParallelDims(1, ranks // options.tp, 1, options.tp, 1, 1, 1, ranks)
    dims.build_mesh()
    name = torch.cuda.get_device_name() if kind == "cuda" else "cpu"
    gpu = "h200" if "H200" in name else "h100"
    args = shape_args(options, "llama")
    result: dict[str, Any] = {
        "model": options.model, "layers": options.layers, "vocab": options.vocab, "seq_len": options.seq_len,
        "batch": options.batch, "ac": options.ac, "gpu": name, "ranks": ranks, "torch": torch.__version__,
        "parameters": plan.Parameters.of(args, [], False).total, "layout": f"FSDP {dims.dp_shard} x TP {dims.tp}",
        "rows": [],
    }  # fmt: skip
    for variant in names:
        row = measure(variant, options, dims, kind)
        row["plan"] = predicted(variant, options, dims, gpu)
        result["rows"].append(row)
        if not dist.get_rank():
            print(f"{variant}: {row['step_ms']:.1f} ms, {row['peak_memory_gib']:.1f} GiB, "
                  f"warm-up {row['warm_up_s']:.0f} s", flush=True)  # fmt: skip
            if options.out:
                save(options.out, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
    if not dist.get_rank():
        print(table(result))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
