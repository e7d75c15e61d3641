"""Draw a run, or compare several, from their metrics.jsonl.

    python tools/plot.py RUN_FOLDER [MORE...] [--out run.png]

Panels: loss (a line for training, circles for held-out text, dashed what token frequencies alone would give),
gradient norm, learning rate, throughput, and the largest FP8 saturation. Crosses on the lower edge mark steps
whose value was not finite. The format follows the suffix of --out (png, svg, pdf).
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from titan_fp8.errors import UserError
from titan_fp8.stability import journal

# Okabe and Ito's colours: told apart with any colour vision. No yellow: too faint for a line on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#666666"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.edgecolor": GREY,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.7,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "lines.linewidth": 1.4,
    "legend.frameon": False,
}


@dataclass
class Run:
    """The rows of one run, and its name in the legend."""

    name: str
    about: dict[str, Any]  # its newest "run" row, or {}
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]

    def series(self, key: str) -> tuple[list[int], list[float], list[int]]:
        """(steps, values, steps whose value is not finite) of a train row's key; "fp8.x" is a nested key.

        A value that is not finite is NaN here, so that a line breaks; an unknown one is left out.
        """
        steps: list[int] = []
        values: list[float] = []
        broken: list[int] = []
        outer, _, inner = key.partition(".")
        for row in self.train:
            value = row.get(outer)
            if inner:
                value = (value or {}).get(inner)
            if value is None and key not in row.get("nonfinite", ()):
                continue
            if value is None:
                broken.append(row["step"])
            steps.append(row["step"])
            values.append(float("nan") if value is None else value)
        return steps, values, broken


def load(folder: Path, name: str) -> Run:
    """Read a run folder. Raises UserError if it holds no logged steps."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(
            f"a run folder must hold metrics.jsonl, and {path} does not exist: "
            "name the [job] dump_folder of a run"
        )
    rows = journal.read(path)
    by_kind = {
        kind: [row for row in rows if row.get("kind") == kind] for kind in ("run", "train", "validation")
    }
    if not by_kind["train"]:
        raise UserError(f"a run must have logged a step to be drawn, and {path} has none: let it train first")
    about = by_kind["run"][-1] if by_kind["run"] else {}
    return Run(name, about, by_kind["train"], by_kind["validation"])


def draw(runs: list[Run], out: Path) -> None:
    """Write the picture of `runs` to `out`. Raises UserError if it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    panels = [
        ("grad_norm", "Gradient norm before clipping", {"yscale": "log"}),
        ("lr", "Learning rate", {}),
        ("tokens_per_second", "Throughput (tokens/s, all ranks)", {}),
        ("fp8.max_saturation", "Largest FP8 saturation (above 1 the cast clamps)", {}),
    ]
    panels = [panel for panel in panels if any(run.series(panel[0])[0] for run in runs)]
    with plt.rc_context(STYLE):
        lower = (len(panels) + 1) // 2
        figure = plt.figure(figsize=(9, 3.4 + 2.1 * lower), layout="constrained")
        grid = figure.add_gridspec(1 + lower, 2, height_ratios=[1.6] + [1] * lower)
        axes = [figure.add_subplot(grid[0, :])]
        axes += [figure.add_subplot(grid[1 + i // 2, i % 2]) for i in range(len(panels))]

        _draw_loss(axes[0], runs)
        for axis, (key, title, options) in zip(axes[1:], panels, strict=True):
            axis.set(title=title, **options)
            for run, color in zip(runs, COLORS, strict=False):
                steps, values, broken = run.series(key)
                axis.plot(steps, values, color=color, **_dot_if_alone(values))
                _mark_broken(axis, broken, color)
            if key == "grad_norm":
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_locator(NullLocator())
            if key == "lr":
                axis.yaxis.set_major_formatter("{x:g}")
            if key == "tokens_per_second":
                axis.yaxis.set_major_formatter(EngFormatter(sep=""))
            if key in ("lr", "tokens_per_second"):
                axis.set_ylim(bottom=0)
            if key == "fp8.max_saturation":
                axis.set_ylim(bottom=0, top=max(1.15, axis.get_ylim()[1]))
                _reference(axis, 1.0)
        for axis in axes:
            axis.set_xlabel("Step")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(runs) == 1:
            figure.suptitle(_describe(runs[0]), x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        _save(figure, out)
        plt.close(figure)


def _draw_loss(axis: Any, runs: list[Run]) -> None:
    axis.set(title="Loss (nats per token)")
    alone = len(runs) == 1
    for run, color in zip(runs, COLORS, strict=False):
        steps, values, broken = run.series("loss")
        label = "training" if alone else run.name
        axis.plot(steps, values, color=color, label=label, **_dot_if_alone(values))
        _mark_broken(axis, broken, color)
        held_out = [row for row in run.validation if row.get("validation_loss") is not None]
        if held_out:
            axis.plot(
                [row["step"] for row in held_out],
                [row["validation_loss"] for row in held_out],
                linestyle="none",
                marker="o",
                markersize=5,
                markerfacecolor="white",
                markeredgecolor=color,
                label="held-out" if alone else None,
            )
    axis.legend(loc="upper right")
    # Runs on the same text share this line; draw each value once.
    for entropy in {run.about.get("unigram_entropy") for run in runs} - {None}:
        _reference(axis, entropy, "token frequencies alone")


def _describe(run: Run) -> str:
    if not run.about:
        return run.name
    about = run.about
    ranks = f"{about['ranks']} x " if about["ranks"] > 1 else ""
    return f"{about['model']}, {about['recipe']}, {ranks}{about['device']}"


def _reference(axis: Any, y: float, text: str = "") -> None:
    """A dashed line with its name on it."""
    axis.axhline(y, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axis.annotate(
        text,
        xy=(0.99, y),
        xycoords=axis.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=GREY,
        fontsize=8,
    )


def _mark_broken(axis: Any, steps: list[int], color: str) -> None:
    """Crosses on the lower edge: a value that is not finite has no height."""
    if steps:  # matplotlib cannot lay out an empty line that is not clipped
        transform = axis.get_xaxis_transform()
        axis.plot(
            steps, [0.03] * len(steps), "x", color=color, markersize=5, transform=transform, clip_on=False
        )


def _dot_if_alone(values: list[float]) -> dict[str, str]:
    """A single point makes no line."""
    return {"marker": "."} if len(values) == 1 else {}


def _save(figure: Any, out: Path) -> None:
    suffix = out.suffix.lower().removeprefix(".")
    if suffix not in figure.canvas.get_supported_filetypes():
        raise UserError(f"--out must end in .png, .svg or .pdf, got {out}: change its name")
    temporary = out.with_name(out.name + ".tmp")
    try:
        figure.savefig(temporary, dpi=160, format=suffix)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(
            f"--out must be writable, got {out} ({error.strerror}): choose another place"
        ) from error


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
