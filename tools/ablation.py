"""Does training with 8-bit moments hold? One run per optimizer and model, from the same weights, on the same batches.

    python tools/ablation.py --size small --seeds 3 --out ablation.json       on a GPU; a picture beside the JSON
    python tools/ablation.py --size tiny --arms "torch fp32,coat" --out a.json      on CPU, 20 s a run
    python tools/ablation.py --merge a.json b.json --out c.json               runs of several processes, as one result
    python tools/ablation.py --draw c.json                                    table and picture of a recorded result

Each optimizer is AdamW: betas 0.9 and 0.95, weight decay 0.1, gradients clipped at 1, the learning rate growing over the
first tenth of the steps and then falling along a cosine to a tenth. Compute is BF16 (autocast), parameters are float32 but
where an arm says otherwise. Models: `llama`, all in BF16, and `fog_max`, FP8 linears and full FP8 attention, whose authors
kept 16-bit moments.

    torch fp32                      the base line
    ours fp32, ours bf16            ours without FP8 moments; fp32 is the base line's mathematics in another order of
                                    roundings, hence shows how far two equal runs drift apart
    ours M+V tensor                 m in M, v in V, one scale per parameter: "Scaling FP8 training to trillion-token LLMs",
                                    arXiv 2409.12517, section 5, chose e4m3+e5m2
    ours M+V                        the same with a scale for each 256 elements, the default here
    ... bf16 weights                parameters in bf16, rounded stochastically
    ... fp16 master                 parameters in float16, and a loss scale of 4096
    plain M+V tensor                one scale per parameter without the two rules of ours (float8/kernels/adam.py) against
                                    a v that rounds to zero
    torchao fp8                     torchao.optim.AdamWFp8: both e4m3, blocks of 256
    coat                            COAT's moments, implemented here from the paper (arXiv 2410.19313), not its package

Held-out loss: the mean over the same windows of text that no run trains on, in nats per byte. Gap: to the base line of the
same seed; what follows +- is the standard deviation over seeds, or with one seed the standard error over held-out
batches, paired. v zero, v least: of the entries that have a gradient after the last step, the shares whose v is stored as 0,
and as 0 or the format's smallest number. A run has diverged when a loss is not finite, or the mean of ten in a row is
above the first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import train_parts  # pyrefly: ignore
from bench_optimizer import state_bytes  # pyrefly: ignore
from torch import Tensor, nn
from train_parts import ADAMW, Shape, Text, Trained, device_name  # pyrefly: ignore

from titan_fp8.config import Data, Fp8
from titan_fp8.data.sources import open_source
from titan_fp8.errors import UserError, in_one_line
from titan_fp8.files import save
from titan_fp8.float8.convert import convert, scaling_state
from titan_fp8.float8.formats import E4M3, E5M2, FP8_MAX, saturating_cast, scale_from_amax
from titan_fp8.float8.kernels.adam import SMALLEST
from titan_fp8.optim import Fp8AdamW

HELD_OUT = 0.1  # share of the text
LOOK = 20  # steps between two looks at the losses: each waits for the device
LAST = 50  # losses in the mean at the end of training


@dataclass(frozen=True)
class Size(Shape):
    steps: int
    lr: float
    held_out: int
    """Batches of held-out text, at most."""


SIZES = {
    "tiny": Size(128, 2, 4, 384, 64, 16, 200, 1e-3, 64),
    "small": Size(512, 8, 8, 1408, 512, 32, 600, 1e-3, 64),
}


# ---- Optimizers from papers, in plain PyTorch ----


class PerTensor:
    """A moment in FP8 with one scale: x = codes * scale."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        scale = scale_from_amax(x.abs().amax(), FP8_MAX[self.dtype])
        return {"codes": saturating_cast(x, scale, self.dtype), "scale": 1.0 / scale}

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes.float() * scale


class Coat:
    """COAT's dynamic range expansion: groups of 128 elements, in each a power k and a scale, codes in E4M3.

        f(x) = sign(x) |x|^k        k = log(R) / log(max |x| / min |x|)        R = 448 / 2^-9, the range of E4M3

    so that what is stored, f(x) scaled to 448 at most, spans the format's range exactly. The paper does not say what the
    minimum is where an x is 0: here it is that of the others, and 0 stays 0. Equal magnitudes, whose k would be
    infinite, have MAX_POWER. f is taken of x / max |x|, which only changes the scale.
    """

    GROUP, MAX_POWER = 128, 16.0
    RANGE = FP8_MAX[E4M3] / SMALLEST[E4M3]

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """codes of x's shape; scale (the largest magnitude) and power, float32 [groups]. The last group may be short."""
        groups = self._groups(x)
        size = groups.abs()
        largest = size.amax(1, keepdim=True)
        smallest = torch.where(size > 0, size, torch.inf).amin(1, keepdim=True)
        spread = torch.where(largest > 0, largest / smallest, 1.0).clamp(max=torch.finfo(torch.float32).max)
        power = (math.log(self.RANGE) / spread.log()).clamp(max=self.MAX_POWER)
        unit = size / torch.where(largest > 0, largest, 1.0)
        codes = (groups.sign() * unit.pow(power) * FP8_MAX[E4M3]).to(E4M3)
        return {
            "codes": codes.flatten()[: x.numel()].view_as(x),
            "scale": largest.flatten(),
            "power": power.flatten(),
        }

    def decode(self, codes: Tensor, scale: Tensor, power: Tensor) -> Tensor:
        groups = self._groups(codes.float()) / FP8_MAX[E4M3]
        x = groups.sign() * groups.abs().pow(1.0 / power[:, None]) * scale[:, None]
        return x.flatten()[: codes.numel()].view_as(codes)

    def _groups(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x.flatten(), (0, -x.numel() % self.GROUP)).view(-1, self.GROUP)


class PaperAdamW(torch.optim.Optimizer):
    """AdamW whose moments of matrices are kept by `first` and `second`; those of vectors are float32, as in ours."""

    def __init__(self, params: Any, first: PerTensor | Coat, second: PerTensor | Coat, **settings: Any):
        self.keepers = {"exp_avg": first, "exp_avg_sq": second}
        super().__init__(params, {"lr": 1e-3, "eps": 1e-8} | settings)

    def _read(self, p: Tensor, name: str) -> Tensor:
        state = self.state[p]
        if name in state:
            return state[name]
        kept = {
            key: state[f"{name}_{key}"] for key in ("codes", "scale", "power") if f"{name}_{key}" in state
        }
        return self.keepers[name].decode(**kept) if kept else torch.zeros_like(p)

    def _write(self, p: Tensor, name: str, x: Tensor) -> None:
        kept = self.keepers[name].encode(x) if p.ndim > 1 else None
        self.state[p].update({f"{name}_{key}": value for key, value in kept.items()} if kept else {name: x})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            group["step"] = t = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self._read(p, "exp_avg") * beta1 + p.grad * (1 - beta1)
                v = self._read(p, "exp_avg_sq") * beta2 + p.grad.square() * (1 - beta2)
                update = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                self._write(p, "exp_avg", m)
                self._write(p, "exp_avg_sq", v)


# ---- Arms ----


@dataclass(frozen=True)
class Arm:
    make: Callable[[list[nn.Parameter], int], torch.optim.Optimizer]
    """(parameters, seed of what it rounds stochastically)"""
    dtype: torch.dtype = torch.float32
    """Of the parameters."""
    loss_scale: float = 1.0


def _torch(parameters: list[nn.Parameter], seed: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **ADAMW, fused=True)


def _torchao(parameters: list[nn.Parameter], seed: int) -> torch.optim.Optimizer:
    from torchao.optim import AdamWFp8

    return AdamWFp8(parameters, **ADAMW)


def _ours(
    first: str, second: str, **options: Any
) -> Callable[[list[nn.Parameter], int], torch.optim.Optimizer]:
    return lambda parameters, seed: Fp8AdamW(
        parameters, **ADAMW, first_moment=first, second_moment=second, seed=seed, **options
    )


def _paper(first: PerTensor | Coat, second: PerTensor | Coat) -> Arm:
    return Arm(lambda parameters, seed: PaperAdamW(parameters, first, second, **ADAMW))


PAIRS = (("e4m3", "e5m2"), ("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e5m2", "e5m2"))
BASE = "torch fp32"
ARMS = {
    BASE: Arm(_torch),
    "ours fp32": Arm(_ours("fp32", "fp32")),
    "ours bf16": Arm(_ours("bf16", "bf16")),
    **{f"ours {m}+{v} tensor": Arm(_ours(m, v, block_size=0)) for m, v in PAIRS},
    **{f"ours {m}+{v}": Arm(_ours(m, v)) for m, v in PAIRS},
    "ours e4m3+e5m2 bf16 weights": Arm(_ours("e4m3", "e5m2", round_parameters="stochastic"), torch.bfloat16),
    "ours e4m3+e5m2 fp16 master": Arm(_ours("e4m3", "e5m2", half_master=True), torch.float16, 4096.0),
    "plain e4m3+e5m2 tensor": _paper(PerTensor(E4M3), PerTensor(E5M2)),
    "plain e4m3+e4m3 tensor": _paper(PerTensor(E4M3), PerTensor(E4M3)),
    "torchao fp8": Arm(_torchao),
    "coat": _paper(Coat(), Coat()),
}
MODELS = {"llama": Fp8(recipe="bf16"), "fog_max": Fp8(attention="full")}
DEFAULT = {
    "llama": list(ARMS),
    "fog_max": [BASE, "ours bf16", "ours e4m3+e5m2", "ours e4m3+e5m2 tensor"],
}


# ---- Training ----


def read_text(path: Path | None) -> tuple[bytes, bytes]:
    """(training, held out): Python's library by document, or the file and its last tenth."""
    if path is None:
        source = open_source(Data(source="builtin", held_out=HELD_OUT))
        train, held = (b"\n".join(source.split(side)) for side in ("train", "validation"))
        return train, held
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"--data must be a file that can be read, got {path} ({error.strerror}): name a text file"
        ) from error
    cut = int(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def held_out_batches(text: bytes, size: Size, device: torch.device) -> list[Tensor]:
    """[B, S + 1] each: windows that do not overlap, spread over the text.

    Raises:
        UserError: less text than one batch.
    """
    window = size.seq_len + 1
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0)
    windows = windows[: len(text) // window * window].view(-1, window)
    count = min(size.held_out, len(windows) // size.batch)
    if not count:
        raise UserError(
            f"the text must have at least {size.batch * window:,} bytes in its held-out tenth, got {len(text):,}: "
            "name a larger file with --data"
        )
    chosen = torch.linspace(0, len(windows) - 1, count * size.batch).long()
    return list(windows[chosen].long().to(device).split(size.batch))


def learning_rate(size: Size, step: int) -> float:
    warm_up = max(1, size.steps // 10)
    done = max(0, step + 1 - warm_up) / (size.steps - warm_up)
    return size.lr * min(1.0, (step + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * done))


def diverged_at(losses: Sequence[float]) -> int | None:
    """The first step whose loss is not finite or ends ten whose mean is above the first loss."""
    for step, loss in enumerate(losses):
        ten = losses[max(0, step - 9) : step + 1]
        if not math.isfinite(loss) or (len(ten) == 10 and sum(ten) / 10 > losses[0]):
            return step
    return None


@torch.no_grad()
def evaluate(trained: Trained, batches: list[Tensor]) -> list[float]:
    """The mean loss of each batch. Blocks as they are, not compiled: that would compile them once more."""
    model, layers = trained.model.eval(), trained.model.layers
    compiled = dict(layers.items())
    for key, block in compiled.items():
        layers[key] = getattr(block, "_orig_mod", block)
    losses = []
    with torch.autocast(trained.device.type, torch.bfloat16):
        for batch in batches:
            losses.append(model(batch[:, :-1], batch[:, 1:]) / batch[:, 1:].numel())
    layers.update(compiled)
    model.train()
    return torch.stack(losses).tolist()


@torch.no_grad()
def underflow(optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Of the entries that have a gradient: (share with v = 0, share with v = 0 or the least that its format has)."""
    zero = least = entries = torch.zeros(())
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            name = next(name for name in state if name in _SECOND)
            codes = getattr(state[name], "codes", state[name])  # torchao's is a subclass
            stored, has = codes.float().abs(), p.grad != 0
            zero = zero + (has & (stored == 0)).sum().cpu()
            least = least + (has & (stored <= SMALLEST.get(codes.dtype, 0.0))).sum().cpu()
            entries = entries + has.sum().cpu()
    entries = entries.clamp(min=1)
    return float(zero / entries), float(least / entries)


_SECOND = ("exp_avg_sq", "exp_avg_sq_e4m3", "exp_avg_sq_e5m2", "exp_avg_sq_codes")


def train(
    size: Size, model_name: str, arm_name: str, seed: int, text: bytes, held_out: list[Tensor], device: torch.device
) -> dict[str, Any]:  # fmt: skip
    """One run, JSON-ready."""
    began = time.perf_counter()
    arm, fp8 = ARMS[arm_name], MODELS[model_name]
    model = train_parts.build(size, seed, model_name).to(device, arm.dtype).train()
    convert(model, fp8)
    if (scaling := scaling_state(model)) is not None:
        scaling.init_weights()
    parameters = list(model.parameters())
    if arm.dtype == torch.float16:
        for p in parameters:
            p.grad_dtype = torch.float32
    optimizer = arm.make(parameters, seed)
    trained = Trained(model, optimizer, device, arm.loss_scale)
    if device.type == "cuda":
        for key, block in list(model.layers.items()):
            model.layers[key] = torch.compile(block, fullgraph=True)
    batches = Text(text, size, device, 1_000_003 * seed)
    seen: list[Tensor] = []
    losses: list[float] = []
    bad = None
    for step in range(size.steps):
        seen.append(trained.step(*batches.batch(step), learning_rate(size, step))[0])
        if len(seen) == LOOK or step + 1 == size.steps:
            losses += torch.stack(seen).tolist()
            seen = []
            bad = diverged_at(losses)
            if bad is not None:
                break
    count = sum(p.numel() for p in parameters)
    v_zero, v_least = underflow(optimizer)
    run: dict[str, Any] = {
        "model": model_name, "arm": arm_name, "seed": seed, "diverged": bad, "parameters": count,
        "parameter_bytes": round(sum(p.numel() * p.element_size() for p in parameters) / count, 4),
        "state_bytes": round(state_bytes(optimizer) / count, 4), "v_zero": round(v_zero, 6), "v_least": round(v_least, 6),
        "last": None, "held_out": [], "losses": [round(x, 5) if math.isfinite(x) else None for x in losses],
    }  # fmt: skip
    if bad is None:
        run["last"] = round(statistics.fmean(losses[-LAST:]), 5)
        run["held_out"] = [round(x, 5) for x in evaluate(trained, held_out)]
    run["seconds"] = round(time.perf_counter() - began, 1)
    return run


def train_all(
    size: Size,
    arms: dict[str, list[str]],
    seeds: int,
    texts: tuple[bytes, bytes],
    device: torch.device,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """The result, JSON-ready: what all runs share, and the runs. `keep` gets it after every run.

    arms: model -> names of its arms.

    Raises:
        UserError: too little text.
    """
    text, held = texts
    held_out = held_out_batches(held, size, device)
    if len(text) < 2 * size.batch * (size.seq_len + 1):
        raise UserError(f"the text must be longer, got {len(text):,} bytes: name a larger file with --data")
    result: dict[str, Any] = {
        "tool": "ablation", "size": asdict(size), "device": device_name(device), "torch": torch.__version__,
        "text": hashlib.blake2b(text + held, digest_size=8).hexdigest(),
        "text_bytes": [len(text), len(held)], "held_out_tokens": len(held_out) * size.batch * size.seq_len, "runs": [],
    }  # fmt: skip
    for seed in range(seeds):
        for model, names in arms.items():
            for name in names:
                run = train(size, model, name, seed, text, held_out, device)
                result["runs"].append(run)
                end = f"diverged at step {run['diverged']}"
                if run["held_out"]:
                    end = f"held out {statistics.fmean(run['held_out']):.4f}"
                print(f"{model:8s} {name:28s} seed {seed}  {run['seconds']:6.1f} s   {end}", flush=True)
                keep(result)
    return result


# ---- Results ----


def summarize(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """model -> a row for each arm, in the order of ARMS, the means over its seeds that did not diverge."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for model in MODELS:
        runs = [run for run in result["runs"] if run["model"] == model]
        base = {run["seed"]: run for run in runs if run["arm"] == BASE and run["held_out"]}
        base_losses = [statistics.fmean(run["held_out"]) for run in base.values()]
        base_spread = statistics.stdev(base_losses) if len(base_losses) > 1 else None
        for arm in ARMS:
            mine = [run for run in runs if run["arm"] == arm]
            if not mine:
                continue
            ended = [run for run in mine if run["held_out"]]
            losses = [statistics.fmean(run["held_out"]) for run in ended]
            row: dict[str, Any] = {
                "arm": arm, "seeds": len(mine), "diverged": [run["diverged"] for run in mine if not run["held_out"]],
                "held_out": _mean(losses), "spread": statistics.stdev(losses) if len(losses) > 1 else None,
                "last": _mean([run["last"] for run in ended]), "gap": None, "gap_error": None, "gap_spreads": None,
            }  # fmt: skip
            row |= {
                key: mine[0][key] if key.endswith("bytes") else _mean([run[key] for run in mine])
                for key in ("state_bytes", "parameter_bytes", "v_zero", "v_least")
            }
            pairs = [(run, base[run["seed"]]) for run in ended if run["seed"] in base]
            if pairs and arm != BASE:
                row |= _gap(pairs, base_spread)
            rows.setdefault(model, []).append(row)
    return rows


def _gap(pairs: list[tuple[dict[str, Any], dict[str, Any]]], base_spread: float | None) -> dict[str, Any]:
    """gap and gap_error in % of the base line; the gap in standard deviations of the base line over seeds."""
    by_batch = [
        [x - y for x, y in zip(run["held_out"], base["held_out"], strict=True)] for run, base in pairs
    ]
    gaps = [statistics.fmean(differences) for differences in by_batch]
    level = statistics.fmean(statistics.fmean(base["held_out"]) for _, base in pairs)
    error = None
    if len(gaps) > 1:
        error = statistics.stdev(gaps)
    elif len(by_batch[0]) > 1:
        error = statistics.stdev(by_batch[0]) / len(by_batch[0]) ** 0.5
    gap = statistics.fmean(gaps)
    return {
        "gap": 100 * gap / level,
        "gap_error": None if error is None else 100 * error / level,
        "gap_spreads": gap / base_spread if base_spread else None,
    }


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def table(result: dict[str, Any]) -> str:
    size = result["size"]
    lines = []
    for model, rows in summarize(result).items():
        count = next(run["parameters"] for run in result["runs"] if run["model"] == model)
        lines += [
            f"{model}: {count / 1e6:.2f}M parameters, {size['steps']} steps of {size['batch']} x {size['seq_len']} bytes, "
            f"{result['held_out_tokens']:,} held out, {result['device']}, torch {result['torch']}",
            f"{'optimizer':28s} {'seeds':>5s} {'held out':>8s} {'sd':>7s} {'gap %':>8s} {'+-':>6s} {'in sd':>6s} "
            f"{'last':>7s} {'state B':>8s} {'param B':>7s} {'v zero':>7s} {'v least':>7s}",
        ]
        for row in rows:
            line = (
                f"{row['arm']:28s} {row['seeds']:5d} {_cell(row['held_out'], '8.4f')} {_cell(row['spread'], '7.4f')} "
                f"{_cell(row['gap'], '+8.3f')} {_cell(row['gap_error'], '6.3f')} {_cell(row['gap_spreads'], '+6.1f')} "
                f"{_cell(row['last'], '7.4f')} {row['state_bytes']:8.3f} {row['parameter_bytes']:7.2f} "
                f"{row['v_zero']:7.2%} {row['v_least']:7.2%}"
            )
            if row["diverged"]:
                steps = ", ".join(map(str, row["diverged"]))
                line += f"   {len(row['diverged'])} of {row['seeds']} diverged, at step {steps}"
            lines.append(line)
        lines.append("")
    return "\n".join(lines[:-1])


def _cell(value: float | None, form: str) -> str:
    return format("-", ">" + form.strip("+").split(".")[0]) if value is None else format(value, form)


def curves(result: dict[str, Any], model: str) -> dict[str, list[float]]:
    """arm -> training loss minus the base line's, mean over seeds and a twentieth of the steps; to the shortest run."""
    runs = {(run["arm"], run["seed"]): run["losses"] for run in result["runs"] if run["model"] == model}
    width = max(1, result["size"]["steps"] // 20)
    found = {}
    for arm in ARMS:
        pairs = [
            (losses, runs[BASE, seed])
            for (name, seed), losses in runs.items()
            if name == arm and (BASE, seed) in runs
        ]
        if arm == BASE or not pairs:
            continue
        length = min(min(len(x), len(y)) for x, y in pairs)
        difference = [
            statistics.fmean(math.nan if x[i] is None or y[i] is None else x[i] - y[i] for x, y in pairs)
            for i in range(length)
        ]
        found[arm] = [statistics.fmean(difference[i : i + width]) for i in range(max(0, length - width + 1))]
    return found


def draw(result: dict[str, Any], out: Path) -> None:
    """The picture, as PNG. For each model: training losses relative to the base line, and the gaps in held-out loss."""
    from plot_parts import COLORS, GREY, STYLE, pyplot

    plt = pyplot()

    summary = summarize(result)
    dashes = ("-", (0, (5, 2)), (0, (1, 1.5)))
    style = {arm: (COLORS[i % 7], dashes[i // 7 % 3]) for i, arm in enumerate(ARMS)}
    heights = [1 + 0.22 * len(rows) for rows in summary.values()]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(summary), 2, figsize=(12, 1.3 * sum(heights)), width_ratios=(1.25, 1), height_ratios=heights,
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for (left, right), (model, rows) in zip(axes, summary.items(), strict=True):
            lines = curves(result, model)
            width = max(1, result["size"]["steps"] // 20)
            alive = {row["arm"] for row in rows if not row["diverged"]}
            # What falls apart leaves the picture; the others keep their scale.
            late = [abs(x) for arm, y in lines.items() if arm in alive for x in y[len(y) // 4 :]]
            top = 1.1 * max([0.01, *filter(math.isfinite, late)])
            for arm, y in lines.items():
                color, dash = style[arm]
                steps = range(width - 1, width - 1 + len(y))
                left.plot(steps, y, color=color, linestyle=dash, linewidth=1.2, label=arm)
            left.set(ylim=(-top, top), xlabel="Step")
            left.set_title(f"{model}: training loss minus the base line's, nats per byte, over {width} steps")
            left.axhline(0, color=GREY, linewidth=1)
            rows = [row for row in rows if row["arm"] != BASE]
            for place, row in enumerate(rows):
                color = style[row["arm"]][0]
                if row["gap"] is not None:
                    right.barh(place, row["gap"], xerr=row["gap_error"], color=color, height=0.7, ecolor=GREY)
                if row["diverged"]:
                    words = (
                        f" diverged at step {row['diverged'][0]} ({len(row['diverged'])} of {row['seeds']})"
                    )
                    right.text(0, place, words, va="center", fontsize=8)
            right.set_yticks(range(len(rows)), [row["arm"] for row in rows], fontsize=8)
            right.invert_yaxis()
            right.grid(visible=False, axis="y")
            right.set_axisbelow(True)
            right.axvline(0, color=GREY, linewidth=1)
            right.set_title("Held-out loss over the base line's, %")
            if lines:
                left.legend(fontsize=6.5, ncols=2, loc="upper right")
        size, seeds = result["size"], len({run["seed"] for run in result["runs"]})
        figure.suptitle(
            f"AdamW with 8-bit moments: {size['layers']} layers of {size['dim']}, {size['steps']} steps, "
            f"{seeds} seed{'s' * (seeds > 1)}, {result['device']}; base line: {BASE}",
            x=0.01, ha="left", fontweight="bold",
        )  # fmt: skip
        save(out, lambda path: figure.savefig(path, dpi=150, format="png"))
        plt.close(figure)


def write(result: dict[str, Any], out: Path) -> None:
    """A line for each run."""
    shared = {key: value for key, value in result.items() if key != "runs"}
    runs = ",\n".join(json.dumps(run, separators=(",", ":"), allow_nan=False) for run in result["runs"])
    text = f'{json.dumps(shared, allow_nan=False)[:-1]}, "runs": [\n{runs}\n]}}\n'
    save(out, lambda path: path.write_text(text))


def load(path: Path, option: str) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
        if result["tool"] == "ablation" and result["runs"]:
            return result
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{option} must name a recorded result, got {path}: name an --out of this tool")


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """All runs as one result.

    Raises:
        UserError: they are not comparable, or a run is there twice.
    """
    first = results[0]
    for other in results[1:]:
        for key in first:
            if key != "runs" and first[key] != other.get(key):
                raise UserError(
                    f"--merge must name results of the same {key}, got {first[key]} and {other.get(key)}: "
                    "run them alike"
                )
    runs: dict[tuple[str, str, int], dict[str, Any]] = {}
    for result in results:
        for run in result["runs"]:
            key = run["model"], run["arm"], run["seed"]
            if key in runs:
                raise UserError(
                    f"--merge must name results with different runs, got {key[1]!r} of {key[0]}, seed {key[2]}, twice: "
                    "leave one out"
                )
            runs[key] = run
    models, arms = list(MODELS), list(ARMS)
    order = sorted(runs, key=lambda key: (key[2], models.index(key[0]), arms.index(key[1])))
    return first | {"runs": [runs[key] for key in order]}


# ---- Command line ----


def names(option: str, given: str, known: Sequence[str]) -> list[str]:
    chosen = list(dict.fromkeys(name.strip() for name in given.split(",")))
    for name in chosen:
        if name not in known:
            raise UserError(f"{option} must name known ones, got {name!r}: choose of {', '.join(known)}")
    return chosen


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated; default: both")
    parser.add_argument("--arms", help="comma-separated; default: all for llama, four for fog_max")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each arm; default 1")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="text to train on; default: Python's library"
    )
    parser.add_argument(
        "--out", type=Path, help="write the result as JSON after every run, and its picture beside it"
    )
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSON", help="write recorded results as one")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="table and picture of a recorded result")
    options = parser.parse_args(arguments)
    out = options.out
    if out and (out.suffix != ".json" or not out.parent.is_dir()):
        raise UserError(
            f"--out must end in .json and lie in a folder that exists, got {out}: change its name or make "
            f"{out.parent}"
        )
    if options.draw:
        result, out = load(options.draw, "--draw"), options.draw
    elif options.merge:
        if out is None:
            raise UserError("--merge must have an --out, got none: add --out merged.json")
        result = merge([load(path, "--merge") for path in options.merge])
        write(result, out)
    else:
        result = _train(options)
    print("\n" + table(result))
    if out:
        draw(result, out.with_suffix(".png"))
    return 0


def _train(options: argparse.Namespace) -> dict[str, Any]:
    if not 1 <= options.seeds <= 100:
        raise UserError(f"--seeds must lie between 1 and 100, got {options.seeds}: leave it out for 1")
    models = names("--models", options.models, list(MODELS))
    given = names("--arms", options.arms, list(ARMS)) if options.arms is not None else None
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        # The blocks of all runs are one function to torch.compile, which would give up after eight of them.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
    out = options.out
    keep = (lambda result: write(result, out)) if out else (lambda result: None)
    arms = {model: given or DEFAULT[model] for model in models}
    return train_all(SIZES[options.size], arms, options.seeds, read_text(options.data), device, keep)


if __name__ == "__main__":
    sys.exit(main())
