"""Saving, surviving and loading: round trips, killed runs, full disks, other models, FP8 state, purging."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import refusal
from torch import nn
from torch.distributed.checkpoint import filesystem

from titan_fp8.checkpoint import FP8_STATE, SafeCheckpointManager, _file_trouble, compare_weights
from titan_fp8.checkpoint_folder import complete_steps, tidy
from titan_fp8.errors import UserError
from titan_fp8.float8.formats import E4M3, E5M2
from titan_fp8.float8.scaling import DelayedScaling, Recipe, TensorScale

pytestmark = pytest.mark.usefixtures("gloo")


class Tiny(nn.Module):
    """Two weights and, like the real model, optional FP8 scaling state in buffers."""

    def __init__(self, width: int = 4, history: int | None = None):
        super().__init__()
        self.up = nn.Linear(3, width, bias=False)
        self.down = nn.Linear(width, 3, bias=False)
        if history is not None:
            self.float8_state = nn.Module()
            self.float8_state.register_buffer("amaxes", torch.zeros(2, history))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class Counter:
    """Stands for the trainer: one number."""

    def __init__(self):
        self.step = 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


class Run:
    """A model, its optimizer and schedule, and a checkpoint manager below `base`."""

    def __init__(self, base: Path, model: nn.Module | None = None, adapter=None, **settings):
        from torchtitan.components.lr_scheduler import LRSchedulersContainer
        from torchtitan.components.optimizer import OptimizersContainer
        from torchtitan.config import Checkpoint

        self.model = model or Tiny()
        self.optimizers = OptimizersContainer([self.model], torch.optim.AdamW, {"lr": 0.1})
        self.counter = Counter()
        config = dataclasses.replace(Checkpoint(enable=True, interval=1, keep_latest_k=0), **settings)
        self.manager = SafeCheckpointManager(
            dataloader=None,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=LRSchedulersContainer(self.optimizers, lambda step: 1.0),
            states={"train_state": self.counter},
            checkpoint_config=config,
            sd_adapter=adapter,
            base_folder=str(base),
        )

    def train(self, steps: int = 1, last: bool = False) -> Run:
        """Steps with a save after each; `last`: the last one is the run's last."""
        for index in range(steps):
            self.counter.step += 1
            self.optimizers.zero_grad()
            self.model(torch.ones(2, 3) * self.counter.step).square().sum().backward()
            self.optimizers.step()
            self.manager.save(self.counter.step, last_step=last and index == steps - 1)
        return self

    def state(self) -> list[torch.Tensor]:
        moments = [self.optimizers.state_dict()[f"state.{n}.weight.exp_avg_sq"] for n in ("up", "down")]
        return [p.detach().clone() for p in self.model.parameters()] + [m.clone() for m in moments]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_round_trip(tmp_path, place, mode):
    first = Run(tmp_path, async_mode=mode).train(3)
    first.manager.close()  # an async save takes its name no later than here
    assert sorted(os.listdir(place)) == ["step-1", "step-2", "step-3"]
    second = Run(tmp_path)
    assert not same(first.state(), second.state())
    assert second.manager.load()
    assert second.counter.step == 3 and same(first.state(), second.state())
    # Both go on in the same way: everything that matters was in the checkpoint.
    state = first.train().state()
    first.manager.close()
    assert same(state, second.train().state())
    assert Run(tmp_path).manager.load(step=1)


def test_no_checkpoint_is_no_error(tmp_path):
    assert Run(tmp_path).manager.load() is False


def test_only_a_finished_save_has_the_name(tmp_path, place, monkeypatch):
    """While torch writes, even its table of contents, there is no new step-<n> for anyone to load."""
    run = Run(tmp_path).train()
    seen = []
    finish = filesystem.FileSystemWriter.finish

    def spy(self, metadata, results):
        finish(self, metadata, results)
        seen.append((complete_steps(place), run.manager._find_load_step(), sorted(os.listdir(place))))

    monkeypatch.setattr(filesystem.FileSystemWriter, "finish", spy)
    run.train()
    assert seen == [([1], 1, ["partial-2", "step-1"])]
    assert complete_steps(place) == [1, 2]


def test_leftovers_of_a_killed_run(tmp_path, place, caplog):
    state = Run(tmp_path).train(2).state()
    (place / "step-2").rename(place / "partial-7")  # a table of contents, but no name: not to be trusted
    (place / "stale-1").mkdir()
    (place / "step-9").mkdir()  # no table of contents: not complete
    with caplog.at_level(logging.WARNING):
        run = Run(tmp_path)
    assert sorted(os.listdir(place)) == ["step-1", "step-9"]
    assert "partial-7" in caplog.text and "stale-1" in caplog.text
    assert run.manager.load() and run.counter.step == 1
    assert not same(state, run.state())


def test_killed_while_replacing_keeps_the_former_one(tmp_path, place):
    state = Run(tmp_path).train().state()
    (place / "step-1").rename(place / "replaced-1")
    (place / "partial-1").mkdir()
    run = Run(tmp_path)
    assert os.listdir(place) == ["step-1"]
    assert run.manager.load() and same(state, run.state())


def test_load_only_leaves_anothers_partial_save_alone(tmp_path, place):
    Run(tmp_path).train()
    (place / "partial-2").mkdir()
    assert Run(tmp_path, load_only=True).manager.load()
    assert (place / "partial-2").is_dir()


def test_saving_a_step_again_replaces_it(tmp_path, place):
    Run(tmp_path).train()
    state = Run(tmp_path).train().state()
    assert os.listdir(place) == ["step-1"]
    run = Run(tmp_path)
    assert run.manager.load() and same(state, run.state())


def test_a_rename_that_fails_puts_the_former_one_back(tmp_path, place, monkeypatch):
    state = Run(tmp_path).train().state()
    rename = Path.rename

    def fail_once(self, target):
        if self.name == "partial-1":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    refusal(
        Run(tmp_path).train, "could not save step-1", "Input/output error", "last good checkpoint is step-1"
    )
    monkeypatch.undo()
    run = Run(tmp_path)
    assert os.listdir(place) == ["step-1"]
    assert run.manager.load() and same(state, run.state())


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_full_disk(tmp_path, place, mode, monkeypatch):
    run = Run(tmp_path, async_mode=mode).train(2)
    run.manager._async_wait()

    def full(self, plan, planner):
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path / "__0_0.distcp"))

    with monkeypatch.context() as patch:
        patch.setattr(filesystem.FileSystemWriter, "write_data", full)

        def save_and_wait():
            run.train()
            run.manager.close()

        words = (
            "could not save step-3",
            str(place),
            "No space left on device",
            "last good checkpoint is step-2",
        )
        refusal(save_and_wait, *words)
    assert sorted(os.listdir(place)) == ["step-1", "step-2"]
    other = Run(tmp_path)
    assert other.manager.load() and other.counter.step == 2


def test_async_failure_is_told_at_the_next_save(tmp_path, place, monkeypatch):
    run = Run(tmp_path, async_mode="async").train()
    run.manager._async_wait()

    def full(self, plan, planner):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(filesystem.FileSystemWriter, "write_data", full)
        run.train()
        refusal(run.train, "could not save step-2", "No space left", "last good checkpoint is step-1")
    run.manager.close()
    assert os.listdir(place) == ["step-1"]


def test_close_does_not_hide_the_error_that_ended_the_run(tmp_path, monkeypatch, caplog):
    run = Run(tmp_path, async_mode="async")

    def full(self, plan, planner):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(filesystem.FileSystemWriter, "write_data", full)
    run.train()
    with pytest.raises(KeyError, match="the real reason"):
        try:
            raise KeyError("the real reason")
        except KeyError:
            run.manager.close()
            raise
    assert "could not save step-1" in caplog.text and "last good checkpoint is none yet" in caplog.text


def test_write_that_the_kernel_refuses(tmp_path, place):
    """A real failure in the middle of a file."""
    run = Run(tmp_path, model=Tiny(width=2000)).train()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        refusal(run.train, "could not save step-2", "File too large", "GiB free", "step-1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(place) == ["step-1"]
    run.train()
    assert complete_steps(place) == [1, 3]


def test_a_really_full_disk(tmp_path):
    """4 MiB of tmpfs, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mount.stderr.strip()}")
    try:
        run = Run(disk, model=Tiny(width=30_000)).train()  # 720 kB of weights, 1.4 MB of moments
        refusal(run.train, "could not save step-2", "(0.00 GiB free)", "last good checkpoint is step-1")
        assert os.listdir(disk / "checkpoint") == ["step-1"]
        assert Run(disk, model=Tiny(width=30_000)).manager.load()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_write_error_of_another_rank():
    """Between processes only torch.save's own error arrives, without the OSError behind it."""
    hidden = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    failures = {1: dcp.api._wrap_exception(hidden)}
    assert _file_trouble(dcp.api.CheckpointException("write", failures)) == "a write failed"
    assert _file_trouble(ConnectionResetError("peer")) is None, "the network is not the disk"
    assert _file_trouble(RuntimeError("something else")) is None


def test_folder_that_cannot_be_made(tmp_path):
    """Told before the first step. What is only read need not be written."""
    (tmp_path / "checkpoint").write_text("a file")
    refusal(
        lambda: Run(tmp_path),
        "could not write checkpoints",
        "Not a directory",
        "last good checkpoint is none yet",
    )
    Run(tmp_path, load_only=True)
    Run(tmp_path, folder="probed")
    assert not (tmp_path / "probed").exists()  # else checkpoint.initial_load_path would be ignored


def test_errors_that_are_not_about_files_stay_themselves(tmp_path, place, monkeypatch):
    run = Run(tmp_path).train()

    def bug(self, plan, planner):
        raise KeyError("a bug")

    monkeypatch.setattr(filesystem.FileSystemWriter, "write_data", bug)
    with pytest.raises(dcp.api.CheckpointException, match="a bug"):
        run.train()
    assert os.listdir(place) == ["step-1"]


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_purge_keeps_the_newest_complete_ones(tmp_path, place, mode):
    place.mkdir()
    (place / "step-90").mkdir()  # not complete: neither counted nor deleted
    (place / "step-1-notes").mkdir()  # a user's own
    run = Run(tmp_path, keep_latest_k=2, async_mode=mode).train(4)
    run.manager.close()  # joins the purge thread
    assert sorted(os.listdir(place)) == ["step-1-notes", "step-3", "step-4", "step-90"]


def test_what_is_held_is_not_purged(tmp_path, place):
    run = Run(tmp_path, keep_latest_k=2).train(2)
    run.manager.held = 1
    run.train(2)
    assert complete_steps(place) == [1, 3, 4]
    run.manager.held = None
    run.train().manager.close()
    assert complete_steps(place) == [4, 5]


def test_a_requested_checkpoint_is_the_next_save_whatever_the_interval(tmp_path, place):
    run = Run(tmp_path, interval=10).train(2)
    run.manager.request()
    run.train(3)
    assert complete_steps(place) == [3]
    none = Run(tmp_path / "none", enable=False)
    none.manager.request()
    none.train()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_roll_back_loads_all_and_leaves_nothing_later(tmp_path, place, mode):
    run = Run(tmp_path, async_mode=mode).train(2)
    then = run.state()
    run.train(2)
    assert not same(run.state(), then)
    run.manager.roll_back(2)
    assert same(run.state(), then) and run.counter.step == 2
    assert sorted(os.listdir(place)) == ["step-1", "step-2"]
    assert run.manager.save_now(2)  # although step 2 was saved before: the run may have changed what it holds
    run.train()
    run.manager.close()
    assert complete_steps(place) == [1, 2, 3]
    refusal(lambda: Run(tmp_path).manager.roll_back(7), "step must be a complete checkpoint", "7")


def test_failed_saves_do_not_purge(tmp_path, place, monkeypatch):
    run = Run(tmp_path, keep_latest_k=2).train(2)

    def full(self, plan, planner):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(filesystem.FileSystemWriter, "write_data", full)
        for _ in range(3):
            with pytest.raises(UserError):
                run.train()
    run.manager.close()
    assert complete_steps(place) == [1, 2]


def test_another_architecture_is_named(tmp_path):
    Run(tmp_path, model=Tiny(width=4)).train()
    message = refusal(Run(tmp_path, model=Tiny(width=8)).manager.load, "another architecture")
    assert "up.weight is [4, 3] there, [8, 3] here" in message

    deeper = Tiny()
    deeper.extra = nn.Linear(2, 2)
    refusal(Run(tmp_path, model=deeper).manager.load, "extra.weight is only here", "extra.bias is only here")
    smaller = nn.Sequential()
    smaller.up = nn.Linear(3, 4, bias=False)
    refusal(Run(tmp_path, model=smaller).manager.load, "down.weight is only there")


def test_differences_are_counted_beyond_three(tmp_path):
    Run(tmp_path).train()
    other = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    refusal(Run(tmp_path, model=other).manager.load, "; and 5 more; set [model]")  # 6 here, 2 there
    assert compare_weights({"a": (2, 3)}, {"a": (2, 3)}) == []


def test_missing_fp8_state_starts_fresh(tmp_path, caplog):
    first = Run(tmp_path).train()
    second = Run(tmp_path, model=Tiny(history=5))
    second.model.float8_state.amaxes.fill_(7)
    assert second.manager.load() and same(first.state(), second.state())
    assert "FP8 state not in the checkpoint: scales start from the first step." in caplog.text
    assert torch.equal(second.model.float8_state.amaxes, torch.full((2, 5), 7.0)), "left as it was"


def test_fp8_state_is_restored(tmp_path, caplog):
    first = Run(tmp_path, model=Tiny(history=5))
    first.model.float8_state.amaxes.copy_(torch.arange(10).reshape(2, 5))
    first.train()
    second = Run(tmp_path, model=Tiny(history=5))
    second.manager.load()
    assert torch.equal(first.model.float8_state.amaxes, second.model.float8_state.amaxes)
    # The other way round: a BF16 model takes the weights of an FP8 one.
    third = Run(tmp_path)
    assert third.manager.load() and same(first.state(), third.state())
    assert "this model lacks is ignored: float8_state.amaxes" in caplog.text
    # A history of another length: the weights load, the scales start again.
    fourth = Run(tmp_path, model=Tiny(history=6))
    assert fourth.manager.load() and same(first.state(), fourth.state())
    assert "does not fit (float8_state.amaxes)" in caplog.text
    assert FP8_STATE == "float8_state."


def test_fp8_state_of_other_tensors_is_not_taken(tmp_path, caplog):
    """Of as many tensors, so the shapes fit: another filter, or another format of attention's gradients."""

    def scaled(names: str, dtype: torch.dtype, older: bool = False) -> Tiny:
        model = Tiny()
        model.float8_state = DelayedScaling({name: TensorScale(dtype) for name in names}, Recipe(history=3))
        model.float8_state.init_weights()
        if older:  # as it was saved before names and formats were told
            buffers = model.float8_state._buffers
            del buffers[next(name for name in buffers if name.startswith("tensors_and_formats_"))]
        return model

    for older in (False, True):
        base = tmp_path / f"older {older}"
        first = Run(base, model=scaled("ab", E4M3, older))
        first.model.float8_state.history.fill_(7)
        first.train()
        # A name that another process gives too.
        assert older or "tensors_and_formats_8e0fb82b4b155ffb" in first.model.float8_state.state_dict()
        for names, dtype in (("ab", E4M3), ("ac", E4M3), ("ba", E4M3), ("ab", E5M2)):
            caplog.clear()
            second = Run(base, model=scaled(names, dtype))
            assert second.manager.load() and same(first.state(), second.state())
            taken = older or (names, dtype) == ("ab", E4M3)
            assert bool((second.model.float8_state.history == 7).all()) is taken, (names, dtype)
            assert ("does not fit (float8_state.tensors_and_formats_" in caplog.text) is not taken


def test_load_step_that_does_not_exist(tmp_path, place):
    Run(tmp_path).train(3)
    refusal(lambda: Run(tmp_path).manager.load(step=7), "got 7", "there are: 1, 2, 3")
    refusal(lambda: Run(tmp_path, folder="elsewhere").manager.load(step=7), "there are: none")


def test_load_step_sets_later_checkpoints_aside(tmp_path, place, caplog):
    """Neither purged by the new history nor taken for it."""
    run = Run(tmp_path, keep_latest_k=0).train(2)
    second = run.state()
    run.train(3)
    again = Run(tmp_path, keep_latest_k=2)
    assert again.manager.load(step=2) and again.counter.step == 2
    assert complete_steps(place) == [1, 2] and complete_steps(place / "abandoned-1") == [3, 4, 5]
    assert "later checkpoints (3, 4, 5) are in" in caplog.text and "Leave load_step out" in caplog.text
    again.train(1).manager.close()
    assert complete_steps(place) == [2, 3]
    other = Run(tmp_path)
    assert other.manager.load() and other.counter.step == 3
    assert Run(tmp_path).manager.load(step=2)
    assert complete_steps(place / "abandoned-1") == [3, 4, 5] and complete_steps(place / "abandoned-2") == [3]
    assert sorted(os.listdir(place)) == [".taken-up", "abandoned-1", "abandoned-2", "step-2"]
    looks = Run(tmp_path, folder="checkpoint/abandoned-1", load_only=True)
    assert looks.manager.load(step=3) and looks.counter.step == 3 and not same(looks.state(), second)
    assert complete_steps(place / "abandoned-1") == [3, 4, 5]


def test_a_restart_keeps_what_was_trained_after_load_step(tmp_path, place, monkeypatch):
    """torchrun starts a process that died again with the same load_step; a start by hand obeys it."""
    Run(tmp_path).train(4)
    for attempt, (start, trained) in enumerate([(2, 0), (2, 1), (3, 1), (4, 0)]):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        run = Run(tmp_path)
        if attempt == 0:
            continue  # died before it had loaded anything: the next one has it to do
        assert run.manager.load(step=2) and run.counter.step == start
        run.train(trained)
    assert complete_steps(place / "abandoned-1") == [3, 4]
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    run = Run(tmp_path)
    assert run.manager.load(step=2) and run.counter.step == 2


def test_model_only_last_save_cannot_be_resumed(tmp_path, place):
    Run(tmp_path, last_save_model_only=True).train(2, last=True)
    run = Run(tmp_path)
    words = "step-2 lacks train_state, optimizer, lr_scheduler", "as the last one of a finished run does"
    words = *words, "another (there are: 1)", "initial_load_path"
    refusal(run.manager.load, *words)
    fresh = Run(tmp_path, folder="new", initial_load_path=str(place / "step-2"))
    assert fresh.manager.load() and fresh.counter.step == 0
    assert run.manager.load(step=1)
    full = Run(tmp_path, folder="full", last_save_model_only=False).train(2, last=True)
    assert Run(tmp_path, folder="full").manager.load() and full.counter.step == 2


def test_damaged_checkpoints(tmp_path, place):
    Run(tmp_path).train(2)
    data = place / "step-2" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:1000])
    refusal(Run(tmp_path).manager.load, "step-2 is not a readable checkpoint", "there are: 1, 2")
    (place / "step-2" / ".metadata").write_bytes(b"not a pickle")
    refusal(Run(tmp_path).manager.load, "step-2 is not a readable checkpoint")
    assert Run(tmp_path).manager.load(step=1)


def test_initial_load(tmp_path, place):
    trained = Run(tmp_path).train()
    source = str(place / "step-1")
    refusal(Run(tmp_path, folder="a", initial_load_path="/no/such").manager.load, "got /no/such")
    (tmp_path / "b" / "notes").mkdir(parents=True)
    refusal(Run(tmp_path, folder="b", initial_load_path=source).manager.load, "exists and holds none")
    # A run killed in its first save leaves nothing that would make the next one ignore initial_load_path.
    (tmp_path / "c" / "partial-1").mkdir(parents=True)
    run = Run(tmp_path, folder="c", initial_load_path=source)
    assert run.manager.load() and torch.equal(run.model.up.weight, trained.model.up.weight)


def test_tidy_leaves_strangers_alone(tmp_path):
    for name in ("partial-x", "my-partial-3", "step-3"):
        (tmp_path / name).mkdir()
    tidy(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["my-partial-3", "partial-x", "step-3"]


class Adapter:
    """A Hugging Face adapter that renames nothing."""

    hf_assets_path = None

    def __init__(self, mapping=None):
        self.fqn_to_index_mapping = mapping

    def to_hf(self, state):
        assert not any(name.startswith(FP8_STATE) for name in state)
        return dict(state)

    def from_hf(self, state):
        return dict(state)

    def get_hf_storage_reader(self, path, from_quantized=False):
        return dcp.HuggingFaceStorageReader(path)


@pytest.mark.parametrize("mapping", [None, {"up.weight": 1, "down.weight": 2}])
def test_hugging_face_export(tmp_path, place, mapping):
    model = Tiny(history=3)
    settings = {"adapter": Adapter(mapping), "last_save_in_hf": True}
    Run(tmp_path, model=model, **settings).train(2, last=True)
    assert sorted(os.listdir(place)) == ["step-1", "step-2"]
    assert (place / "step-2" / "model.safetensors.index.json").is_file()
    refusal(
        Run(tmp_path, model=Tiny(history=3)).manager.load, "step-2", "is a Hugging Face export", "another (1)"
    )
    start = {"folder": "new", "initial_load_path": str(place / "step-2"), "initial_load_in_hf": True}
    run = Run(tmp_path, model=Tiny(history=3), adapter=Adapter(mapping), **start)
    assert run.manager.load()
    assert torch.equal(run.model.up.weight, model.up.weight)


def test_two_ranks(tmp_path):
    """Sharded by FSDP2 over two processes; a write that fails on rank 1 is the same error on both."""
    worker = str(Path(__file__).with_name("checkpoint_ranks.py"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", worker, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
        timeout=120,
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    assert done.stdout.count("ok") == 2
