"""The packed token stream: samples in an order that depends neither on ranks nor on batch sizes.

    documents  ->  bos text eos bos text eos …  ->  packed sample p = tokens [p*S, p*S + S + 1)    S = seq_len

The input of a sample is its first S tokens, the labels its last S. Two streams hand samples out:

    text      every rank reads and tokenises all documents and keeps its own samples. The epochs follow one
              another without a gap. Shuffled, it takes the packed samples in blocks of K: sample n is the one
              at place P(n mod K) of block n // K, with P drawn from the seed and the block's number. While a
              block is handed out the next is packed at the same pace, so no border waits for a whole block.
              A block has as many tokens as the source has bytes, but 4M at most: sequences of the same
              document come apart, two blocks fit in memory, and a start waits for one block only.
    shards    prepared by tools/prepare_data.py, memory-mapped: each rank reads only its samples. An epoch is
              the (tokens - 1) // S whole samples of the stream, visited in the order shards.py describes.

Not shuffled, both hand out the packed samples in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from titan_fp8.data.shards import PREPARE, Shards, permute, token_dtype
from titan_fp8.data.sources import Source, Split, hash64
from titan_fp8.data.tokenizer import Tokenizer
from titan_fp8.errors import UserError

# To be raised with any change to the order or the packing: the sizes of blocks and of shuffle buffers count.
STATE_FORMAT = 2
_BLOCK_TOKENS = 4 << 20


class Position(NamedTuple):
    """Which sample is next. The last three are the text stream's; shards need only `samples`.

    They say where the block that holds the next sample begins. Not shuffled, a block is one sample.
    """

    samples: int = 0
    """Samples handed out so far, all ranks together."""
    epoch: int = 0
    """Epoch of the document that the block begins in,"""
    documents: int = 0
    """that document's number in the epoch's order,"""
    offset: int = 0
    """and the block's first token in it."""


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
    """Documents, tokenised on the fly. The order and the packing are exact: see the top of this file.

    Args:
        source, split: the documents; UserError if the split has none.
        seq_len: S, in tokens.
        seed: decides the order of documents and samples; None leaves both as they are.
        repeat: go on for ever, epoch after epoch; otherwise one epoch, whose last block may be short.
        buffer_bytes: of text, through which documents are shuffled.
    """

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
        # A block of more than a tiny source would read it hundreds of times before the first batch.
        shuffled = min(_BLOCK_TOKENS, source.size) // seq_len
        self._block_samples = 1 if seed is None else max(1, shuffled)
        self._dtype = token_dtype(tokenizer.get_vocab_size())

    def groups(self, at: Position, count: int, mine: slice) -> Iterator[Group]:
        size, samples = self._block_samples, at.samples
        tokens = _Tokens(self._documents(at))
        number, index = divmod(samples, size)
        block = self._next_block(tokens)
        order = self._finish(block, number)
        ahead = self._next_block(tokens)
        # Where in the block this run came in: the rest of it is the time there is to pack the next one.
        first = index
        while True:
            n, rows = 0, []
            while n < count:
                if index == block.samples:
                    block, number, index, first = ahead, number + 1, 0, 0
                    order = self._finish(block, number)
                    if not block.samples:
                        break
                    ahead = self._next_block(tokens)
                taken = min(count - n, block.samples - index)
                own = np.arange(max(mine.start, n), min(mine.stop, n + taken))
                rows.append(block.rows(order[own + (index - n)]))
                n += taken
                index += taken
                ahead.pack(size * (index - first) // (size - first))
            if not n:
                return
            samples += n
            begin = (ahead if index == block.samples else block).begin
            yield Group(n, np.concatenate(rows), Position(samples, *begin))

    def _next_block(self, tokens: _Tokens) -> _Block:
        return _Block(tokens, self._block_samples, self._seq_len, self._dtype)

    def _finish(self, block: _Block, number: int) -> np.ndarray:
        """The order in which the block's samples are visited, int64 [samples]."""
        block.finish()
        order = np.arange(block.samples)
        if self._seed is None or not block.samples:
            return order
        return permute(order, block.samples, hash64("block", self._seed, number))

    def _documents(self, at: Position) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """(epoch, number, offset, tokens) from `at` on; earlier documents are not tokenised."""
        epoch, first, offset = at.epoch, at.documents, at.offset
        while True:
            number = -1
            for number, text in enumerate(self._epoch(epoch)):
                if number >= first:
                    ids = self._tokenizer.encode_document(text)
                    if offset >= len(ids):
                        raise self._changed()
                    yield epoch, number, offset, ids
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


class _Tokens:
    """The tokens of all documents, one after another.

    Attributes:
        at: (epoch, document, offset) of the next token, right after `more` said that there is one.
    """

    def __init__(self, documents: Iterator[tuple[int, int, int, np.ndarray]]) -> None:
        self._documents = documents
        self._ids = np.empty(0, np.uint32)
        self.at = (0, 0, 0)

    def more(self) -> bool:
        """Whether there is another token. Takes the next document if this one is used up."""
        while self.at[2] == len(self._ids):
            document = next(self._documents, None)
            if document is None:
                return False
            *at, self._ids = document
            self.at = (at[0], at[1], at[2])
        return True

    def peek(self) -> int:
        """The next token, not taken."""
        return int(self._ids[self.at[2]])

    def take(self, out: np.ndarray) -> int:
        """Fills `out`, or as much of it as there is; how many tokens."""
        done = 0
        while done < len(out) and self.more():
            epoch, document, offset = self.at
            part = self._ids[offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            self.at = (epoch, document, offset + len(part))
        return done


class _Block:
    """`size` packed samples, fewer only at the end of the stream; packed bit by bit, then read in any order.

    Attributes:
        begin: (epoch, document, offset) of the first token.
        samples: how many there are; 0 before `finish`.
    """

    def __init__(self, tokens: _Tokens, size: int, seq_len: int, dtype: str) -> None:
        tokens.more()
        self.begin = tokens.at
        self.samples = 0
        self._tokens, self._size, self._seq_len = tokens, size, seq_len
        self._ids = np.empty(size * seq_len + 1, dtype)
        self._filled = 0

    def pack(self, samples: int) -> None:
        """Packs on until it has `samples` samples, but for the last label."""
        self._filled += self._tokens.take(self._ids[self._filled : samples * self._seq_len])

    def finish(self) -> None:
        """Packs what is left. The last label stays in the stream: it is the next block's first token."""
        self.pack(self._size)
        filled = self._filled
        if self._tokens.more():
            self._ids[filled] = self._tokens.peek()
            filled += 1
        self.samples = max(0, filled - 1) // self._seq_len

    def rows(self, places: np.ndarray) -> np.ndarray:
        """The samples at `places`, int64 [n] -> int64 [n, S + 1]."""
        return self._ids[places[:, None] * self._seq_len + np.arange(self._seq_len + 1)].astype(np.int64)


class ShardStream:
    """Prepared tokens. Position is the number of samples alone.

    `groups` raises UserError at an id that the tokenizer does not have: loading looks at few bytes of a shard (shards.py).
    """

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
        self._vocab = tokenizer.get_vocab_size()

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
            if (largest := rows.max(initial=0)) >= self._vocab:
                raise UserError(
                    f"a shard must hold ids below the tokenizer's {self._vocab}; got {largest} in {self.where}; "
                    f"run {PREPARE} --out {self.where} --verify, which names the damaged shard"
                )
            begin += n
            yield Group(n, rows, Position(begin))


def _common_facts(tokenizer: Tokenizer, seq_len: int, seed: int | None) -> list[Fact]:
    order = -1 if seed is None else seed
    return [
        Fact("[data] tokenizer", _code(tokenizer.identity), tokenizer.identity),
        Fact("training.seq_len", seq_len, str(seq_len)),
        Fact("debug.seed (-1: [data] shuffle off)", order, str(order)),
    ]


def _code(value: object) -> int:
    return hash64(value) >> 1  # int64 has 63 bits for it
