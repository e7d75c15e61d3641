"""Draw a run on one page, or compare several, from their metrics.jsonl.

    python tools/plot_run.py RUN_FOLDER [MORE...] [--out run.png]

One run: loss (a line for training, circles for held-out text, dashed what token frequencies alone would give) with what the
stability policy did; the predicted risk of divergence with its leading cause; kurtosis and FP8 headroom as heat maps, layer
by step and site by step; alignment of SwiGLU's rows, attention's logits, saturated share; gradient norm, learning rate,
throughput. Several runs: loss, gradient norm, learning rate, throughput and FP8 saturation on the same axes.

What a run does not have is left out. Crosses on the lower edge mark steps whose value was not finite. The format follows the
suffix of --out (png, svg, pdf).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from plot_parts import COLORS, STYLE, Run, dot_if_alone, load, mark_broken, reference, save

from titan_fp8.errors import UserError
from titan_fp8.stability.predictor import split_name

BLUE, RED, GREEN = COLORS[:3]
WARN, ALERT = 0.5, 0.9  # risks at which tools/monitoring/rules.yml warns and alerts
COLUMNS = 800  # of a heat map; more rows are merged, the worst of them is shown

Floats = NDArray[np.float64]
Table = dict[tuple[int | None, str], Floats]
Draw = Callable[[Any], None]  # a panel, onto its axis


def draw(runs: list[Run], out: Path) -> None:
    """Write the picture of `runs` to `out`. Raises UserError if it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    plan = list(_page(runs[0]) if len(runs) == 1 else _comparison(runs))
    with plt.rc_context(STYLE):
        heights = [height for height, _ in plan]
        figure = plt.figure(figsize=(12, 0.4 + sum(heights)), layout="constrained")
        grid = figure.add_gridspec(len(plan), 6, height_ratios=heights)
        steps = [row["step"] for run in runs for row in run.train]
        for line, (_, panels) in enumerate(plan):
            width = 6 // len(panels)
            for column, panel in enumerate(panels):
                axis = figure.add_subplot(grid[line, column * width : (column + 1) * width])
                panel(axis)
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
                if len(set(steps)) > 1:
                    axis.set_xlim(min(steps), max(steps))
                if line == len(plan) - 1:
                    axis.set_xlabel("Step")
        if len(runs) == 1:
            figure.suptitle(_describe(runs[0]), x=0.01, ha="left", fontsize=11, fontweight="bold")
        save(figure, out)
        plt.close(figure)


def _page(run: Run) -> Iterator[tuple[float, list[Draw]]]:
    """Lines of panels of one run, each with its height in inches."""
    yield 2.6, [lambda axis: _loss(axis, [run])]
    if run.actions:
        causes = {(row["action"], row["cause"]) for row in run.actions}
        yield 0.5 + 0.22 * len(causes), [lambda axis: _actions(axis, run)]
    if run.series("risk")[0]:
        yield 2.0, [lambda axis: _risk(axis, run)]
    if kurtosis := run.table("kurtosis"):
        yield (
            2.3,
            [
                lambda axis: _kurtosis(
                    axis, run, _grouped(kurtosis, 0, np.fmax), "layer, largest of all sites"
                ),
                lambda axis: _kurtosis(
                    axis, run, _grouped(kurtosis, 1, np.fmax), "site, largest of all layers"
                ),
            ],
        )
    if headroom := run.table("headroom", tensors=True):
        yield (
            2.6,
            [
                lambda axis: _headroom(axis, run, _grouped(headroom, 0, np.fmin), "layer, worst tensor"),
                lambda axis: _headroom(axis, run, _grouped(headroom, 1, np.fmin), "tensor, worst layer"),
            ],
        )
    lines: list[Draw] = []
    if alignment := run.table("alignment_q999"):
        lines.append(lambda axis: _alignment(axis, run, alignment))
    if logits := run.table("logit_max"):
        lines.append(lambda axis: _by_layer(axis, run, logits, "Largest attention logit", yscale="log"))
    if share := run.table("saturated_share", tensors=True):
        worst = {(layer, ""): values for layer, values in _grouped(share, 0, np.fmax).items()}
        lines.append(lambda axis: _share(axis, run, worst))
    if lines:
        yield 1.9, lines
    known = [
        name for name in CURVES if run.series(name)[0] and not (name == "fp8.max_saturation" and headroom)
    ]
    for start in range(0, len(known), 3):
        yield 1.9, [lambda axis, name=name: _curve(axis, [run], name) for name in known[start : start + 3]]


def _comparison(runs: list[Run]) -> Iterator[tuple[float, list[Draw]]]:
    yield 3.4, [lambda axis: _loss(axis, runs)]
    known = [name for name in CURVES if any(run.series(name)[0] for run in runs)]
    for start in range(0, len(known), 2):
        yield 2.2, [lambda axis, name=name: _curve(axis, runs, name) for name in known[start : start + 2]]


# ---- Curves ----

CURVES = {
    "grad_norm": "Gradient norm before clipping",
    "lr": "Learning rate",
    "tokens_per_second": "Throughput (tokens/s, all ranks)",
    "fp8.max_saturation": "Largest FP8 saturation (above 1 the cast clamps)",
}


def _curve(axis: Any, runs: list[Run], name: str) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    axis.set(title=CURVES[name])
    for run, color in zip(runs, COLORS, strict=False):
        steps, values, broken = run.series(name)
        axis.plot(steps, values, color=color, **dot_if_alone(values))
        mark_broken(axis, broken, color)
    if name == "grad_norm":
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    elif name == "fp8.max_saturation":
        axis.set_ylim(bottom=0, top=max(1.15, axis.get_ylim()[1]))
        reference(axis, 1.0)
    else:
        axis.yaxis.set_major_formatter(EngFormatter(sep="") if name == "tokens_per_second" else "{x:g}")
        axis.set_ylim(bottom=0)


def _loss(axis: Any, runs: list[Run]) -> None:
    axis.set(title="Loss (nats per token)")
    alone = len(runs) == 1
    for run, color in zip(runs, COLORS, strict=False):
        steps, values, broken = run.series("loss")
        axis.plot(steps, values, color=color, label="training" if alone else run.name, **dot_if_alone(values))
        mark_broken(axis, broken, color)
        held_out = [row for row in run.validation if row.get("validation_loss") is not None]
        if held_out:
            axis.plot(
                [row["step"] for row in held_out], [row["validation_loss"] for row in held_out], "o", color=color,
                markersize=5, markerfacecolor="white", label="held-out" if alone else None,
            )  # fmt: skip
    if alone and (first := _first_alarm(runs[0])) is not None:
        axis.axvline(first, color=RED, linewidth=1, label=f"risk first at {WARN:g}: step {first}")
    axis.legend(loc="upper right")
    # Runs on the same text share this line; draw each value once.
    for entropy in {run.about.get("unigram_entropy") for run in runs} - {None}:
        reference(axis, entropy, "token frequencies alone")


def _first_alarm(run: Run) -> int | None:
    steps, risks, _ = run.series("risk")
    return next((step for step, risk in zip(steps, risks, strict=True) if risk >= WARN), None)


def _risk(axis: Any, run: Run) -> None:
    """The risk, filled, and under it a strip with the leading cause where the risk is worth a word."""
    steps, risks, _ = run.series("risk")
    axis.set(
        title="Predicted risk of divergence, and its leading cause", ylim=(-0.34, 1.02), yticks=[0, 0.5, 1]
    )
    axis.plot(steps, risks, color=RED, **dot_if_alone(risks))
    axis.fill_between(steps, 0, risks, color=RED, alpha=0.15, linewidth=0)
    for level, name in ((WARN, "warning"), (ALERT, "alert")):
        reference(axis, level, name)
    shades = ("#F2C9A5", "#C9D9EC")
    for index, (first, last, cause) in enumerate(_causes(run)):
        axis.axvspan(first, last, ymin=0.02, ymax=0.17, color=shades[index % 2], linewidth=0)
        if last - first > 0.12 * (steps[-1] - steps[0]):
            axis.text((first + last) / 2, -0.2, cause, ha="center", va="center", fontsize=7.5, clip_on=True)


def _causes(run: Run) -> list[tuple[float, float, str]]:
    """(first step, last step, words) of stretches with one leading cause and a risk of at least 0.1."""
    stretches: list[list[Any]] = []
    previous = None
    for row in run.train:
        cause = row.get("cause") if (row.get("risk") or 0) >= 0.1 else None
        if stretches and cause == previous and cause is not None:
            stretches[-1][1] = row["step"]
        elif cause is not None:
            layer, site, statistic = split_name(cause)
            words = [
                statistic.replace("_", " "),
                f"of {site}" if site else "",
                f"in layer {layer}" if layer is not None else "",
            ]
            stretches.append([row["step"], row["step"], " ".join(filter(None, words))])
        previous = cause
    return [(first - 0.5, last + 0.5, words) for first, last, words in stretches]


def _actions(axis: Any, run: Run) -> None:
    kinds = list(dict.fromkeys((row["action"], row["cause"]) for row in run.actions))
    for row in run.actions:
        place = kinds.index((row["action"], row["cause"]))
        axis.plot(
            [row["step"], row.get("until", row["step"])], [place, place], color=GREEN, linewidth=4, alpha=0.4
        )
        axis.plot(row["step"], place, "|", color=GREEN, markersize=9, markeredgewidth=1.8)
    axis.set(title="What the stability policy did (bars: for how long)", ylim=(len(kinds) - 0.4, -0.6))
    axis.set_yticks(
        range(len(kinds)),
        [f"{action.replace('_', ' ')}: {cause.replace('_', ' ')}" for action, cause in kinds],
    )


def _by_layer(axis: Any, run: Run, table: Table, title: str, **options: Any) -> None:
    """A line per layer, from the first (light) to the last (dark)."""
    from matplotlib import colormaps

    axis.set(title=f"{title}, by layer", **options)
    steps = [row["step"] for row in run.train]
    layers = sorted({layer for layer, _ in table if layer is not None})
    for (layer, _), values in sorted(table.items(), key=lambda item: (item[0][0] is None, item[0])):
        place = layers.index(layer) / max(len(layers) - 1, 1) if layer is not None else 0.0
        label = f"layer {layer}" if layers and layer in (layers[0], layers[-1]) else None
        axis.plot(steps, values, color=colormaps["viridis_r"](0.1 + 0.9 * place), linewidth=1, label=label)
    if layers:
        axis.legend(loc="lower right", fontsize=7.5)


def _alignment(axis: Any, run: Run, table: Table) -> None:
    _by_layer(axis, run, table, "FFN alignment, 99.9 % of |cos|")
    axis.set_ylim(0, 1)
    reference(axis, 0.85, "a square")


def _share(axis: Any, run: Run, table: Table) -> None:
    smallest = min((v[v > 0].min() for v in table.values() if (v > 0).any()), default=1e-6)
    _by_layer(axis, run, table, "Saturated share, worst tensor")
    axis.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(smallest)))
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter("{x:g}")


# ---- Heat maps ----


def _grouped(table: Table, part: int, worse: Callable[[Floats, Floats], Floats]) -> dict[Any, Floats]:
    """The worst values by layer (`part` 0; of what lies in a layer) or by site (1)."""
    groups: dict[Any, Floats] = {}
    for key, values in table.items():
        if key[part] is not None:
            group = groups.get(key[part])
            groups[key[part]] = values if group is None else worse(group, values)
    return dict(sorted(groups.items())) if part == 0 else groups


def _heat(axis: Any, run: Run, groups: dict[Any, Floats], worse: Any, label: str, **options: Any) -> None:
    """Rows from the top down are the groups, time goes to the right."""
    steps = np.array([row["step"] for row in run.train], dtype=np.float64)
    values = np.stack(list(groups.values()))
    starts = np.unique(np.linspace(0, len(steps), min(len(steps), COLUMNS), endpoint=False).astype(int))
    values = worse.reduceat(values, starts, axis=1)
    edges = np.append(steps[starts], steps[-1] + 1)
    mesh = axis.pcolormesh(edges, np.arange(len(groups) + 1), values, rasterized=True, **options)
    axis.set_facecolor("#BBBBBB")  # unknown or not finite
    axis.grid(visible=False)
    axis.invert_yaxis()
    every = max(1, math.ceil(len(groups) / 16))
    names = [str(name) for name in groups][::every]
    size = 8 if len(names) <= 9 else 6.5
    axis.set_yticks(np.arange(len(groups))[::every] + 0.5, [_short(name) for name in names], fontsize=size)
    axis.tick_params(axis="y", length=0)
    bar = axis.figure.colorbar(
        mesh, ax=axis, pad=0.01, fraction=0.04, extend=options.pop("extend", "neither")
    )
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter("{x:g}")


def _short(name: str) -> str:
    return (
        name.replace("attention.inner_attention.", "attn ")
        .replace("attention.", "")
        .replace("feed_forward.", "ffn ")
    )


def _kurtosis(axis: Any, run: Run, groups: dict[Any, Floats], what: str) -> None:
    from matplotlib.colors import LogNorm

    axis.set_title(f"Kurtosis by {what}")
    finite = np.concatenate([values[np.isfinite(values)] for values in groups.values()])
    top = max(100.0, float(finite.max(initial=0)))
    _heat(axis, run, groups, np.fmax, "3: Gaussian", norm=LogNorm(2, top), cmap="YlOrRd")


def _headroom(axis: Any, run: Run, groups: dict[Any, Floats], what: str) -> None:
    axis.set_title(f"FP8 headroom by {what}")
    _heat(axis, run, groups, np.fmin, "bits; below 0: clamped", vmin=-3, vmax=3, cmap="RdBu")


def _describe(run: Run) -> str:
    if not run.about:
        return run.name
    about = run.about
    ranks = f"{about['ranks']} x " if about["ranks"] > 1 else ""
    return f"{about['model']}, {about['recipe']}, {ranks}{about['device']}"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(description="Draw a run, or compare several, from their metrics.jsonl.")
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="a run's [job] dump_folder"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("run.png"), help="picture to write (default: run.png)"
    )
    options = parser.parse_args(arguments)
    folders: list[Path] = options.folders
    try:
        if len(folders) > len(COLORS):
            raise UserError(f"at most {len(COLORS)} runs fit in one picture, got {len(folders)}: name fewer")
        unique = len({folder.resolve().name for folder in folders}) == len(folders)
        runs = [load(folder, folder.resolve().name if unique else str(folder)) for folder in folders]
        draw(runs, options.out)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print(
            "error: drawing needs matplotlib, which is not installed: pip install 'titan-fp8[plot]'",
            file=sys.stderr,
        )
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
