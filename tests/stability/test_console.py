"""Progress on a terminal, and times in words."""

import io
import logging
import sys

import pytest

from titan_fp8.stability.console import Console, duration

RUN = {"step": 0, "total_steps": 40, "ranks": 4, "device_memory_bytes": 2**34, "unigram_entropy": None}


def row(step, loss=2.0):
    return {
        "kind": "train",
        "step": step,
        "loss": loss,
        "grad_norm": 1.0,
        "memory_reserved_bytes": 2**32,
        "tokens_per_second": 40_000.0,
        "tflops": 12.5,
        "mfu": 0.25,
    }


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (80, "1m20s"), (11220, "3h07m"), (187200, "2d04h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_bar_continues_at_the_resumed_step_and_log_lines_stay_whole(monkeypatch):
    # Not in a fixture: pytest sets sys.stderr anew between setup and test.
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [handler])
    monkeypatch.setattr(root, "level", logging.INFO)
    console = Console({**RUN, "step": 10}, kept=[])
    console.train(row(20))
    console.close()
    console.close()
    assert root.handlers == [handler], "the log handler is given back"
    screen = terminal.getvalue()
    assert "10/40" in screen and "20/40" in screen
    assert "loss 2.000, 40,000 tok/s" in screen
    # The log line stands alone: no bar before it on its line.
    line = next(line for line in screen.split("\n") if "grad_norm" in line)
    assert line.split("\r")[-1].startswith("step: 20/40  loss:  2.00000")
    assert "memory:  4.00GiB(25.00%)  tps: 10,000 (40,000 on 4)  tflops: 12.50  mfu: 25.00%" in line


def test_no_bar_where_nobody_looks(monkeypatch, caplog):
    quiet = io.StringIO()
    monkeypatch.setattr(sys, "stderr", quiet)
    console = Console(RUN, kept=[])
    with caplog.at_level(logging.INFO):
        console.train(row(1))
    console.close()
    assert quiet.getvalue() == ""
    assert "step:  1/40" in caplog.text


def test_a_risk_is_shown_from_where_it_matters(caplog):
    caplog.set_level(logging.INFO)
    console = Console(RUN, [])
    cause = "layers.3.ffn_act.kurtosis"
    console.train(row(1) | {"risk": 0.29, "cause": cause})
    console.train(row(2) | {"risk": 0.3, "cause": cause})
    console.close()
    first, second = caplog.messages
    assert "risk" not in first and second.endswith(f"risk: 0.30 ({cause})")


def test_results_against_unigrams():
    def verdict(loss):
        console = Console({**RUN, "unigram_entropy": 2.5}, kept=[])
        console.train(row(1, loss))
        return console.results()[1]

    assert verdict(2.0) == "Token frequencies alone would give a loss of 2.500; the model is 0.500 below that"
    for loss in (3.0, float("nan")):
        assert verdict(loss).endswith("the model is not below that yet")
