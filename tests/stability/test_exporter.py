"""From rows of metrics.jsonl to what a scraper reads, over real HTTP."""

import json
import math
import re
import time

import pytest

from titan_fp8.errors import UserError
from titan_fp8.stability import exporter as exporter_module
from titan_fp8.stability.exporter import BUILD, TABLE, Exporter
from titan_fp8.stability.journal import encode

SITES = ("residual", "qkv_in", "q", "k", "v", "attention_out", "ffn_up", "ffn_act", "ffn_out")
TENSORS = (
    *("attention.wqkv.x", "attention.wqkv.dy", "attention.wo.x", "attention.wo.dy"),
    *(f"feed_forward.{name}" for name in ("x", "z", "dh", "dy")),
    *(f"attention.inner_attention.{name}" for name in ("q", "k", "v", "do", "ds")),
)
GRADIENTS = ("attention.wqkv.dy", "attention.wo.dy", "feed_forward.dy", "attention.inner_attention.do")


def statistics(layers):
    """A step's statistics of a gated model with `layers` layers, every series that there is."""
    found = {}
    for layer in range(layers):
        name = f"layers.{layer}"
        for site in SITES:
            found[f"{name}.{site}"] = {"mean": 0.0, "rms": 1.0, "kurtosis": 3.0 + layer, "amax": 5.0}
        found[f"{name}.attention"] = {"logit_max": 7.0, "entropy": 2.0}
        found[f"{name}.feed_forward"] = {"alignment_max": 0.5, "alignment_q999": 0.4}
        for tensor in TENSORS:
            found[f"{name}.{tensor}"] = {
                "headroom": 1.5,
                "amax_jump": 1.0,
                "saturated_share": 0.0,
                "underflowed_share": 0.1,
            }
        for tensor in GRADIENTS:
            found[f"{name}.{tensor}"] |= {"rms": 1.0, "kurtosis": 9.0, "amax": 5.0}
        for weight in ("attention.wq", "feed_forward.w1"):
            found[f"{name}.{weight}"] = {"weight_rms": 0.02, "update_rms": 1e-4}
    return found


def train(step, layers=2, **more):
    row = {
        "kind": "train", "step": step, "tokens": 1000 * step, "loss": 2.0, "loss_max": 2.5, "grad_norm": 1.25, "lr": 1e-3,
        "step_seconds": 0.5, "tokens_per_second": 2000.0, "data_seconds": 0.1, "memory_reserved_bytes": 2**30,
        "memory_active_bytes": 2**29, "tflops": 1.0, "mfu": 0.4, "bits_per_byte": 1.1, "loss_scale": 1024.0,
        "skipped_steps": 4, "nonfinite_steps": 5, "fp8": {"saturated_tensors": 1, "max_saturation": 1.5, "worst": "a"},
        "statistics": statistics(layers), "risk": 0.25, "cause": "layers.1.ffn_act.kurtosis", "cause_kind": "trend",
        "steps_to_saturation": [10.0, 20.0, None],
    }  # fmt: skip
    return row | more


RUN = {
    "kind": "run",
    "step": 7,
    "model": "titan_fp8 debug",
    "recipe": "delayed",
    "activation": "swiglu",
    "version": "0.1.0",
    "ranks": 2,
}
VALIDATION = {"kind": "validation", "step": 10, "validation_loss": 1.75, "validation_bits_per_byte": 0.9}
ACTION = {"kind": "action", "step": 10, "action": "skip_step", "cause": "nonfinite", "why": "inf", "times": 2}


@pytest.fixture
def exporter():
    exporter = Exporter({"host": "127.0.0.1", "port": 0})
    exporter.start()
    yield exporter
    exporter.close()


@pytest.fixture
def samples(exporter, scrape):
    """samples(*rows) -> {(name, labels): value} scraped after the rows."""

    def samples(*rows):
        for row in rows:
            exporter.update(row)
        return scrape(exporter.endpoint.port)

    return samples


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


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_labels_are_few(row):
    if row.name.endswith("_info") or row.name == "titan_fp8_actions_total":
        assert "step" not in row.labels
    else:
        assert set(row.labels) <= {"layer", "site", "tensor"}


def test_names_are_unique():
    assert len({row.name for row in TABLE}) == len(TABLE)


def test_every_metric_reaches_a_scraper(samples, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.8e9)
    got = samples(RUN, train(10), VALIDATION, ACTION, ACTION)
    layer = (("layer", "1"),)
    expected = {
        ("build_info", tuple(sorted((label, RUN[label]) for label in BUILD.labels))): 1,
        ("last_step_timestamp_seconds", ()): 1.8e9,
        ("log_interval_seconds", ()): 1.5,
        ("steps_total", ()): 10,
        ("tokens_total", ()): 10_000,
        ("loss", ()): 2.0,
        ("loss_max", ()): 2.5,
        ("validation_loss", ()): 1.75,
        ("grad_norm", ()): 1.25,
        ("learning_rate", ()): 1e-3,
        ("step_seconds", ()): 0.5,
        ("tokens_per_second", ()): 2000,
        ("data_loading_seconds", ()): 0.1,
        ("memory_active_peak_bytes", ()): 2**29,
        ("memory_reserved_peak_bytes", ()): 2**30,
        ("model_flops_utilization_ratio", ()): 0.4,
        ("divergence_risk_ratio", ()): 0.25,
        ("risk_cause_info", (*layer, ("site", "ffn_act"), ("statistic", "kurtosis"))): 1,
        ("steps_to_saturation_p10", ()): 10,
        ("steps_to_saturation_p50", ()): 20,
        ("steps_to_saturation_p90", ()): math.inf,
        ("actions_total", (("action", "skip_step"), ("cause", "nonfinite"))): 4,
        ("nonfinite_steps_total", ()): 5,
        ("skipped_steps_total", ()): 4,
        ("loss_scale", ()): 1024,
        ("fp8_saturated_tensors", ()): 1,
        ("fp8_max_saturation_ratio", ()): 1.5,
        ("activation_kurtosis", (*layer, ("site", "ffn_act"))): 4.0,
        ("fp8_headroom_log2", (*layer, ("tensor", "attention.inner_attention.ds"))): 1.5,
        ("fp8_saturated_ratio", layer): 0.0,
        ("fp8_underflowed_ratio", layer): 0.1,
        ("ffn_alignment_max", layer): 0.5,
        ("ffn_alignment_q999", layer): 0.4,
        ("attention_logit_max", layer): 7.0,
        ("attention_entropy_nats", layer): 2.0,
    }
    expected = {(f"titan_fp8_{name}", labels): value for (name, labels), value in expected.items()}
    assert {key: got[key] for key in expected} == expected
    # DROPPED has a test of its own.
    assert {name for name, _ in got} == {row.name for row in TABLE} - {"titan_fp8_dropped_samples_total"}


def test_about_a_thousand_series_at_32_layers(samples):
    got = samples(RUN, train(10, layers=32), VALIDATION)
    assert 28 * 32 < len(got) < 1000
    assert len(samples(train(20, layers=32))) == len(got)  # and they do not grow


def test_series_are_bounded(samples, monkeypatch, caplog):
    monkeypatch.setattr(exporter_module, "MOST_SERIES", 100)
    got = samples(RUN, *(train(step, layers=step) for step in range(1, 20)))
    assert len(got) == 101 and "layers" not in caplog.text
    assert got["titan_fp8_dropped_samples_total", ()] > 100
    assert got["titan_fp8_steps_total", ()] == 19  # what there is goes on
    assert caplog.text.count("100 series and no more") == 1


def test_the_worst_tensor_speaks_for_its_layer(samples):
    row = train(1)
    row["statistics"]["layers.1.attention.wo.x"]["saturated_share"] = 0.01
    row["statistics"]["layers.0.attention.wo.dy"]["saturated_share"] = math.nan
    row["statistics"]["loss.h"] = {"headroom": -0.5, "saturated_share": 0.5}
    got = samples(row)
    name = "titan_fp8_fp8_saturated_ratio"
    assert got[name, (("layer", "1"),)] == 0.01
    assert math.isnan(got[name, (("layer", "0"),)])
    assert got[name, (("layer", ""),)] == 0.5
    assert got["titan_fp8_fp8_headroom_log2", (("layer", ""), ("tensor", "loss.h"))] == -0.5


def test_the_cause_is_one(samples):
    causes = lambda got: [labels for name, labels in got if name == "titan_fp8_risk_cause_info"]  # noqa: E731
    samples(train(1))
    got = samples(train(2, cause="layers.0.attention.wo.x.headroom"))
    assert causes(got) == [(("layer", "0"), ("site", "attention.wo.x"), ("statistic", "headroom"))]
    assert causes(samples(train(3, cause="loss"))) == [(("layer", ""), ("site", ""), ("statistic", "loss"))]
    assert len(causes(samples(train(4, cause=None)))) == 0


def test_what_a_step_does_not_tell_is_served_no_longer(samples):
    """Attention leaves FP8 while its tensors clamp, and a kurtosis is not finite any more; a step without statistics tells
    of none, and takes none away."""
    row = train(1)
    for name, values in row["statistics"].items():
        if "inner_attention" in name:
            values |= {"headroom": -2.5, "saturated_share": 0.01}
    before = samples(RUN, row)
    assert before["titan_fp8_fp8_saturated_ratio", (("layer", "0"),)] == 0.01
    row = train(2)
    row["statistics"] = {name: s for name, s in row["statistics"].items() if "inner_attention" not in name}
    row["statistics"]["layers.0.ffn_act"] = {"nonfinite": 3}
    got = samples(row)
    gone = {("titan_fp8_activation_kurtosis", (("layer", "0"), ("site", "ffn_act")))}
    gone |= {key for key in before if "inner_attention" in str(key)}
    assert len(gone) == 11 and before.keys() - got.keys() == gone
    assert got["titan_fp8_fp8_saturated_ratio", (("layer", "0"),)] == 0.0
    unseen = {key: value for key, value in train(3).items() if key != "statistics"}
    assert samples(unseen).keys() == got.keys()
    assert samples(train(4)).keys() == before.keys()


def test_a_run_without_statistics_has_no_such_series(samples):
    """As with stability.statistics = false, or in a BF16 run: absent, not 0."""
    row = {key: value for key, value in train(1).items() if key not in ("statistics", "fp8", "risk", "cause")}
    names = {name for name, _ in samples(row | {"memory_active_bytes": None, "mfu": None})}
    assert "titan_fp8_loss" in names
    assert not any(
        word in name
        for name in names
        for word in ("kurtosis", "fp8_fp8", "alignment", "risk", "active", "utiliz")
    )


@pytest.mark.parametrize("through_the_file", [False, True], ids=["live", "from metrics.jsonl"])
def test_nonfinite_values_are_served(samples, through_the_file):
    row = train(1, loss=math.nan, grad_norm=math.inf, mfu=None)
    row["statistics"]["layers.0.ffn_act"]["kurtosis"] = math.nan
    row["fp8"]["max_saturation"] = math.nan
    got = samples(json.loads(encode(row)) if through_the_file else row)
    assert math.isnan(got["titan_fp8_loss", ()])
    assert math.isnan(got["titan_fp8_fp8_max_saturation_ratio", ()])
    assert math.isnan(got["titan_fp8_activation_kurtosis", (("layer", "0"), ("site", "ffn_act"))])
    assert not math.isfinite(got["titan_fp8_grad_norm", ()])
    assert ("titan_fp8_model_flops_utilization_ratio", ()) not in got


def test_counts_of_actions_go_on_from_a_checkpoint(exporter, samples):
    exporter.set_actions({("roll_back", "loss_spike"): 2})
    got = samples({"kind": "action", "step": 3, "action": "roll_back", "cause": "loss_spike", "why": "x"})
    assert got["titan_fp8_actions_total", (("action", "roll_back"), ("cause", "loss_spike"))] == 3


# ---- Text file ----


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_a_text_file_for_node_exporter(tmp_path):
    path = tmp_path / "run.prom"
    exporter = Exporter(textfile=str(path))
    assert exporter.start() == [str(path)]
    exporter.update(train(1))
    wait_for(path.exists)
    exporter.update(train(2, loss=1.5))
    wait_for(lambda: "\ntitan_fp8_loss 1.5\n" in path.read_text())
    assert [file.name for file in tmp_path.iterdir()] == ["run.prom"]
    exporter.close()
    exporter.close()
    assert list(tmp_path.iterdir()) == []


def test_after_an_error_the_text_file_stays_with_the_last_row(tmp_path):
    """As after a stop because of NaN, which an alert must see."""
    path = tmp_path / "run.prom"
    exporter = Exporter(textfile=str(path))
    exporter.start()
    with pytest.raises(UserError):
        try:
            exporter.update(train(1, loss=math.nan))
            raise UserError("step 1: the loss is not finite")
        finally:
            exporter.close()
    assert "\ntitan_fp8_loss NaN\n" in path.read_text()


def test_a_run_without_a_row_writes_no_text_file(tmp_path):
    exporter = Exporter(textfile=str(tmp_path / "run.prom"))
    exporter.start()
    with pytest.raises(UserError):
        try:
            raise UserError("a finished run")
        finally:
            exporter.close()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_or_hangs_does_not_touch_training(tmp_path, monkeypatch, caplog):
    """Each write waits, then fails; rows come at once. The trouble is told once."""
    written = []

    def write(path, registry):
        time.sleep(0.2)
        written.append(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter_module, "write_to_textfile", write)
    exporter = Exporter(textfile=str(tmp_path / "run.prom"))
    exporter.start()
    started = time.monotonic()
    for step in range(1, 6):
        exporter.update({"kind": "train", "step": step, "loss": 1.0})
    assert time.monotonic() - started < 0.2
    wait_for(lambda: written)
    exporter.update({"kind": "train", "step": 6, "loss": 1.0})
    wait_for(lambda: len(written) >= 2)
    exporter.close()
    assert caplog.text.count("No space left on device") == 1 and "training goes on" in caplog.text


@pytest.mark.parametrize("path", ["run.txt", "/no/such/folder/run.prom"])
def test_a_text_file_that_cannot_be_is_refused(path):
    with pytest.raises(UserError, match=r"\*\.prom file"):
        Exporter(textfile=path)
