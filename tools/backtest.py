"""Replay recorded runs through the predictor: was each divergence foretold, how early, and what did it cost in false alarms?

    python tools/backtest.py RUN [MORE...] [--tune] [--half first|second] [--healthy 'calm-*'] [--every 10]
                             [--out backtest.json] [--picture backtest.png]

RUN is a run folder, or a recording *.jsonl or *.jsonl.gz as titan_fp8.stability.journal writes it.

Divergence, from the loss alone and knowing the whole run (the predictor knows neither):
    m_t = median of the last 11 losses; baseline b_t = min of m up to t
    noise = 1.4826 median |loss_i - (loss_i-1 + loss_i+1) / 2| / sqrt(1.5), over the rows up to the best m (a trend cancels)
    loss_t is off the baseline where loss_t > b_t + max(10 % of b_t, 6 noise); a loss that is not finite is
    The run diverged if m is off for 10 rows in a row, or the recording ends off with a loss that is not finite. The step is
    the first one off among the 11 before m was. A spike that comes back sooner is none.
Alarm: risk >= threshold for 3 rows in a row, or >= 0.95 in one (a value that was not finite).
    An alarm counts as the warning of a divergence if it is on in at least half of the rows from there to the divergence;
    its lead is the steps between. Alarms before that, and all in runs that did not diverge, are false.
Healthy: a run that did not diverge and whose name matches --healthy (default: any). One that did not diverge and does not
    match (an experiment that was meant to break) is undecided: listed, and neither a divergence nor healthy. The summary's
    "strict" figure takes all that did not diverge for healthy.
ROC: for each threshold, the share of divergences warned of (a lead of 0 counts; it is listed apart), and the share of
    healthy runs with a false alarm.
Halves: the first is the runs whose name has an even SHA-256. --tune: the threshold is chosen on it, the report is about the
    second. --half: the report is about that half, at --threshold.
--every N: the predictor gets only what `metrics.log_freq = N` would have logged. Divergences are judged on all rows.
"""

from __future__ import annotations

import argparse
import fnmatch
import gzip
import hashlib
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from titan_fp8.errors import UserError, in_one_line
from titan_fp8.files import save
from titan_fp8.stability.predictor import Prediction, Predictor, parameters_of, series_of

WINDOW = 11  # rows of the median; odd
RISE = 0.1  # of the baseline: harder data moves a loss by less, a divergence by far more
NOISE = 6.0
HOLD = 10  # rows
AT_ONCE = 0.95
THRESHOLDS = np.round(np.arange(0.02, 0.99, 0.02), 2)
TARGETS = {"warned_share": 0.9, "median_lead_percent": 10.0, "false_alarms_per_healthy_run": 0.1}  # issue 5

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass
class Replay:
    """One recording with what the predictor said of each row. Arrays [rows]; `off` is the row of the divergence.

    Neither diverged nor `healthy`: undecided.
    """

    name: str
    steps: NDArray[np.int64]
    losses: Floats
    predictions: list[Prediction]
    off: int | None
    healthy: bool

    @property
    def risks(self) -> Floats:
        return np.array([prediction.risk for prediction in self.predictions])


@dataclass
class Verdict:
    """One run at one threshold. Steps of the run; leads in steps and in percent of the steps before the divergence."""

    name: str
    rows: int
    steps: int
    diverged_at: int | None
    alarm_at: int | None
    lead_steps: int | None
    lead_percent: float | None
    cause: str | None
    steps_to_saturation: tuple[float, ...] | None
    """At the alarm: 10, 50, 90 %; None if never."""
    false_alarms: int
    false_alarms_per_1000_steps: float
    max_risk: float
    """Up to the divergence."""
    healthy: bool


def read(path: Path) -> list[dict[str, Any]]:
    """The "run" and "train" rows of a recording, in order. A torn end is left out, as a killed run leaves it."""
    if path.is_dir():
        plain = path / "metrics.jsonl"
        path = plain if plain.exists() else path / "metrics.jsonl.gz"
    rows = []
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            try:
                for line in file:
                    try:
                        row = json.loads(line)
                    except ValueError:
                        continue
                    if (
                        isinstance(row, dict)
                        and row.get("kind") in ("run", "train")
                        and isinstance(row.get("step"), int)
                    ):
                        rows.append(row)
            except EOFError:
                pass
    except OSError as error:
        raise UserError(
            f"a run must be a folder with metrics.jsonl or a *.jsonl or *.jsonl.gz file, got {path} "
            f"({error.strerror or error}): name the [job] dump_folder of a run"
        ) from error
    if not any(row["kind"] == "train" for row in rows):
        raise UserError(f"a recording must hold a logged step, and {path} has none: let the run train first")
    return rows


def divergence(losses: Floats) -> int | None:
    """The row [0, rows) at which the loss left its baseline for good, as the top of this file says, or None."""
    losses = np.where(np.isfinite(losses), losses, np.inf)
    medians = np.array([np.median(losses[: i + 1]) for i in range(min(WINDOW - 1, len(losses)))])
    if len(losses) >= WINDOW:
        windows = np.lib.stride_tricks.sliding_window_view(losses, WINDOW)
        medians = np.concatenate([medians, np.median(windows, axis=1)])
    baseline = np.minimum.accumulate(medians)
    best = max(int(medians.argmin()) + 1, min(WINDOW, len(losses)))
    bends = np.diff(losses[:best][np.isfinite(losses[:best])], 2) / 2
    noise = 1.4826 * float(np.median(np.abs(bends))) / math.sqrt(1.5) if len(bends) else 0.0
    bound = baseline + np.maximum(RISE * np.abs(baseline), NOISE * noise)
    off = (losses > bound) | np.isinf(losses)
    held = 0
    for i, high in enumerate(medians > bound):
        held = held + 1 if high else 0
        if held == HOLD:
            first = i - HOLD + 1
            start = max(first - WINDOW + 1, 0)
            return start + int(off[start : first + 1].argmax())
    if not math.isfinite(losses[-1]):
        inside = np.flatnonzero(~off)
        return int(inside[-1]) + 1 if len(inside) else 0
    return None


def replay(name: str, rows: list[dict[str, Any]], healthy: str = "*", every: int = 1) -> Replay:
    """Stream a recording through a fresh predictor, or of its rows those with `metrics.log_freq = every`.

    `healthy`: names of runs that are, unless they diverge.
    """
    starts = [row for row in rows if row.get("kind") == "run"]
    predictor = Predictor(parameters_of(starts[0] if starts else {}))
    predictions, steps, losses, told = [], [], [], []
    for row in rows:
        if row.get("kind") == "run":
            continue
        values = series_of(row)
        if "loss" in values:
            told.append((row["step"], values["loss"]))
        if row["step"] == 1 or row["step"] % every == 0:
            predictions.append(predictor.update(row["step"], values))
            steps.append(row["step"])
            losses.append(values.get("loss", math.nan))
    if not steps:
        raise UserError(f"--every must leave a row of each run, got {every} for {name}: choose a smaller one")
    off = divergence(np.array([loss for _, loss in told])) if told else None
    if off is not None:  # the last row that is there before it
        off = max(int(np.searchsorted(steps, told[off][0], "right")) - 1, 0)
    matches = fnmatch.fnmatchcase(name, healthy)
    return Replay(name, np.array(steps), np.array(losses), predictions, off, off is None and matches)


def alarms(risks: Floats, threshold: float, rows: int) -> Mask:
    """[rows] bool: the alarm is on."""
    high = risks >= threshold
    held = high.copy()
    for back in range(1, rows):
        held[back:] &= high[:-back]
        held[:back] = False
    return held | (risks >= max(AT_ONCE, threshold))


def judge(run: Replay, threshold: float, rows: int) -> Verdict:
    """What the alarms of a run were worth."""
    last = len(run.steps) if run.off is None else run.off + 1
    on = alarms(run.risks, threshold, rows)[:last]
    starts = np.flatnonzero(on & ~np.concatenate([[False], on[:-1]]))
    warning = None
    if run.off is not None:
        warning = next((int(s) for s in starts if on[s:].mean() >= 0.5), None)
    false = int((starts < (last if warning is None else warning)).sum())
    healthy_steps = int(run.steps[last - 1 if warning is None else warning] - run.steps[0]) + 1
    diverged_at = None if run.off is None else int(run.steps[run.off])
    alarm_at = lead = percent = cause = steps = None
    if warning is not None and diverged_at is not None:
        alarm_at = int(run.steps[warning])
        lead = diverged_at - alarm_at
        percent = 100 * lead / max(diverged_at - int(run.steps[0]), 1)
        said = run.predictions[warning]
        cause = f"{said.cause.series} ({said.cause.kind})" if said.cause else None
        if said.steps_to_saturation and math.isfinite(said.steps_to_saturation[1]):
            steps = said.steps_to_saturation
    return Verdict(
        run.name, len(run.steps), int(run.steps[last - 1] - run.steps[0]) + 1, diverged_at, alarm_at, lead, percent,
        cause, steps, false, 1000 * false / healthy_steps, float(run.risks[:last].max()), run.healthy,
    )  # fmt: skip


def summarise(verdicts: list[Verdict]) -> dict[str, Any]:
    """The figures of issue 5 over some runs. A divergence without warning has a lead of 0. None: no such run."""
    bad = [v for v in verdicts if v.diverged_at is not None]
    undecided = [v for v in verdicts if v.diverged_at is None and not v.healthy]
    healthy = [v for v in verdicts if v.healthy]
    calm = healthy + undecided
    steps, false = sum(v.steps for v in healthy), sum(v.false_alarms for v in healthy)
    return {
        "divergences": len(bad),
        "warned_share": sum(v.alarm_at is not None for v in bad) / len(bad) if bad else None,
        "warned_before_share": sum((v.lead_steps or 0) > 0 for v in bad) / len(bad) if bad else None,
        "median_lead_steps": statistics.median(v.lead_steps or 0 for v in bad) if bad else None,
        "median_lead_percent": statistics.median(v.lead_percent or 0 for v in bad) if bad else None,
        "healthy_runs": len(healthy),
        "healthy_runs_with_false_alarm": sum(v.false_alarms > 0 for v in healthy),
        "false_alarms_per_healthy_run": false / len(healthy) if healthy else None,
        "false_alarms_per_healthy_run_strict": sum(v.false_alarms for v in calm) / len(calm)
        if calm
        else None,
        "false_alarms_per_1000_healthy_steps": 1000 * false / steps if steps else None,
        "false_alarms_before_divergences": sum(v.false_alarms for v in bad),
        "undecided_runs": len(undecided),
        "undecided_runs_alarmed": sum(v.false_alarms > 0 for v in undecided),
    }


def roc(runs: list[Replay], rows: int) -> list[dict[str, float]]:
    """Per threshold: the share of divergences warned of and of healthy runs with a false alarm. NaN: no such run."""
    points = []
    for threshold in THRESHOLDS.tolist():
        verdicts = [judge(run, threshold, rows) for run in runs]
        warned = [v.alarm_at is not None for v in verdicts if v.diverged_at is not None]
        false = [v.false_alarms > 0 for v in verdicts if v.healthy]
        points.append(
            {
                "threshold": threshold,
                "warned": float(np.mean(warned)) if warned else math.nan,
                "false": float(np.mean(false)) if false else math.nan,
            }
        )
    return points


def area(points: list[dict[str, float]]) -> float:
    """Area under the ROC: 1 parts all runs, 0.5 is chance, NaN: one sort of run is missing."""
    if any(math.isnan(p["false"] + p["warned"]) for p in points):
        return math.nan
    ends = [(0.0, 0.0), *((p["false"], p["warned"]) for p in points), (1.0, 1.0)]
    ordered = np.array(sorted(ends))
    return float(np.trapezoid(ordered[:, 1], ordered[:, 0]))


def first_half(name: str) -> bool:
    """Whether a run is one to tune on: by its name alone, so that nobody chooses."""
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0


def tune(runs: list[Replay], rows: int) -> float:
    """The threshold with the most divergences warned of less healthy runs alarmed; of several the one in the middle."""
    points = roc(runs, rows)
    scores = [p["warned"] - p["false"] for p in points]
    if any(math.isnan(score) for score in scores):
        raise UserError(
            f"--tune needs a divergence and a healthy run in its half, and {len(runs)} runs "
            f"({', '.join(run.name for run in runs) or 'none'}) have not both: add runs or give --threshold"
        )
    best = [p["threshold"] for p, score in zip(points, scores, strict=True) if score == max(scores)]
    return best[len(best) // 2]


def table(verdicts: list[Verdict]) -> str:
    """Plain text, a line per run: divergences, then healthy runs, then undecided ones ("?")."""
    lines = [
        f"{'run':<32} {'steps':>7} {'diverged':>8} {'alarm':>7} {'lead':>6} {'lead %':>6} {'false':>5} {'risk':>5}  cause"
    ]
    for v in sorted(verdicts, key=lambda v: (v.diverged_at is None, not v.healthy, v.name)):
        percent = "-" if v.lead_percent is None else f"{v.lead_percent:.1f}"
        cells = ["-" if x is None else str(x) for x in (v.diverged_at, v.alarm_at, v.lead_steps)]
        if v.diverged_at is None and not v.healthy:
            cells[0] = "?"
        lines.append(
            f"{v.name:<32} {v.steps:>7} {cells[0]:>8} {cells[1]:>7} {cells[2]:>6} {percent:>6} "
            f"{v.false_alarms:>5} {v.max_risk:>5.2f}  {v.cause or ''}".rstrip()
        )
    return "\n".join(lines)


def draw(runs: list[Replay], report: dict[str, Any], out: Path) -> None:
    """ROC, the leads, and the divergence with the median lead. Raises UserError if `out` cannot be written."""
    from plot_parts import COLORS, STYLE, pyplot, reference, save_figure

    plt = pyplot()
    from matplotlib.ticker import MaxNLocator

    blue, orange, green = COLORS[:3]
    bad = sorted(
        (v for v in report["runs"] if v["diverged_at"] is not None), key=lambda v: -(v["lead_percent"] or 0)
    )
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(9, 6.4), layout="constrained")
        grid = figure.add_gridspec(3, 2, height_ratios=[1.5, 1, 0.8])
        left, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])

        left.set(
            title="Thresholds",
            xlabel="Healthy runs with a false alarm (%)",
            ylabel="Divergences warned of (%)",
        )
        points = report["roc"]
        left.plot(
            [100 * p["false"] for p in points],
            [100 * p["warned"] for p in points],
            "o-",
            color=blue,
            markersize=3,
        )
        chosen = min(points, key=lambda p: abs(p["threshold"] - report["threshold"]))
        left.plot(100 * chosen["false"], 100 * chosen["warned"], "o", color=orange, markersize=8)
        left.annotate(
            f"threshold {report['threshold']:g}", (100 * chosen["false"], 100 * chosen["warned"]),
            xytext=(10, -12), textcoords="offset points", color=orange,
        )  # fmt: skip
        left.set(xlim=(-3, 103), ylim=(-3, 105))

        right.set(title="Lead of the warning, one bar per divergence", ylabel="% of the steps before")
        right.bar(range(len(bad)), [v["lead_percent"] or 0 for v in bad], color=blue, width=0.8)
        right.set_axisbelow(True)
        right.grid(axis="x", visible=False)
        reference(right, TARGETS["median_lead_percent"], "target for the median")
        right.set(
            xticks=[], xlim=(-0.7, 1.4 * len(bad) + 0.7), ylim=(0, None)
        )  # the reference's name needs room

        upper = figure.add_subplot(grid[1, :])
        lower = figure.add_subplot(grid[2, :], sharex=upper)
        shown = bad[len(bad) // 2] if bad else report["runs"][0]
        run = next(run for run in runs if run.name == shown["name"])
        upper.plot(run.steps, np.where(np.isfinite(run.losses), run.losses, np.nan), color=blue, linewidth=1)
        upper.set(title=f"{run.name}: loss (nats per token)")
        lower.plot(run.steps, run.risks, color=green, linewidth=1)
        reference(lower, report["threshold"])
        because = f"; at the alarm because of {shown['cause']}" if shown["cause"] else ""
        lower.set(title=f"Risk{because}", ylim=(-0.03, 1.05), xlabel="Step")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in (upper, lower):
            for step, color, text in (
                (shown["alarm_at"], orange, "alarm"),
                (shown["diverged_at"], "#000000", "diverged"),
            ):
                if step is not None:
                    axis.axvline(step, color=color, linewidth=1.2)
                    if axis is upper:
                        axis.annotate(
                            text, (step, 1), xycoords=axis.get_xaxis_transform(), xytext=(-4, -9),
                            textcoords="offset points", color=color, fontsize=8, ha="right",
                        )  # fmt: skip
        save_figure(figure, out)
        plt.close(figure)


def _name(path: Path) -> str:
    return path.resolve().name.removesuffix(".gz").removesuffix(".jsonl")


def _finite(value: Any) -> Any:
    """For JSON, which knows no inf and NaN: null."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(description="Replay recorded runs through the divergence predictor.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, *.jsonl or *.jsonl.gz")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="risk at which the alarm is on (default: 0.5)"
    )
    parser.add_argument("--rows", type=int, default=3, help="rows in a row that it takes (default: 3)")
    parser.add_argument(
        "--tune", action="store_true", help="choose the threshold on one half, report on the other"
    )
    parser.add_argument("--half", choices=("first", "second"), help="report on that half only")
    parser.add_argument(
        "--healthy", default="*", metavar="GLOB", help="names of runs that are healthy unless they diverge"
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="rows as metrics.log_freq = N leaves them"
    )
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--picture", type=Path, help="picture to write (png, svg, pdf)")
    options = parser.parse_args(arguments)
    if not 0 < options.threshold <= 1:
        raise UserError(
            f"--threshold must be above 0 and at most 1, got {options.threshold:g}: 0.5 is the default"
        )
    if options.rows < 1:
        raise UserError(f"--rows must be at least 1, got {options.rows}: 3 is the default")
    if options.every < 1:
        raise UserError(f"--every must be at least 1, got {options.every}: 1 is every step")
    names = [_name(path) for path in options.runs]
    names = names if len(set(names)) == len(names) else [str(path) for path in options.runs]
    if options.tune and options.half:
        raise UserError("--half cannot go with --tune, which reports on the second half: leave out one")
    pairs = [
        (name, path)
        for name, path in zip(names, options.runs, strict=True)
        if options.half is None or first_half(name) == (options.half == "first")
    ]
    if not pairs:
        raise UserError(f"--half {options.half} needs runs in that half, got none there: add runs")
    runs = [replay(name, read(path), options.healthy, options.every) for name, path in pairs]
    threshold, tuned_on = options.threshold, []
    if options.tune:
        tuned_on = [run for run in runs if first_half(run.name)]
        threshold = tune(tuned_on, options.rows)
        runs = [run for run in runs if not first_half(run.name)]
        if not runs:
            raise UserError("--tune needs runs in the other half too, got none there: add runs")
    verdicts = [judge(run, threshold, options.rows) for run in runs]
    points = roc(runs, options.rows)
    report = {
        "threshold": threshold,
        "rows": options.rows,
        "every": options.every,
        "tuned_on": [run.name for run in tuned_on],
        "half": "second" if options.tune else options.half,
        "healthy": options.healthy,
        "summary": summarise(verdicts),
        "targets": TARGETS,
        "roc_area": area(points),
        "roc": points,
        "runs": [asdict(verdict) for verdict in verdicts],
    }
    print(table(verdicts))
    print(f"threshold {threshold:g}" + (f", chosen on {len(tuned_on)} other runs" if tuned_on else ""))
    for key, value in report["summary"].items():
        target = f"  (target {TARGETS[key]:g})" if key in TARGETS else ""
        print(f"{key}: {'-' if value is None else format(value, '.4g')}{target}")
    if options.out:
        try:
            text = json.dumps(_finite(report), indent=1, allow_nan=False) + "\n"
            save(options.out, lambda path: path.write_text(text))
        except OSError as error:
            raise UserError(
                f"--out must be writable, got {options.out} ({error.strerror}): choose another place"
            ) from error
    if options.picture:
        draw(runs, report, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
