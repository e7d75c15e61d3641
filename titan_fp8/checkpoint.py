"""Checkpoints that a crash, a full disk or a wrong flag cannot spoil: torchtitan's manager, made safe.

A save is written to `partial-<n>`, synced to disk, and only then named `step-<n>` (`checkpoint_folder` lists
the names). Only rank 0 renames and deletes, and only after torch's checkpointing has gathered every rank's
result. With async saves that happens at completion, in the background. One run at a time may write to a
folder.

Errors with files end in a one-line `UserError` that names the last good checkpoint. Before loading, the names
and shapes in the checkpoint are compared with the model's.

Torch's format keeps its table of contents (`.metadata`) as a pickle, which can run code when it is read: only
load checkpoints that you trust.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchtitan.components.checkpoint import DATALOADER, MODEL, TRAIN_STATE, AsyncMode, CheckpointManager
from torchtitan.tools.logging import logger

from titan_fp8 import checkpoint_folder as folders
from titan_fp8 import files
from titan_fp8.errors import UserError

FP8_STATE = "float8_state."
"""Prefix of the FP8 scaling state (amax histories, scales) in the model's state dict."""

SEEN_WITHIN = 60.0
"""Seconds in which a folder that one machine has made must be there for the others: network disks take their time."""


def compare_weights(saved: Mapping[str, tuple[int, ...]], model: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Differences between two tables of name -> global shape, each in a few words."""
    differences = [
        f"{name} is {list(saved[name])} there, {list(shape)} here"
        for name, shape in model.items()
        if name in saved and tuple(saved[name]) != tuple(shape)
    ]
    differences += [f"{name} is only here" for name in model if name not in saved]
    differences += [f"{name} is only there" for name in saved if name not in model]
    return differences


class SafeCheckpointManager(CheckpointManager):
    """torchtitan's CheckpointManager with the same constructor, settings and file formats; see the module.

    `save`, `load` and the constructor are collective: every rank calls them, every rank gets the same error.
    The constructor raises UserError if the folder cannot be written, or is not the same one for all machines.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An async save in flight: its step, and a future that is done once step-<n> has its name (rank 0)
        # or is written (other ranks). Set first: close() runs even if the base class's constructor fails.
        self._pending: tuple[int, Future[None]] | None = None
        self._last_saved = -1
        self._forced = False  # by save_now or request, until the next save
        self.held: int | None = None  # rank 0: this step's checkpoint is not purged
        self.paused = False  # `save` saves nothing: the run is about to roll back
        super().__init__(*args, **kwargs)
        if self.enable and not self.load_only:
            self._check_folder()
            self._together(
                lambda: folders.tidy(Path(self.folder), restarted=restarted()),
                only_rank0=True, doing="tidy up after a killed run",
            )  # fmt: skip

    def _check_folder(self) -> None:
        """Rank 0 makes a folder with a name that nobody can know; every rank must see it."""
        # A partial checkpoint's name: killed here, `tidy` removes it.
        name = [f"{folders.PARTIAL}{secrets.randbits(63)}"]
        dist.broadcast_object_list(name, src=0)
        token = Path(self.folder) / name[0]
        self._together(lambda: token.mkdir(parents=True), only_rank0=True, doing="write checkpoints")
        end = time.monotonic() + SEEN_WITHIN
        while not (there := token.is_dir()) and time.monotonic() < end:
            time.sleep(0.1)
        mine = None if there else f"{os.path.abspath(self.folder)} on {platform.node()}"
        blind: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(blind, mine)
        if dist.get_rank() == 0:
            shutil.rmtree(token, ignore_errors=True)
        for place in filter(None, blind):
            raise UserError(
                f"the checkpoint folder must be one folder for all machines, got {place}, where what rank 0 writes is not "
                "seen: choose a --job.dump_folder on a disk that all share"
            )

    # Saving

    def save_now(self, step: int) -> bool:
        """Save `step` whole, whatever the interval, and wait until it has its name. False if this run saves nothing.

        Collective. Raises UserError as a save does.
        """
        if not self.enable or self.load_only:
            return False
        if step != self._last_saved:
            self._forced = True
            self.save(step)
            self._forced = False
        self._async_wait()
        return True

    def request(self) -> None:
        """Let the next call of `save` write a checkpoint, whatever the interval. Every rank calls it, or none."""
        self._forced = self.enable and not self.load_only

    def roll_back(self, step: int) -> None:
        """In the middle of a run, go back to the complete checkpoint `step`: later ones are removed, and all of it is loaded
        but the data's position, which stays where the run is. Collective.

        Raises UserError as `load` does, or if later checkpoints cannot be removed.
        """
        self._async_wait()
        self._forced = self.paused = False
        self._together(
            lambda: self._remove_beyond(step), only_rank0=True, doing=f"remove what is later than step-{step}"
        )
        excluded, self.exclude_from_loading = self.exclude_from_loading, [DATALOADER]
        try:
            self._load(step)
        finally:
            self.exclude_from_loading = excluded
        self._last_saved = -1  # what is saved next differs from what was loaded: the data are elsewhere

    def _remove_beyond(self, step: int) -> None:
        # Newest first: killed in between, a restart finds no checkpoint that is later than one removed.
        for later in reversed(folders.complete_steps(self.folder)):
            if later > step:
                stale = self._path(folders.STALE, later)
                shutil.rmtree(stale, ignore_errors=True)
                self._path(folders.STEP, later).rename(stale)
                shutil.rmtree(stale)

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        return not self.paused and (self._forced or super()._should_save(curr_step, last_step))

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Future | AsyncSaveResponse | None:
        """Write `state_dict` beside its final place `<folder>/step-<n>`, then give it that name.

        Arguments and result as in torchtitan; an async save takes its name when it is complete.
        Hugging Face exports leave out the FP8 scaling state, which means nothing to other programs.
        Raises UserError if a file cannot be written: the partial copy is removed, earlier checkpoints stay.
        """
        self._forced = False
        step = int(checkpoint_id.rpartition("-")[2])
        partial = self._path(folders.PARTIAL, step)
        self._together(lambda: folders.make_empty(partial), only_rank0=True, doing=f"save step-{step}")
        state_dict = _unwrapped(state_dict)
        if to_hf:
            state_dict = _without_fp8_state(state_dict)
        try:
            result = super().dcp_save(
                state_dict, str(partial), async_mode, enable_garbage_collection, to_hf=to_hf
            )
            if async_mode == AsyncMode.DISABLED:
                # torch syncs the files of its own format, but not the ones it consolidates for Hugging Face
                if to_hf:
                    self._together(lambda: files.sync_files(partial), doing=f"save step-{step}")
                self._together(lambda: self._publish(step), only_rank0=True, doing=f"save step-{step}")
        except (CheckpointException, Exception) as error:
            # Not together: a CheckpointException is on every rank already, and after another error the other
            # ranks may wait inside a collective of torch's, until the launcher ends them.
            explained = self._explained(error, f"save step-{step}")
            self._remove_partial(step)
            raise explained from (None if explained is error else error)
        if async_mode != AsyncMode.DISABLED:
            assert result is not None
            self._publish_when_done(step, result)
        self._last_saved = step
        return result

    def close(self) -> None:
        """Finish the save in flight, then stop the background threads. Not collective; may be called twice.

        Raises UserError if that save failed, or logs it if another error is already on its way.
        """
        failing_already = sys.exc_info()[0] is not None
        explained: BaseException | None = None
        pending, self._pending = self._pending, None
        if pending is not None:
            step, published = pending
            try:
                published.result()
            except (CheckpointException, Exception) as error:
                explained = self._explained(error, f"save step-{step}")
                self._remove_partial(step)
        super().close()
        if explained is not None:
            if not failing_already:
                raise explained
            logger.error(str(explained))

    def _async_wait(self) -> None:
        """Wait for the async save in flight, if any, until it has its final name or has failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            step, published = pending
            self.save_future = None
            try:
                self._together(lambda: published.result(), doing=f"save step-{step}")
            except BaseException:
                self._remove_partial(step)
                raise
        super()._async_wait()

    def _publish_when_done(self, step: int, result: Future | AsyncSaveResponse) -> None:
        written = result.upload_completion if isinstance(result, AsyncSaveResponse) else result
        published: Future[None] = Future()

        def finish(done: Future) -> None:
            try:
                done.result()
                if dist.get_rank() == 0:
                    self._publish(step)
            except BaseException as error:  # whoever waits for `published` raises it
                published.set_exception(error)
            else:
                published.set_result(None)

        written.add_done_callback(finish)
        self._pending = (step, published)

    def _publish(self, step: int) -> None:
        """Rank 0, all files written and synced: give the partial checkpoint its name, then purge old ones."""
        partial, final, replaced = (
            self._path(kind, step) for kind in (folders.PARTIAL, folders.STEP, folders.REPLACED)
        )
        files.sync(partial)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)  # killed here: the next start puts it back
            try:
                partial.rename(final)
            except OSError:
                replaced.rename(final)
                raise
        else:
            partial.rename(final)
        files.sync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        logger.info("Checkpoint %s is complete.", final)
        self._purge()

    def _purge_stale_checkpoints(self) -> None:
        """torchtitan's moment to purge; ours comes in `_publish`, when the new checkpoint is safe."""

    def _purge(self) -> None:
        """Rank 0: hand all but the newest keep_latest_k complete checkpoints, and `held`, to the purge thread."""
        if self.keep_latest_k == 0:
            return
        for step in folders.complete_steps(self.folder)[: -self.keep_latest_k]:
            if step == self.held:
                continue
            stale = self._path(folders.STALE, step)
            try:
                # Renamed first: a half-deleted folder must not look like a checkpoint.
                self._path(folders.STEP, step).rename(stale)
            except OSError as error:
                logger.warning("Old checkpoint step-%d stays: %s", step, error)
            else:
                self.purge_queue.put(str(stale))

    # Loading

    def load(self, step: int = -1) -> bool:
        """Load checkpoint `step`, or the latest (-1); False if there is none and none was asked for.

        Later ones than `step` are then set aside in `abandoned-<k>`: the next start would go on from them. A restart by
        torchrun takes the latest all the same, which comes after `step` by then.

        Raises UserError if that step does not exist, is damaged, or belongs to another model.
        """
        if not self.enable or self.load_only or step == -1:
            return self._load(step)
        folder = Path(self.folder)
        if restarted() and (folder / folders.TAKEN_UP).exists():
            return self._load(-1)
        self._load(step)
        self._together(
            lambda: folders.take_up(folder, step),
            only_rank0=True,
            doing=f"set aside what is later than step-{step}",
        )
        return True

    def _load(self, step: int) -> bool:
        if self.enable:
            self._check_request(step)
        return super().load(step)

    def dcp_load(
        self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool
    ) -> None:
        """Load into `state_dict` in place, as in torchtitan, after comparing it with what the checkpoint has.

        FP8 scaling state loads as a whole or not at all: without it, scales start from the first step.
        Raises UserError.
        """
        state_dict = _unwrapped(state_dict)
        if from_hf:
            super().dcp_load(_without_fp8_state(state_dict), checkpoint_id, from_hf, from_quantized)
            return
        try:
            metadata = FileSystemReader(checkpoint_id).read_metadata()
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(self._unreadable(checkpoint_id, error)) from error
        self._check_weights(state_dict, metadata, checkpoint_id)
        self._check_other_states(state_dict, metadata, checkpoint_id)
        for key, value in state_dict.items():
            if hasattr(value, "prepare_to_load"):  # the optimizer reads other formats of its moments
                saved = metadata.state_dict_metadata.items()
                own = {n: getattr(entry, "size", None) for n, entry in saved if n.startswith(f"{key}.")}
                value.prepare_to_load({n.removeprefix(f"{key}."): size for n, size in own.items()})
        if not _fp8_state_matches(state_dict, metadata):
            state_dict = _without_fp8_state(state_dict)
        try:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise UserError(self._unreadable(checkpoint_id, cause)) from error

    def _find_load_step(self, folder: str = "") -> int:
        return max(folders.complete_steps(folder or self.folder), default=-1)

    def _check_request(self, step: int) -> None:
        """Refuse what torchtitan would answer with a traceback, or by silently starting afresh."""
        steps = folders.complete_steps(self.folder)
        if step != -1 and step not in steps:
            raise UserError(
                f"checkpoint.load_step must be a complete checkpoint in {self.folder}, got {step}; "
                f"there are: {folders.listed(steps)}; choose one, or -1 for the latest"
            )
        if not steps and (self.initial_load_path or self.initial_load_in_hf):
            if os.path.exists(self.folder):
                raise UserError(
                    f"an initial checkpoint is loaded only if the run has no checkpoint folder, but "
                    f"{self.folder} exists and holds none; remove it, or choose another checkpoint.folder"
                )
            if self.initial_load_path and not os.path.isdir(self.initial_load_path):
                raise UserError(
                    f"checkpoint.initial_load_path must be a folder, got {self.initial_load_path}; "
                    "give the checkpoint's own folder, for example outputs/run/checkpoint/step-1000"
                )
        chosen = steps[-1] if steps and step == -1 else step
        if chosen != -1 and not (self._path(folders.STEP, chosen) / folders.TORCH_TABLE).is_file():
            others = folders.listed([other for other in steps if other != chosen])
            raise UserError(
                f"a run resumes only from torch's checkpoints, but step-{chosen} in {self.folder} is a "
                f"Hugging Face export; set checkpoint.load_step to another ({others}), or start a new run "
                "from it with checkpoint.initial_load_path and checkpoint.initial_load_in_hf"
            )

    def _check_weights(self, state_dict: dict[str, Any], metadata: Metadata, checkpoint_id: str) -> None:
        others = tuple(f"{name}." for name in self.states if name != MODEL)
        paths = metadata.planner_data or {}  # flattened name -> its path; a weight's path has one part
        saved = {
            name: tuple(entry.size)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            and len(paths.get(name, (name,))) == 1
            and not name.startswith((FP8_STATE, *others))
        }
        here = {
            name: tuple(value.shape)
            for name, value in state_dict.items()
            if isinstance(value, torch.Tensor) and not name.startswith(FP8_STATE)
        }
        if differences := compare_weights(saved, here):
            raise UserError(
                f"{checkpoint_id} is a checkpoint of another architecture: {_first(differences)}; "
                "set [model] and [architecture] as it was trained, or give this run another checkpoint.folder"
            )

    def _check_other_states(self, state_dict: dict[str, Any], metadata: Metadata, checkpoint_id: str) -> None:
        names = metadata.state_dict_metadata
        missing = [
            key
            for key, value in state_dict.items()
            if hasattr(value, "state_dict")
            and not any(name == key or name.startswith(f"{key}.") for name in names)
            and value.state_dict()  # one that has nothing to save leaves no trace
        ]
        if missing:
            here = Path(checkpoint_id)
            steps = folders.complete_steps(self.folder)
            others = [step for step in steps if self._path(folders.STEP, step) != here]
            finished = TRAIN_STATE in missing and here.parent == Path(self.folder)
            why = ", as the last one of a finished run does" if finished else ""
            raise UserError(
                f"a run resumes only from a full checkpoint, but {checkpoint_id} lacks {', '.join(missing)}{why}; "
                f"set checkpoint.load_step to another (there are: {folders.listed(others)}), or list what it lacks in "
                "checkpoint.exclude_from_loading, or start a new run with it as "
                "checkpoint.initial_load_path (checkpoint.last_save_model_only = false keeps last saves full)"
            )

    # Words, paths, agreement

    def _path(self, kind: str, step: int) -> Path:
        return Path(self.folder) / f"{kind}{step}"

    def _steps(self) -> str:
        return folders.listed(folders.complete_steps(self.folder))

    def _remove_partial(self, step: int) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(self._path(folders.PARTIAL, step), ignore_errors=True)

    def _explained(self, error: BaseException, doing: str) -> BaseException:
        """A UserError if `error` is about files, otherwise `error` itself."""
        reason = _file_trouble(error)
        return error if reason is None else UserError(self._cannot(doing, reason))

    def _cannot(self, doing: str, reason: str) -> str:
        steps = folders.complete_steps(self.folder)
        last = f"step-{steps[-1]}" if steps else "none yet"
        space = folders.free_space(Path(self.folder))
        return (
            f"could not {doing} in {self.folder}: {reason}{space}; the last good checkpoint is {last}; "
            "make room there, or choose another job.dump_folder, and start again"
        )

    def _unreadable(self, checkpoint_id: str, error: BaseException) -> str:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return (
            f"{checkpoint_id} is not a readable checkpoint: {reason}; choose another with "
            f"checkpoint.load_step (there are: {self._steps()}) or checkpoint.initial_load_path"
        )

    def _together(self, action: Callable[[], Any], *, doing: str, only_rank0: bool = False) -> None:
        """Run `action` on all ranks, or on rank 0 alone; wait for all. If one fails, every rank raises."""
        error: BaseException | None = None
        if not only_rank0 or dist.get_rank() == 0:
            try:
                action()
            except (CheckpointException, Exception) as caught:
                error = caught
        mine = None if error is None else (_file_trouble(error), f"{type(error).__name__}: {error}")
        everyone: list[tuple[str | None, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        if error is not None and _file_trouble(error) is None:
            raise error
        for rank, failure in enumerate(everyone):
            if failure is not None:
                reason, words = failure
                if reason is None:
                    raise RuntimeError(f"could not {doing}: rank {rank} failed with {words}")
                raise UserError(self._cannot(doing, reason)) from error


def restarted() -> bool:
    """Whether torchrun has started this process in place of one that died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _unwrapped(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same memory without the wrapper that a weight has while FSDP2 gathers it in FP8 (float8/weights.py).

    Wrapped ones would be pickled, class and all, and then only such models could read them.
    """

    def unwrap(value: Any) -> Any:
        local = value._local_tensor if isinstance(value, DTensor) else None
        if local is None or not is_traceable_wrapper_subclass(local):
            return value
        (name,), _ = local.__tensor_flatten__()
        return DTensor.from_local(
            getattr(local, name), value.device_mesh, value.placements, run_check=False, shape=value.shape,
            stride=value.stride(),
        )  # fmt: skip

    return {name: unwrap(value) for name, value in state_dict.items()}


def _without_fp8_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state_dict.items() if not name.startswith(FP8_STATE)}


def _fp8_state_matches(state_dict: dict[str, Any], metadata: Metadata) -> bool:
    """Whether the checkpoint has all the FP8 scaling state that the model wants; logs what does not fit."""
    entries = metadata.state_dict_metadata
    saved = {name: entry for name, entry in entries.items() if name.startswith(FP8_STATE)}
    wanted = {name: value for name, value in state_dict.items() if name.startswith(FP8_STATE)}
    whose = f"{FP8_STATE}tensors_and_formats_"
    if not any(name.startswith(whose) for name in saved):  # an older checkpoint: names and shapes must do
        for name in [name for name in wanted if name.startswith(whose)]:
            del wanted[name], state_dict[name]
    if unknown := [name for name in saved if name not in wanted]:
        logger.info("FP8 state in the checkpoint that this model lacks is ignored: %s", _first(unknown))
    unfit = [
        name
        for name, value in wanted.items()
        if name not in saved or tuple(getattr(saved[name], "size", ())) != tuple(value.shape)
    ]
    if wanted and not saved:
        logger.warning("FP8 state not in the checkpoint: scales start from the first step.")
    elif unfit:
        logger.warning(
            "FP8 state in the checkpoint does not fit (%s): scales start from the first step.", _first(unfit)
        )
    return not unfit


def _file_trouble(error: BaseException) -> str | None:
    """Why a file could not be written or read, if that is what `error` is about."""
    causes: Iterable[BaseException | None] = (error,)
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
    writer_failed = False
    for cause in causes:
        while cause is not None:
            network = isinstance(cause, (ConnectionError, TimeoutError))
            if isinstance(cause, OSError) and not network:
                where = f" ({cause.filename})" if cause.filename else ""
                return f"{cause.strerror or cause}{where}"
            # torch.save hides the OSError behind this, and loses it between processes
            writer_failed |= isinstance(cause, RuntimeError) and "inline_container" in str(cause)
            cause = cause.__cause__ or cause.__context__
    return "a write failed" if writer_failed else None


def _first(words: list[str], count: int = 3) -> str:
    """The first few, and how many more, for a message."""
    more = f"; and {len(words) - count} more" if len(words) > count else ""
    return "; ".join(words[:count]) + more
