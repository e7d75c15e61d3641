"""Parts of the pictures: a run's rows, the style, and what all panels share."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from titan_fp8.errors import UserError
from titan_fp8.files import save
from titan_fp8.stability import journal
from titan_fp8.stability.predictor import split_name

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
    actions: list[dict[str, Any]]

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

    def table(
        self, statistic: str, tensors: bool = False
    ) -> dict[tuple[int | None, str], NDArray[np.float64]]:
        """(layer, site) -> values [train rows] of a statistic, NaN where it is not finite or unknown.

        `tensors`: of FP8 tensors (dotted sites) instead of activations.
        """
        found: dict[str, NDArray[np.float64]] = {}
        for index, row in enumerate(self.train):
            for name, statistics in (row.get("statistics") or {}).items():
                value = statistics.get(statistic)
                if value is not None:
                    if name not in found:
                        found[name] = np.full(len(self.train), np.nan)
                    found[name][index] = value
        split = {split_name(f"{name}.{statistic}")[:2]: values for name, values in found.items()}
        return {key: values for key, values in split.items() if ("." in key[1]) == tensors}


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
        kind: [row for row in rows if row.get("kind") == kind]
        for kind in ("run", "train", "validation", "action")
    }
    if not by_kind["train"]:
        raise UserError(f"a run must have logged a step to be drawn, and {path} has none: let it train first")
    about = by_kind["run"][-1] if by_kind["run"] else {}
    return Run(name, about, by_kind["train"], by_kind["validation"], by_kind["action"])


def reference(axis: Any, y: float, text: str = "") -> None:
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


def log_scale(axis: Any) -> None:
    """The y axis, for what is drawn on it: ticks are plain numbers, between powers of ten too if there are few."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())


def mark_broken(axis: Any, steps: list[int], color: str) -> None:
    """Crosses on the lower edge: a value that is not finite has no height."""
    if steps:  # matplotlib cannot lay out an empty line that is not clipped
        transform = axis.get_xaxis_transform()
        axis.plot(
            steps, [0.03] * len(steps), "x", color=color, markersize=5, transform=transform, clip_on=False
        )


def dot_if_alone(values: list[float]) -> dict[str, str]:
    """A single point makes no line."""
    return {"marker": "."} if len(values) == 1 else {}


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files. Raises UserError where it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise UserError(
            "drawing needs matplotlib, which is not installed: pip install 'titan-fp8[plot]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save_figure(figure: Any, out: Path) -> None:
    suffix = out.suffix.lower().removeprefix(".")
    if suffix not in figure.canvas.get_supported_filetypes():
        raise UserError(f"--out must end in .png, .svg or .pdf, got {out}: change its name")
    try:
        save(out, lambda path: figure.savefig(path, dpi=160, format=suffix))
    except OSError as error:
        raise UserError(
            f"--out must be writable, got {out} ({error.strerror}): choose another place"
        ) from error
