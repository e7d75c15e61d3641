"""Tokens per second of whole training steps, ours beside the peers at their best, in one process on one GPU.

    python tools/benchmark.py --model 8b-slice [--seq-len 4096] [--batch 2] [--variants a,b] [--rounds 5] [--out result.json]

Every variant is a model of the same shape with bf16 parameters, torch.compile per block, cuDNN attention where attention is
bf16, fused AdamW, the same random tokens. A round runs some steps of each variant in turn, so that a drift of the machine
meets all alike; the figure is the median over rounds, the spread is min and max, the ratio is to stock torchtitan BF16.
Peak memory is that of one variant alone. The floor: FLOPs by precision over the GEMM rates measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

for noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(noisy).setLevel(logging.ERROR)

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from titan_fp8.config import Architecture, Fp8  # noqa: E402
from titan_fp8.float8.convert import convert, scaling_state  # noqa: E402
from titan_fp8.model.args import FLAVORS, DecoderArgs  # noqa: E402
from titan_fp8.model.decoder import Decoder  # noqa: E402


@dataclass(frozen=True)
class Shape:
    flavor: str
    layers: int
    vocab: int
    batch: int


SHAPES = {
    "390m": Shape("390m", 16, 131072, 4),
    "1.5b": Shape("1.5b", 16, 32768, 4),
    "8b-slice": Shape("8b", 8, 32768, 2),
}

# name -> (preset, recipe, attention); None: stock torchtitan's Llama.
VARIANTS: dict[str, tuple[str | None, str, str]] = {
    "torchtitan bf16": (None, "bf16", "off"),
    "torchao tensorwise": (None, "tensorwise", "off"),
    "torchao rowwise": (None, "rowwise", "off"),
    "llama bf16": ("llama", "bf16", "off"),
    "llama fp8 linears": ("llama", "delayed", "off"),
    "llama fp8 full": ("llama", "delayed", "full"),
    "fog_max bf16": ("fog_max", "bf16", "off"),
    "fog_max fp8 linears": ("fog_max", "delayed", "off"),
    "fog_max fp8 full": ("fog_max", "delayed", "full"),
    "fog_opt fp8 full": ("fog_opt", "delayed", "full"),
    "fog_flash fp8 full": ("fog_flash", "delayed", "full"),
}


def shape_args(shape: Shape, seq_len: int, preset: str) -> DecoderArgs:
    args = FLAVORS[shape.flavor]
    args.apply(
        Architecture(preset=preset, n_layers=shape.layers, vocab_size=shape.vocab, tie_embeddings=False)
    )  # type: ignore
    args.seq_len = seq_len
    return args


def build_ours(shape: Shape, seq_len: int, preset: str, recipe: str, attention: str) -> nn.Module:
    args = shape_args(shape, seq_len, preset)
    with torch.device("meta"):
        model = Decoder(args).to(torch.bfloat16)
    # FP8 attention at its best: the kernels, and the format that meets their error bound.
    fused = {"attention_backend": "triton", "attention_gradients": "e4m3"} if attention == "full" else {}
    convert(model, Fp8(recipe=recipe, attention=attention, **fused))  # type: ignore
    model.to_empty(device="cuda")
    with torch.no_grad():
        model.init_weights()
    return model


def build_stock(shape: Shape, seq_len: int, recipe: str) -> nn.Module:
    """torchtitan's own Llama of the same shape, with torchao's float8 linears as torchtitan applies them."""
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
    if recipe != "bf16":
        config = (
            Float8LinearConfig() if recipe == "tensorwise" else Float8LinearConfig.from_recipe_name("rowwise")
        )
        if recipe == "rowwise":
            torch._inductor.config.emulate_precision_casts = True
        convert_to_float8_training(
            model, config=config, module_filter_fn=lambda _, name: "output" not in name
        )
    model.to_empty(device="cuda")
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cuda"))
    return model


class Variant:
    """A model, its optimizer, and a step on given tokens."""

    def __init__(self, name: str, shape: Shape, seq_len: int):
        before = torch.cuda.memory_allocated()
        preset, recipe, attention = VARIANTS[name]
        self.name = name
        model = (
            build_stock(shape, seq_len, recipe)
            if preset is None
            else build_ours(shape, seq_len, preset, recipe, attention)
        )
        self.parameters = sum(p.numel() for p in model.parameters())
        for key, block in list(model.layers.named_children()):
            model.layers.register_module(key, torch.compile(block, fullgraph=True))
        self.model = model.train()
        self.scaling = scaling_state(model)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.loss = torch.compile(_loss)
        self.losses: list[Tensor] = []
        self.before = before
        self.persistent = self.peak = 0

    def step(self, tokens: Tensor) -> None:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
            loss = self.loss(self.model(tokens[:, :-1]), tokens[:, 1:])
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        if self.scaling is not None:
            self.scaling.update()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())

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


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def milliseconds(run: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def gemm_rates() -> dict[str, float]:
    """TFLOP/s of a large random GEMM in each precision: the ceilings for the floor."""
    m, n, k = 16384, 8192, 4096
    a, b = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(n, k, device="cuda").bfloat16()
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    runs: dict[str, Callable[[], Any]] = {
        "bf16": lambda: a @ b.t(),
        "fp8": lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
    }
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in range(10):
        for name, run in runs.items():
            times[name].append(milliseconds(run))
    return {name: 2 * m * n * k / statistics.median(t) / 1e9 for name, t in times.items()}


def floor_ms(name: str, shape: Shape, seq_len: int, batch: int, rates: dict[str, float]) -> float:
    """Milliseconds that the step's matrix products alone would take at the measured rates; attention counted causal."""
    preset, recipe, attention = VARIANTS[name]
    args = shape_args(shape, seq_len, preset or "llama")
    tokens = batch * seq_len
    ffn = 3 * args.dim * args.ffn_dim  # two matrices of 1.5 times the size, without a gate
    block = args.dim * args.head_dim * 2 * (args.n_heads + args.n_kv_heads) + ffn
    linear = 6 * tokens * args.n_layers * block
    one_gemm = tokens * seq_len * args.n_heads * args.head_dim  # 2 flops, half of them masked
    core = 7 * args.n_layers * one_gemm
    head = 6 * tokens * args.dim * args.vocab_size
    linear_rate = rates["bf16" if recipe == "bf16" else "fp8"]
    core_rate = rates["fp8" if attention == "full" else "bf16"]
    return (linear / linear_rate + core / core_rate + head / rates["bf16"]) / 1e9


def profile(variant: Variant, tokens: Tensor) -> dict[str, float]:
    """Milliseconds of one step by kind of kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as recorded:
        variant.step(tokens)
        torch.cuda.synchronize()
    # cuBLAS names its kernels alike for FP8 and bf16, so GEMMs are one kind.
    kinds = {
        "attention": ("flash", "fmha", "sdpa", "cudnn", "attention", "forward_kernel", "kv_kernel", "q_kernel"),
        "cast": ("_cast",), "gemm": ("nvjet", "gemm", "cutlass", "cublas"), "optimizer": ("adam", "multi_tensor"),
    }  # fmt: skip
    sums: dict[str, float] = {}
    for event in recorded.key_averages():
        name = event.key.lower()
        kind = next(
            (kind for kind, words in kinds.items() if any(word in name for word in words)), "elementwise"
        )
        sums[kind] = sums.get(kind, 0.0) + event.self_device_time_total / 1e3
    return {kind: round(value, 2) for kind, value in sorted(sums.items(), key=lambda item: -item[1])}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="390m")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--batch", type=int, help="sequences per step; default: the model's")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="steps of a variant in a round")
    parser.add_argument(
        "--profile", action="store_true", help="also print each variant's time by kind of kernel"
    )
    parser.add_argument("--out", help="write the result as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "error: the benchmark needs a CUDA GPU, got none: run it on a machine with one", file=sys.stderr
        )
        return 2
    names = options.variants.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        print(
            f"error: --variants must name known ones, got {unknown[0]!r}: choose of {', '.join(VARIANTS)}",
            file=sys.stderr,
        )
        return 2

    torch.manual_seed(0)
    shape = SHAPES[options.model]
    batch = options.batch or shape.batch
    # Zipf-like tokens: uniform ones would leave nothing to learn, and the speed of a model that cannot learn says little.
    weights = 1.0 / torch.arange(1, shape.vocab + 1, device="cuda")
    tokens = [
        torch.multinomial(weights, batch * (options.seq_len + 1), replacement=True).view(batch, -1)
        for _ in range(8)
    ]
    rates = gemm_rates()
    variants = []
    for name in names:
        torch._dynamo.reset()
        torch._inductor.config.emulate_precision_casts = False
        variant = Variant(name, shape, options.seq_len)
        variant.warm_up(tokens)
        variants.append(variant)
        print(f"built {name}: {variant.parameters / 1e6:.1f}M parameters", flush=True)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(options.rounds):
        for variant in variants:

            def run(variant: Variant = variant, offset: int = round_number) -> None:
                for i in range(options.steps):
                    variant.step(tokens[(offset + i) % len(tokens)])

            times[variant.name].append(milliseconds(run) / options.steps)

    base = statistics.median(times[names[0]])
    rows = []
    for variant in variants:
        ms = statistics.median(times[variant.name])
        rows.append(
            {
                "variant": variant.name,
                "tokens_per_second": batch * options.seq_len / ms * 1e3,
                "step_ms": ms,
                "step_ms_min": min(times[variant.name]),
                "step_ms_max": max(times[variant.name]),
                "ratio": base / ms,
                "floor_ms": floor_ms(variant.name, shape, options.seq_len, batch, rates),
                "peak_memory_gib": variant.peak / 2**30,
                "parameters": variant.parameters,
                "loss_first": float(variant.losses[0]),
                "loss_last": float(variant.losses[-1]),
                "profile_ms": profile(variant, tokens[0]) if options.profile else None,
            }
        )
    result = {
        "model": options.model, "layers": shape.layers, "seq_len": options.seq_len, "batch": batch, "vocab": shape.vocab,
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "gemm_tflops": rates, "rows": rows,
    }  # fmt: skip
    print(f"\n{options.model}, {shape.layers} layers, batch {batch}, seq {options.seq_len}", end=", ")
    print(f"{result['gpu']}, torch {result['torch']}")
    print(f"GEMM rates: bf16 {rates['bf16']:.0f}, fp8 {rates['fp8']:.0f} TFLOP/s; ratio to {names[0]}")
    for row in rows:
        print(
            f"{row['variant']:22s} {row['tokens_per_second']:9,.0f} tok/s {row['ratio']:6.3f}x  {row['step_ms']:7.2f} ms "
            f"({row['step_ms_min']:.2f}-{row['step_ms_max']:.2f}, floor {row['floor_ms']:.1f})  "
            f"{row['peak_memory_gib']:5.1f} GiB  "
            f"loss {row['loss_first']:.3f} -> {row['loss_last']:.3f}"
        )
        if row["profile_ms"]:
            print(" " * 22, "  ".join(f"{kind} {value:.1f}" for kind, value in row["profile_ms"].items()))
    if options.out:
        with open(options.out, "w") as file:
            json.dump(result, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
