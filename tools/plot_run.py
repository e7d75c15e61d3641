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
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from plot_parts import (
    COLORS,
    STYLE,
    Run,
    dot_if_alone,
    load,
    log_scale,
    mark_broken,
    pyplot,
    reference,
    save_figure,
)

from titan_fp8.errors import UserError, in_one_line
from titan_fp8.stability.predictor import split_name

BLUE, RED, GREEN = COLORS[:3]
WARN, ALERT = 0.5, 0.9  # risks at which tools/monitoring/rules.yml warns and alerts
SITES = ("residual", "qkv_in", "q", "k", "v", "attention_out", "ffn_up", "ffn_act", "ffn_out")
COLUMNS = 800  # of a heat map; more rows are merged, the worst of them is shown

Floats = NDArray[np.float64]
Table = dict[tuple[int | None, str], Floats]
Draw = Callable[[Any], None]  # a panel, onto its axis


def draw(runs: list[Run], out: Path) -> None:
    """Write the picture of `runs` to `out`. Raises UserError if it cannot be written."""
    plt = pyplot()
    from matplotlib.ticker import MaxNLocator

    plan = list(_page(runs[0]) if len(runs) == 1 else _comparison(runs))
    with plt.rc_context(STYLE):
        heights = [sum(high) for high, _ in plan]
        figure = plt.figure(figsize=(12, 0.4 + sum(heights)), layout="constrained")
        # Lines of panels are laid out by themselves: long names in one must not narrow the others.
        lines = figure.subfigures(len(plan), 1, height_ratios=heights, squeeze=False)[:, 0]
        steps = [row["step"] for run in runs for row in run.train]
        for line, (high, panels) in zip(lines, plan, strict=True):
            across = len(panels) // len(high)
            axes = line.subplots(len(high), across, height_ratios=high, squeeze=False).flat
            for panel, axis in zip(panels, axes, strict=True):
                panel(axis)
                axis.xaxis.set_major_locator(MaxNLocator(nbins=12 // across + 1, integer=True))
                if len(set(steps)) > 1:
                    axis.set_xlim(min(steps), max(steps))
                if line is lines[-1]:
                    axis.set_xlabel("Step")
        if len(runs) == 1:
            figure.suptitle(_describe(runs[0]), x=0.01, ha="left", fontsize=11, fontweight="bold")
        save_figure(figure, out)
        plt.close(figure)


Line = tuple[list[float], list[Draw]]
"""Heights of one or more rows in inches, and the panels of all of them; the rows of a line share their margins."""


def _page(run: Run) -> Iterator[Line]:
    top: Line = [2.6], [lambda axis: _loss(axis, [run])]
    if run.actions:
        kinds = {(row["action"], row["cause"]) for row in run.actions}
        top[0].append(0.5 + 0.22 * len(kinds))
        top[1].append(lambda axis: _actions(axis, run))
    if run.series("risk")[0]:
        top[0].append(2.0)
        top[1].append(lambda axis: _risk(axis, run))
    yield top
    if kurtosis := run.table("kurtosis"):
        layers, sites = _grouped(kurtosis, 0, np.fmax), _grouped(kurtosis, 1, np.fmax)
        left = lambda axis: _kurtosis(axis, run, layers, "layer, largest of all sites")  # noqa: E731
        yield [2.3], [left, lambda axis: _kurtosis(axis, run, sites, "site, largest of all layers")]
    if headroom := run.table("headroom", tensors=True):
        of_layers, of_tensors = _grouped(headroom, 0, np.fmin), _grouped(headroom, 1, np.fmin)
        left = lambda axis: _headroom(axis, run, of_layers, "layer, worst tensor")  # noqa: E731
        yield [2.6], [left, lambda axis: _headroom(axis, run, of_tensors, "tensor, worst layer")]
    lines: list[Draw] = []
    if alignment := run.table("alignment_q999"):
        lines.append(lambda axis: _alignment(axis, run, alignment))
    if logits := run.table("logit_max"):
        lines.append(lambda axis: _logits(axis, run, logits))
    if share := run.table("saturated_share", tensors=True):
        lines.append(lambda axis: _share(axis, run, np.fmax.reduce(list(share.values()))))
    if lines:
        yield [1.9], lines
    known = [
        name for name in CURVES if run.series(name)[0] and not (name == "fp8.max_saturation" and headroom)
    ]
    for start in range(0, len(known), 3):
        yield [1.9], [lambda axis, name=name: _curve(axis, [run], name) for name in known[start : start + 3]]


def _comparison(runs: list[Run]) -> Iterator[Line]:
    yield [3.4], [lambda axis: _loss(axis, runs)]
    known = [name for name in CURVES if any(run.series(name)[0] for run in runs)]
    for start in range(0, len(known), 2):
        yield [2.2], [lambda axis, name=name: _curve(axis, runs, name) for name in known[start : start + 2]]


# ---- Curves ----

CURVES = {
    "grad_norm": "Gradient norm before clipping",
    "lr": "Learning rate",
    "tokens_per_second": "Throughput (tokens/s, all ranks)",
    "fp8.max_saturation": "Largest FP8 saturation (above 1 the cast clamps)",
}


def _curve(axis: Any, runs: list[Run], name: str) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set(title=CURVES[name])
    for run, color in zip(runs, COLORS, strict=False):
        steps, values, broken = run.series(name)
        axis.plot(steps, values, color=color, **dot_if_alone(values))
        mark_broken(axis, broken, color)
    if name == "grad_norm":
        log_scale(axis)
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
    losses = np.array([value for run in runs for value in run.series("loss")[1] if math.isfinite(value)])
    if (
        len(losses) and losses.max() > 3 * np.median(losses) and losses.min() > 0
    ):  # a spike would flatten all else
        log_scale(axis)
    axis.legend(loc="best" if alone else "upper right")
    # Runs on the same text share this line; draw each value once.
    for entropy in {run.about.get("unigram_entropy") for run in runs} - {None}:
        reference(axis, entropy, "token frequencies alone")


def _first_alarm(run: Run) -> int | None:
    steps, risks, _ = run.series("risk")
    return next((step for step, risk in zip(steps, risks, strict=True) if risk >= WARN), None)


def _risk(axis: Any, run: Run) -> None:
    """The risk, filled, and, where there are any, under it a strip with the leading causes."""
    steps, risks, _ = run.series("risk")
    causes = _causes(run)
    title = f"Predicted risk of divergence ({WARN:g} warns, {ALERT:g} alerts)"
    title += ", and under it the leading cause" if causes else ""
    axis.set(title=title, ylim=(-0.5 if causes else -0.03, 1.02), yticks=[0, WARN, ALERT])
    axis.plot(steps, risks, color=RED, **dot_if_alone(risks))
    axis.fill_between(steps, 0, risks, color=RED, alpha=0.15, linewidth=0)
    for first, last, cause in causes:
        axis.axvspan(first, last, ymin=0.01, ymax=0.3, facecolor="#F3E3D3", edgecolor="white", linewidth=1.5)
        layer, site, statistic = split_name(cause)
        where = [
            site.replace("attention.inner_attention", "attention"),
            f"layer {layer}" if layer is not None else "",
        ]
        text = "\n".join([statistic.replace("_", " "), *filter(None, where)])
        axis.text((first + last) / 2, -0.265, text, ha="center", va="center", fontsize=7, clip_on=True)


def _causes(run: Run) -> list[tuple[float, float, str]]:
    """(first step, last step, series): of each tenth of the run the most frequent leading cause at a risk of 0.1 or more."""
    stretches: list[tuple[float, float, str]] = []
    for part in np.array_split(np.arange(len(run.train)), 10):
        rows = [run.train[index] for index in part]
        causes = Counter(row["cause"] for row in rows if row.get("cause") and (row.get("risk") or 0) >= 0.1)
        if not causes:
            continue
        cause, first, last = (
            causes.most_common(1)[0][0],
            rows[0]["step"],
            run.train[min(part[-1] + 1, len(run.train) - 1)]["step"],
        )
        if stretches and stretches[-1][1:] == (first, cause):
            first = stretches.pop()[0]
        stretches.append((first, last, cause))
    return stretches


def _actions(axis: Any, run: Run) -> None:
    kinds = list(dict.fromkeys((row["action"], row["cause"]) for row in run.actions))
    for row in run.actions:
        place = kinds.index((row["action"], row["cause"]))
        axis.plot(
            [row["step"], row.get("until", row["step"])], [place, place], color=GREEN, linewidth=4, alpha=0.4
        )
        axis.plot(row["step"], place, "|", color=GREEN, markersize=9, markeredgewidth=1.8)
    axis.set(
        title="What the stability policy did (bars: for how long)", ylim=(len(kinds) - 0.4, -0.6), yticks=[]
    )
    edge = axis.get_yaxis_transform()
    for place, (action, cause) in enumerate(kinds):
        words = f"{action} ({cause})".replace("_", " ")
        axis.text(0.005, place, words, transform=edge, va="center", fontsize=8, backgroundcolor="white")


def _by_layer(axis: Any, run: Run, table: Table, title: str) -> None:
    """A line per layer, from the first (light) to the last (dark)."""
    from matplotlib import colormaps

    axis.set(title=f"{title}, by layer")
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


def _logits(axis: Any, run: Run, table: Table) -> None:
    _by_layer(axis, run, table, "Largest attention logit")
    if max(np.nanmax(values) for values in table.values()) > 100:  # what grows, grows by orders of magnitude
        log_scale(axis)
        axis.set_ylim(bottom=max(axis.get_ylim()[0], 0.01))
    else:
        axis.set_ylim(bottom=0)


def _share(axis: Any, run: Run, worst: Floats) -> None:
    """`worst`: of all FP8 tensors, [train rows]."""
    axis.set(title="Saturated share of the worst FP8 tensor")
    above = worst[worst > 0]
    axis.set_yscale(
        "symlog", linthresh=10 ** math.floor(math.log10(np.median(above))) / 10 if len(above) else 1e-6
    )
    axis.plot([row["step"] for row in run.train], worst, color=BLUE, linewidth=1)
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
    # Layers as they are counted, sites as data meets them; unknown ones last.
    return dict(
        sorted(groups.items(), key=lambda item: item[0] if part == 0 else (*SITES, item[0]).index(item[0]))
    )


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


@in_one_line
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
    if len(folders) > len(COLORS):
        raise UserError(f"at most {len(COLORS)} runs fit in one picture, got {len(folders)}: name fewer")
    unique = len({folder.resolve().name for folder in folders}) == len(folders)
    runs = [load(folder, folder.resolve().name if unique else str(folder)) for folder in folders]
    draw(runs, options.out)
    print(f"Wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
