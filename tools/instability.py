"""The instability of SwiGLU in FP8 with delayed scaling, in minutes: four arms from the same weights, on the same batches.

    python tools/instability.py --size small --out instability.json       on a GPU, minutes; a picture beside the JSON
    python tools/instability.py --size tiny --out instability.json        on CPU, a minute
    python tools/instability.py --draw instability.json                   the picture of a recorded result

    bf16         SwiGLU, no FP8
    fp8          SwiGLU, linears in FP8, one delayed scale for z, SwiGLU's output
    fp8 smooth   Smooth-SwiGLU, the same but a delayed scale for each feature of z
    ... dynamic  Smooth-SwiGLU with each feature scaled by its amax in this step

"Scaling FP8 training to trillion-token LLMs" (arXiv 2409.12517, section 3): after hundreds of billions of tokens the gate's
and the up-projection's rows of a feature are parallel and long. SwiGLU is then quadratic in that feature, a rare input makes
an outlier that no earlier step foresaw, and delayed scaling answers wrongly twice: the cast clips the outlier, and then its
amax stays in the history, and whatever is small beside it is flushed to zero for as long as the history is.

What is INDUCED here, instead of waiting for it: the model is trained in BF16 for a while, as it is. Then the first
feature of each of the first two layers gets parallel gate and up rows (in length hundreds of others), along the
direction that ordinary text uses least in the residual stream; what is left of it there is taken out of the weights that
write into the stream. One token that ordinary text does not have is embedded along it, so that z = --outlier for that
token. The feature's column of w2 is so short that what it adds is as long as the stream is, which every arm can carry.
The token is in one batch only, once in each sequence, at the step marked in the picture; how well it is predicted does
not count in the loss.
What is NATURAL: all else. Text (Python's own library, bytes), every other weight, optimizer, learning rate (a fifth of
the warm-up's), the scales, their history (1024 steps, as in both papers), and whatever the arms make of that batch and
the next.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import train_parts  # pyrefly: ignore
from torch import Tensor, nn
from train_parts import IGNORE_INDEX, Shape, Trained, device_name  # pyrefly: ignore

from titan_fp8.config import Data, Fp8
from titan_fp8.data.sources import open_source
from titan_fp8.errors import UserError, in_one_line
from titan_fp8.files import save
from titan_fp8.float8.convert import convert, scaling_state
from titan_fp8.model.decoder import Decoder

RARE = 256  # the token; text is bytes
SEED = 0
# Layers, from the first, that get an aligned feature. Further down the token's direction is small in the stream: rows must
# be thousands of times as long as others, and ordinary text finds them too.
ALIGNED = 2
COLORS = {"bf16": "#666666", "fp8": "#D55E00", "fp8 smooth": "#0072B2", "fp8 smooth dynamic": "#009E73"}


@dataclass(frozen=True)
class Size(Shape):
    warm_up: int
    """Steps in BF16 before the arms part."""
    steps: int
    """Of each arm."""
    event: int
    """The arms' step whose batch has the rare token."""
    lr: float
    """In the warm-up; the arms, late in training, have a fifth of it."""


SIZES = {
    "tiny": Size(128, 2, 4, 384, 64, 16, 300, 120, 40, 3e-3),
    "small": Size(512, 8, 8, 1408, 512, 32, 400, 400, 150, 1e-3),
}

ARMS: dict[str, tuple[str, Fp8]] = {
    "bf16": ("swiglu", Fp8(recipe="bf16")),
    "fp8": ("swiglu", Fp8()),
    "fp8 smooth": ("smooth_swiglu", Fp8()),
    "fp8 smooth dynamic": ("smooth_swiglu", Fp8(smooth_scale="channel_dynamic")),
}


class Text(train_parts.Text):
    """Python's library; the same batches in all arms."""

    def __init__(self, size: Size, device: torch.device, seed: int = SEED):
        text = b"\n".join(open_source(Data(source="builtin")).split("train"))
        super().__init__(text, size, device, seed)

    def batch(self, step: int, event: bool = False) -> tuple[Tensor, Tensor]:
        """(tokens, labels) [B, S]; with `event` one token of each sequence is the rare one."""
        generator = self.generator(step)
        tokens = self.windows(generator)
        labels = tokens[:, 1:].clone()
        if event:
            rows = torch.arange(self.shape.batch)
            places = torch.randint(1, self.shape.seq_len, (self.shape.batch,), generator=generator)
            tokens[rows, places] = RARE
            labels[rows, places - 1] = IGNORE_INDEX
        return tokens[:, :-1].to(self.device), labels.to(self.device)


def start(model: Decoder, size: Size, device: torch.device) -> Trained:
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, **train_parts.ADAMW)
    return Trained(model, optimizer, device)


def feed_forward_inputs(model: Decoder, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(residual stream, what the feed-forward gets of it) [B S, D] float32 of each layer, computed in BF16."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append((inputs[0].flatten(0, 1).float(), output.flatten(0, 1).float()))

    hooks = [block.get_submodule("ffn_norm").register_forward_hook(look) for block in model.layers.children()]
    with torch.no_grad(), torch.autocast(tokens.device.type, torch.bfloat16):
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def free_direction(model: Decoder, text: Text) -> Tensor:
    """The unit vector [D] that ordinary text uses least in the residual stream, and from now on not at all.

    What is left of it there is taken out of the weights that write into the stream, and the rare token is embedded along it.
    """
    ordinary = torch.cat([text.batch(-1 - i)[0] for i in range(4)])
    streams = [nn.functional.normalize(stream.double()) for stream, _ in feed_forward_inputs(model, ordinary)]
    unused = torch.linalg.eigh(sum(stream.T @ stream for stream in streams)).eigenvectors[:, 0].float()
    embeddings = model.tok_embeddings.weight
    length = embeddings[ordinary.unique()].norm(dim=1).median()
    embeddings -= torch.outer(embeddings @ unused, unused)
    embeddings[RARE] = 8 * length * unused
    for block in model.layers.values():
        for writer in (block.attention.wo, block.feed_forward.w2):
            writer.weight -= torch.outer(unused, unused @ writer.weight)
    return unused


@torch.no_grad()
def align(model: Decoder, text: Text, outlier: float) -> list[dict[str, float]]:
    """Give the first feature of ALIGNED layers parallel rows, along `free_direction`. Returns what was reached, by layer."""
    unused = free_direction(model, text)
    ordinary = torch.cat([text.batch(-1 - i)[0] for i in range(4)])
    special = text.batch(-1, event=True)[0]
    rare = (special == RARE).flatten()
    reached = []
    for i, block in enumerate(list(model.layers.values())[:ALIGNED]):
        ffn = block.feed_forward
        stream, others = feed_forward_inputs(model, ordinary)[i]
        x = feed_forward_inputs(model, special)[i][1][rare]
        row = unused / block.ffn_norm.weight
        row *= math.sqrt(outlier) / (x @ row).mean()
        usual = ffn.w1.weight.norm(dim=1).median()
        ffn.w1.weight[0] = ffn.w3.weight[0] = row
        ffn.w2.weight[:, 0] *= stream.norm(dim=1).mean() / (outlier * ffn.w2.weight[:, 0].norm())
        z_rare, z_others = (u * nn.functional.silu(u) for u in (x @ row, others @ row))
        reached.append(
            {
                "z of the rare token": float(z_rare.mean()),
                "largest z of others": float(z_others.abs().max()),
                "rows, in lengths of a median row": float(row.norm() / usual),
            }
        )
    return reached


@torch.no_grad()
def probe(model: Decoder, tokens: Tensor) -> dict[str, float]:
    """What the arm's casts of z would do to this batch, over all layers, and how far rows are aligned."""
    was_training = model.training
    inputs = feed_forward_inputs(model.eval(), tokens)
    model.train(was_training)
    flushed, cosines = [], []
    for (_, x), block in zip(inputs, model.layers.children(), strict=True):
        ffn = block.get_submodule("feed_forward")
        w1, w3 = ffn.w1.weight.float(), ffn.w3.weight.float()
        cosines.append(nn.functional.cosine_similarity(w1, w3, dim=1).abs())
        slot = getattr(ffn, "z", None)
        if slot is not None:
            z = nn.functional.silu(x @ w1.T) * (x @ w3.T) * slot.scale * getattr(slot, "channel_scale", 1.0)
            flushed.append((z.abs() < 2.0**-10).float().mean())  # half of E4M3's smallest number
    every = torch.cat(cosines)
    found = {"cosine_max": every.max(), "cosine_p99": every.quantile(0.99), "cosine_median": every.median()}
    if flushed:
        found["flushed"] = torch.stack(flushed).mean()
    return {name: float(value) for name, value in found.items()}


def run(size: Size, outlier: float, device: torch.device) -> dict[str, Any]:
    """The result, JSON-ready: the arms' losses and what was seen of z."""
    text = Text(size, device)
    base = start(train_parts.build(size, SEED), size, device)
    warm = []
    for step in range(size.warm_up):
        lr = size.lr * min(1.0, (step + 1) / 50)
        warm.append(base.step(*text.batch(step), lr)[0])
    reached = align(base.model, text, outlier)
    weights, moments = copy.deepcopy(base.model.state_dict()), copy.deepcopy(base.optimizer.state_dict())
    for row in reached:
        print(", ".join(f"{name}: {value:.4g}" for name, value in row.items()), flush=True)
    arms = {}
    for name, (activation, fp8) in ARMS.items():
        began = time.perf_counter()
        model = train_parts.build(size, SEED, activation=activation)
        model.load_state_dict(weights)
        convert(model.to(device), fp8)
        if (state := scaling_state(model)) is not None:
            state.init_weights()
        arm = start(model, size, device)
        arm.optimizer.load_state_dict(copy.deepcopy(moments))
        losses, norms, probes = [], [], []
        saturation: list[float] = []
        for step in range(size.steps):
            if step % 10 == 0 or step in (size.event, size.event + 1):
                probes.append({"step": step} | probe(model, text.batch(-2)[0]))
            loss, norm = arm.step(*text.batch(size.warm_up + step, step == size.event), size.lr / 5)
            losses.append(loss)
            norms.append(norm)
            if state is not None:
                seen = [row for tensor, row in state.report().items() if tensor.endswith(".z")]
                saturation.append(max(row["saturation"] for row in seen))
        arms[name] = {
            "losses": torch.stack(losses).tolist(), "gradient_norms": torch.stack(norms).tolist(), "probes": probes,
            "saturation": saturation,
        }  # fmt: skip
        row = summary(arms[name], size.event)
        print(f"{name:18s} {time.perf_counter() - began:6.1f} s   " + words(row), flush=True)
    return {
        "size": asdict(size), "outlier": outlier, "device": device_name(device), "torch": torch.__version__,
        "warm_up_losses": torch.stack(warm).tolist(), "aligned": reached, "arms": arms,
        "summary": {name: summary(arm, size.event) for name, arm in arms.items()},
    }  # fmt: skip


def summary(arm: dict[str, Any], event: int) -> dict[str, float]:
    """Mean loss of the 20 steps before the event and of the 20 after its own, the largest after it, and the last 20's."""
    losses = [loss if math.isfinite(loss) else math.inf for loss in arm["losses"]]
    before, after, last = losses[event - 20 : event], losses[event + 1 : event + 21], losses[-20:]
    found = {
        "before": sum(before) / len(before), "after": sum(after) / len(after), "largest": max(losses[event + 1 :]),
        "last": sum(last) / len(last),
    }  # fmt: skip
    flushed = {row["step"]: row["flushed"] for row in arm["probes"] if "flushed" in row}
    if flushed:
        found |= {"flushed_before": flushed[event], "flushed_after": flushed[event + 1]}
        found["saturation"] = max(arm["saturation"][1:])
    return found


def words(row: dict[str, float]) -> str:
    text = f"loss {row['before']:.3f} before, {row['after']:.3f} after, {row['largest']:.3f} at most"
    text += f", {row['last']:.3f} at the end"
    if "saturation" in row:
        text += f"; of z flushed {row['flushed_before']:.1%} before, {row['flushed_after']:.1%} after"
        text += f"; amax up to {row['saturation']:.3g} times the limit"
    return text


def draw(result: dict[str, Any], out: Path) -> None:
    """The picture, as PNG: losses; z's amax against the limit of its cast; what the cast flushes; cosines of gate and up."""
    from plot_parts import pyplot

    plt = pyplot()

    style = {
        "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.color": "#E5E5E5", "lines.linewidth": 1.2,
        "legend.frameon": False,
    }  # fmt: skip
    event = result["size"]["event"]
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            4, 1, figsize=(9, 9.5), height_ratios=[2.2, 1.2, 1, 1], sharex=True, layout="constrained"
        )
        for name, arm in result["arms"].items():
            color, steps = COLORS[name], [row["step"] for row in arm["probes"]]
            axes[0].plot(arm["losses"], color=color, label=name)
            if arm["saturation"]:
                axes[1].plot(arm["saturation"], color=color, label=name)
                axes[2].plot(steps, [row["flushed"] for row in arm["probes"]], color=color, label=name)
            for key, line in (("cosine_max", "-"), ("cosine_p99", "--"), ("cosine_median", ":")):
                label = key.replace("_", ", ") if name == "bf16" else None
                axes[3].plot(steps, [row[key] for row in arm["probes"]], line, color=color, label=label)
        axes[0].set_title("Loss, nats per byte (dotted: the batch with the rare token)")
        axes[1].set(
            title="Largest z over the largest that its cast holds (above 1 it is clipped)", yscale="log"
        )
        axes[1].axhline(1.0, color="#333333", linewidth=0.8)
        axes[2].set(title="Share of z on ordinary text that its cast makes zero", ylim=(0, 1))
        axes[3].set(
            title="|cosine| of a feature's gate and up rows (induced in one of each of the first layers)",
            xlabel="Step",
            ylim=(0, 1.05),
        )
        for axis in axes:
            axis.axvline(event, color="#333333", linewidth=0.8, linestyle=":")
            axis.legend(fontsize=8)
        size = result["size"]
        figure.suptitle(
            f"SwiGLU in FP8 meets an outlier: {size['layers']} layers of {size['dim']}, z = {result['outlier']:.0e}, "
            f"{result['device']}",
            x=0.01, ha="left", fontweight="bold",
        )  # fmt: skip
        save(out, lambda path: figure.savefig(path, dpi=150, format="png"))
        plt.close(figure)


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--outlier", type=float, default=1e7, help="z of the aligned feature; default 1e7")
    parser.add_argument("--out", type=Path, help="write the result as JSON, and its picture beside it")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="draw a recorded result")
    options = parser.parse_args(arguments)
    if options.draw:
        if not options.draw.is_file():
            raise UserError(
                f"--draw must name a recorded result, got {options.draw}: name an --out of this tool"
            )
        draw(json.loads(options.draw.read_text()), options.draw.with_suffix(".png"))
        return 0
    if not 1 <= options.outlier <= 1e30:
        raise UserError(
            f"--outlier must lie between 1 and 1e30, got {options.outlier:g}: leave it out for 1e7"
        )
    if options.out and not options.out.parent.is_dir():
        raise UserError(
            f"--out must lie in a folder that exists, got {options.out}: make {options.out.parent}"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = run(SIZES[options.size], options.outlier, device)
    if options.out:
        save(options.out, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))
        draw(result, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
