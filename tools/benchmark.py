"""Tokens per second of whole training steps, ours beside the peers at their best, in one process on one GPU.

    python tools/benchmark.py --model 8b-slice [--variants "a,b"] [--profile] [--loss-curves 200] --out r.json
    python tools/benchmark.py --gemm-only --model 8b-slice     rates of the model's own GEMMs, bf16 and FP8
    python tools/benchmark.py --attention-only                 FP8 attention beside cuDNN's, times and errors
    python tools/benchmark.py --optimizer-only --model 1.5b    an optimizer step, FP8 Adam beside torch's and torchao's
    python tools/benchmark.py --draw r.json                    table and picture of a recorded result, without a GPU

Every variant is a model of the same shape and, within a thousandth, the same parameters, in bf16, with torch.compile per
block, cuDNN attention where attention is bf16, fused AdamW, gradients clipped, the same tokens. A round runs some steps of
each variant in turn, so that a drift of the machine meets all alike; figures are medians over rounds, spreads min and max,
ratios those to stock torchtitan BF16. Peak memory is that of one variant alone. The floor is the time that the step's matrix
products alone take at the rates of this model's own shapes, measured in the same run (bench_gemms.py).

The tokens are a fixed random Markov chain, so there is something to learn. `--loss-curves N` starts every variant anew from
the same seed for N steps on the same tokens, before the timing. Writes --out and a PNG beside it.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

for noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(noisy).setLevel(logging.ERROR)

import bench_attention  # noqa: E402  # pyrefly: ignore
import bench_gemms  # noqa: E402  # pyrefly: ignore
import bench_optimizer  # noqa: E402  # pyrefly: ignore
import bench_report  # noqa: E402  # pyrefly: ignore
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from titan_fp8 import files  # noqa: E402
from titan_fp8.config import Architecture, Fp8  # noqa: E402
from titan_fp8.device import launch_quickly  # noqa: E402
from titan_fp8.errors import UserError, in_one_line  # noqa: E402
from titan_fp8.float8.convert import convert, scaling_state  # noqa: E402
from titan_fp8.float8.formats import BY_NAME  # noqa: E402
from titan_fp8.float8.kernels.attention_forward import require_hopper  # noqa: E402
from titan_fp8.model.args import FLAVORS, DecoderArgs  # noqa: E402
from titan_fp8.model.decoder import Decoder  # noqa: E402
from titan_fp8.optim import Fp8AdamW  # noqa: E402
from titan_fp8.stability.statistics import Statistics  # noqa: E402

LEARNING_RATE, WARMUP_STEPS, MAX_NORM = 3e-4, 20, 1.0
STATES, SUCCESSORS = 2048, 8  # of the Markov chain
SEED = 0


@dataclass(frozen=True)
class Shape:
    flavor: str
    layers: int
    vocab: int
    batch: int


SHAPES = {
    "390m": Shape("390m", 16, 131072, 4),
    "1.5b": Shape("1.5b", 16, 32768, 4),
    "7b-slice": Shape("llama2_7b", 8, 32000, 2),
    "8b-slice": Shape("8b", 8, 32768, 2),
}


@dataclass(frozen=True)
class Recipe:
    """preset None: torchtitan's own Llama, with torchao's float8 linears unless `linears` is bf16."""

    preset: str | None
    linears: str
    attention: bool = False
    head: bool = False
    moments: str = "torch"  # of torch's fused AdamW, or of ours in "bf16" or "fp8"
    forward: str = "auto"  # [fp8] attention_forward
    smooth: str | None = None  # [fp8] smooth_scale, with activation smooth_swiglu
    statistics: bool = False  # of every step, as in a run with [metrics] log_freq = 1


BASE = "torchtitan bf16"
VARIANTS = {
    BASE: Recipe(None, "bf16"),
    "torchao tensorwise": Recipe(None, "tensorwise"),
    "torchao rowwise": Recipe(None, "rowwise"),
    "llama fp8 linears": Recipe("llama", "delayed"),
    "llama fp8 full": Recipe("llama", "delayed", True),
    "fog_max fp8 full": Recipe("fog_max", "delayed", True),
    "fog_max fp8 full + head": Recipe("fog_max", "delayed", True, True),
    "fog_max fp8 full + head + adam": Recipe("fog_max", "delayed", True, True, "fp8"),
    "fog_opt fp8 full": Recipe("fog_opt", "delayed", True),
    "fog_flash fp8 full": Recipe("fog_flash", "delayed", True),
    # Not by default: on request.
    "llama bf16": Recipe("llama", "bf16"),
    "llama fp8 linears + smooth": Recipe("llama", "delayed", smooth="channel_delayed"),
    "llama fp8 linears + smooth dynamic": Recipe("llama", "delayed", smooth="channel_dynamic"),
    "llama fp8 linears + smooth token": Recipe("llama", "delayed", smooth="token_dynamic"),
    "fog_max bf16": Recipe("fog_max", "bf16"),
    "fog_max fp8 linears": Recipe("fog_max", "delayed"),
    "fog_max fp8 full + statistics": Recipe("fog_max", "delayed", True, statistics=True),
    "llama fp8 full + statistics": Recipe("llama", "delayed", True, statistics=True),
    "fog_max fp8 full + cudnn": Recipe("fog_max", "delayed", True, forward="cudnn"),
    "fog_max fp8 full + adam16": Recipe("fog_max", "delayed", True, moments="bf16"),
    "fog_max fp8 full + head + adam16": Recipe("fog_max", "delayed", True, True, "bf16"),
}
DEFAULT = list(VARIANTS)[:10]


def shape_args(shape: Shape, seq_len: int, preset: str) -> DecoderArgs:
    args = FLAVORS[shape.flavor]
    args.apply(
        Architecture(preset=preset, n_layers=shape.layers, vocab_size=shape.vocab, tie_embeddings=False)  # type: ignore
    )
    args.seq_len = seq_len
    return args


def build_ours(shape: Shape, seq_len: int, recipe: Recipe) -> nn.Module:
    """On meta, converted."""
    assert recipe.preset is not None
    args = shape_args(shape, seq_len, recipe.preset)
    if recipe.smooth:
        args.activation = "smooth_swiglu"
    with torch.device("meta"):
        model = Decoder(args).to(torch.bfloat16)
    options: dict[str, Any] = {"recipe": recipe.linears}
    if recipe.attention:
        # At its best: the fastest backends, and the format that meets their error bound.
        options |= {"attention": "full", "attention_forward": recipe.forward, "attention_gradients": "e4m3"}
    if recipe.head:
        options["lm_head"] = "fp8"
    if recipe.smooth:
        options["smooth_scale"] = recipe.smooth
    convert(model, Fp8(**options))
    return model


def build_stock(shape: Shape, seq_len: int, recipe: Recipe) -> nn.Module:
    """torchtitan's own Llama of the same shape on meta, with torchao's float8 linears as torchtitan applies them."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs

    ours = shape_args(shape, seq_len, "llama")
    # torchtitan computes the hidden size as round_up(2/3 * 4 dim * multiplier, multiple_of).
    args = TransformerModelArgs(
        dim=ours.dim, n_layers=ours.n_layers, n_heads=ours.n_heads, n_kv_heads=ours.n_kv_heads, vocab_size=ours.vocab_size,
        ffn_dim_multiplier=ours.ffn_dim / (8 * ours.dim / 3), multiple_of=256, rope_theta=ours.rope_theta,
        max_seq_len=seq_len,
    )  # fmt: skip
    with torch.device("meta"):
        model = Transformer(args).to(torch.bfloat16)
    hidden = model.layers["0"].feed_forward.w1.out_features
    assert hidden == ours.ffn_dim, f"stock hidden size {hidden}, ours {ours.ffn_dim}"
    if recipe.linears != "bf16":
        rowwise = recipe.linears == "rowwise"
        config = Float8LinearConfig.from_recipe_name("rowwise") if rowwise else Float8LinearConfig()
        torch._inductor.config.emulate_precision_casts = rowwise
        convert_to_float8_training(
            model, config=config, module_filter_fn=lambda _, name: "output" not in name
        )
    return model


def build(shape: Shape, seq_len: int, recipe: Recipe) -> nn.Module:
    return (build_stock if recipe.preset is None else build_ours)(shape, seq_len, recipe)


def check_parameters(counts: dict[str, int]) -> None:
    """Raises UserError unless all variants have the same number of parameters, norms and activations' scalars aside."""
    low, high = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[high] > 1.001 * counts[low]:
        raise UserError(
            f"variants must have equal parameters within 0.1 %, got {counts[low]:,} in {low} and {counts[high]:,} in {high}:"
            " choose a --model whose shapes agree"
        )


def markov_tokens(
    vocab: int, batches: int, batch: int, length: int, device: str
) -> tuple[list[Tensor], float]:
    """(batches of tokens [batch, length], entropy in nats per token given the one before) of a fixed random chain.

    Each of STATES tokens is followed by one of SUCCESSORS, the r-th with a probability that goes as 1 / r.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    states = torch.randperm(vocab, generator=generator, device=device)[:STATES]
    successors = torch.randint(STATES, (STATES, SUCCESSORS), generator=generator, device=device)
    p = 1.0 / torch.arange(1, SUCCESSORS + 1, device=device)
    p /= p.sum()
    count = batches * batch
    choices = torch.multinomial(p, count * length, replacement=True, generator=generator).view(length, count)
    path = torch.empty(length, count, dtype=torch.int64, device=device)
    path[0] = torch.randint(STATES, (count,), generator=generator, device=device)
    for i in range(1, length):
        path[i] = successors[path[i - 1], choices[i]]
    tokens = states[path].t().contiguous().view(batches, batch, length)
    return list(tokens), float(-(p * p.log()).sum())


def make_optimizer(moments: str, model: nn.Module) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": LEARNING_RATE, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if moments == "torch":
        return torch.optim.AdamW(model.parameters(), **settings, fused=True)
    formats = {"first_moment": "bf16", "second_moment": "bf16"} if moments == "bf16" else {}
    return Fp8AdamW(model.parameters(), **settings, **formats)


class Variant:
    """A model on the GPU, its optimizer, and a step on given tokens."""

    def __init__(self, name: str, shape: Shape, seq_len: int):
        launch_quickly()  # the peers too
        before = torch.cuda.memory_allocated()
        self.name, self.ours = name, VARIANTS[name].preset is not None
        self.model = build(shape, seq_len, VARIANTS[name]).to_empty(device="cuda").train()
        self.weights = list(self.model.parameters())
        self.parameters = sum(p.numel() for p in self.weights)
        self.scaling = scaling_state(self.model)
        self.statistics: Statistics | None = None
        self.reset()
        for key, block in list(self.model.layers.named_children()):
            self.model.layers.register_module(key, torch.compile(block, fullgraph=True))
        self.loss = torch.compile(_loss)
        self.before = before
        self.persistent = self.peak = 0

    def reset(self) -> None:
        """Weights from the seed, a new optimizer, and no history."""
        torch.manual_seed(SEED)
        self.optimizer = make_optimizer(VARIANTS[self.name].moments, self.model)
        if self.scaling is not None:
            self.scaling.stepped = getattr(self.optimizer, "amaxes", {})
        with torch.no_grad():
            self.model.init_weights(buffer_device=torch.device("cuda"))

    def step(self, tokens: Tensor) -> Tensor:
        """Returns the mean loss, on the device."""
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            # THE ONE PLACE where ours and the stock step differ; titan_fp8/train.py does what ours does here.
            if self.ours:
                if VARIANTS[self.name].statistics and self.statistics is None:
                    self.statistics = Statistics(
                        self.model, self.model.observer, len(tokens), None, self.scaling
                    )
                if self.statistics is not None:
                    self.statistics.begin()
                loss = self.model(inputs, labels) / labels.numel()
                loss.backward()
                if self.statistics is not None:
                    self.statistics.end()
                    self.statistics.before_update()
                norms = torch._foreach_norm([p.grad for p in self.weights], 2, dtype=torch.float32)
                norm = torch.linalg.vector_norm(torch.stack(norms))
                self.optimizer.grad_scale = ((norm + 1e-6) / MAX_NORM).clamp(min=1.0)
                self.optimizer.found_inf = (~norm.isfinite()).float()
            else:
                loss = self.loss(self.model(inputs), labels)
                loss.backward()
                nn.utils.clip_grad_norm_(self.weights, MAX_NORM, foreach=True)
        self.optimizer.step()
        if self.scaling is not None:
            self.scaling.update()
        if self.statistics is not None:
            self.statistics.collect()
        self.optimizer.zero_grad()
        return loss.detach()

    def warm_up(self, tokens: list[Tensor]) -> None:
        """Compile, and measure peak memory as if this variant were alone."""
        for batch in tokens[:4]:
            self.step(batch)
        torch.cuda.synchronize()
        self.persistent = torch.cuda.memory_allocated() - self.before
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step(tokens[0])
        torch.cuda.synchronize()
        self.peak = torch.cuda.max_memory_allocated() - start + self.persistent

    def learn(self, tokens: list[Tensor]) -> list[float]:
        """The loss of every step from fresh weights; the learning rate grows linearly over WARMUP_STEPS."""
        self.reset()
        losses = []
        for i, batch in enumerate(tokens):
            for group in self.optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (i + 1) / WARMUP_STEPS)
            losses.append(self.step(batch))
        return torch.stack(losses).tolist()


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def milliseconds(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def kind_of(kernel: str) -> str:
    """Which of bench_report.KINDS a kernel is, by its name. cuBLAS names FP8 and bf16 alike, so GEMMs are one kind."""
    name = kernel.lower()
    if name.startswith(
        "triton_"
    ):  # what Inductor made; it names what it fused, which misleads the words below
        return "elementwise"
    words = {
        "optimizer": ("adam", "multi_tensor"),
        "loss": ("softmax_gradient", "cross_entropy", "nll_loss"),
        "attention": (
            "flash",
            "fmha",
            "sdpa",
            "cudnn",
            "attention",
            "forward_kernel",
            "kv_kernel",
            "q_kernel",
        ),
        "cast": ("_cast", "cast_"),
        "gemm": ("nvjet", "gemm", "cutlass", "cublas", "splitk"),
        "copy": ("memcpy", "memset"),
    }
    if name.startswith(
        ("_forward_kernel", "_backward_kernel")
    ):  # activation.py's; attention's have no underscore
        return "activation"
    return next((kind for kind, parts in words.items() if any(part in name for part in parts)), "elementwise")


def profile(variant: Variant, tokens: list[Tensor], step_ms: float, steps: int = 4) -> dict[str, float]:
    """Milliseconds of a step by kind of kernel, averaged over steps back to back on a warm chip.

    "idle" is the rest of step_ms, the step's time without the profiler, which slows the host.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    for batch in tokens[:3]:
        variant.step(batch)
    with torch_profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for i in range(steps):
            variant.step(tokens[i % len(tokens)])
        torch.cuda.synchronize()
    sums: dict[str, float] = {}
    for event in recorded.events():
        if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        kind = kind_of(event.name)
        sums[kind] = sums.get(kind, 0.0) + event.time_range.elapsed_us() / 1e3 / steps
    sums["idle"] = max(0.0, step_ms - sum(sums.values()))
    return {kind: round(value, 2) for kind, value in sorted(sums.items(), key=lambda item: -item[1])}


def floor_ms(
    name: str,
    shape: Shape,
    seq_len: int,
    batch: int,
    rates: dict[str, list[dict[str, Any]]],
    sustained: bool = False,
) -> float:
    """The floor of a variant's step, from the rates of its preset's GEMMs (bench_gemms.measure)."""
    recipe = VARIANTS[name]
    preset = recipe.preset or "llama"
    flops = bench_gemms.attention_flops(shape_args(shape, seq_len, preset), batch, seq_len)
    linear = "bf16" if recipe.linears == "bf16" else "fp8"
    core, head = ("fp8" if on else "bf16" for on in (recipe.attention, recipe.head))
    return sum(bench_gemms.floor(rates[preset], flops, linear, core, head, sustained).values())


def measure_rates(
    names: list[str], shape: Shape, seq_len: int, batch: int
) -> dict[str, list[dict[str, Any]]]:
    """Rates of the GEMMs of every preset among the variants; presets with the same shapes share a measurement."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    rates = {}
    for preset in sorted({VARIANTS[name].preset or "llama" for name in names}):
        model = bench_gemms.linears(shape_args(shape, seq_len, preset))
        if tuple(model) not in found:
            found[tuple(model)] = bench_gemms.measure(model, batch * seq_len)
        rates[preset] = found[tuple(model)]
    return rates


def run(options: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """The result: see bench_report.table for what it holds."""
    shape, seq_len = SHAPES[options.model], options.seq_len
    batch = options.batch or shape.batch
    tokens, entropy = markov_tokens(shape.vocab, max(8, options.loss_curves), batch, seq_len + 1, "cuda")
    rates = measure_rates(names, shape, seq_len, batch)
    for preset, rows in rates.items():
        print(f"GEMMs of {preset}:\n{bench_gemms.table(rows)}\n", flush=True)
    variants = []
    # The blocks of all variants are one function to torch.compile, which would give up after eight of them.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
    for name in names:
        torch._inductor.config.emulate_precision_casts = False
        try:
            variant = Variant(name, shape, seq_len)
            variant.warm_up(tokens)
        except torch.OutOfMemoryError as error:
            total = torch.cuda.get_device_properties(0).total_memory / 2**30
            raise UserError(
                f"all variants must fit in the GPU's memory together, got {len(variants)} in {total:.0f} GiB before {name}: "
                "name fewer with --variants, or a smaller --batch"
            ) from error
        variants.append(variant)
        print(f"built {name}: {variant.parameters:,} parameters", flush=True)
    losses = {v.name: v.learn(tokens[: options.loss_curves]) for v in variants} if options.loss_curves else {}
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(options.rounds + 1):
        for variant in variants:

            def steps(variant: Variant = variant, offset: int = round_number) -> None:
                for i in range(options.steps):
                    variant.step(tokens[(offset + i) % len(tokens)])

            elapsed = milliseconds(steps) / options.steps
            if round_number:  # the first round warms the chip and what torch.compile kept
                times[variant.name].append(elapsed)
    base = BASE if BASE in names else names[0]
    base_ms = statistics.median(times[base])
    rows = []
    for variant in variants:
        ms = statistics.median(times[variant.name])
        rows.append(
            {
                "variant": variant.name,
                "tokens_per_second": batch * seq_len / ms * 1e3,
                "step_ms": ms,
                "step_ms_min": min(times[variant.name]),
                "step_ms_max": max(times[variant.name]),
                "step_ms_rounds": times[variant.name],
                "ratio": base_ms / ms,
                "floor_ms": floor_ms(variant.name, shape, seq_len, batch, rates),
                "floor_sustained_ms": floor_ms(variant.name, shape, seq_len, batch, rates, sustained=True),
                "peak_memory_gib": variant.peak / 2**30,
                "parameters": variant.parameters,
                "losses": losses.get(variant.name),
                "profile_ms": profile(variant, tokens[:8], ms) if options.profile else None,
            }
        )
    return {
        "model": options.model, "layers": shape.layers, "seq_len": seq_len, "batch": batch, "vocab": shape.vocab,
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "base": base, "token_entropy": entropy,
        "gemms": rates, "rows": rows,
    }  # fmt: skip


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(options, names of the variants). Raises UserError."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="390m")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batch", type=int, help="sequences per step; default: the model's")
    parser.add_argument(
        "--variants", default=",".join(DEFAULT), help=f"comma-separated, of: {', '.join(VARIANTS)}"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="steps of a variant in a round")
    parser.add_argument("--profile", action="store_true", help="also each variant's time by kind of kernel")
    parser.add_argument(
        "--loss-curves", type=int, default=0, metavar="N", help="also N steps from fresh weights"
    )
    parser.add_argument("--attention-only", action="store_true", help="FP8 attention beside cuDNN's")
    parser.add_argument("--shape", action="append", help="for --attention-only: B,S,H,K,C; repeat for more")
    parser.add_argument(
        "--dtype", choices=list(BY_NAME), default="e4m3", help="for --attention-only: of dO and dS"
    )
    parser.add_argument("--gemm-only", action="store_true", help="only the rates of the model's own GEMMs")
    parser.add_argument(
        "--optimizer-only",
        action="store_true",
        help="FP8 Adam beside torch's and torchao's on the model's matrices",
    )
    parser.add_argument("--draw", type=Path, metavar="JSON", help="table and picture of a recorded result")
    parser.add_argument("--out", type=Path, help="write the result as JSON, and its picture beside it")
    options = parser.parse_args(arguments)
    names = options.variants.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(
            f"--variants must name known ones, got {unknown[0]!r}: choose of {', '.join(VARIANTS)}"
        )
    longest = FLAVORS[SHAPES[options.model].flavor].max_seq_len
    if not 0 < options.seq_len <= longest or options.seq_len % 128:
        raise UserError(
            f"--seq-len must be a multiple of 128 up to {longest}, got {options.seq_len}: write 4096"
        )
    if min(options.rounds, options.steps) < 1 or options.loss_curves < 0 or (options.batch or 1) < 1:
        raise UserError("--rounds, --steps and --batch must be at least 1: leave them out for the defaults")
    if options.draw and not options.draw.is_file():
        raise UserError(f"--draw must name a recorded result, got {options.draw}: name an --out of this tool")
    if options.out and not options.out.parent.is_dir():
        raise UserError(
            f"--out must lie in a folder that exists, got {options.out}: make {options.out.parent}"
        )
    for text in options.shape or ():
        bench_attention.parse_shape(text)
    return options, names


def save(result: dict[str, Any], out: Path) -> None:
    """JSON at `out`; the picture beside it if the result has one."""
    files.save(out, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
    if "rows" in result:
        bench_report.draw(result, out.with_suffix(".png"))


def recorded(path: Path) -> dict[str, Any]:
    """A result of training steps. Raises UserError if it is none."""
    try:
        result = json.loads(path.read_text())
        if "step_ms_min" in result["rows"][0]:
            return result
    except (ValueError, LookupError, TypeError):
        pass
    raise UserError(
        f"--draw must name a result of training steps on one GPU, got {path}: those of attention, GEMMs, optimizer and "
        "benchmark_ranks.py have no picture"
    )


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    options, names = parse(arguments)
    if options.draw:
        result = recorded(options.draw)
        print(bench_report.table(result))
        bench_report.draw(result, options.draw.with_suffix(".png"))
        return 0
    if not torch.cuda.is_available():
        raise UserError("the benchmark needs a CUDA GPU, got none: run it on a machine with one")
    if options.attention_only:
        require_hopper(torch.device("cuda"))
        result = bench_attention.run(options.shape or bench_attention.SHAPES, BY_NAME[options.dtype])
        print(bench_attention.table(result))
    elif options.gemm_only:
        shape = SHAPES[options.model]
        result = measure_rates(names, shape, options.seq_len, options.batch or shape.batch)
        for preset, rows in result.items():
            print(f"GEMMs of {preset}:\n{bench_gemms.table(rows)}\n")
    elif options.optimizer_only:
        model = build(SHAPES[options.model], 128, VARIANTS["llama bf16"])
        shapes = [tuple(p.shape) for p in model.parameters()]
        result = bench_optimizer.run(shapes, torch.bfloat16, list(bench_optimizer.OPTIMIZERS))
        print(bench_optimizer.table(result))
    else:
        shape = SHAPES[options.model]
        # Before memory is taken: on meta.
        check_parameters(
            {n: sum(p.numel() for p in build(shape, 128, VARIANTS[n]).parameters()) for n in names}
        )
        result = run(options, names)
        print(bench_report.table(result))
    if options.out:
        save(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
