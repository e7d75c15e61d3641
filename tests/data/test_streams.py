"""The order of samples: blocks, borders, positions, how evenly the work is spread, and that batches mix.

The samples expected are cut from the documents here, not by the code under test. Most tests make blocks small.
"""

import itertools
from collections import Counter

import numpy as np
import pytest

from titan_fp8.config import Data
from titan_fp8.data import streams
from titan_fp8.data.shards import entropy
from titan_fp8.data.sources import open_source
from titan_fp8.data.streams import Position, TextStream
from titan_fp8.data.tokenizer import build_tokenizer

BYTE = build_tokenizer(Data())
S = 8
START = Position()


@pytest.fixture
def block(monkeypatch):
    """block(samples): blocks of so many samples of 8 tokens."""
    return lambda samples: monkeypatch.setattr(streams, "_BLOCK_TOKENS", samples * S)


class Counting:
    """A tokenizer that counts the documents it is given."""

    def __init__(self):
        self.documents = 0

    def __getattr__(self, name):
        return getattr(BYTE, name)

    def encode_document(self, text):
        self.documents += 1
        return BYTE.encode_document(text)


def stream_of(path, seq_len=S, seed=0, split="train", tokenizer=BYTE, held_out=0.0, **data):
    source = open_source(Data(**({"source": "files", "path": str(path), "held_out": held_out} | data)))
    return TextStream(
        source, split, tokenizer, seq_len, seed=seed, repeat=split == "train", buffer_bytes=1 << 20
    )


def groups_of(stream, n, count=4, at=START):
    return list(itertools.islice(stream.groups(at, count, slice(0, count)), n))


def rows_of(stream, n, count=4):
    """The first n samples as tuples."""
    groups = groups_of(stream, -(-n // count), count)
    return [tuple(row) for group in groups for row in group.rows.tolist()][:n]


def documents_of(path, epochs, seed=0):
    source = open_source(Data(source="files", path=str(path), held_out=0.0))
    for epoch in range(epochs):
        texts = source.split("train") if seed is None else source.shuffled("train", seed, epoch, 1 << 20)
        yield from ((epoch, number, BYTE.encode_document(text)) for number, text in enumerate(texts))


def packed_rows(path, epochs, seed=0):
    tokens = np.concatenate([ids for _, _, ids in documents_of(path, epochs, seed)]).tolist()
    return [tuple(tokens[i : i + S + 1]) for i in range(0, len(tokens) - S, S)]


def test_a_shuffled_block_holds_each_of_its_packed_samples_once(corpus, block):
    block(50)
    expected = packed_rows(corpus, 3)
    n = len(expected) // 50 * 50
    assert n > 20 * 50  # three epochs, whose borders lie inside blocks
    rows = rows_of(stream_of(corpus), n)
    orders = []
    for at in range(0, n, 50):
        here, packed = rows[at : at + 50], expected[at : at + 50]
        assert Counter(here) == Counter(packed)
        orders.append(tuple(here.index(row) for row in packed))
    assert len(set(orders)) == len(orders) and tuple(range(50)) not in orders


def test_order_of_a_seed_is_pinned(tmp_path):
    # A changed order would break every resume: this may change only together with STATE_FORMAT.
    (tmp_path / "a.txt").write_text("abcdefghijkl")
    inputs = [row[0] for row in rows_of(stream_of(tmp_path, seq_len=1, seed=7), 28, count=2)]
    assert "".join({256: "<", 257: ">"}.get(i, chr(i)) for i in inputs) == "ijkcb<eafdhgfbcd<>hgaeil>fed"


@pytest.mark.parametrize("samples", [1, 3, 20, 4000])
@pytest.mark.parametrize("seed", [None, 5])
def test_groups_of_any_size_give_the_same_samples(corpus, block, samples, seed):
    block(samples)
    stream = stream_of(corpus, seed=seed)
    one = rows_of(stream, 840, count=1)
    assert len(set(one)) > 300
    assert all(rows_of(stream, 840, count) == one for count in (7, 64))
    if seed is None or samples == 1:
        assert one == packed_rows(corpus, 2, seed)[:840]


@pytest.mark.parametrize("seed", [None, 5])
def test_the_position_says_where_the_block_begins(corpus, block, seed):
    block(20)
    places = [
        (epoch, number, offset)
        for epoch, number, ids in documents_of(corpus, 2, seed)
        for offset in range(len(ids))
    ]
    ends = [group.end for group in groups_of(stream_of(corpus, seed=seed), 150)]
    assert ends[-1].epoch == 1
    for n, end in enumerate(ends, start=1):
        begin = 4 * n if seed is None else 4 * n // 20 * 20
        assert end == (4 * n, *places[begin * S])


@pytest.mark.parametrize("index", [0, 60, 96])
def test_the_next_block_is_packed_while_this_one_is_handed_out(corpus, block, index):
    block(100)  # 800 tokens: 20 documents or so
    tokenizer = Counting()
    stream = stream_of(corpus, tokenizer=tokenizer)
    end = groups_of(stream, 1, 300 + index)[0].end
    groups = stream.groups(end, 4, slice(0, 4))
    tokenizer.documents = 0
    next(groups)
    started = tokenizer.documents
    done = []
    for _ in range(100):  # four blocks
        before = tokenizer.documents
        next(groups)
        done.append(tokenizer.documents - before)
    # A start reads its own block, nothing before it; entered late, the rest of the time is shorter.
    late = done[: (100 - index) // 4]
    assert 14 < started < 60
    assert max(done[len(late) :]) <= 3 and sum(done) > 60
    if index < 90:
        assert max(late) <= 5


def test_a_source_smaller_than_a_block_is_not_read_often_to_start(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh")
    tokenizer = Counting()
    groups_of(stream_of(tmp_path, seq_len=4, tokenizer=tokenizer), 1, count=1)
    assert tokenizer.documents <= 3


def test_a_finite_stream_hands_out_every_sample_once(tmp_path, block):
    block(3)
    for length in range(6, 70):
        (tmp_path / "a.txt").write_text("".join(chr(48 + i) for i in range(length)))
        stream = stream_of(tmp_path, split="validation", held_out=1 - 1e-9)
        groups = groups_of(stream, None, count=2)
        rows = [tuple(row) for group in groups for row in group.rows.tolist()]
        assert len(rows) == sum(group.samples for group in groups) == (length + 1) // S
        assert Counter(rows) == Counter(packed_rows(tmp_path, 1))
        assert all(group.samples == 2 for group in groups[:-1])


def test_consecutive_batches_of_the_builtin_text_mix_documents(block):
    def spread():
        groups = groups_of(stream_of("", 256, source="builtin"), 300, count=8)
        return np.var([entropy(np.bincount(g.rows[:, :-1].ravel(), minlength=259)) for g in groups])

    mixed = spread()
    block(1)  # now only the documents are shuffled
    # Eight sequences from anywhere differ less from eight others than eight of one document do.
    assert mixed < spread() / 2


def test_the_first_validation_batches_mix_the_held_out_documents(tmp_path):
    for i in range(26):
        (tmp_path / f"{i}.txt").write_text(chr(97 + i) * 400)
    stream = stream_of(tmp_path, split="validation", held_out=1 - 1e-9)
    [group] = groups_of(stream, 1, count=32)
    assert len(set(group.rows.ravel().tolist()) - {256, 257}) > 13
