"""Metrics over HTTP for Prometheus: a table of what is exported, and the endpoint that serves it.

This file knows numbers and names only: no model, no torch, no trainer. Names follow the Prometheus
convention: the project's prefix, then the thing, then its base unit; a counter ends in `_total`. A value that
is not finite is served as NaN or +Inf, as it is: an alert must see it.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from titan_fp8.errors import UserError

logger = logging.getLogger(__name__)

PORTS_TO_TRY = 100


@dataclass(frozen=True)
class Row:
    """One exported metric. `unit` is the tail of the name (before `_total`), or "" where there is none."""

    name: str
    kind: Literal["gauge", "counter"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()


_T = ("tensor",)

TABLE: tuple[Row, ...] = (
    Row(
        "titan_fp8_run_info",
        "gauge",
        "",
        "Always 1; its labels say what runs.",
        ("model", "recipe", "version"),
    ),
    Row("titan_fp8_last_log_timestamp_seconds", "gauge", "seconds", "Unix time of the last logged step."),
    # Progress
    Row("titan_fp8_steps_total", "counter", "steps", "Training steps done, over all restarts."),
    Row("titan_fp8_tokens_total", "counter", "tokens", "Tokens trained on, all ranks, over all restarts."),
    # Quality
    Row("titan_fp8_loss", "gauge", "", "Training loss, nats per token, mean over all ranks."),
    Row("titan_fp8_loss_max", "gauge", "", "Training loss of the worst rank, nats per token."),
    Row("titan_fp8_validation_loss", "gauge", "", "Held-out loss, nats per token."),
    Row("titan_fp8_bits_per_byte", "gauge", "bits_per_byte", "Training loss in bits per byte of text."),
    Row(
        "titan_fp8_validation_bits_per_byte",
        "gauge",
        "bits_per_byte",
        "Held-out loss in bits per byte of text.",
    ),
    Row("titan_fp8_grad_norm", "gauge", "", "Norm of the whole gradient before clipping."),
    Row("titan_fp8_learning_rate", "gauge", "", "Learning rate of the last logged step."),
    # Speed and memory, since the last logged step
    Row("titan_fp8_step_seconds", "gauge", "seconds", "Mean wall time of a training step."),
    Row(
        "titan_fp8_tokens_per_second",
        "gauge",
        "tokens_per_second",
        "Throughput of all ranks together.",
    ),
    Row("titan_fp8_data_loading_seconds", "gauge", "seconds", "Mean wait for data per step, slowest rank."),
    Row("titan_fp8_memory_active_peak_bytes", "gauge", "bytes", "Peak of live tensor memory, fullest rank."),
    Row("titan_fp8_memory_reserved_peak_bytes", "gauge", "bytes", "Peak of allocator memory, fullest rank."),
    Row(
        "titan_fp8_model_flops_utilization_ratio",
        "gauge",
        "ratio",
        "Model FLOPs achieved over the device's BF16 peak; FP8 may exceed 1.",
    ),
    # Numerical health
    Row(
        "titan_fp8_nonfinite_steps_total",
        "counter",
        "steps",
        "Steps with a loss or gradient that is not finite.",
    ),
    Row("titan_fp8_skipped_steps_total", "counter", "steps", "Steps whose update was skipped."),
    Row("titan_fp8_loss_scale", "gauge", "", "Dynamic loss scale."),
    # FP8, one series per cast tensor ("layers.0.attention.wq.x")
    Row("titan_fp8_fp8_amax", "gauge", "", "Largest magnitude in the tensor at its last cast.", _T),
    Row("titan_fp8_fp8_scale", "gauge", "", "Factor that the tensor was multiplied by before its cast.", _T),
    Row(
        "titan_fp8_fp8_saturation_ratio",
        "gauge",
        "ratio",
        "amax * scale / largest FP8 number; above 1 the cast clamped.",
        _T,
    ),
    Row("titan_fp8_fp8_saturated_steps_total", "counter", "steps", "Steps in which the cast clamped.", _T),
    Row(
        "titan_fp8_fp8_nonfinite_steps_total",
        "counter",
        "steps",
        "Steps in which it was not finite.",
        _T,
    ),
)

_ROWS = {row.name: row for row in TABLE}


class Exporter(Collector):
    """Serves the metrics of TABLE at http://host:port/metrics from a thread of its own.

    A metric is absent until it is first set. Values are kept here and read at each scrape (rather
    than in prometheus_client's own counters), so that a resumed run can continue a total from its checkpoint.

    Args:
        host: address to listen on; the default is reachable from this machine only.
        port: TCP port; 0 takes any free one.
        next_free_port: when `port` is taken, try the 99 after it instead of refusing.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 9464, next_free_port: bool = False):
        self.host, self.port, self.next_free_port = host, port, next_free_port
        self._values: dict[str, dict[tuple[str, ...], float]] = {}
        self._lock = threading.Lock()
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None
        # Our own registry: the global one would be shared with every library of the process.
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def start(self) -> int:
        """Listen; returns the port. Raises UserError where the address cannot be used."""
        assert self._server is None, "the exporter is already running"
        wanted = self.port
        last = (
            max(wanted, min(wanted + PORTS_TO_TRY - 1, 65535)) if self.next_free_port and wanted else wanted
        )
        for port in range(wanted, last + 1):
            try:
                self._server, self._thread = start_http_server(port, self.host, self._registry)
                break
            except (OSError, OverflowError) as error:  # OverflowError: a port above 65535
                reason = getattr(error, "strerror", None) or error
                if getattr(error, "errno", None) != errno.EADDRINUSE:
                    raise UserError(
                        f"the metrics endpoint must be able to listen, and {self.host}:{port} refuses "
                        f"({reason}): give --prometheus.host= an address of this machine "
                        "and --prometheus.port= a number from 1024 to 65535"
                    ) from error
        else:
            if self.next_free_port:
                raise UserError(
                    f"the metrics endpoint needs a free port, and {wanted} to {last} on {self.host} are all "
                    "taken: choose another with --prometheus.port="
                )
            raise UserError(
                f"the metrics endpoint needs a free port, and {wanted} on {self.host} is taken: "
                "choose another with --prometheus.port=, or add --prometheus.next_free_port"
            )
        self.port = int(self._server.server_port)
        if wanted and self.port != wanted:
            logger.warning("Prometheus port %d is taken; using %d instead", wanted, self.port)
        return self.port

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set the gauge `name` (its full name in TABLE) to `value`, which may be NaN or infinite."""
        self._store(name, "gauge", value, labels)

    def set_total(self, name: str, total: float, **labels: str) -> None:
        """Set the counter `name` to its whole total so far, as a checkpoint or the device counted it."""
        self._store(name, "counter", total, labels)

    def inc(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add `amount` >= 0 to the counter `name`."""
        assert amount >= 0, f"a counter only grows: {name} by {amount}"
        self._store(name, "counter", amount, labels, add=True)

    def _store(self, name: str, kind: str, value: float, labels: dict[str, str], add: bool = False) -> None:
        row = _ROWS[name]
        assert row.kind == kind, f"{name} is a {row.kind}, not a {kind}"
        assert set(labels) == set(row.labels), f"{name} has labels {row.labels}, got {tuple(labels)}"
        key = tuple(labels[label] for label in row.labels)
        with self._lock:
            series = self._values.setdefault(name, {})
            series[key] = float(value) + (series.get(key, 0.0) if add else 0.0)

    def collect(self) -> Iterable[Metric]:
        """What prometheus_client asks at each scrape: every metric set so far."""
        with self._lock:
            values = {name: dict(series) for name, series in self._values.items()}
        for row in TABLE:
            if row.name not in values:
                continue
            family_type = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
            family = family_type(row.name, row.help, labels=row.labels)
            for key, value in values[row.name].items():
                family.add_metric(key, value)
            yield family

    def close(self) -> None:
        """Stop listening and end the thread. The port is free again on return. May be called twice."""
        if self._server is None:
            return
        assert self._thread is not None
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server = self._thread = None
