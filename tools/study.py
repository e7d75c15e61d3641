"""Train many runs that differ in little, keep their numbers, and say what differed.

    python tools/study.py run STUDY.toml [--jobs 4] [--seconds 500] [--arms "a,b"] [--seeds 1,2]   go on with what is missing
    python tools/study.py status STUDY.toml                                                        what is there
    python tools/study.py report STUDY.toml [MORE.toml ...] --out STUDY.md                         tables and pictures

A study is a TOML file; flags are those of run_train.sh, as "section.key" or as nested tables:

    [study]
    title = "What it asks"
    config = "train_configs/debug.toml"   all runs start from it; relative to the repository
    baseline = "llama bf16"               the arm that others are compared with
    pairs = [["fog fp8", "fog bf16"]]     arms that are compared with another one too
    seeds = [1, 2, 3]                     of each arm
    keep = ["lr", "statistics.amax"]      what of a logged step stays in results/ beside tokens and loss; left out: all

    [flags]                               of all runs
    "training.steps" = 1000

    [arms."llama bf16"]                   what one arm has beside them
    "fp8.recipe" = "bf16"

Beside the TOML file NAME.toml lies the folder NAME: NAME/runs/ARM-SEED is the dump folder of a run (not for git),
NAME/results/ARM-SEED.jsonl.gz are the rows of a run that came to its end, small enough to be kept.

A run is a process on one GPU (or on the CPU, where there is none); --jobs share one, whose times then mean little and are
not compared. After --seconds, or on SIGINT or SIGTERM, no run is started any more and those under way save a checkpoint; the
same command goes on from there. A run that the trainer stopped because it diverged has come to its end too. A run that
cannot start ends the study with its error. One whose checkpoint.initial_load_path lies in another's folder waits for that.
What is there keeps the flags it was made with: others are refused.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import math
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout, installed or not

from titan_fp8.errors import NotFinite, UserError, in_one_line  # noqa: E402
from titan_fp8.files import save  # noqa: E402
from titan_fp8.stability import journal  # noqa: E402

GRACE = 90.0  # seconds that a run has for its checkpoint
FAR = 20.0  # percent: an arm this far from its baseline would leave the others no room in the picture


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    arm: str
    seed: int
    folder: Path
    result: Path
    flags: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def arguments(self) -> list[str]:
        return [f"--{key}={_text(value)}" for key, value in self.flags.items()]

    @property
    def recipe(self) -> dict[str, str]:
        """The flags, but for where the run lies."""
        return {key: _text(value) for key, value in self.flags.items() if key != "job.dump_folder"}

    @property
    def start(self) -> Path | None:
        """The checkpoint that it begins from, if any."""
        path = self.flags.get("checkpoint.initial_load_path")
        return (ROOT / path).resolve() if path else None

    def outcome(self) -> dict[str, Any] | None:
        """How the run, or its last session, ended; None where none has."""
        try:
            if not self.ended():
                return json.loads((self.folder / "outcome.json").read_text())
            with gzip.open(self.result, "rt") as file:
                return json.loads(list(file)[-1])
        except FileNotFoundError:
            return None

    def changed(self) -> str:
        """Flags that are not those the run was made with, or "". Results of before flags were kept have none."""
        then = (self.outcome() or {}).get("flags", self.recipe)
        keys = sorted(key for key in then | self.recipe if then.get(key) != self.recipe.get(key))
        return ", ".join(f"{key} {then.get(key, '-')}, now {self.recipe.get(key, '-')}" for key in keys)

    def ended(self) -> bool:
        return self.result.exists()


@dataclass(frozen=True)
class Study:
    """A study's file."""

    path: Path
    title: str
    text: str
    config: Path
    baseline: str
    pairs: list[list[str]]
    keep: tuple[str, ...]
    runs: list[Run]

    @property
    def folder(self) -> Path:
        return self.path.with_suffix("")

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(run.arm for run in self.runs))


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _text(value: Any) -> str:
    """A TOML value as a flag has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_text, value)) if isinstance(value, list) else str(value)


def load(path: Path) -> Study:
    """Read a study. Raises UserError if it is not one."""
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"a study must be a TOML file, got {path} ({error.strerror}): see studies/ for some"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"a study must be a TOML file, got {path} ({error}): mend it") from error
    for name in content.keys() - {"study", "flags", "arms"}:
        raise UserError(f"{path} must have [study], [flags] and [arms] only, got [{name}]: rename it")
    about, arms = content.get("study", {}), content.get("arms", {})
    known = ("title", "text", "config", "baseline", "pairs", "seeds", "keep")
    for key in about.keys() - set(known):
        raise UserError(f"{path} [study] must have {', '.join(known)} only, got {key}: rename it")
    seeds = about.get("seeds", [1])
    if not arms or not all(isinstance(flags, dict) for flags in arms.values()):
        raise UserError(
            f'{path} must have an arm, got {list(arms) or "none"}: write [arms."a name"] and its flags'
        )
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"{path} seeds must be whole numbers, got {seeds}: write seeds = [1, 2, 3]")
    baseline = about.get("baseline", next(iter(arms)))
    if baseline not in arms:
        raise UserError(
            f"{path} baseline must be one of the arms, got {baseline!r}: choose of {', '.join(arms)}"
        )
    pairs = about.get("pairs", [])
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not set(pair) <= set(arms):
            raise UserError(
                f"{path} pairs must be lists of two arms, got {pair}: choose of {', '.join(arms)}"
            )
    if len({slug(arm) for arm in arms}) < len(arms) or any("," in arm for arm in arms):
        raise UserError(
            f"{path} arms must differ in letters and digits and have no commas, got {list(arms)}: rename some"
        )
    folder, runs = path.with_suffix(""), []
    for seed in seeds:
        for arm, flags in arms.items():
            name = f"{slug(arm)}-{seed}"
            all_flags = flatten(content.get("flags", {})) | flatten(flags)
            all_flags |= {"debug.seed": seed, "job.dump_folder": str(folder / "runs" / name)}
            result = folder / "results" / f"{name}.jsonl.gz"
            runs.append(Run(arm, seed, folder / "runs" / name, result, all_flags))
    config = ROOT / about.get("config", "train_configs/debug.toml")
    title, text, keep = about.get("title", path.stem), about.get("text", ""), tuple(about.get("keep", ()))
    return Study(path, title, text, config, baseline, pairs, keep, runs)


def choose(study: Study, arms: str | None, seeds: str | None) -> list[Run]:
    """The runs of some arms and seeds. Raises UserError for a name that is none."""
    wanted = [name.strip() for name in arms.split(",")] if arms else study.arms
    for name in wanted:
        if name not in study.arms:
            raise UserError(f"--arms must be of {', '.join(study.arms)}, got {name!r}: choose of them")
    known = sorted({run.seed for run in study.runs})
    try:
        numbers = [int(seed) for seed in seeds.split(",")] if seeds else known
    except ValueError:
        raise UserError(f"--seeds must be numbers with commas, got {seeds}: write 1,2") from None
    for seed in numbers:
        if seed not in known:
            raise UserError(f"--seeds must be of {known}, got {seed}: add it to the study")
    return [run for run in study.runs if run.arm in wanted and run.seed in numbers]


def check(study: Study, runs: list[Run]) -> None:
    """Read every arm's configuration as the trainer will. Raises UserError for the first that cannot run or go on."""
    from titan_fp8.config import load_config

    for run in runs:
        if changed := run.changed():
            raise UserError(
                f"a study must keep the flags of what it has, got {changed} in {run.name}: give the arm another name, "
                f"or remove {run.result} and {run.folder}"
            )
    for run in {run.arm: run for run in runs}.values():
        try:
            load_config(["--job.config_file", str(study.config), *run.arguments])
        except UserError as error:
            raise UserError(f"arm {run.arm!r}: {error}") from None


# ---- Runs ----


def startable(run: Run, runs: list[Run]) -> bool:
    """Whether what it goes on from, if that is another of `runs`, has ended."""
    before = run.start.parents if run.start else ()
    return all(other.ended() or other.folder.resolve() not in before for other in runs)


class Scheduler:
    """Starts runs where there is room, and writes down how they ended."""

    def __init__(self, study: Study, jobs: int, seconds: float):
        import torch

        gpus = [str(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [""]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible and gpus != [""] else gpus
        self.device = torch.cuda.get_device_name() if gpus != [""] else platform.machine()
        self.study, self.jobs, self.commit = study, jobs, _commit()
        self.free = [gpu for _ in range(jobs) for gpu in names]
        self.until = time.monotonic() + seconds
        self.active: dict[subprocess.Popen[bytes], tuple[Run, str, float]] = {}
        self.asked_at: float | None = None  # when runs were asked to stop

    def __call__(self, runs: list[Run]) -> int:
        """Run all of them that have not ended. Returns how many have not then."""
        waiting = [run for run in runs if not run.ended()]
        handlers = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.active or (waiting and self.asked_at is None):
                while self.free and self.asked_at is None:
                    if (run := next((run for run in waiting if startable(run, runs)), None)) is None:
                        break
                    waiting.remove(run)
                    self._start(run)
                time.sleep(0.2)
                for process in [process for process in self.active if process.poll() is not None]:
                    self._end(process)
                if self.asked_at is None and time.monotonic() > self.until:
                    self._ask()
                if self.asked_at is not None and time.monotonic() > self.asked_at + GRACE:
                    for process in self.active:
                        process.kill()
        finally:
            for process in self.active:
                process.kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return sum(not run.ended() for run in runs)

    def _ask(self, number: int = 0, frame: FrameType | None = None) -> None:
        self.asked_at = self.asked_at or time.monotonic()
        for run, *_ in self.active.values():
            (run.folder / "stop").touch()

    def _start(self, run: Run) -> None:
        gpu = self.free.pop(0)
        run.folder.mkdir(parents=True, exist_ok=True)
        for name in ("stop", "error"):
            (run.folder / name).unlink(missing_ok=True)
        (run.folder / "error").touch()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "TITAN_FP8_STOP_FILE": str(run.folder / "stop"), "TITAN_FP8_ERROR_FILE": str(run.folder / "error"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }  # fmt: skip
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, "-m", "titan_fp8.train", "--job.config_file", str(self.study.config)]
        with open(run.folder / "console.log", "ab") as log:
            process = subprocess.Popen(
                [*command, *run.arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, cwd=ROOT,
                start_new_session=True,  # ^C is ours to pass on
            )  # fmt: skip
        self.active[process] = (run, gpu, time.monotonic())

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        run, gpu, started = self.active.pop(process)
        self.free.append(gpu)
        seconds = time.monotonic() - started
        error = (run.folder / "error").read_text().strip()
        every = rows_of(run)
        rows = [row for row in every if row["kind"] == "train"]
        step = rows[-1]["step"] if rows else 0
        stopped = (run.folder / "stop").exists() and process.returncode == 0
        had_ended = "holds a finished run" in error  # and whoever should have collected it was killed
        before = (run.outcome() or {}).get("seconds", 0.0)
        outcome = {
            "status": "asked to stop" if stopped else "finished" if process.returncode == 0 or had_ended else "stopped",
            "exit": process.returncode, "step": step, "error": error, "seconds": round(before + seconds, 1),
            "device": self.device, "jobs": self.jobs, "titan_fp8": self.commit, "torch": version("torch"),
            "flags": run.recipe,
        }  # fmt: skip
        if process.returncode and not (process.returncode == NotFinite.status or had_ended):
            if self.asked_at is None:  # not killed by us
                tail = error or f"exit status {process.returncode}, see {run.folder / 'console.log'}"
                self._ask()
                print(f"{run.name}: {tail}", file=sys.stderr, flush=True)
            return
        save(run.folder / "outcome.json", lambda path: path.write_text(json.dumps(outcome, indent=1)))
        if not stopped:
            collect(run, every, self.study.keep, outcome)
        print(f"{run.name}: {outcome['status']} at step {step}, {seconds:.0f} s {error}".rstrip(), flush=True)


def rows_of(run: Run) -> list[dict[str, Any]]:
    """All rows of a run, from its result, or from its folder while it has none."""
    if run.ended():
        with gzip.open(run.result, "rt") as file:
            return [json.loads(line) for line in file]
    path = run.folder / "metrics.jsonl"
    return journal.read(path) if path.exists() else []


def kept(row: dict[str, Any], keep: tuple[str, ...]) -> dict[str, Any]:
    """What `keep` says of a logged step, tokens and loss anyway; floats with 5 digits."""
    found = {key: row[key] for key in ("kind", "step", "tokens", "loss", "nonfinite", *keep) if key in row}
    wanted = {key.partition(".")[2] for key in keep if key.startswith("statistics.")}
    if wanted:
        sites = (row.get("statistics") or {}).items()
        chosen = {site: {k: v for k, v in values.items() if k in wanted} for site, values in sites}
        found["statistics"] = {site: values for site, values in chosen.items() if values}

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(inner) for key, inner in value.items()}
        return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value

    return shorten(found)


def collect(run: Run, rows: list[dict[str, Any]], keep: tuple[str, ...], outcome: dict[str, Any]) -> None:
    """Write the run's result: its `rows`, the logged ones with the keys of `keep` only, and last how it ended."""
    lines = io.BytesIO()
    with gzip.GzipFile(fileobj=lines, mode="wb", compresslevel=9, mtime=0) as file:
        for row in rows:
            if row["kind"] == "train" and keep:
                row = kept(row, keep)
            file.write((json.dumps(row, separators=(",", ":")) + "\n").encode())
        end = {"kind": "outcome", **outcome}
        file.write((json.dumps(end, separators=(",", ":")) + "\n").encode())
    run.result.parent.mkdir(parents=True, exist_ok=True)
    save(run.result, lambda path: path.write_bytes(lines.getvalue()))


def _commit() -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True, stderr=subprocess.DEVNULL
        ).strip()
    return "unknown"


# ---- Report ----


@dataclass
class Arm:
    """What the ended runs of an arm say. Lists have an entry per run; a run that diverged has losses of inf."""

    name: str
    runs: list[Run]
    train: list[list[dict[str, Any]]]
    losses: dict[int, float]
    """seed -> last validation loss, or the mean of the last 50 training rows where there is none."""
    diverged: dict[int, int]
    """seed -> step."""
    early: dict[int, int]
    """seed -> step at which a run ended before its time without having diverged; it has no loss."""
    outcomes: list[dict[str, Any]]
    validated: bool

    @property
    def tokens(self) -> int:
        return max((rows[-1].get("tokens", 0) for rows in self.train if rows), default=0)

    @property
    def speed(self) -> float | None:
        """Tokens per second of the runs that had their GPU alone, the median of each one's later half; None: no run had."""
        alone = [
            rows for rows, outcome in zip(self.train, self.outcomes, strict=True) if outcome["jobs"] == 1
        ]
        speeds = [
            statistics.median(found)
            for rows in alone
            if (
                found := [
                    row["tokens_per_second"] for row in rows[len(rows) // 2 :] if row.get("tokens_per_second")
                ]
            )
        ]
        return statistics.median(speeds) if speeds else None

    @property
    def timed(self) -> float | None:
        """`speed`, but None for an arm that goes on from another's checkpoint: its tokens are not all of its own time."""
        return None if any(run.start for run in self.runs) else self.speed


def read_arm(name: str, runs: list[Run]) -> Arm:
    """Read the results of an arm."""
    import numpy as np
    from backtest import divergence  # what a divergence is, is said there

    arm = Arm(name, [run for run in runs if run.arm == name and run.ended()], [], {}, {}, {}, [], True)
    for run in arm.runs:
        rows = rows_of(run)
        train = [row for row in rows if row["kind"] == "train"]
        losses = np.array([math.nan if row.get("loss") is None else row["loss"] for row in train])
        outcome = rows[-1]
        off = divergence(losses) if len(losses) else None
        if off is not None:
            arm.diverged[run.seed] = train[off]["step"]
        elif outcome["status"] != "finished":
            arm.early[run.seed] = outcome["step"]
        held_out = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
        arm.validated &= bool(held_out)
        last = held_out[-1] if held_out else float(losses[-50:].mean())
        if run.seed not in arm.early:
            arm.losses[run.seed] = math.inf if run.seed in arm.diverged else last
        arm.train.append(train)
        arm.outcomes.append(outcome)
    return arm


def gap(arm: Arm, baseline: Arm) -> tuple[float, float | None] | None:
    """(mean, standard error) in % of the arm's loss over the baseline's, of the seeds that both have; None: none or inf."""
    pairs = [(arm.losses[seed], baseline.losses[seed]) for seed in arm.losses if seed in baseline.losses]
    gaps = [100 * (a / b - 1) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    if not gaps or len(gaps) < len(pairs):
        return None
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    return statistics.mean(gaps), error


def over(arm: Arm, baseline: Arm) -> str:
    """`gap` as the report tells it."""
    found = gap(arm, baseline)
    if found is None:
        return "-"
    mean, error = found
    return f"{mean:+.2f} %" + (f" ± {error:.2f}" if error is not None else "")


def table(arms: list[Arm], baseline: Arm) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| arm | runs | tokens | loss | over the baseline | before the end | tokens/s | GPU hours |"
    yield "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |"
    for arm in arms:
        finite = [loss for loss in arm.losses.values() if math.isfinite(loss)]
        loss = f"{statistics.mean(finite):.4f}" if finite else "-"
        if len(finite) > 1:
            loss += f" ± {statistics.stdev(finite):.4f}"
        ends = [f"seed {seed} diverged at {step}" for seed, step in arm.diverged.items()]
        ends += [f"seed {seed} ended at {step}" for seed, step in arm.early.items()]
        speed = f"{arm.speed:,.0f}" if arm.speed else "-"
        hours = sum(outcome["seconds"] / outcome["jobs"] for outcome in arm.outcomes) / 3600
        cells = (
            arm.name,
            len(arm.runs),
            f"{arm.tokens / 1e6:.1f} M",
            loss,
            "-" if arm is baseline else over(arm, baseline),
            ", ".join(ends) or "-",
            speed,
            f"{hours:.2f}",
        )
        yield "| " + " | ".join(map(str, cells)) + " |"


def at_equal_time(arms: list[Arm], baseline: Arm) -> list[str]:
    """A line of Markdown: training losses at the GPU seconds of a run of the baseline; none if it was not timed alone."""
    if not baseline.timed:
        return []
    seconds, told = baseline.tokens / baseline.timed, []
    for arm in arms:
        if not arm.timed or arm.diverged:
            continue
        here = seconds * arm.timed
        losses = []
        for rows in arm.train:
            found = zip(*curve(rows, 20), strict=True)
            losses.append(([loss for millions, loss in found if 1e6 * millions <= here] or [math.nan])[-1])
        told.append(f"{arm.name} {statistics.fmean(losses):.3f} ({min(here, arm.tokens) / 1e6:.1f} M tokens)")
    return [
        f"Training loss, smoothed, after the {seconds:.0f} GPU seconds of {baseline.name}: {', '.join(told)}."
    ]


def downstream(study: Study) -> list[str]:
    """Lines of Markdown: what tools/downstream/evaluate.py found of the study's runs; empty where it has found nothing."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in study.runs:
        path = study.folder / "downstream" / f"{run.name}.json"
        if path.exists():
            found.setdefault(run.arm, []).append(json.loads(path.read_text()))
    if not found:
        return []

    def mean(rows: list[dict[str, Any]], part: str, key: str) -> float:
        return statistics.fmean(row[part][key] for row in rows)

    lines = [
        "",
        "Downstream (lm-eval; models exported in 16 bits; bits per byte: the mean over domains; cloze: the last word of a "
        "passage, which stood in it before, ± the standard error that its number of passages leaves):",
        "",
        "| arm | runs | bits per byte | cloze accuracy | cloze perplexity |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for arm, rows in found.items():
        cells = [arm, str(len(rows)), f"{mean(rows, 'bits_per_byte', 'mean'):.4f}", "-", "-"]
        if all("cloze" in row for row in rows):
            accuracy, error = (100 * mean(rows, "cloze", key) for key in ("acc", "acc_stderr"))
            cells[3:] = [f"{accuracy:.1f} % ± {error:.1f}", f"{mean(rows, 'cloze', 'perplexity'):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    names = [name for name in next(iter(found.values()))[0]["bits_per_byte"] if name != "mean"]
    lines += ["", f"| bits per byte | {' | '.join(found)} |", f"| --- |{' ---: |' * len(found)}"]
    for name in sorted(names):
        cells = [f"{mean(rows, 'bits_per_byte', name):.3f}" for rows in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def smooth(values: list[float], width: int) -> list[float]:
    """Running mean over the last `width` values; what is not finite counts as missing."""
    found = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - width + 1) : i + 1] if math.isfinite(v)]
        found.append(statistics.fmean(window) if window else math.nan)
    return found


def curve(rows: list[dict[str, Any]], pieces: int = 50) -> tuple[list[float], list[float]]:
    """(millions of tokens, losses smoothed over that part of the run) of logged rows."""
    losses = [math.nan if row.get("loss") is None else row["loss"] for row in rows]
    return [row["tokens"] / 1e6 for row in rows], smooth(losses, max(1, len(rows) // pieces))


def draw(study: Study, arms: list[Arm], baseline: Arm, out: Path) -> None:
    """Loss over tokens; the difference to the baseline; kurtosis over tokens by site, the largest of all layers."""
    from plot_parts import STYLE, log_scale, pyplot, save_figure

    plt = pyplot()

    sites = ("residual", "qkv_in", "q", "k", "v", "attention_out", "ffn_up", "ffn_act", "ffn_out")
    with_sites = [
        arm for arm in arms if any(row.get("statistics") for rows in arm.train for row in rows[-1:])
    ]
    colors = plt.get_cmap("tab20").colors  # type: ignore
    with plt.rc_context(STYLE):
        rows_of_panels = 1 + (math.ceil(len(sites) / 3) if with_sites else 0)
        figure = plt.figure(figsize=(11, 4.2 + 2.1 * (rows_of_panels - 1)), layout="constrained")
        grid = figure.add_gridspec(rows_of_panels, 6, height_ratios=[2.0, *[1.0] * (rows_of_panels - 1)])
        speeds = [arm.timed for arm in arms]
        width = 2 if any(speeds) else 3
        left, right = figure.add_subplot(grid[0, :width]), figure.add_subplot(grid[0, width : 2 * width])
        ends, late = [], [-1.0, 1.0]
        for i, arm in enumerate(arms):
            for j, rows in enumerate(arm.train):
                x, y = curve(rows)
                left.plot(x, y, color=colors[i % 20], linewidth=0.9, label=arm.name if j == 0 else None)
                ends += [loss for loss in y[-1:] if math.isfinite(loss)]
            by_seed = dict(zip([run.seed for run in arm.runs], arm.train, strict=True))
            base = dict(zip([run.seed for run in baseline.runs], baseline.train, strict=True))
            for j, seed in enumerate(seed for seed in by_seed if seed in base and arm is not baseline):
                rows = by_seed[seed]
                since = [row for row in base[seed] if rows and row["tokens"] >= rows[0]["tokens"]]
                (x, a), (_, b) = curve(rows), curve(since)
                label = arm.name if j == 0 else None
                gaps = [100 * (u / v - 1) for u, v in zip(a, b, strict=False)]
                right.plot(x[: len(gaps)], gaps, color=colors[i % 20], linewidth=0.9, label=label)
                late += [gap for gap in gaps[len(gaps) // 2 :] if abs(gap) <= FAR]
        if ends:
            left.set_ylim(min(ends) * 0.97, max(ends) * 1.35)
        left.set(title="Training loss, smoothed", xlabel="Tokens (millions)")
        right.set(title=f"Loss over {baseline.name} (%)", xlabel="Tokens (millions)")
        right.set_ylim(min(late) * 1.1, max(late) * 1.1)  # what the second half of the runs needs
        right.axhline(0.0, color="#333333", linewidth=0.8)
        if any(speeds):
            axis = figure.add_subplot(grid[0, 4:], sharey=left)
            for i, (arm, speed) in enumerate(zip(arms, speeds, strict=True)):
                for rows in arm.train if speed else ():
                    x, y = curve(rows)
                    axis.plot([1e6 * tokens / speed for tokens in x], y, color=colors[i % 20], linewidth=0.9)
            axis.set(
                title="The same, of arms timed alone on a GPU", xlabel="GPU seconds, by the tokens per second"
            )
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
        for k, site in enumerate(sites if with_sites else ()):
            axis = figure.add_subplot(grid[1 + k // 3, 2 * (k % 3) : 2 * (k % 3) + 2])
            for i, arm in enumerate(arms):
                for rows in arm.train[:1]:
                    points = [
                        (row["tokens"] / 1e6, max(found))
                        for row in rows
                        if (found := [
                            values["kurtosis"] for name, values in (row.get("statistics") or {}).items()
                            if name.rpartition(".")[2] == site and "kurtosis" in values
                        ])
                    ]  # fmt: skip
                    if points:
                        axis.plot(*zip(*points, strict=True), color=colors[i % 20], linewidth=0.9)
            axis.set(title=f"Kurtosis, {site}: largest layer")
            log_scale(axis)
        save_figure(figure, out)
        plt.close(figure)


def report(studies: list[Study], out: Path | None) -> str:
    """The Markdown of STUDY.md. With `out`, pictures are written beside the studies.

    Raises UserError where no run has ended.
    """
    paths = " ".join(os.path.relpath(study.path, ROOT) for study in studies)
    lines = [
        "# Studies",
        "",
        f"Written by `python tools/study.py report {paths} --out STUDY.md`; "
        "the rows behind it are in each study's folder `results/`.",
        "",
        "Loss: the last on held-out text, mean ± standard deviation over seeds (or, where a study has no validation, of the "
        "last 50 logged steps). Over the baseline: mean ± standard error of the same seeds' differences. Diverged: as "
        "tools/backtest.py defines it; ended: stopped for another reason. Neither counts in a loss. Tokens/s only of runs "
        "that had a GPU alone.",
    ]
    if not any(run.ended() for study in studies for run in study.runs):
        path = studies[0].path
        raise UserError(f"{path} must have an ended run, got none: python tools/study.py run {path}")
    for study in studies:
        if not any(run.ended() for run in study.runs):
            lines += ["", f"## {study.title}", "", "No run has ended yet."]
            continue
        arms = [arm for name in study.arms if (arm := read_arm(name, study.runs)).runs]
        baseline = next((arm for arm in arms if arm.name == study.baseline), arms[0])
        picture = study.folder / "curves.png"
        if out:
            draw(study, arms, baseline, picture)
        outcomes = [outcome for arm in arms for outcome in arm.outcomes]
        told = {
            key: sorted({str(outcome[key]) for outcome in outcomes})
            for key in ("device", "torch", "titan_fp8")
        }
        ended = sum(run.ended() for run in study.runs)
        lines += (
            ["", f"## {study.title}", "", study.text.strip(), ""]
            if study.text
            else ["", f"## {study.title}", ""]
        )
        lines += [
            *table(arms, baseline),
            "",
            f"Baseline: {baseline.name}. {ended} of {len(study.runs)} runs have ended.",
        ]
        by_name = {arm.name: arm for arm in arms}
        for name, other in study.pairs:
            if name in by_name and other in by_name:
                lines += [f"{name} over {other}: {over(by_name[name], by_name[other])}."]
        lines += at_equal_time(arms, baseline)
        if not all(arm.validated for arm in arms):
            lines += ["No validation: losses are of training."]
        lines += [
            f"{run.name} had other flags: {changed}." for run in study.runs if (changed := run.changed())
        ]
        lines += downstream(study)
        if out:
            lines += ["", f"![curves]({os.path.relpath(picture, out.parent)})"]
        lines += [
            "", f"`python tools/study.py run {os.path.relpath(study.path, ROOT)}`, on {', '.join(told['device'])}, torch "
            f"{', '.join(told['torch'])}, commits {', '.join(told['titan_fp8'])}.",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def status(study: Study) -> str:
    """A line per run."""
    lines = []
    for run in study.runs:
        rows = [row for row in rows_of(run) if row["kind"] in ("train", "outcome")]
        state = rows[-1]["status"] if run.ended() else "under way or stopped" if rows else "-"
        step = rows[-1]["step"] if rows else 0
        lines.append(f"{run.name:<40} {state:<22} step {step}")
    return "\n".join(lines)


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 if runs are missing; 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "status", "report"))
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY.toml")
    parser.add_argument("--jobs", type=int, default=1, help="runs that share a GPU; default 1")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop, and save, after so long")
    parser.add_argument("--arms", help="names with commas; default all")
    parser.add_argument("--seeds", help="numbers with commas; default all")
    parser.add_argument("--out", type=Path, help="for report: the Markdown file; without it no pictures")
    options = parser.parse_args(arguments)
    try:
        studies = [load(path.resolve()) for path in options.studies]
        if options.command != "report" and len(studies) > 1:
            raise UserError(f"{options.command} takes one study, got {len(studies)}: name one")
        if options.jobs < 1:
            raise UserError(f"--jobs must be at least 1, got {options.jobs}: leave it out")
        if options.command == "status":
            print(status(studies[0]))
        elif options.command == "report":
            text = report(studies, options.out and options.out.resolve())
            if options.out:
                save(options.out, lambda path: path.write_text(text))
            else:
                print(text)
        else:
            runs = choose(studies[0], options.arms, options.seeds)
            check(studies[0], runs)
            missing = Scheduler(studies[0], options.jobs, options.seconds)(runs)
            if missing:
                print(f"{missing} of {len(runs)} runs have not ended: the same command goes on with them")
            return 1 if missing else 0
    except BrokenPipeError:  # status | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
