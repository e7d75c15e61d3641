"""The processor as the trainer drives it, on a fake clock: what is measured, and where it arrives."""

import json
import logging
import math
import time

import pytest

TOKENS = 512


def steps(processor, clock, first, last, seconds=0.5, loss=2.0, **extra):
    """Train steps first..last as torchtitan's Trainer does: fetch, compute, log where should_log."""
    for step in range(first, last + 1):
        processor.ntokens_since_last_log += TOKENS
        processor.data_loading_times.append(0.1)
        clock.advance(seconds)
        if processor.should_log(step):
            metrics = {"n_tokens_seen": step * TOKENS, "lr": 1e-3, **extra}
            processor.log(step, loss, loss + 0.5, 1.25, extra_metrics=metrics)


def validate(processor, clock, step, loss, seconds=2.0, **extra):
    """As titan_fp8.validate: it costs time and reads tokens, which are not training's."""
    processor.begin_validation()
    clock.advance(seconds)
    processor.ntokens_since_last_log += 7 * TOKENS
    processor.log_validation(loss, step, extra)


def rows(tmp_path, kind):
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def report(**saturation):
    return {
        name: {"amax": 2.0, "scale": 4.0, "saturation": x, "saturated_steps": 3, "nonfinite_steps": 1}
        for name, x in saturation.items()
    }


def test_windows_of_any_length(make_processor, clock, tmp_path):
    """Step 1, every tenth, and the last step are logged; each row's speed is that of its own window."""
    processor = make_processor(steps=23)
    clock.advance(300)  # building the model is not training
    processor.resume(0)
    steps(processor, clock, 1, 1, seconds=20)
    steps(processor, clock, 2, 23, seconds=0.5)
    train = rows(tmp_path, "train")
    assert [row["step"] for row in train] == [1, 10, 20, 23]
    assert [row["step_seconds"] for row in train] == pytest.approx([20, 0.5, 0.5, 0.5])
    speeds = [row["tokens_per_second"] for row in train]
    assert speeds == pytest.approx([TOKENS / 20] + 3 * [TOKENS / 0.5])
    assert [row["data_seconds"] for row in train] == pytest.approx([0.1] * 4)
    assert train[1]["tokens"] == 10 * TOKENS
    assert train[1]["loss"] == 2.0 and train[1]["loss_max"] == 2.5 and train[1]["grad_norm"] == 1.25
    assert train[1]["lr"] == 1e-3
    assert train[1]["tflops"] == pytest.approx(TOKENS / 0.5 * 1e9 / 1e12)
    assert train[1]["memory_reserved_bytes"] is None or train[1]["memory_reserved_bytes"] > 2**20


def test_utilization_is_null_where_the_peak_is_unknown(make_processor, clock, tmp_path):
    processor = make_processor(steps=2, log_freq=1)
    processor.resume(0)
    processor.gpu_peak_flops = math.inf
    steps(processor, clock, 1, 1)
    processor.gpu_peak_flops = 2e12
    steps(processor, clock, 2, 2)
    first, second = rows(tmp_path, "train")
    assert first["mfu"] is None and "nonfinite" not in first
    assert second["mfu"] == pytest.approx(TOKENS / 0.5 * 1e9 / 2e12)


def test_first_window_after_a_resume(make_processor, clock, tmp_path):
    processor = make_processor(steps=20)
    processor.resume(0)
    steps(processor, clock, 1, 13)
    processor.close()

    processor = make_processor(steps=20)
    processor.resume(7)
    steps(processor, clock, 8, 20)
    train = rows(tmp_path, "train")
    assert [row["step"] for row in train] == [1, 10, 20]
    # The resumed process did 3 steps up to step 10, not log_freq.
    assert train[1]["step_seconds"] == pytest.approx(0.5)
    assert train[1]["tokens_per_second"] == pytest.approx(TOKENS / 0.5)
    assert [row["step"] for row in rows(tmp_path, "run")] == [0, 7]


@pytest.mark.parametrize("announced", [True, False], ids=["our validator", "torchtitan's validator"])
def test_validation_is_not_training(make_processor, clock, tmp_path, announced):
    processor = make_processor(steps=20)
    processor.resume(0)
    steps(processor, clock, 1, 15)
    if announced:
        processor.begin_validation()
    clock.advance(60)
    processor.ntokens_since_last_log += 7 * TOKENS
    processor.log_validation(1.75, 15, {"bits_per_byte": 0.9})
    steps(processor, clock, 16, 20)
    last = rows(tmp_path, "train")[-1]
    assert last["step"] == 20
    assert last["step_seconds"] == pytest.approx(0.5)
    assert last["tokens_per_second"] == pytest.approx(TOKENS / 0.5)
    assert rows(tmp_path, "validation") == [
        {"kind": "validation", "step": 15, "validation_loss": 1.75, "validation_bits_per_byte": 0.9}
    ]


def test_numbers_of_all_ranks(make_processor, clock, tmp_path, monkeypatch):
    """Two ranks that share each batch (TP 2): speed counts it once; waits and peaks are the worst rank's."""
    import torch.distributed as dist

    processor = make_processor(steps=1, ranks_per_batch=2)
    processor.resume(0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def two_ranks(gathered, mine):
        gathered[0].copy_(mine)
        gathered[1].copy_(mine)
        gathered[1][1:] *= 2

    monkeypatch.setattr(dist, "all_gather", two_ranks)
    monkeypatch.setattr(processor, "_peaks", lambda memory: (1.0, 1.5))
    steps(processor, clock, 1, 1)
    (row,) = rows(tmp_path, "train")
    assert row["tokens_per_second"] == pytest.approx(TOKENS / 0.5)
    assert row["tflops"] == pytest.approx(TOKENS / 0.5 * 1e9 / 1e12 / 2)
    assert row["data_seconds"] == pytest.approx(0.2)
    assert (row["memory_active_bytes"], row["memory_reserved_bytes"]) == (2 * 2**30, 3 * 2**30)


def test_nan_reaches_every_place(make_processor, clock, tmp_path, scrape):
    processor = make_processor(prometheus=True)
    processor.resume(0)
    processor.fp8_report = lambda: report(a=0.5, b=math.nan, c=1.5)
    steps(processor, clock, 1, 1, loss=math.nan, nonfinite_steps=1)
    (row,) = rows(tmp_path, "train")
    assert row["loss"] is None
    assert row["fp8"] == {"saturated_tensors": 2, "max_saturation": None, "worst": "b"}
    assert row["nonfinite"] == ["loss", "loss_max", "fp8.max_saturation"]
    samples = scrape(processor.exporter.endpoint.port)
    assert math.isnan(samples["titan_fp8_loss", ()])
    assert samples["titan_fp8_nonfinite_steps_total", ()] == 1


def test_prometheus_sees_what_is_logged(make_processor, clock, tmp_path, scrape):
    processor = make_processor(prometheus=True)
    processor.resume(0)
    processor.fp8_report = lambda: report(**{"layers.0.attention.wq.x": 1.5})
    steps(processor, clock, 1, 10, skipped_steps=4, nonfinite_steps=5, loss_scale=1024.0, bits_per_byte=1.1)
    validate(processor, clock, 10, 1.75, bits_per_byte=0.9)
    samples = scrape(processor.exporter.endpoint.port)
    assert samples["titan_fp8_last_step_timestamp_seconds", ()] > 1.7e9
    labels = (
        ("activation", "xielu"),
        ("model", "titan_fp8 debug"),
        ("recipe", "delayed"),
        ("version", "0.1.0"),
    )
    assert samples["titan_fp8_build_info", labels] == 1
    (_, row), (validation,) = rows(tmp_path, "train"), rows(tmp_path, "validation")
    expected = {
        "titan_fp8_steps_total": 10,
        "titan_fp8_tokens_total": row["tokens"],
        "titan_fp8_loss": row["loss"],
        "titan_fp8_validation_loss": validation["validation_loss"],
        "titan_fp8_learning_rate": row["lr"],
        "titan_fp8_step_seconds": row["step_seconds"],
        "titan_fp8_log_interval_seconds": 9 * row["step_seconds"],
        "titan_fp8_skipped_steps_total": 4,
        "titan_fp8_nonfinite_steps_total": 5,
        "titan_fp8_fp8_max_saturation_ratio": 1.5,
    }
    assert {name: samples[name, ()] for name in expected} == pytest.approx(expected)


def test_a_text_file_alone(make_processor, clock, tmp_path):
    processor = make_processor(textfile=tmp_path / "run.prom")
    processor.resume(0)
    assert processor.exporter.endpoint is None
    steps(processor, clock, 1, 1)
    end = time.monotonic() + 10
    while (
        not (tmp_path / "run.prom").exists()
        or "titan_fp8_loss 2.0" not in (tmp_path / "run.prom").read_text()
    ):
        assert time.monotonic() < end
    processor.close()
    assert not (tmp_path / "run.prom").exists()


def test_close_frees_the_port_and_may_come_twice(make_processor):
    from titan_fp8.stability.exporter import Exporter

    processor = make_processor(prometheus=True)
    processor.resume(0)
    port = processor.exporter.endpoint.port
    processor.close()
    processor.close()
    again = Exporter({"host": "127.0.0.1", "port": port})
    assert again.start() == [f"http://127.0.0.1:{port}/metrics"]
    again.close()


def test_console_line(make_processor, clock, caplog):
    processor = make_processor(steps=100)
    processor.resume(0)
    processor.gpu_peak_flops = math.inf
    processor.fp8_report = lambda: report(a=0.5, b=1.25)
    with caplog.at_level(logging.INFO):
        steps(processor, clock, 1, 20, seconds=1.0)
    lines = [record.message for record in caplog.records if "step:" in record.message]
    assert lines[0].startswith("step:  1/100  loss:  2.00000  grad_norm:  1.2500  memory: ")
    assert "eta: ?" in lines[0]
    assert "tps: 512  tflops: 0.51  mfu: n/a  eta: 1m20s  fp8: 1 clamped (b: 1.25x)" in lines[2]


def test_tensorboard_keeps_torchtitans_tags(make_processor, clock, monkeypatch):
    processor = make_processor(log_freq=1)
    processor.resume(0)
    seen = {}
    monkeypatch.setattr(processor.logger, "log", lambda metrics, step: seen.update(metrics))
    steps(processor, clock, 1, 1)
    assert seen["time_metrics/end_to_end(s)"] == pytest.approx(0.5)
    assert seen["time_metrics/data_loading(%)"] == pytest.approx(20)
    # Every tag that torchtitan's own log() writes, read off a call of it.
    from torchtitan.components.metrics import MetricsProcessor

    ours = set(seen)
    seen.clear()
    processor.ntokens_since_last_log, processor.data_loading_times = 1, [0.1]
    clock.advance(1)
    processor.gpu_peak_flops = 1e12
    MetricsProcessor.log(processor, 2, 2.0, 2.5, 1.0, {"n_tokens_seen": 1, "lr": 1e-3})
    assert set(seen) - ours <= {"mfu(%)"}


def test_summary(make_processor, clock, tmp_path):
    processor = make_processor(steps=20)
    processor.unigram_entropy = 2.75
    processor.resume(0)
    steps(processor, clock, 1, 10, loss=3.0)
    validate(processor, clock, 10, 2.5, bits_per_byte=1.5)
    processor.close()

    processor = make_processor(steps=20, tensorboard=True)
    processor.job_config.checkpoint.enable = True
    processor.unigram_entropy = 2.75
    processor.next_command = "./run_train.sh train_configs/390m.toml"
    processor.log_folder = "outputs/logs"
    processor.resume(10)
    steps(processor, clock, 11, 20, loss=2.0, bits_per_byte=1.25)
    validate(processor, clock, 20, math.nan)
    assert processor.summary() == [
        "Loss: 3.000 at step 1, 2.000 at step 20 (nats per token)",
        "Held-out loss: nan at step 20; best 2.500 at step 10",
        "Token frequencies alone would give a loss of 2.750; the model is 0.250 below that",
        "Bits per byte: 1.250 training",
        "Total time: 7s",
        f"Metrics: {tmp_path}/metrics.jsonl",
        f"TensorBoard: tensorboard --logdir {tmp_path}/tb",
        f"Checkpoints: {tmp_path}/checkpoint",
        "Logs: outputs/logs",
        "Try next: ./run_train.sh train_configs/390m.toml",
    ]


def test_statistics_reach_row_and_predictor(make_processor, clock, tmp_path):
    """A kurtosis that grows tenfold in forty rows becomes a risk with that cause; a saved state goes on bit for bit."""
    first = make_processor(steps=200, log_freq=1)
    table = {}
    first.resume(0)
    first.statistics = lambda: table
    for step in range(1, 81):
        table = {"layers.1.ffn_act": {"kurtosis": 4 * 10 ** (step / 40), "amax": 3.0}}
        steps(first, clock, step, step)
        if step == 60:
            saved = json.loads(json.dumps(first.state_dict()))
    train = rows(tmp_path, "train")
    assert train[9]["risk"] == 0 and train[9]["cause"] is None and train[9]["steps_to_saturation"] is None
    last = train[-1]
    assert last["statistics"] == table
    assert last["risk"] > 0.5
    assert (last["cause"], last["cause_kind"]) == ("layers.1.ffn_act.kurtosis", "trend")
    assert first.prediction.risk == pytest.approx(last["risk"], rel=1e-5)
    soon, median, late = last["steps_to_saturation"]
    assert soon <= median and (late is None or median <= late)

    again = make_processor(steps=200, log_freq=1)
    again.load_state_dict(saved)
    again.resume(60)
    again.statistics = lambda: table
    for step in range(61, 81):
        table = {"layers.1.ffn_act": {"kurtosis": 4 * 10 ** (step / 40), "amax": 3.0}}
        steps(again, clock, step, step)
    assert again.state_dict() == first.state_dict()


def test_actions_reach_the_journal_and_prometheus(make_processor, tmp_path, scrape):
    """Counts of a loaded checkpoint are there from the start."""
    from titan_fp8.stability.policy import Action

    processor = make_processor(prometheus=True)
    processor.actions = {("checkpoint", "predicted"): 2}
    processor.resume(0)
    label = ("titan_fp8_actions_total", (("action", "checkpoint"), ("cause", "predicted")))
    port = processor.exporter.endpoint.port
    assert scrape(port)[label] == 2
    action = Action("checkpoint", "predicted", "risk 0.95")
    processor.act(3, action, {("checkpoint", "predicted"): 3})
    assert scrape(port)[label] == 3
    assert [row["why"] for row in rows(tmp_path, "action")] == ["risk 0.95"]
