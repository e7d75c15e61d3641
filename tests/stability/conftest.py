"""A scraper, a fake clock, and torchtitan's processor in a process group of one."""

import time
import urllib.request
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families


@pytest.fixture
def scrape():
    """scrape(port) -> {(sample name, sorted label pairs): value}, over real HTTP."""

    def scrape(port):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    return scrape


class Clock:
    """Stands in for time.perf_counter; moves only when told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.fixture
def make_processor(gloo, tmp_path, clock):
    """make_processor(steps=..., ...) -> a processor that writes to tmp_path; closed at the end."""
    from torchtitan.config import JobConfig

    from titan_fp8.config import Fp8, Prometheus
    from titan_fp8.stability.processor import build_metrics_processor

    @dataclass
    class Config(JobConfig):
        fp8: Fp8 = field(default_factory=Fp8)
        prometheus: Prometheus = field(default_factory=Prometheus)

    made = []

    def make(*, steps=100, log_freq=10, prometheus=False, textfile="", tensorboard=False, ranks_per_batch=1,
        activation="xielu",
    ):  # fmt: skip
        config = Config()
        config.job.dump_folder = str(tmp_path)
        config.model.name, config.model.flavor = "titan_fp8", "debug"
        config.training.steps = steps
        config.metrics.log_freq = log_freq
        config.metrics.enable_tensorboard = tensorboard
        config.metrics.disable_color_printing = True
        config.prometheus.enable = prometheus
        config.prometheus.port = 0
        config.prometheus.textfile = str(textfile)
        dims = SimpleNamespace(non_data_parallel_size=ranks_per_batch, pp_enabled=False)
        processor = build_metrics_processor(config, dims, SimpleNamespace(activation=activation))
        processor.num_flops_per_token = 10**9
        made.append(processor)
        return processor

    yield make
    for processor in made:
        processor.close()
