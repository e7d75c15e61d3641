"""The loaders: packing, ranks, resuming, validation, statistics. test_streams.py tests the order of samples.

The samples expected are cut by hand from the documents' bytes, not by the code under test.
"""

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from titan_fp8.config import Data
from titan_fp8.data import streams
from titan_fp8.data.dataset import (
    build_dataloader,
    build_validation_dataloader,
    text_statistics,
    unigram_entropy,
)
from titan_fp8.data.sources import open_source
from titan_fp8.data.tokenizer import build_tokenizer
from titan_fp8.errors import UserError

BYTE = build_tokenizer(Data())
BOS, EOS = 256, 257


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 20 samples of 8 tokens: every test crosses many borders."""
    monkeypatch.setattr(streams, "_BLOCK_TOKENS", 160)


def take(loader, n):
    """The next n batches as [L, S + 1] lists, after checking shapes, types, and labels."""
    batches = []
    for inputs, labels in itertools.islice(loader, n):
        x = inputs["input"]
        assert x.dtype == labels.dtype == torch.int64 and x.shape == labels.shape
        assert torch.equal(x[:, 1:], labels[:, :-1])
        batches.append(torch.cat([x, labels[:, -1:]], 1).tolist())
    return batches


def train(config, world=1, rank=0):
    return build_dataloader(world, rank, BYTE, config)


def samples(config, n, world=1):
    """The first n samples, gathered from all ranks in the order the stream has them."""
    batch = config.training.local_batch_size
    ranks = [take(train(config, world, rank), -(-n // (world * batch))) for rank in range(world)]
    return [row for group in zip(*ranks, strict=True) for rows in group for row in rows][:n]


def packed(texts):
    return [token for text in texts for token in (BOS, *text, EOS)]


def cut(tokens, seq_len):
    return [tokens[i : i + seq_len + 1] for i in range(0, len(tokens) - seq_len, seq_len)]


def test_packing_by_hand(tmp_path, job):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("de")
    config = job(tmp_path, seq_len=4, batch=1, held_out=0.0, shuffle=False)
    a, b, c, d, e = b"abcde"
    # The stream: B a b c E B d e E | B a b c E B d e E | … with its epochs of nine tokens.
    assert take(train(config), 6) == [
        [[BOS, a, b, c, EOS]],
        [[EOS, BOS, d, e, EOS]],
        [[EOS, BOS, a, b, c]],
        [[c, EOS, BOS, d, e]],
        [[e, EOS, BOS, a, b]],
        [[b, c, EOS, BOS, d]],
    ]


def test_unshuffled_stream_is_the_documents_in_order(corpus, job):
    texts = list(open_source(job(corpus).data).split("train"))
    expected = cut(packed(texts) * 2, 8)
    assert samples(job(corpus, shuffle=False), len(expected)) == expected


def test_a_shuffled_epoch_holds_every_document_once(corpus, job, monkeypatch):
    texts = list(open_source(job(corpus).data).split("train"))
    length = len(packed(texts))
    # Blocks of one sample leave the packed order, in which documents can be read.
    monkeypatch.setattr(streams, "_BLOCK_TOKENS", 8)
    in_order = samples(job(corpus), 2 * length // 8)
    stream = [token for row in in_order for token in row[:-1]]
    first, second = (_documents(stream[at : at + length]) for at in (0, length))
    assert Counter(first) == Counter(texts)
    assert Counter(second) <= Counter(texts) and len(second) >= len(texts) - 1
    assert first != texts and first[:50] != second[:50]
    # Larger blocks hand out the same samples, in another order.
    monkeypatch.setattr(streams, "_BLOCK_TOKENS", 160)
    n = len(in_order) // 20 * 20
    rows = samples(job(corpus), n)
    assert rows != in_order[:n]
    assert [sorted(rows[i : i + 20]) for i in range(0, n, 20)] == [
        sorted(in_order[i : i + 20]) for i in range(0, n, 20)
    ]


def _documents(tokens):
    """The whole documents in a piece of the stream; what it has of one that began before it is left out."""
    pieces, current = [], None
    for token in tokens:
        if token == BOS:
            current = []
        elif current is not None and token == EOS:
            pieces.append(bytes(current))
            current = None
        elif current is not None:
            current.append(token)
    return pieces


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_stream_does_not_depend_on_ranks_or_batch(corpus, job, shuffle):
    one = samples(job(corpus, batch=4, shuffle=shuffle), 64)
    assert len(set(map(tuple, one))) > 32
    assert samples(job(corpus, batch=2, shuffle=shuffle), 64, world=2) == one
    assert samples(job(corpus, batch=1, shuffle=shuffle), 64, world=4) == one
    assert samples(job(corpus, batch=3, shuffle=shuffle), 64, world=4) == one


def test_seed_decides_the_order_and_none_means_zero(corpus, job):
    assert samples(job(corpus, seed=None), 20) == samples(job(corpus, seed=0), 20)
    assert samples(job(corpus, seed=1), 20) != samples(job(corpus, seed=0), 20)


def epoch_groups(corpus, job):
    texts = list(open_source(job(corpus).data).split("train"))
    return len(packed(texts)) // (8 * 4)


@pytest.mark.parametrize(
    "where", ["start", "in a block", "block's border", "before border", "at border", "second epoch"]
)
def test_resume_is_exact(corpus, job, where):
    config = job(corpus, batch=4)
    border = epoch_groups(corpus, job)
    done = {
        "start": 0,
        "in a block": 7,
        "block's border": 10,
        "before border": border - 1,
        "at border": border,
        "second epoch": border + 3,
    }
    n = done[where]
    whole = take(train(config), n + 6)
    stopped = train(config)
    if n:
        running = iter(stopped)
        take(running, n)
    resumed = train(config)
    resumed.load_state_dict(stopped.state_dict())
    assert take(resumed, 6) == whole[n:]


@pytest.mark.parametrize("batch, shuffle", [(1, False), (1, True), (7, True)])
def test_resume_after_every_batch(tmp_path, job, batch, shuffle):
    # Documents that end where a sample does, that last for many samples, and that are shorter than one.
    for i, text in enumerate(["ab", "cdefgh", "i" * 50, "", "j", "klmnop", "q" * 31]):
        (tmp_path / f"{i}.txt").write_text(text)
    config = job(tmp_path, seq_len=4, batch=batch, held_out=0.0, shuffle=shuffle)
    whole = take(train(config), 90)  # three epochs, or with batches of seven, which straddle blocks, 21
    loader = train(config)
    for n, _ in enumerate(itertools.islice(loader, 87), start=1):
        resumed = train(config)
        resumed.load_state_dict(loader.state_dict())
        assert take(resumed, 3) == whole[n : n + 3]


def test_resume_through_a_torch_checkpoint(corpus, job, tmp_path):
    config = job(corpus, batch=2)
    whole = take(train(config), 12)
    stopped = train(config)
    take(stopped, 7)
    dcp.save({"dataloader": stopped}, checkpoint_id=tmp_path / "checkpoint")
    resumed = train(config)
    dcp.load({"dataloader": resumed}, checkpoint_id=tmp_path / "checkpoint")
    assert take(resumed, 5) == whole[7:]


@pytest.mark.parametrize("done", [5, 7])  # batches of four: at a block's border, and inside one
@pytest.mark.parametrize("world, batch", [(2, 2), (4, 3), (1, 1), (4, 16)])
def test_resume_at_another_world_size_and_batch(corpus, job, world, batch, done):
    whole = samples(job(corpus, batch=4), 28 + 3 * 64)
    stopped = train(job(corpus, batch=4))
    take(stopped, done)
    ranks = []
    for rank in range(world):
        loader = train(job(corpus, batch=batch), world, rank)
        loader.load_state_dict(stopped.state_dict())
        ranks.append(take(loader, 3))
    rows = [row for group in zip(*ranks, strict=True) for part in group for row in part]
    assert rows == whole[4 * done : 4 * done + len(rows)]


def test_state_is_that_of_the_batch_handed_out_on_every_rank(corpus, job):
    states = []
    for rank in range(4):
        loader = train(job(corpus, batch=1), 4, rank)
        assert loader.state_dict()["position"].tolist() == [0, 0, 0, 0]
        running = iter(loader)
        take(running, 3)
        states.append(loader.state_dict())
    assert states[0]["position"][0] == 12
    for state in states:
        assert state.keys() == {"position", "fingerprint"}
        assert all(value.dtype == torch.int64 for value in state.values())
        assert all(torch.equal(state[key], states[0][key]) for key in state)


def test_a_saved_state_does_not_move_on(corpus, job):
    running = train(job(corpus))
    batches = iter(running)
    next(batches)
    state = running.state_dict()
    next(batches)
    assert state["position"][0] == 2 and running.state_dict()["position"][0] == 4


@pytest.mark.parametrize(
    "change, words",
    [
        ({"seq_len": 16}, "training.seq_len differs: got 16 where the checkpoint has 8"),
        ({"seed": 3}, "debug.seed .* differs: got 3 where the checkpoint has 0"),
        ({"shuffle": False}, "shuffle off.* differs: got -1 where the checkpoint has 0"),
        ({"held_out": 1e-9}, "held_out differs: got 1e-09"),
        ({"text_key": "n"}, "the text of .data. source and path differs"),
        ({"source": "builtin"}, "the text of .data. source and path differs"),
    ],
)
def test_resume_with_other_data_names_what_differs(tmp_path, job, change, words):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "n": "eins"}\n')
    saved = train(job(tmp_path, held_out=0.0)).state_dict()
    with pytest.raises(UserError, match=words) as caught:
        train(job(tmp_path, **({"held_out": 0.0} | change))).load_state_dict(saved)
    assert "exclude_from_loading" in str(caught.value) and "\n" not in str(caught.value)


def test_resume_with_another_tokenizer(corpus, job):
    saved = train(job(corpus)).state_dict()
    other = build_tokenizer(Data())
    other.identity = "byte:other"
    with pytest.raises(UserError, match="tokenizer differs: got byte:other"):
        build_dataloader(1, 0, other, job(corpus)).load_state_dict(saved)


def test_resume_with_a_foreign_state(corpus, job):
    loader = train(job(corpus))
    state = loader.state_dict()
    state["fingerprint"][0] += 1
    with pytest.raises(UserError, match="of format"):
        loader.load_state_dict(state)


def test_text_that_shrank_unnoticed_is_refused_on_resume(corpus, job):
    config = job(corpus, batch=4, shuffle=False, held_out=0.0)
    loader = train(config)
    take(loader, 100)
    state = loader.state_dict()
    for path in corpus.iterdir():
        # Of the same size, so that only the missing documents can tell.
        path.write_bytes(b'{"text":"x"}\n'.ljust(path.stat().st_size))
    resumed = train(config)
    resumed.load_state_dict(state)
    with pytest.raises(UserError, match="must not change during a run"):
        next(iter(resumed))


@pytest.mark.parametrize("shuffle", [False, True])
def test_held_out_documents_are_never_trained_on(corpus, job, shuffle):
    # Sequences long enough to hold whole documents, whatever the order of the sequences.
    config = job(corpus, seq_len=160, batch=4, shuffle=shuffle)
    held = set(open_source(config.data).split("validation"))
    assert len(held) > 10
    trained = [text for row in samples(config, 3 * 4 * epoch_groups(corpus, job)) for text in _documents(row)]
    assert len(trained) > 200 and not held & set(trained)
    one = job(corpus, seq_len=160, batch=1, shuffle=shuffle)
    validated = take(build_validation_dataloader(1, 0, BYTE, one), 10**6)
    seen = {text for [row] in validated for text in _documents(row)}
    assert len(seen) > 10 and seen <= held


def test_validation_is_finite_and_the_same_every_time(corpus, job):
    loader = build_validation_dataloader(1, 0, BYTE, job(corpus, batch=4))
    first = take(loader, 3)  # a validation that stops early, as validation.steps asks
    whole = take(loader, 10**6)
    assert whole[:3] == first
    assert take(loader, 10**6) == whole
    held = list(open_source(job(corpus).data).split("validation"))
    assert len(whole) == (len(packed(held)) - 1) // 8 // 4
    every = take(build_validation_dataloader(1, 0, BYTE, job(corpus, batch=1)), 10**6)
    order = open_source(job(corpus).data).shuffled("validation", 0, 0, 1 << 20)
    assert [row for [row] in every][: 4 * len(whole)] == [row for rows in whole for row in rows]
    assert sorted(row for [row] in every) == sorted(cut(packed(order), 8))
    assert take(build_validation_dataloader(1, 0, BYTE, job(corpus, batch=4, seed=9)), 10**6) == whole
    assert loader.state_dict() == {}


def test_validation_gives_every_rank_equally_many_batches(corpus, job):
    whole = take(build_validation_dataloader(1, 0, BYTE, job(corpus, batch=4)), 10**6)
    ranks = [take(build_validation_dataloader(4, r, BYTE, job(corpus, batch=1)), 10**6) for r in range(4)]
    assert [len(batches) for batches in ranks] == [len(whole)] * 4
    assert [[rank[j][0] for rank in ranks] for j in range(len(whole))] == whole


def test_a_validation_below_one_batch_is_filled_with_ignored_rows(tmp_path, job):
    (tmp_path / "a.txt").write_text("abcdefgh")  # 10 tokens: 2 samples of 4
    config = job(tmp_path, seq_len=4, batch=2, held_out=1 - 1e-9, shuffle=False)
    batches = [list(build_validation_dataloader(2, rank, BYTE, config)) for rank in (0, 1)]
    assert [len(b) for b in batches] == [1, 1]
    (x0, y0), (x1, y1) = batches[0][0], batches[1][0]
    assert x0["input"].tolist() == [[BOS, *b"abc"], list(b"defg")]
    assert y0.tolist() == [list(b"abcd"), [*b"efgh"]]
    assert x1["input"].shape == (2, 4) and y1.unique().tolist() == [-100]


def test_validation_without_one_sample_is_refused(tmp_path, job):
    (tmp_path / "a.txt").write_text("abc")
    loader = build_validation_dataloader(1, 0, BYTE, job(tmp_path, seq_len=8, held_out=1 - 1e-9))
    with pytest.raises(UserError, match=r"raise .data. held_out"):
        next(iter(loader))


def test_builders_refuse_an_empty_split(tmp_path, job):
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(UserError, match="raise held_out"):
        build_validation_dataloader(1, 0, BYTE, job(tmp_path, held_out=0.0))
    with pytest.raises(UserError, match="and one document in"):
        train(job(tmp_path, held_out=1 - 1e-9))
    (tmp_path / "b.txt").write_text("defg")
    with pytest.raises(UserError, match="lower held_out"):
        train(job(tmp_path, held_out=1 - 1e-9))


def test_bad_text_met_while_reading_ahead_stops_the_run(corpus, job):
    (corpus / "2.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match=r"2\.jsonl line 1"):
        take(train(job(corpus, shuffle=False)), 10**6)


def test_a_document_much_longer_than_a_batch(tmp_path, job):
    text = bytes(range(97, 123)) * 4000
    (tmp_path / "a.txt").write_bytes(text)
    expected = cut(packed([text]), 8)
    assert samples(job(tmp_path, held_out=0.0, shuffle=False), 200) == expected[:200]
    assert sorted(samples(job(tmp_path, held_out=0.0), 200)) == sorted(expected[:200])


def test_unigram_statistics(tmp_path, job):
    (tmp_path / "a.txt").write_text("aabb")
    config = job(tmp_path, held_out=0.0)
    # bos a a b b eos
    expected = -2 * (1 / 3) * math.log(1 / 3) - 2 * (1 / 6) * math.log(1 / 6)
    assert unigram_entropy(config, BYTE) == pytest.approx(expected, abs=1e-12)
    assert text_statistics(config, BYTE).bytes_per_token == pytest.approx(4 / 6)
    config.data.source = "hf"
    assert unigram_entropy(config, BYTE) is None


def test_hf_goes_through_torchtitan(tmp_path, job, monkeypatch):
    from torchtitan.config import JobConfig
    from torchtitan.hf_datasets import text_datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "c4.json").write_text("".join('{"text": "some words"}\n' for _ in range(20)))
    config = JobConfig()
    config.training.dataset, config.training.dataset_path = "c4_test", str(tmp_path / "text")
    config.validation.dataset, config.validation.dataset_path = "c4_test", str(tmp_path / "text")
    for section in (config.training, config.validation):
        section.seq_len, section.local_batch_size = 8, 2
    config.data = job(Path(), source="hf").data
    for build in (build_dataloader, build_validation_dataloader):
        loader = build(1, 0, BYTE, config)
        assert isinstance(loader, text_datasets.ParallelAwareDataloader)
        inputs, labels = next(iter(loader))
        assert inputs["input"].tolist()[0] == [BOS, *b"some wo"] and labels.shape == (2, 8)
