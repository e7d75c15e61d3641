"""The packed token stream, and the loaders that cut it into batches.

    documents  ->  bos text eos bos text eos …  ->  sample n = tokens [n*S, n*S + S + 1)      S = seq_len

The input of sample n is its first S tokens, the labels its last S. Rank r of W, with L samples a batch, takes
in microbatch j the samples (j*W + r)*L + [0..L). So the stream does not know how many ranks read it: every W
and L with the same product see the same global batches, and the state is how far all of them have come.

Two streams:

    text      every rank reads and tokenises all documents and keeps its own samples; a thread does it.
              The epochs follow one another without a gap.
    shards    prepared by tools/prepare_data.py, memory-mapped: each rank reads only its samples. An epoch is
              the (tokens - 1) // S whole samples of the stream, visited in the order shards.py describes.

Training never ends. Validation is finite, is the same every time, and is kept in memory once read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX

from titan_fp8.config import Data
from titan_fp8.data.shards import Shards, entropy, finished_manifest, permute
from titan_fp8.data.sources import Source, Split, hash64, open_source
from titan_fp8.data.tokenizer import Tokenizer
from titan_fp8.errors import UserError

# To be raised with any change to the order or the packing, these buffers' sizes included.
_STATE_FORMAT = 1
_TRAIN_BUFFER_BYTES = 256 << 20
# Validation and statistics read only a little: a large buffer would make them read far ahead first.
_SMALL_BUFFER_BYTES = 16 << 20
_UNIGRAM_TOKENS = 2_000_000

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
"""({"input": int64 [L, S]}, labels int64 [L, S])."""


class Position(NamedTuple):
    """Where the next sample begins. The last three are the text stream's; shards need only `samples`."""

    samples: int = 0
    """Samples handed out so far, all ranks together."""
    epoch: int = 0
    """Epoch of the document that the next sample begins in,"""
    documents: int = 0
    """that document's number in the epoch's order,"""
    offset: int = 0
    """and the sample's first token in it."""


class Group(NamedTuple):
    """One microbatch of all ranks, of which `rows` are this rank's samples."""

    samples: int
    """How many samples all ranks have in it; fewer than asked for only at the end of a finite stream."""
    rows: np.ndarray
    """int64 [at most L, S + 1]."""
    end: Position
    """Where the next group begins."""


class Fact(NamedTuple):
    """One thing that decides the stream. `code` goes into the state, `now` into messages."""

    name: str
    code: int
    now: str


class Stream(Protocol):
    """Samples in a fixed order."""

    facts: list[Fact]
    where: str

    def groups(self, at: Position, count: int, mine: slice) -> Iterator[Group]:
        """Groups of `count` samples from `at` on, each with the rows `mine` of the group."""
        ...


class TextStream:
    """Documents, tokenised on the fly. The order and the packing are exact: see the top of this file."""

    def __init__(
        self,
        source: Source,
        split: Split,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        seed: int | None,
        repeat: bool,
        buffer_bytes: int,
    ) -> None:
        source.require(split)
        self.where = source.where
        self.facts = [
            Fact("the text of [data] source and path", _code(source.identity), source.where),
            Fact("[data] held_out", _code(source.held_out), str(source.held_out)),
            *_common_facts(tokenizer, seq_len, seed),
        ]
        self._source, self._split, self._tokenizer, self._seq_len = source, split, tokenizer, seq_len
        self._seed, self._repeat, self._buffer_bytes = seed, repeat, buffer_bytes

    def groups(self, at: Position, count: int, mine: slice) -> Iterator[Group]:
        s = self._seq_len
        # Documents not used up yet: epoch, number, tokens left, how many tokens went before those.
        waiting: deque[tuple[int, int, np.ndarray, int]] = deque()
        available = 0
        samples = at.samples
        documents = self._documents(at)
        while True:
            while available < count * s + 1:
                document = next(documents, None)
                if document is None:
                    break
                waiting.append(document)
                available += len(document[2])
            n = min(count, (available - 1) // s)
            if n < 1:
                return
            flat = _first([ids for _, _, ids, _ in waiting], n * s + 1)
            rows = np.lib.stride_tricks.sliding_window_view(flat, s + 1)[::s][mine].copy()
            samples += n
            available -= n * s
            # The last label is the next sample's first input: one token at least stays, so there is a head.
            used = n * s
            while used >= len(waiting[0][2]):
                used -= len(waiting.popleft()[2])
            epoch, number, ids, before = waiting.popleft()
            waiting.appendleft((epoch, number, ids[used:], before + used))
            yield Group(n, rows, Position(samples, epoch, number, before + used))

    def _documents(self, at: Position) -> Iterator[tuple[int, int, np.ndarray, int]]:
        """(epoch, number, tokens, tokens skipped) from `at` on; earlier documents are not tokenised."""
        epoch, first, offset = at.epoch, at.documents, at.offset
        while True:
            number = -1
            for number, text in enumerate(self._epoch(epoch)):
                if number >= first:
                    ids = self._tokenizer.encode_document(text)
                    if offset >= len(ids):
                        raise self._changed()
                    yield epoch, number, ids[offset:], offset
                    offset = 0
            if number < first:
                raise self._changed()
            if not self._repeat:
                return
            epoch, first = epoch + 1, 0

    def _epoch(self, epoch: int) -> Iterator[bytes]:
        if self._seed is None:
            return self._source.split(self._split)
        return self._source.shuffled(self._split, self._seed, epoch, self._buffer_bytes)

    def _changed(self) -> UserError:
        return UserError(
            f"the text must not change during a run; got less in {self.where} than before; "
            'restore it, or set checkpoint.exclude_from_loading = ["dataloader"] to begin the data anew'
        )


class ShardStream:
    """Prepared tokens. Position is the number of samples alone."""

    def __init__(
        self,
        folder: Path,
        split: Split,
        tokenizer: Tokenizer,
        seq_len: int,
        *,
        seed: int | None,
        repeat: bool,
    ) -> None:
        self._shards = Shards(folder, split, tokenizer)
        self._n = (self._shards.tokens - 1) // seq_len
        if self._n < 1:
            raise UserError(
                f"a split must hold at least seq_len + 1 = {seq_len + 1} tokens; "
                f"got {self._shards.tokens} of {split} in {folder}; lower seq_len or prepare more text"
            )
        self.where = str(folder)
        self.facts = [
            Fact("the shards of [data] path", _code(self._shards.identity), str(folder)),
            # What was held out is fixed in the shards; the place keeps both streams' states of one shape.
            Fact("[data] held_out", 0, "as prepared"),
            *_common_facts(tokenizer, seq_len, seed),
        ]
        self._seq_len, self._seed, self._repeat = seq_len, seed, repeat

    def groups(self, at: Position, count: int, mine: slice) -> Iterator[Group]:
        begin, s = at.samples, self._seq_len
        while True:
            n = count if self._repeat else min(count, self._n - begin)
            if n < 1:
                return
            index = begin + np.arange(n)[mine]
            epochs, places = index // self._n, index % self._n
            if self._seed is not None:
                for epoch in np.unique(epochs):
                    chosen = epochs == epoch
                    places[chosen] = permute(places[chosen], self._n, hash64("sample", self._seed, epoch))
            rows = np.empty((len(places), s + 1), np.int64)
            for row, place in zip(rows, places, strict=True):
                row[:] = self._shards.read(int(place) * s, s + 1)
            begin += n
            yield Group(n, rows, Position(begin))


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
                f"the checkpoint's data state must be of format {_STATE_FORMAT}; got {saved[:1]}; {remedy}"
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
        return [_STATE_FORMAT, *(fact.code for fact in self._stream.facts)]


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

    Its order does not depend on debug.seed: runs of different seeds are validated on the same samples.
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


def _common_facts(tokenizer: Tokenizer, seq_len: int, seed: int | None) -> list[Fact]:
    return [
        Fact("[data] tokenizer", _code(tokenizer.identity), tokenizer.identity),
        Fact("training.seq_len", seq_len, str(seq_len)),
        Fact(
            "debug.seed (-1: [data] shuffle off)",
            -1 if seed is None else seed,
            str(-1 if seed is None else seed),
        ),
    ]


def _first(parts: list[np.ndarray], count: int) -> np.ndarray:
    """The first `count` tokens of the parts, int64; takes no more of a very long document than it needs."""
    out = np.empty(count, np.int64)
    done = 0
    for part in parts:
        taken = part[: count - done]
        out[done : done + len(taken)] = taken
        done += len(taken)
    assert done == count
    return out


def _code(value: object) -> int:
    return hash64(value) >> 1  # int64 has 63 bits for it


def _batch(rows: np.ndarray, batch_size: int) -> Batch:
    """rows [at most L, S + 1] -> a batch; rows that lack are zeros whose labels the loss ignores."""
    filled = torch.from_numpy(rows).long()
    lacking = batch_size - len(filled)
    inputs, labels = filled[:, :-1], filled[:, 1:]
    if lacking:
        inputs = torch.nn.functional.pad(inputs, (0, 0, 0, lacking))
        labels = torch.nn.functional.pad(labels, (0, 0, 0, lacking), value=IGNORE_INDEX)
    return {"input": inputs.contiguous()}, labels.contiguous()
