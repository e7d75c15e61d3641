"""The loaders that cut a stream of samples (streams.py) into batches, and the builders that open one.

Rank r of W, with L samples a batch, takes in microbatch j the samples (j*W + r)*L + [0..L). So the stream does
not know how many ranks read it: every W and L with the same product see the same global batches, and the state
is how far all of them have come.

Training never ends. Validation is finite, is the same every time, and is kept in memory once read.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX

from titan_fp8.config import Data
from titan_fp8.data.shards import entropy, finished_manifest
from titan_fp8.data.sources import Split, open_source
from titan_fp8.data.streams import STATE_FORMAT, Position, ShardStream, Stream, TextStream
from titan_fp8.data.tokenizer import Tokenizer
from titan_fp8.errors import UserError

_TRAIN_BUFFER_BYTES = 256 << 20
# Validation and statistics read only a little: a large buffer would make them read far ahead first.
_SMALL_BUFFER_BYTES = 16 << 20
_UNIGRAM_TOKENS = 2_000_000

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
"""({"input": int64 [L, S]}, labels int64 [L, S])."""


class TrainDataLoader(BaseDataLoader):
    """Endless batches of this rank's samples; one batch is made ahead in a thread.

    The state is that of the batch handed out last, equal on every rank, and can be loaded at another number
    of ranks or another batch size: the stream goes on at the same sample.
    """

    def __init__(self, stream: Stream, dp_world_size: int, dp_rank: int, batch_size: int) -> None:
        self._stream = stream
        self._count = dp_world_size * batch_size
        self._batch_size = batch_size
        self._mine = slice(dp_rank * batch_size, (dp_rank + 1) * batch_size)
        self._position = Position()

    def __iter__(self) -> Iterator[Batch]:
        groups = self._stream.groups(self._position, self._count, self._mine)
        with ThreadPoolExecutor(1, thread_name_prefix="data") as thread:
            ahead = thread.submit(next, groups)
            while True:
                group = ahead.result()
                ahead = thread.submit(next, groups)
                self._position = group.end
                yield _batch(group.rows, self._batch_size)

    def state_dict(self) -> dict[str, Any]:
        """{"position": int64 [4], as in `Position`; "fingerprint": int64 [6]: format, facts' codes}."""
        return {"position": torch.tensor(self._position), "fingerprint": torch.tensor(self._fingerprint())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state. UserError that names what differs, if the state is of another stream."""
        if not state_dict:  # a checkpoint without data state
            return
        remedy = 'set checkpoint.exclude_from_loading = ["dataloader"] to begin the data anew'
        saved, now = state_dict["fingerprint"].tolist(), self._fingerprint()
        if len(saved) != len(now) or saved[0] != now[0]:
            raise UserError(
                f"the checkpoint's data state must be of format {STATE_FORMAT}; got {saved[:1]}; {remedy}"
            )
        for fact, before in zip(self._stream.facts, saved[1:], strict=True):
            if fact.code != before:
                was = f" where the checkpoint has {before}" if str(fact.code) == fact.now else ""
                raise UserError(
                    f"a resumed run must read the same data; {fact.name} differs: got {fact.now}{was};"
                    f" set it back, or {remedy}"
                )
        self._position = Position(*state_dict["position"].tolist())

    def _fingerprint(self) -> list[int]:
        return [STATE_FORMAT, *(fact.code for fact in self._stream.facts)]


class ValidationDataLoader(BaseDataLoader):
    """This rank's held-out samples, the same ones from each `iter` on, and as many batches on every rank.

    The last group is left out when it is not full: torchtitan averages over steps, so its few samples would
    weigh too much. If it is the only one it is filled up with rows whose labels are ignored.
    """

    def __init__(self, stream: Stream, dp_world_size: int, dp_rank: int, batch_size: int) -> None:
        self._batch_size = batch_size
        mine = slice(dp_rank * batch_size, (dp_rank + 1) * batch_size)
        self._rest = self._whole_groups(stream, dp_world_size * batch_size, mine)
        self._read: list[np.ndarray] = []

    @staticmethod
    def _whole_groups(stream: Stream, count: int, mine: slice) -> Iterator[np.ndarray]:
        first = True
        for group in stream.groups(Position(), count, mine):
            if first or group.samples == count:
                yield group.rows.astype(np.int32)
            first = False
        if first:
            raise UserError(
                f"validation needs one sample of validation.seq_len + 1 tokens; got less in {stream.where};"
                " raise [data] held_out, lower validation.seq_len or add text"
            )

    def __iter__(self) -> Iterator[Batch]:
        done = 0
        while True:
            if done == len(self._read):
                rows = next(self._rest, None)
                if rows is None:
                    return
                self._read.append(rows)
            yield _batch(self._read[done], self._batch_size)
            done += 1

    def state_dict(self) -> dict[str, Any]:
        """Nothing: every validation starts anew."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class TextStatistics(NamedTuple):
    """Of the training split."""

    entropy_nats: float
    """Entropy of the unigram distribution, nats per token: the loss of one who knows only frequencies."""
    bytes_per_token: float
    """Bytes of text per token, bos and eos counted as tokens."""


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: Tokenizer, job_config: Any
) -> BaseDataLoader:
    """The training loader of `[data]`, with [training] seq_len and local_batch_size and debug.seed (or 0).

    torchtitan's `TrainSpec.build_dataloader_fn`. UserError for data that cannot be read.
    """
    if job_config.data.source == "hf":
        from torchtitan.hf_datasets.text_datasets import build_text_dataloader

        return build_text_dataloader(dp_world_size, dp_rank, tokenizer, job_config)
    seed = job_config.debug.seed or 0
    stream = _open_stream(job_config.data, "train", tokenizer, job_config.training.seq_len, seed)
    return TrainDataLoader(stream, dp_world_size, dp_rank, job_config.training.local_batch_size)


def build_validation_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: Tokenizer, job_config: Any
) -> BaseDataLoader:
    """The loader of the held-out split, with [validation] seq_len and local_batch_size.

    Its order does not depend on debug.seed: runs of different seeds are validated on the same samples. With
    [data] shuffle, the first few batches mix all held-out documents, so `validation.steps` of them stand for all.
    """
    if job_config.data.source == "hf":
        from torchtitan.hf_datasets.text_datasets import build_text_validation_dataloader

        # As torchtitan's own validator asks for it.
        infinite = job_config.validation.steps != -1
        return build_text_validation_dataloader(dp_world_size, dp_rank, tokenizer, job_config, infinite)
    stream = _open_stream(job_config.data, "validation", tokenizer, job_config.validation.seq_len, 0)
    return ValidationDataLoader(stream, dp_world_size, dp_rank, job_config.validation.local_batch_size)


def text_statistics(job_config: Any, tokenizer: Tokenizer) -> TextStatistics | None:
    """Unigram entropy and bytes per token; exact for shards, from about 2M tokens of text; None for "hf"."""
    data: Data = job_config.data
    if data.source == "hf":
        return None
    if data.source == "shards":
        unigram = finished_manifest(_folder(data), tokenizer)["unigram"]
        return TextStatistics(unigram["entropy_nats"], unigram["bytes_per_token"])
    source = open_source(data)
    source.require("train")
    counts = np.zeros(tokenizer.get_vocab_size(), np.int64)
    tokens = text_bytes = 0
    for text in source.shuffled("train", 0, 0, _SMALL_BUFFER_BYTES):
        ids = tokenizer.encode_document(text)
        np.add.at(counts, ids, 1)
        tokens += len(ids)
        text_bytes += len(text)
        if tokens >= _UNIGRAM_TOKENS:
            break
    return TextStatistics(entropy(counts), text_bytes / tokens)


def unigram_entropy(job_config: Any, tokenizer: Tokenizer) -> float | None:
    """`text_statistics(...).entropy_nats`, in nats per token; None for "hf"."""
    statistics = text_statistics(job_config, tokenizer)
    return statistics.entropy_nats if statistics else None


def _open_stream(data: Data, split: Split, tokenizer: Tokenizer, seq_len: int, seed: int) -> Stream:
    train = split == "train"
    order = seed if data.shuffle else None
    if data.source == "shards":
        return ShardStream(_folder(data), split, tokenizer, seq_len, seed=order, repeat=train)
    buffer_bytes = _TRAIN_BUFFER_BYTES if train else _SMALL_BUFFER_BYTES
    source = open_source(data)
    return TextStream(source, split, tokenizer, seq_len, seed=order, repeat=train, buffer_bytes=buffer_bytes)


def _folder(data: Data) -> Path:
    if not data.path:
        raise UserError('[data] path must name the shard folder for source "shards"; got ""; set [data] path')
    return Path(data.path).expanduser()


def _batch(rows: np.ndarray, batch_size: int) -> Batch:
    """rows [at most L, S + 1] -> a batch; rows that lack are zeros whose labels the loss ignores."""
    filled = torch.from_numpy(rows).long()
    lacking = batch_size - len(filled)
    inputs, labels = filled[:, :-1], filled[:, 1:]
    if lacking:
        inputs = torch.nn.functional.pad(inputs, (0, 0, 0, lacking))
        labels = torch.nn.functional.pad(labels, (0, 0, 0, lacking), value=IGNORE_INDEX)
    return {"input": inputs.contiguous()}, labels.contiguous()
