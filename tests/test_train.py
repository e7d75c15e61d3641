"""The trainer, in this process: gating of bad steps, loss scaling, resume, errors that leave the last checkpoint alone."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from titan_fp8.config import load_config
from titan_fp8.errors import UserError
from titan_fp8.stability.predictor import series_of
from titan_fp8.train import Trainer, main

pytestmark = pytest.mark.usefixtures("gloo")
CONFIG = Path(__file__).parent.parent / "train_configs" / "debug.toml"


@pytest.fixture
def make(tmp_path, text):
    """Trainer factory: a two-layer FOG in full FP8 on tiny batches; extra flags win."""
    trainers = []

    def build(*flags: str) -> Trainer:
        base = {
            "job.config_file": CONFIG, "job.dump_folder": tmp_path, "architecture.n_layers": 2, "training.seq_len": 32,
            "training.local_batch_size": 4, "validation.seq_len": 32, "validation.local_batch_size": 4,
            "validation.enable": "false", "data.source": "files", "data.path": text, "training.steps": 8,
            "metrics.log_freq": 1, "prometheus.enable": "false", "metrics.enable_tensorboard": "false",
            "checkpoint.interval": 4, "lr_scheduler.warmup_steps": 2, "fp8.amax_history": 4, "data.held_out": 0.1,
        }  # fmt: skip
        flags = tuple(f"--{key}={value}" for key, value in base.items()) + flags
        trainers.append(Trainer(load_config(list(flags))))
        return trainers[-1]

    yield build
    for trainer in trainers:
        trainer.close()


def rows(folder: Path, kind: str = "train") -> dict[int, dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in lines if row["kind"] == kind}


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_resume_is_bit_exact_and_fp8_state_is_in_the_checkpoint(make, tmp_path):
    make("--job.dump_folder", str(tmp_path / "a")).train()
    b = make("--job.dump_folder", str(tmp_path / "b"), "--training.steps=4", "--lr_scheduler.total_steps=8")
    b.train()
    b.close()
    resumed = make("--job.dump_folder", str(tmp_path / "b"))
    resumed.train()
    a_rows, b_rows = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert list(a_rows) == list(b_rows) == list(range(1, 9))
    for step in a_rows:
        for key in ("loss", "grad_norm", "lr", "bits_per_byte", "tokens", "fp8"):
            assert a_rows[step].get(key) == b_rows[step].get(key), (step, key)
    assert int(resumed.scaling.steps) == 8
    assert (resumed.scaling.history > 0).all()


@pytest.mark.parametrize("fp8", ["false", "true"])
def test_resuming_takes_the_optimizers_settings_from_the_configuration(make, tmp_path, fp8):
    """Not from the checkpoint: a lower learning rate is what one resumes with after a spike. A roll-back does the same."""
    common = [f"--optimizer.fp8.enable={fp8}", "--checkpoint.interval=2", "--lr_scheduler.decay_ratio=0.5"]
    make(*common, "--training.steps=4", "--lr_scheduler.total_steps=5", "--optimizer.lr=1e-3").train()
    new = [
        "--optimizer.lr=1e-5",
        "--optimizer.weight_decay=0.5",
        "--optimizer.beta1=0.5",
        "--optimizer.eps=1e-7",
    ]
    trainer = make(*common, *new, "--training.steps=6", "--lr_scheduler.total_steps=12")

    def settings() -> list:
        (group,) = trainer.optimizers.optimizers[0].param_groups
        return [group[key] for key in ("initial_lr", "weight_decay", "betas", "eps")]

    before = settings()
    trainer.train()
    assert settings() == before == [1e-5, 0.5, (0.5, 0.95), 1e-7]
    # The first run's rate fell from step 5 on. In 12 steps it falls after the sixth.
    assert [rows(tmp_path)[step]["lr"] for step in (4, 5, 6)] == [1e-3, 1e-5, 1e-5]
    trainer.checkpointer.roll_back(4)
    assert settings() == before and trainer.lr_schedulers.schedulers[0].get_last_lr() == [1e-5]


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise", "rowwise", "delayed"])
def test_every_recipe_trains(make, tmp_path, recipe):
    attention = "full" if recipe == "delayed" else "off"
    make(f"--fp8.recipe={recipe}", f"--fp8.attention={attention}", "--training.steps=12").train()
    losses = [row["loss"] for row in rows(tmp_path).values()]
    assert losses[-1] < losses[0] - 0.5


def poison(trainer: Trainer, step: int, module: torch.nn.Module) -> None:
    """Make `module` return NaN in training step `step`."""

    def hook(_module, _args, output):
        return output * float("nan") if trainer.step == step else output

    module.register_forward_hook(hook)


def test_nan_in_the_loss_names_step_and_layer_and_overwrites_nothing(make, tmp_path):
    trainer = make()
    poison(trainer, 6, trainer.model.layers["1"].feed_forward)
    with pytest.raises(UserError) as error:
        trainer.train()
    message = str(error.value)
    assert "step 6" in message and "layers.1" in message and "\n" not in message
    assert "weights were not updated" in message
    assert all(parameter.isfinite().all() for parameter in trainer.parameters.values())
    assert trainer.scaling.history.isfinite().all() and trainer.scaling.scale.isfinite().all()
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["step-4"]


def test_the_bad_step_is_named_though_the_host_looks_later(make):
    trainer = make("--metrics.log_freq=5")
    poison(trainer, 3, trainer.model.layers["0"].attention)
    with pytest.raises(UserError, match=r"step 3: .*layers\.0"):
        trainer.train()


def test_allowed_bad_steps_are_skipped_and_weights_untouched(make, tmp_path):
    trainer = make("--stability.skip_nonfinite_steps=1", "--training.steps=4")
    poison(trainer, 3, trainer.model.layers["1"].feed_forward)
    seen = {}
    step_of = trainer.optimizers.step

    def step(*args, **kwargs):
        before = whole_state(trainer)["layers.0.attention.wq.weight"]
        step_of(*args, **kwargs)
        seen[trainer.step] = bool((whole_state(trainer)["layers.0.attention.wq.weight"] != before).any())

    trainer.optimizers.step = step
    trainer.train()
    assert seen == {1: True, 2: True, 3: False, 4: True}
    assert rows(tmp_path)[4]["skipped_steps"] == 1
    assert trainer.scaling.nonfinite_steps.sum() > 0
    assert trainer.scaling.history.isfinite().all()


def test_two_bad_steps_in_a_row_stop_where_one_is_allowed(make):
    trainer = make("--stability.skip_nonfinite_steps=1")
    for step in (3, 4):
        poison(trainer, step, trainer.model.layers["1"].feed_forward)
    with pytest.raises(UserError, match="step"):
        trainer.train()


def test_loss_scale_backs_off_on_overflow_and_grows_again(make, tmp_path):
    trainer = make(
        "--fp8.loss_scale.enable", "--fp8.loss_scale.init=1024", "--fp8.loss_scale.growth_interval=3", "--training.steps=8"
    )  # fmt: skip

    def overflow(grad):
        return grad * float("inf") if trainer.step == 2 else grad

    trainer.parameters["layers.0.attention.wq.weight"].register_hook(overflow)
    trainer.train()
    scales = [row["loss_scale"] for row in rows(tmp_path).values()]
    # Logged after the step that changed it: halved by step 2, doubled after three good steps (5), and after three more (8).
    assert scales == [1024, 512, 512, 512, 1024, 1024, 1024, 2048]
    assert rows(tmp_path)[8]["skipped_steps"] == 1
    assert trainer.state_dict()["loss_scale"]["skipped"] == 1


def test_loss_scale_changes_no_gradient(make, tmp_path):
    """Backward is linear and a power of two is exact: a run with a constant loss scale is the run without, bit for bit."""
    flags = ("--fp8.recipe=bf16", "--fp8.attention=off", "--training.steps=3")
    make("--job.dump_folder", str(tmp_path / "plain"), *flags).train()
    plain = [row["loss"] for row in rows(tmp_path / "plain").values()]
    trainer = make("--job.dump_folder", str(tmp_path / "by_hand"), *flags)
    trainer.loss_scaler.scale.fill_(256.0)
    trainer.train()
    by_hand = [row["loss"] for row in rows(tmp_path / "by_hand").values()]
    assert by_hand == plain


def test_disk_full_keeps_the_last_good_checkpoint(make, tmp_path, monkeypatch):
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    trainer = make("--checkpoint.interval=2", "--training.steps=4")
    write = FileSystemWriter.write_data

    def full(self, plan, planner):
        if trainer.step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, plan, planner)

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    with pytest.raises(UserError) as error:
        trainer.train()
    assert (
        "No space left" in str(error.value) and "step-2" in str(error.value) and "\n" not in str(error.value)
    )
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["step-2"]
    trainer.close()
    monkeypatch.undo()
    resumed = make("--training.steps=4")
    resumed.train()
    assert list(rows(tmp_path)) == [1, 2, 3, 4]


def test_a_checkpoint_of_another_architecture_is_refused(make, tmp_path):
    make("--training.steps=2").train()
    with pytest.raises(UserError, match="architecture") as error:
        make("--architecture.activation=swiglu").train()
    assert "\n" not in str(error.value)


def test_an_export_that_cannot_be_is_refused_before_training(make):
    for flag in ("last_save_in_hf", "initial_load_in_hf"):
        with pytest.raises(UserError, match=r"needs a Llama architecture.*export_hf"):
            make(f"--checkpoint.{flag}", "--checkpoint.last_save_model_only=true")


def test_a_dump_folder_that_cannot_be_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(
        sys,
        "argv",
        ["train", "--job.config_file", str(CONFIG), f"--job.dump_folder={tmp_path / 'file' / 'x'}"],
    )
    assert main() == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "job.dump_folder must be a folder that can be written, got" in line and "Not a directory" in line


def test_a_restart_does_not_try_again_what_a_person_must_mend(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--job.config_file", "/nowhere"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TITAN_FP8_ERROR_FILE", str(told := tmp_path / "error"))
    told.touch()
    assert main() == 2 and "/nowhere" in (first := told.read_text())
    monkeypatch.setattr("titan_fp8.train.load_config", lambda _: pytest.fail("tries again"))
    assert main() == 2 and told.read_text() == first


def test_a_finished_run_says_so(make):
    make("--training.steps=2").train()
    with pytest.raises(UserError, match="finished run, step 2 of 2"):
        make("--training.steps=2").train()


def test_gradient_accumulation_is_the_larger_batch(make, tmp_path):
    """Two micro-batches of 4 are one batch of 8, up to bf16 rounding of sums; amaxes are the maximum over both."""
    flags = ("--training.steps=3", "--fp8.recipe=bf16", "--fp8.attention=off")
    make("--job.dump_folder", str(tmp_path / "one"), "--training.local_batch_size=8", *flags).train()
    make("--job.dump_folder", str(tmp_path / "two"), "--training.global_batch_size=8", *flags).train()
    one, two = ([row["loss"] for row in rows(tmp_path / name).values()] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=2e-3)


def test_plain_data_parallel_is_refused(make, monkeypatch):
    from types import SimpleNamespace

    from torchtitan.train import Trainer as Titan

    monkeypatch.setattr(Titan, "init_distributed", lambda self: SimpleNamespace(dp_replicate=2, dp_shard=1))
    with pytest.raises(UserError, match="FSDP2"):
        make()


def test_a_vocabulary_smaller_than_the_tokenisers_is_refused(make):
    with pytest.raises(
        UserError, match="vocab_size must hold the tokeniser's 259 tokens, got 128: raise it to 272"
    ):
        make("--architecture.vocab_size=128")


def test_a_sequence_longer_than_the_models_is_refused(make):
    with pytest.raises(UserError, match=r"seq_len must not exceed .* got 4096 .*maximum 2048"):
        make("--training.seq_len=4096")


@pytest.mark.parametrize("recipe", ["bf16", "tensorwise", "delayed"])
def test_logged_steps_have_statistics_and_a_risk(make, tmp_path, recipe):
    """Steps 1, 3, 6, 8 are logged; every site is there in each recipe, FP8 tensors where scaling is delayed."""
    attention = "full" if recipe == "delayed" else "off"
    make(f"--fp8.recipe={recipe}", f"--fp8.attention={attention}", "--metrics.log_freq=3").train()
    found = rows(tmp_path)
    assert list(found) == [1, 3, 6, 8]
    for row in found.values():
        for site in ("residual", "qkv_in", "q", "k", "v", "attention_out", "ffn_up", "ffn_act", "ffn_out"):
            assert row["statistics"][f"layers.1.{site}"].keys() == {"mean", "rms", "kurtosis", "amax"}
        assert row["statistics"]["layers.0.attention"].keys() == {"logit_max", "entropy"}
        assert row["statistics"]["tok_embeddings"].keys() == {"weight_rms", "update_rms"}
        assert ("layers.0.attention.wqkv.dy" in row["statistics"]) == (recipe == "delayed")
        assert 0 <= row["risk"] <= 1 and {"cause", "cause_kind", "steps_to_saturation"} <= row.keys()
    series = series_of(found[8])
    assert "layers.1.ffn_act.kurtosis" in series and not any(name.startswith("statistics") for name in series)


def test_statistics_can_be_switched_off(make, tmp_path):
    make("--stability.no-statistics", "--training.steps=2").train()
    assert all("statistics" not in row and "risk" in row for row in rows(tmp_path).values())


def test_the_monitor_resumes_where_it_was(make, tmp_path):
    """Statistics, risk, totals and the predictor's state of a run that was interrupted after step 4, bit for bit. Of its bad
    steps two came before that, and one after: the monitor and the policy must see a third one, not a first."""
    folders = [tmp_path / name for name in ("whole", "halves")]
    flags = ["--lr_scheduler.total_steps=8", "--metrics.log_freq=2", "--stability.skip_nonfinite_steps=2"]

    def train(folder: Path, steps: int) -> Trainer:
        trainer = make(*flags, f"--job.dump_folder={folder}", f"--training.steps={steps}")
        assert trainer.metrics_processor.predictor.state_dict()["series"] == []
        for step in (2, 3, 5):
            poison(trainer, step, trainer.model.layers["1"].feed_forward)
        trainer.train()
        return trainer

    whole = train(folders[0], 8)
    train(folders[1], 4)
    again = train(folders[1], 8)
    keys = ("statistics", "risk", "cause", "cause_kind", "steps_to_saturation", "nonfinite_steps", "tokens")
    told = [
        {step: [row.get(key) for key in keys] for step, row in rows(folder).items()} for folder in folders
    ]
    assert told[0] == told[1] and list(told[0]) == [1, 2, 4, 6, 8]
    assert whole.metrics_processor.state_dict() == again.metrics_processor.state_dict()
    counts = again.metrics_processor.actions
    assert counts == whole.metrics_processor.actions and counts["skip_step", "nonfinite"] == 3


def test_a_checkpoint_without_a_monitor_loads(make, tmp_path):
    """As earlier versions wrote it: the predictor and the count of bad steps start afresh."""
    first = make("--training.steps=4")
    first.asked = {"step", "ntokens_seen", "loss_scale"}
    first.train()
    second = make()
    second.train()
    assert list(rows(tmp_path)) == list(range(1, 9))
    assert second.metrics_processor.predictor.state_dict()["step"] == 8
