"""torchtitan's MetricsProcessor seam: measures each window of steps and hands a row to all that show it.

All ranks call `log` and `log_validation`; rank 0 writes: console (console.py), metrics.jsonl (journal.py),
Prometheus (exporter.py), and TensorBoard by torchtitan's own logger. The trainer calls, in this order:

    resume(step)                            once, before the first step; 0: a fresh run, else the loaded step
    log(...)                                where should_log(step)
    begin_validation(), log_validation()    around each validation
    summary(), close()                      at the end

A window is the time since the last log, without validations. It is counted in steps and not in `log_freq`,
for it may have any length: step 1, the last step, the first log after a resume.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torchtitan.components.metrics import DeviceMemStats, MetricsProcessor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_module, device_type

import titan_fp8
from titan_fp8.stability.console import GIB, Console
from titan_fp8.stability.exporter import Exporter
from titan_fp8.stability.journal import Journal
from titan_fp8.stability.predictor import Prediction, Predictor, parameters_of, series_of
from titan_fp8.stability.statistics import Table

if TYPE_CHECKING:
    from torchtitan.protocols import BaseModelArgs

    from titan_fp8.stability.policy import Action

Report = dict[str, dict[str, float]]
"""Per FP8 tensor: "amax", "scale", "saturation" (amax * scale / largest FP8 number), "saturated_steps" and
"nonfinite_steps" (totals of the run)."""


def fp8_summary(report: Report) -> dict[str, Any]:
    """{"saturated_tensors", "max_saturation", "worst"} of a non-empty report; NaN is the worst there is."""

    def severity(name: str) -> float:
        saturation = report[name]["saturation"]
        return math.inf if math.isnan(saturation) else saturation

    worst = max(report, key=severity)
    return {
        "saturated_tensors": sum(severity(name) > 1 for name in report),
        "max_saturation": report[worst]["saturation"],
        "worst": worst,
    }


@dataclass
class Window:
    """What happened since the last log, over all ranks."""

    steps: int
    seconds: float
    tokens: int  # trained on by all ranks together
    data_seconds: float  # waiting for data, slowest rank
    memory: DeviceMemStats  # this rank's
    active_bytes: int | None  # peaks of the fullest rank; None where the device does not tell
    reserved_bytes: int | None


class TitanMetricsProcessor(MetricsProcessor):
    """torchtitan's metrics processor with numbers that are right on any window, and more places to see them.

    The trainer may set, before `resume`:
        fp8_report: returns a Report. Called on every rank, only when logging; it may be a collective.
        statistics: returns a statistics.Table, the same on every rank. Called as fp8_report is.
        unigram_entropy: loss of a model that knows token frequencies alone, nats per token.
        next_command: what the user could type after this run.
        log_folder: where the console output of all ranks is kept.

    `log` reads from `extra_metrics`: n_tokens_seen (all ranks, since the first start of the run), lr,
    bits_per_byte, loss_scale, skipped_steps, nonfinite_steps (totals). `log_validation` reads bits_per_byte.
    All of them go to TensorBoard too. `prediction` is that of the last logged row, equal on all ranks, since all see
    equal values; `state_dict` is what the monitor must remember over a restart. `exporter` is None except on rank 0 with
    `[prometheus] enable` or `textfile`.

    Raises UserError where Prometheus' port or files cannot be used.
    """

    def __init__(
        self,
        job_config: JobConfig,
        parallel_dims: ParallelDims,
        activation: str = "",
        tag: str | None = None,
    ):
        super().__init__(job_config, parallel_dims, tag)
        self.fp8_report: Callable[[], Report] | None = None
        self.statistics: Callable[[], Table] | None = None
        self.prediction: Prediction | None = None
        self.unigram_entropy: float | None = None
        self.next_command: str | None = None
        self.log_folder: str | None = None
        self.exporter: Exporter | None = None
        self.report: Report = {}  # of the last logged step, as fp8_report gave it
        self.actions: dict[tuple[str, str], int] = {}  # (action, cause) -> how often, over the whole run

        # torchtitan's merged class gains our sections at run time: a type checker cannot know them.
        ours: Any = job_config
        self._identity = {
            "model": f"{job_config.model.name} {job_config.model.flavor}",
            "recipe": ours.fp8.recipe,
            "activation": activation,
            "version": titan_fp8.__version__,
        }
        self.predictor = Predictor(parameters_of(self._identity))
        self._folder = Path(job_config.job.dump_folder)
        self._is_writer = dist.get_rank() == 0
        self._journal: Journal | None = None
        self._console: Console | None = None

        self._window_step: int | None = None  # the step after which the window starts; None before resume()
        self._window_peaks = (-1.0, -1.0)  # active, reserved GiB before a validation inside the window
        self._aside: tuple[int, float] | None = None  # the window's tokens and seconds, during a validation

        served = vars(ours.prometheus).copy()
        textfile, enable = served.pop("textfile"), served.pop("enable")
        if self._is_writer and (enable or textfile):
            self.exporter = Exporter(served if enable else None, textfile)
            logger.info(f"Prometheus metrics at {' and '.join(self.exporter.start())}")

    def resume(self, step: int) -> None:
        """The next step trained is `step` + 1 (0: a fresh run). Opens metrics.jsonl, less rows beyond."""
        assert self._window_step is None, "resume() is called once"
        self._begin_window(step)
        if not self._is_writer:
            return
        row = {
            "kind": "run",
            "step": step,
            **self._identity,
            "total_steps": self.job_config.training.steps,
            "ranks": dist.get_world_size(),
            "device": self.device_memory_monitor.device_name,
            "device_memory_bytes": self.device_memory_monitor.device_capacity,
            "unigram_entropy": self.unigram_entropy,
        }
        self._journal = Journal(self._folder, step)
        self._journal.write(row)
        self._console = Console(row, self._journal.kept, self.color)
        if self.exporter:
            # Of a checkpoint that was loaded; first, for an alert takes what appears in a run that is known for news.
            self.exporter.set_actions(self.actions)
            self.exporter.update(row)

    def should_log(self, step: int) -> bool:
        """As torchtitan (step 1 and every log_freq steps), and the last step."""
        return super().should_log(step) or step == self.job_config.training.steps

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log a training step and start the next window. Collective: all ranks call it after the same step.

        Losses are in nats per token. They and `extra_metrics` (see the class) are reduced over ranks already.
        """
        assert self.num_flops_per_token > 0, "num_flops_per_token must be set"
        extra = dict(extra_metrics or {})
        window = self._measure_window(step)
        self.report = report = self.fp8_report() if self.fp8_report else {}
        losses = {
            "loss": float(global_avg_loss),
            "loss_max": float(global_max_loss),
            "grad_norm": float(grad_norm),
        }
        row = self._train_row(step, losses, window, extra)
        if report:
            row["fp8"] = fp8_summary(report)
        if self.statistics is not None:
            row["statistics"] = self.statistics()
        self._predict(row)
        self.logger.log(self._tensorboard(row, window.memory, extra), step)
        if self._is_writer:
            assert self._journal is not None and self._console is not None
            self._journal.write(row)
            self._console.train(row)
            if self.exporter:
                self.exporter.update(row)
        self._begin_window(step)

    def _predict(self, row: dict[str, Any]) -> None:
        """Add to a train row what the predictor says of it."""
        told = self.predictor.update(row["step"], series_of(row))
        self.prediction = told
        row["risk"] = float(f"{told.risk:.6g}")
        row["cause"] = told.cause.series if told.cause else None
        row["cause_kind"] = told.cause.kind if told.cause else None
        steps = told.steps_to_saturation
        row["steps_to_saturation"] = steps and [
            float(f"{count:.6g}") if math.isfinite(count) else None for count in steps
        ]

    def state_dict(self) -> dict[str, str]:
        """What the monitor has learned, as JSON text."""
        return {"predictor": json.dumps(self.predictor.state_dict())}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Go on from a `state_dict`. Raises UserError for a predictor's of another version."""
        self.predictor.load_state_dict(json.loads(state["predictor"]))

    def act(self, step: int, action: Action, counts: dict[tuple[str, str], int]) -> None:
        """Tell of what the policy did after `step`: a line, and an "action" row. All ranks call it."""
        self.actions = counts
        if self._is_writer:
            assert self._journal is not None, "resume(step) comes before the first action"
            logger.warning(f"Step {step}: {action}")
            self._journal.write(action.row(step))
            if self.exporter:
                self.exporter.set_actions(counts)

    def roll_back(self, action: Action, since: int) -> None:
        """The run goes back to the action's target, from step `since`, and is measured from there. All ranks call it."""
        assert action.target is not None
        self._begin_window(action.target)
        if self._is_writer:
            assert self._journal is not None and self._console is not None
            self._journal.roll_back(action.target)
            self._journal.write(action.row(action.target) | {"from": since})
            self._console.roll_back(action.target)

    def begin_validation(self) -> None:
        """Put the window aside: a validation's time and tokens are not training's.

        `log_validation` takes it up again. Without this call (torchtitan's own validator) the next window
        starts at the end of the validation.
        """
        device_module.synchronize()  # training steps that are still queued belong to the window
        self._aside = self.ntokens_since_last_log, time.perf_counter() - self.time_last_log
        self._window_peaks = self._peaks(self.device_memory_monitor.get_peak_stats())
        self.device_memory_monitor.reset_peak_stats()
        self.ntokens_since_last_log = 0
        self.time_last_log = time.perf_counter()

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        """Log the held-out loss (nats per token, reduced over ranks) of the weights after `step`."""
        extra = extra_metrics or {}
        super().log_validation(
            loss, step, {f"validation_metrics/{key}": value for key, value in extra.items()}
        )
        if self._aside is None:
            self._begin_window(step)
        else:
            self.ntokens_since_last_log, seconds = self._aside
            self.time_last_log = time.perf_counter() - seconds
            self._aside = None
        if not self._is_writer:
            return
        assert self._journal is not None and self._console is not None, "resume(step) comes before validation"
        row: dict[str, Any] = {"kind": "validation", "step": step, "validation_loss": float(loss)}
        if "bits_per_byte" in extra:
            row["validation_bits_per_byte"] = float(extra["bits_per_byte"])
        self._journal.write(row)
        self._console.validation(row)
        if self.exporter:
            self.exporter.update(row)

    def summary(self) -> list[str]:
        """Lines to print on rank 0 at the end: results, where things lie, and what to try next."""
        config = self.job_config
        lines = self._console.results() if self._console else []
        lines.append(f"Metrics: {self._folder / 'metrics.jsonl'}")
        if config.metrics.enable_tensorboard:
            lines.append(f"TensorBoard: tensorboard --logdir {self._folder / config.metrics.save_tb_folder}")
        if config.checkpoint.enable:
            lines.append(f"Checkpoints: {self._folder / config.checkpoint.folder}")
        if self.log_folder:
            lines.append(f"Logs: {self.log_folder}")
        if self.next_command:
            lines.append(f"Try next: {self.next_command}")
        return lines

    def close(self) -> None:
        """Close the bar, the endpoint, metrics.jsonl and TensorBoard. May be called twice."""
        if self._console:
            self._console.close()
        if self.exporter:
            self.exporter.close()
        if self._journal:
            self._journal.close()
        super().close()

    def _begin_window(self, step: int) -> None:
        self._window_step = step
        self._window_peaks = (-1.0, -1.0)
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.device_memory_monitor.reset_peak_stats()
        self.time_last_log = time.perf_counter()

    def _peaks(self, memory: DeviceMemStats) -> tuple[float, float]:
        """Active and reserved GiB, those before a validation too; negative if the device tells none."""
        active, reserved = self._window_peaks
        return max(active, memory.max_active_gib), max(reserved, memory.max_reserved_gib)

    def _measure_window(self, step: int) -> Window:
        """The window that ends with `step`. One small all-gather over all ranks."""
        assert self._window_step is not None, "the trainer must call resume(step) before the first step"
        assert step > self._window_step, f"step {step} is logged already"
        seconds = time.perf_counter() - self.time_last_log
        memory = self.device_memory_monitor.get_peak_stats()
        active_gib, reserved_gib = self._peaks(memory)
        mine = torch.tensor(
            [self.ntokens_since_last_log, sum(self.data_loading_times), active_gib * GIB, reserved_gib * GIB],
            dtype=torch.float64,
            device=device_type,
        )
        ranks = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
        # The list form: all_gather_into_tensor is deprecated in torch 2.13, its successor is not in 2.11.
        dist.all_gather(ranks, mine)
        tokens, data_seconds, active, reserved = torch.stack(ranks, dim=1).tolist()
        return Window(
            steps=step - self._window_step,
            seconds=seconds,
            # Ranks that share a batch (tensor, context and pipeline parallel) each counted it.
            tokens=round(sum(tokens) / self.parallel_dims.non_data_parallel_size),
            data_seconds=max(data_seconds),
            memory=memory,
            active_bytes=round(max(active)) if min(active) >= 0 else None,
            reserved_bytes=round(max(reserved)) if min(reserved) >= 0 else None,
        )

    def _train_row(
        self, step: int, losses: dict[str, float], window: Window, extra: dict[str, Any]
    ) -> dict[str, Any]:
        """The row of metrics.jsonl. None: unknown on this device."""
        tokens_per_second = window.tokens / window.seconds
        flops = self.num_flops_per_token * tokens_per_second / dist.get_world_size()
        # titan_fp8.device gives an infinite peak where nobody knows it.
        peak_is_known = 0 < self.gpu_peak_flops < math.inf
        optional = ("bits_per_byte", "loss_scale", "skipped_steps", "nonfinite_steps")
        return {
            "kind": "train",
            "step": step,
            "tokens": extra.get("n_tokens_seen"),
            **losses,
            "lr": extra.get("lr"),
            "step_seconds": window.seconds / window.steps,
            "tokens_per_second": tokens_per_second,
            "data_seconds": window.data_seconds / window.steps,
            "memory_reserved_bytes": window.reserved_bytes,
            "memory_active_bytes": window.active_bytes,
            "tflops": flops / 1e12,
            "mfu": flops / self.gpu_peak_flops if peak_is_known else None,
            **{key: extra[key] for key in optional if key in extra},
        }

    def _tensorboard(
        self, row: dict[str, Any], memory: DeviceMemStats, extra: dict[str, Any]
    ) -> dict[str, Any]:
        """torchtitan's tags with torchtitan's meanings (speed per device, mfu in percent), then ours."""
        tags = {
            "loss_metrics/global_avg_loss": row["loss"],
            "loss_metrics/global_max_loss": row["loss_max"],
            "grad_norm": row["grad_norm"],
            "throughput(tps)": row["tokens_per_second"] / dist.get_world_size(),
            "tflops": row["tflops"],
            "mfu(%)": 100 * row["mfu"] if row["mfu"] is not None else None,
            "time_metrics/end_to_end(s)": row["step_seconds"],
            "time_metrics/data_loading(s)": row["data_seconds"],
            "time_metrics/data_loading(%)": 100 * row["data_seconds"] / row["step_seconds"],
            "memory/max_active(GiB)": memory.max_active_gib,
            "memory/max_active(%)": memory.max_active_pct,
            "memory/max_reserved(GiB)": memory.max_reserved_gib,
            "memory/max_reserved(%)": memory.max_reserved_pct,
            "memory/num_alloc_retries": memory.num_alloc_retries,
            "memory/num_ooms": memory.num_ooms,
            "throughput(tps, all ranks)": row["tokens_per_second"],
            **extra,
        }
        tags["stability/risk"] = row["risk"]
        if "fp8" in row:
            tags["fp8/saturated_tensors"] = row["fp8"]["saturated_tensors"]
            tags["fp8/max_saturation"] = row["fp8"]["max_saturation"]
        return {tag: value for tag, value in tags.items() if value is not None}


def build_metrics_processor(
    job_config: JobConfig,
    parallel_dims: ParallelDims,
    model_args: BaseModelArgs | None = None,
    tag: str | None = None,
) -> TitanMetricsProcessor:
    """torchtitan's TrainSpec.build_metrics_processor_fn."""
    return TitanMetricsProcessor(job_config, parallel_dims, getattr(model_args, "activation", ""), tag)
