"""The endpoint over real HTTP, and the names it serves."""

import math
import re
import socket

import pytest

from titan_fp8.errors import UserError
from titan_fp8.stability.exporter import TABLE, Exporter


@pytest.fixture
def exporter():
    exporter = Exporter(port=0)
    exporter.start()
    yield exporter
    exporter.close()


@pytest.fixture
def taken_port():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_names_follow_the_prometheus_convention(row):
    assert re.fullmatch(r"titan_fp8_[a-z0-9_]*[a-z0-9]", row.name)
    assert (row.kind == "counter") == row.name.endswith("_total")
    assert row.name.removesuffix("_total").endswith(f"_{row.unit}" if row.unit else "")
    assert row.help.endswith(".")
    # Base units only, and no number that is named after a unit but does not say so.
    assert not re.search(r"(milliseconds|_ms|percent|_gib|_mib)(_|$)", row.name)
    for unit in ("seconds", "bytes", "ratio"):
        assert row.unit == unit or not row.name.removesuffix("_total").endswith(f"_{unit}")


def test_names_are_unique():
    assert len({row.name for row in TABLE}) == len(TABLE)


def test_every_row_can_be_scraped(exporter, scrape):
    """A scraper sees each row under its own name, with its labels and its value."""
    expected = {}
    for i, row in enumerate(TABLE):
        labels = {label: f"{label} {i}" for label in row.labels}
        store = exporter.set_total if row.kind == "counter" else exporter.set
        store(row.name, 1.5 * i, **labels)
        expected[row.name, tuple(sorted(labels.items()))] = 1.5 * i
    assert scrape(exporter.port) == expected


def test_unset_metrics_are_absent(exporter, scrape):
    exporter.set("titan_fp8_loss", 2.0)
    assert scrape(exporter.port) == {("titan_fp8_loss", ()): 2.0}


def test_a_total_continues_after_a_resume(exporter, scrape):
    exporter.set_total("titan_fp8_nonfinite_steps_total", 7)
    exporter.inc("titan_fp8_nonfinite_steps_total")
    assert scrape(exporter.port) == {("titan_fp8_nonfinite_steps_total", ()): 8.0}


def test_nonfinite_values_are_served(exporter, scrape):
    exporter.set("titan_fp8_loss", math.nan)
    exporter.set("titan_fp8_grad_norm", math.inf)
    exporter.set("titan_fp8_fp8_amax", 3.0, tensor="layers.0.attention.wq.x")
    exporter.set("titan_fp8_fp8_amax", math.nan, tensor='odd "name"\n')
    samples = scrape(exporter.port)
    assert math.isnan(samples["titan_fp8_loss", ()])
    assert samples["titan_fp8_grad_norm", ()] == math.inf
    assert samples["titan_fp8_fp8_amax", (("tensor", "layers.0.attention.wq.x"),)] == 3.0
    assert math.isnan(samples["titan_fp8_fp8_amax", (("tensor", 'odd "name"\n'),)])


def test_taken_port_is_refused_with_the_remedy(taken_port):
    with pytest.raises(UserError) as refused:
        Exporter(port=taken_port).start()
    message = str(refused.value)
    assert f"{taken_port} on 127.0.0.1 is taken" in message
    assert "--prometheus.port=" in message and "--prometheus.next_free_port" in message
    assert "\n" not in message


def test_next_free_port(taken_port, caplog, scrape):
    exporter = Exporter(port=taken_port, next_free_port=True)
    port = exporter.start()
    try:
        assert taken_port < port < taken_port + 100
        exporter.set("titan_fp8_loss", 2.0)
        assert scrape(port)["titan_fp8_loss", ()] == 2.0
        assert f"Prometheus port {taken_port} is taken; using {port} instead" in caplog.text
    finally:
        exporter.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": "192.0.2.1", "port": 0},  # reserved for documentation: no machine has it
        {"port": 70000},
        {"port": 70000, "next_free_port": True},
    ],
)
def test_an_impossible_address_is_refused(wrong):
    with pytest.raises(UserError, match=r"--prometheus\.host=.*--prometheus\.port="):
        Exporter(**wrong).start()


def test_the_port_is_free_after_close(scrape):
    exporter = Exporter(port=0)
    port = exporter.start()
    exporter.set("titan_fp8_loss", 2.0)
    scrape(port)
    exporter.close()
    exporter.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    again = Exporter(port=port)
    assert again.start() == port
    again.close()
