"""What a person sees of a run: a line per logged step, a bar on a terminal, and the results at the end.

Fed with the rows of metrics.jsonl and nothing else, so that a resumed run can be told from its first step on.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import sys
import time
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger()

Row = dict[str, Any]
GIB = 1024**3
RISK_SHOWN = 0.3  # of divergence: below it, a row says nothing about it


class NoColor:
    """Terminal colour codes for where there are none; torchtitan's Color and NoColor have the same names."""

    red = green = orange = turquoise = blue = cyan = magenta = reset = ""


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45s, 1m20s, 3h07m, 2d04h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def number(value: float | None) -> float:
    """A value of a row as a float: metrics.jsonl writes one that is not finite as null."""
    return math.nan if value is None else value


class Console:
    """Tells a run on rank 0.

    Args:
        run: the "run" row: total_steps, ranks, device_memory_bytes, unigram_entropy (nats per token or None).
        kept: rows of the same run from before a resume.
        color: terminal codes, as torchtitan's Color.
    """

    def __init__(self, run: Row, kept: list[Row], color: Any = NoColor):
        self._run, self._color = run, color
        self._total: int = run["total_steps"]
        train = [row for row in kept if row["kind"] == "train"]
        self._first_row: Row | None = train[0] if train else None
        self._last_row: Row | None = train[-1] if train else None
        self._validation = [row for row in kept if row["kind"] == "validation"]
        self._throughputs: list[float] = []
        self._start_time = time.perf_counter()
        # The first window holds compilation and warm-up and says nothing about the rest: time from its end.
        self._timed_from: tuple[int, float] | None = None

        self._stack = contextlib.ExitStack()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            # Log lines go through tqdm.write, which lifts the bar out of their way.
            self._stack.enter_context(logging_redirect_tqdm())
            self._bar = self._stack.enter_context(
                tqdm(total=self._total, initial=run["step"], unit="step", dynamic_ncols=True, file=sys.stderr)
            )

    def train(self, row: Row) -> None:
        """Log the line of a "train" row and move the bar."""
        now = time.perf_counter()
        if self._timed_from is None:
            eta = "?"
            self._timed_from = row["step"], now
        else:
            step, then = self._timed_from
            # Wall time, so that validations and checkpoints are in it.
            eta = duration((now - then) / (row["step"] - step) * (self._total - row["step"]))
            self._throughputs.append(row["tokens_per_second"])
        self._first_row = self._first_row or row
        self._last_row = row
        logger.info(self._line(row, eta))
        if self._bar is not None:
            postfix = f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tok/s"
            self._bar.set_postfix_str(postfix, refresh=False)
            self._bar.update(row["step"] - self._bar.n)

    def roll_back(self, step: int) -> None:
        """The run goes on from `step`, with what was shown of later steps undone."""
        self._timed_from = None
        self._validation = [row for row in self._validation if row["step"] <= step]
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def _line(self, row: Row, eta: str) -> str:
        """torchtitan's fields in its order (tps, tflops per device), then the time left and FP8 clamping."""
        c, ranks = self._color, self._run["ranks"]
        memory = "n/a"
        if row["memory_reserved_bytes"] is not None:
            share = row["memory_reserved_bytes"] / self._run["device_memory_bytes"]
            memory = f"{row['memory_reserved_bytes'] / GIB:5.2f}GiB({100 * share:.2f}%)"
        everywhere = f" ({row['tokens_per_second']:,.0f} on {ranks})" if ranks > 1 else ""
        mfu = f"{100 * row['mfu']:.2f}%" if row["mfu"] is not None else "n/a"
        line = (
            f"{c.red}step: {row['step']:2}/{self._total}  "
            f"{c.green}loss: {row['loss']:8.5f}  "
            f"{c.orange}grad_norm: {row['grad_norm']:7.4f}  "
            f"{c.turquoise}memory: {memory}  "
            f"{c.blue}tps: {round(row['tokens_per_second'] / ranks):,}{everywhere}  "
            f"{c.cyan}tflops: {row['tflops']:,.2f}  "
            f"{c.magenta}mfu: {mfu}  "
            f"{c.reset}eta: {eta}"
        )
        if row.get("risk", 0) >= RISK_SHOWN:
            line += f"  {c.red}risk: {row['risk']:.2f} ({row['cause']}){c.reset}"
        fp8 = row.get("fp8")
        if fp8 and fp8["saturated_tensors"]:
            line += (
                f"  fp8: {fp8['saturated_tensors']} clamped ({fp8['worst']}: {fp8['max_saturation']:.2f}x)"
            )
        return line

    def validation(self, row: Row) -> None:
        """Remember a "validation" row for the results; torchtitan prints its line."""
        self._validation.append(row)

    def results(self) -> list[str]:
        """Plain lines for the end of the run: losses, bits per byte, speed and time."""
        lines = []
        if self._first_row and self._last_row:
            lines.append(
                f"Loss: {number(self._first_row['loss']):.3f} at step {self._first_row['step']}, "
                f"{number(self._last_row['loss']):.3f} at step {self._last_row['step']} (nats per token)"
            )
        # A held-out loss that is not finite is never the best.
        finite = [row for row in self._validation if math.isfinite(number(row["validation_loss"]))]
        best = min(finite, key=lambda row: row["validation_loss"], default=None)
        if self._validation:
            newest = self._validation[-1]
            line = f"Held-out loss: {number(newest['validation_loss']):.3f} at step {newest['step']}"
            if best is not None and best is not newest:
                line += f"; best {best['validation_loss']:.3f} at step {best['step']}"
            lines.append(line)
        lines += self._against_unigrams(best)
        bits = {"training": (self._last_row or {}).get("bits_per_byte")}
        if self._validation:
            bits["held-out"] = self._validation[-1].get("validation_bits_per_byte")
        known = [f"{value:.3f} {name}" for name, value in bits.items() if value is not None]
        if known:
            lines.append("Bits per byte: " + ", ".join(known))
        elapsed = duration(time.perf_counter() - self._start_time)
        if self._throughputs:
            lines.append(f"Speed: {statistics.median(self._throughputs):,.0f} tokens/s (median)")
        lines.append(f"Total time: {elapsed}")
        return lines

    def _against_unigrams(self, best: Row | None) -> list[str]:
        """How far the run got below what token frequencies alone give; by held-out loss if there is one."""
        entropy = self._run["unigram_entropy"]
        if entropy is None or self._last_row is None:
            return []
        gap = entropy - number(best["validation_loss"] if best else self._last_row["loss"])
        verdict = f"the model is {gap:.3f} below that" if gap > 0 else "the model is not below that yet"
        return [f"Token frequencies alone would give a loss of {entropy:.3f}; {verdict}"]

    def close(self) -> None:
        """Close the bar and give log lines back to their handler. May be called twice."""
        self._stack.close()
        self._bar = None
