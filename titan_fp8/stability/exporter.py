"""A run's metrics for Prometheus: a table of what is exported, filled from the rows of metrics.jsonl.

This file knows numbers and names only: no model, no torch, no trainer. Names follow the Prometheus convention: the project's
prefix, then the thing, then its base unit; a counter ends in `_total`. A value that is not finite is served as NaN or +Inf,
as it is: an alert must see it. A statistic that is missing from a row with statistics is served no longer: its tensor is not
cast any more, or it was not finite, which the statistics tell as an event, and `risk` with them.

How many series. Statistics are exported where an alert or a panel needs them, and as coarsely as it can do with: kurtosis of
the 9 activations of a layer, headroom of its 13 FP8 tensors, and 6 numbers per layer. At 32 layers these are 28 * 32 = 896,
and some 40 more for the run. All else is in metrics.jsonl. Labels are layer, site (an activation) and tensor (one that is
cast to FP8); only *_info metrics and counts of actions have others, of few values each. Never a step.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prometheus_client import CollectorRegistry, make_wsgi_app, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from titan_fp8.errors import UserError
from titan_fp8.stability.endpoint import Endpoint

logger = logging.getLogger(__name__)

MOST_SERIES = 5000  # 100 layers have 2900; beyond, a name has gone wild, and Prometheus must not pay for it


@dataclass(frozen=True)
class Row:
    """One exported metric.

    `unit` is the tail of the name (before `_total`), or "" where there is none. `key` is where its value stands in a row of
    metrics.jsonl (dotted where nested), "" for what Exporter works out. `statistic` is one of row["statistics"] instead: per
    layer and site or tensor, or, if the label is `layer` alone, the largest of the layer.
    """

    name: str
    kind: Literal["gauge", "counter"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    key: str = ""
    statistic: str = ""


def _gauge(name: str, key: str, help: str, unit: str = "") -> Row:
    return Row(f"titan_fp8_{name}", "gauge", unit, help, key=key)


def _total(name: str, key: str, help: str, unit: str) -> Row:
    return Row(f"titan_fp8_{name}_total", "counter", unit, help, key=key)


def _statistic(name: str, statistic: str, help: str, *labels: str, unit: str = "") -> Row:
    return Row(f"titan_fp8_{name}", "gauge", unit, help, ("layer", *labels), statistic=statistic)


BUILD = Row(
    "titan_fp8_build_info",
    "gauge",
    "",
    "Always 1; its labels say what runs.",
    ("model", "recipe", "activation", "version"),
)
CAUSE = Row(
    "titan_fp8_risk_cause_info", "gauge", "", "Always 1; its labels are the series with the most evidence of divergence.",
    ("layer", "site", "statistic"),
)  # fmt: skip
ACTIONS = Row(
    "titan_fp8_actions_total", "counter", "actions", "What the stability policy did or, with action warn, would have done.",
    ("action", "cause"),
)  # fmt: skip
TIMESTAMP = _gauge("last_step_timestamp_seconds", "", "Unix time of the last logged step.", "seconds")
INTERVAL = _gauge(
    "log_interval_seconds", "", "Wall time of the steps from one logged step to the next.", "seconds"
)
DROPPED = _total(
    "dropped_samples", "", f"Samples left out because there were {MOST_SERIES} series already.", "samples"
)
STEPS = _total("steps", "step", "Training steps done, over all restarts.", "steps")
TO_SATURATION = tuple(
    _gauge(
        f"steps_to_saturation_p{percent}", "",
        f"Steps until the leading series saturates, {percent} % quantile; +Inf: never.",
    )
    for percent in (10, 50, 90)
)  # fmt: skip

TABLE: tuple[Row, ...] = (
    BUILD,
    # Progress
    TIMESTAMP,
    INTERVAL,
    STEPS,
    _total("tokens", "tokens", "Tokens trained on, all ranks, over all restarts.", "tokens"),
    # Quality
    _gauge("loss", "loss", "Training loss, nats per token, mean over all ranks."),
    _gauge("loss_max", "loss_max", "Training loss of the worst rank, nats per token."),
    _gauge("validation_loss", "validation_loss", "Held-out loss, nats per token."),
    _gauge("grad_norm", "grad_norm", "Norm of the whole gradient before clipping."),
    _gauge("learning_rate", "lr", "Learning rate of the last logged step."),
    # Speed and memory, since the last logged step
    _gauge("step_seconds", "step_seconds", "Mean wall time of a training step.", "seconds"),
    _gauge(
        "tokens_per_second", "tokens_per_second", "Throughput of all ranks together.", "tokens_per_second"
    ),
    _gauge("data_loading_seconds", "data_seconds", "Mean wait for data per step, slowest rank.", "seconds"),
    _gauge(
        "memory_active_peak_bytes", "memory_active_bytes", "Peak of live tensor memory, fullest rank.", "bytes"
    ),
    _gauge(
        "memory_reserved_peak_bytes", "memory_reserved_bytes", "Peak of allocator memory, fullest rank.", "bytes"
    ),
    _gauge(
        "model_flops_utilization_ratio", "mfu", "Model FLOPs achieved over the device's BF16 peak; above 1 in FP8.", "ratio"
    ),
    # Numerical health
    _gauge("divergence_risk_ratio", "risk", "Predicted risk of divergence, 0 to 1.", "ratio"),
    CAUSE,
    *TO_SATURATION,
    ACTIONS,
    _total(
        "nonfinite_steps", "nonfinite_steps", "Steps with a loss or gradient that is not finite.", "steps"
    ),
    _total("skipped_steps", "skipped_steps", "Steps whose update was skipped.", "steps"),
    _gauge("loss_scale", "loss_scale", "Dynamic loss scale."),
    _gauge(
        "fp8_saturated_tensors", "fp8.saturated_tensors", "FP8 tensors whose cast clamped in the last logged step."
    ),
    _gauge(
        "fp8_max_saturation_ratio", "fp8.max_saturation",
        "Largest amax * scale / largest FP8 number of all tensors; above 1 its cast clamped.", "ratio",
    ),
    # Per layer
    _statistic("activation_kurtosis", "kurtosis", "Kurtosis mean(x^4) / mean(x^2)^2; 3 for a Gaussian.", "site"),
    _statistic(
        "fp8_headroom_log2", "headroom", "log2(largest FP8 number / (amax * scale)); below 0 the cast clamped.", "tensor",
    ),
    _statistic(
        "fp8_saturated_ratio", "saturated_share", "Share of elements clamped by the cast, worst FP8 tensor of the layer.",
        unit="ratio",
    ),
    _statistic(
        "fp8_underflowed_ratio", "underflowed_share",
        "Share of nonzero elements rounded to 0 by the cast, worst FP8 tensor of the layer.", unit="ratio",
    ),
    _statistic("ffn_alignment_max", "alignment_max", "Largest |cosine| of a gate row and its up row."),
    _statistic("ffn_alignment_q999", "alignment_q999", "99.9 % quantile of |cosine| of gate rows and their up rows."),
    _statistic("attention_logit_max", "logit_max", "Largest attention logit."),
    _statistic("attention_entropy_nats", "entropy", "Mean entropy of attention's probabilities.", unit="nats"),
    DROPPED,
)  # fmt: skip

_ROWS = {row.name: row for row in TABLE}
_BY_STATISTIC = {row.statistic: row for row in TABLE if row.statistic}


class Exporter(Collector):
    """Keeps the metrics of TABLE, for a scraper to fetch or in a file. Never blocks or fails the thread that feeds it.

    A metric is absent until it is first set. Values are kept here and read at each scrape (rather than in
    prometheus_client's own counters), so that a resumed run can continue a total from its checkpoint.

    Args:
        endpoint: the arguments of Endpoint but its application; None: serve nothing.
        textfile: a *.prom file that is kept up to date, for node_exporter's textfile collector; "": none. It is removed by
            `close`, so that a run that has ended does not look stalled. It stays, with the last row, when a run is killed or
            `close` is called while an error is on its way: alerts must see that.

    Raises UserError for an endpoint or a textfile that cannot be used.
    """

    def __init__(self, endpoint: Mapping[str, Any] | None = None, textfile: str = ""):
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._count = 0
        self._last_step: int | None = None
        self._lock = threading.Lock()
        # Our own registry: the global one would be shared with every library of the process.
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.endpoint = Endpoint(make_wsgi_app(self._registry), **endpoint) if endpoint is not None else None
        self._textfile = _Textfile(textfile, self._registry) if textfile else None

    def start(self) -> list[str]:
        """Begin to serve. Returns where: a URL, a path, or both. Raises UserError where the address cannot be used."""
        where = []
        if self.endpoint is not None:
            self.endpoint.start()
            where.append(self.endpoint.url)
        if self._textfile is not None:
            self._textfile.start()
            where.append(str(self._textfile.path))
        return where

    def update(self, row: Mapping[str, Any]) -> None:
        """Take in a row of metrics.jsonl, of any kind, as it is written there or before that (NaN for null)."""
        kind = row["kind"]
        with self._lock:
            if kind == "run":
                self._set(BUILD, 1, *(str(row.get(label, "")) for label in BUILD.labels))
                self._set(STEPS, row["step"])
            elif kind == "action":
                key = str(row["action"]), str(row["cause"])
                self._set(ACTIONS, self._values.get(ACTIONS.name, {}).get(key, 0) + row.get("times", 1), *key)
            else:
                self._take(row)
            if kind == "train":
                self._take_train(row)
            elif kind == "run":
                self._last_step = row["step"]
        if self._textfile is not None:
            self._textfile.rewrite()

    def set_actions(self, totals: Mapping[tuple[str, str], int]) -> None:
        """Set the counts of the policy's actions, (action, cause) -> how often so far, as a checkpoint kept them."""
        with self._lock:
            for key, total in totals.items():
                self._set(ACTIONS, total, *key)

    def _take(self, row: Mapping[str, Any]) -> None:
        """All that the table finds by key or by statistic."""
        broken = set(row.get("nonfinite") or ())  # paths whose null is a NaN
        for metric in TABLE:
            # A validation's step is training's: it was counted.
            if metric.key and not (metric is STEPS and row["kind"] != "train"):
                value = _value(row, metric.key, broken)
                if value is not None:
                    self._set(metric, value)
        if "statistics" in row:
            for name in (metric.name for metric in _BY_STATISTIC.values()):
                self._count -= len(self._values.pop(name, {}))
        largest: dict[tuple[Row, str], float] = {}
        for name, statistics in (row.get("statistics") or {}).items():
            layer, site = _split(name)
            for statistic, value in statistics.items():
                metric = _BY_STATISTIC.get(statistic)
                if metric is None:
                    continue
                if value is None:
                    if f"statistics.{name}.{statistic}" not in broken:
                        continue
                    value = math.nan
                if metric.labels == ("layer",):
                    key = metric, layer
                    largest[key] = _worse(value, largest.get(key, value))
                elif ("tensor" in metric.labels) == (
                    "." in site
                ):  # a gradient's kurtosis has no place in the table
                    self._set(metric, value, layer, site)
        for (metric, layer), value in largest.items():
            self._set(metric, value, layer)

    def _take_train(self, row: Mapping[str, Any]) -> None:
        """What is worked out of a row that says how training goes."""
        self._set(TIMESTAMP, time.time())
        if self._last_step is not None and row.get("step_seconds") is not None:
            self._set(INTERVAL, max(row["step"] - self._last_step, 0) * row["step_seconds"])
        self._last_step = row["step"]
        self._count -= len(self._values.pop(CAUSE.name, {}))
        if row.get("cause"):
            site, _, statistic = row["cause"].rpartition(".")
            self._set(CAUSE, 1, *_split(site), statistic)
        if row.get("risk") is not None:
            steps = row.get("steps_to_saturation") or (None, None, None)
            for metric, count in zip(TO_SATURATION, steps, strict=True):
                self._set(metric, math.inf if count is None else count)

    def _set(self, metric: Row, value: float, *labels: str) -> None:
        assert len(labels) == len(metric.labels), f"{metric.name} has labels {metric.labels}, got {labels}"
        series = self._values.setdefault(metric.name, {})
        if labels not in series:
            if self._count >= MOST_SERIES and metric is not DROPPED:
                dropped = self._values.setdefault(DROPPED.name, {}).get((), 0.0)
                if not dropped:
                    logger.warning(
                        "Prometheus gets %d series and no more: %s%s is left out",
                        MOST_SERIES,
                        metric.name,
                        labels,
                    )
                self._values[DROPPED.name][()] = dropped + 1
                return
            self._count += 1
        series[labels] = float(value)

    def collect(self) -> Iterable[Metric]:
        """What prometheus_client asks at each scrape: every metric set so far."""
        with self._lock:
            values = {name: dict(series) for name, series in self._values.items()}
        for row in TABLE:
            if not values.get(row.name):
                continue
            family_type = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
            family = family_type(row.name, row.help, labels=row.labels)
            for key, value in values[row.name].items():
                family.add_metric(key, value)
            yield family

    def close(self) -> None:
        """Stop serving and end the threads; the port is free again on return. May be called twice."""
        if self.endpoint is not None:
            self.endpoint.close()
        if self._textfile is not None:
            self._textfile.close()


class _Textfile:
    """Writes the file from a thread of its own: a disk or a network file system may hang."""

    def __init__(self, path: str, registry: CollectorRegistry):
        self.path = Path(path)
        folder = self.path.absolute().parent
        if self.path.suffix != ".prom" or not os.access(folder, os.W_OK):
            raise UserError(
                f"prometheus.textfile must be a *.prom file in a folder that can be written to, got {path}: name one in the "
                "folder of node_exporter's --collector.textfile.directory"
            )
        self._registry = registry
        self._wake = threading.Event()
        self._stale = self._ends = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="prometheus textfile", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        told = ends = False
        while not ends:
            self._wake.wait()
            self._wake.clear()
            ends = self._ends
            if not self._stale:
                continue
            self._stale = False
            try:
                write_to_textfile(str(self.path), self._registry)  # a temporary name, then a rename
                told = False
            except OSError as error:
                if not told:
                    logger.warning("%s could not be written (%s); training goes on", self.path, error)
                told = True

    def rewrite(self) -> None:
        """Ask for the file to be written with what there is now; the last time it is, even if `close` follows at once."""
        self._stale = True
        self._wake.set()

    def close(self) -> None:
        if self._thread is None:
            return
        self._ends = True
        self._wake.set()
        self._thread.join(timeout=5)  # seconds; a file system that hangs must not hold the end of a run
        if sys.exc_info()[0] is None and not self._thread.is_alive():
            self.path.unlink(missing_ok=True)
        self._thread = None


def _split(name: str) -> tuple[str, str]:
    """(layer, site) of "layers.3.attention.wo.x"; the layer is "" for what lies in none."""
    parts = name.split(".")
    if len(parts) > 2 and parts[0] == "layers" and parts[1].isdecimal():
        return parts[1], ".".join(parts[2:])
    return "", name


def _value(row: Mapping[str, Any], key: str, broken: set[str]) -> float | None:
    """The number at a dotted key; NaN for a null that says so, None where it is unknown."""
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return math.nan if value is None and key in broken else value


def _worse(a: float, b: float) -> float:
    """The larger; NaN is larger than all."""
    return a if math.isnan(a) or a > b else b
