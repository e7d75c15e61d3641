"""Prepared shards: the tool that writes them, resuming it, training from them, and damage."""

import base64
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from titan_fp8.config import Data
from titan_fp8.data.dataset import build_dataloader, build_validation_dataloader, text_statistics
from titan_fp8.data.shards import Shards, permute
from titan_fp8.data.sources import open_source
from titan_fp8.data.streams import Position, ShardStream
from titan_fp8.data.tokenizer import build_tokenizer
from titan_fp8.errors import UserError

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
import prepare_data  # noqa: E402  # pyrefly: ignore [missing-import]

BYTE = build_tokenizer(Data())


@pytest.fixture
def prepare(corpus):
    """prepare(out) -> manifest of the small corpus in shards of about 300 tokens."""

    def prepare(out, workers=1, shard_tokens=300, **data):
        data = Data(**({"source": "files", "path": str(corpus), "held_out": 0.2} | data))
        return prepare_data.prepare(data, out, shard_tokens=shard_tokens, workers=workers, quiet=True)

    return prepare


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_of(loader, n):
    rows = []
    for inputs, labels in loader:
        for x, y in zip(inputs["input"].tolist(), labels.tolist(), strict=True):
            rows.append([*x, y[-1]])
        if len(rows) >= n:
            break
    return rows[:n]


def test_manifest_tells_every_fact(prepare, corpus, tmp_path):
    manifest = prepare(tmp_path / "out")
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["complete"] and manifest["dtype"] == "uint16"
    assert manifest["tokenizer"] == {"identity": BYTE.identity, "vocab_size": 259}
    source = open_source(Data(source="files", path=str(corpus), held_out=0.2))
    for split, entries in manifest["splits"].items():
        texts = list(source.split(split))
        tokens = [token for text in texts for token in (256, *text, 257)]
        files = [tmp_path / "out" / entry["file"] for entry in entries]
        assert b"".join(path.read_bytes() for path in files) == np.array(tokens, "<u2").tobytes()
        assert sum(entry["tokens"] for entry in entries) == len(tokens)
        assert sum(entry["documents"] for entry in entries) == len(texts)
        assert sum(entry["text_bytes"] for entry in entries) == sum(map(len, texts))
        # Each shard ends with the document that fills it.
        assert all(300 <= entry["tokens"] < 300 + 80 for entry in entries[:-1])
        assert all(path.read_bytes()[-2:] == np.array(257, "<u2").tobytes() for path in files)
    assert len(manifest["splits"]["train"]) > 3 and len(manifest["splits"]["validation"]) > 1
    assert set(contents(tmp_path / "out")) == {
        "manifest.json",
        *(entry["file"] for entries in manifest["splits"].values() for entry in entries),
    }


def test_large_vocabularies_take_four_bytes(prepare, corpus, tmp_path):
    ranks = [bytes([i]) for i in range(256)]
    ranks += [bytes([a, b]) for a in range(256) for b in range(256)]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    (tmp_path / "big.model").write_bytes(b"".join(lines))
    manifest = prepare(tmp_path / "out", tokenizer=str(tmp_path / "big.model"))
    assert manifest["dtype"] == "uint32"
    big = build_tokenizer(Data(tokenizer=str(tmp_path / "big.model")))
    shards = Shards(tmp_path / "out", "train", big)
    text = next(open_source(Data(source="files", path=str(corpus), held_out=0.2)).split("train"))
    expected = big.encode_document(text)
    assert shards.read(0, len(expected)).tolist() == expected.tolist() and max(expected) > 2**16


def test_workers_do_not_change_the_bytes(prepare, tmp_path, monkeypatch):
    prepare(tmp_path / "one", workers=1)
    monkeypatch.setattr(prepare_data, "_CHUNK_BYTES", 200)  # many chunks
    prepare(tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("dtype_split", ["train", "validation"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "changed", "after the first"])
def test_damaged_shards_are_written_again_to_the_same_bytes(prepare, tmp_path, harm, dtype_split):
    out = tmp_path / "out"
    prepare(out)
    whole = contents(out)
    victim = sorted(out.glob(f"{dtype_split}-*.bin"))[1 if harm == "after the first" else -1]
    if harm == "missing":
        victim.unlink()
    elif harm == "changed":
        victim.write_bytes(victim.read_bytes()[::-1])
    else:
        victim.write_bytes(victim.read_bytes()[:-10])
    # What a kill leaves of the shard it interrupted.
    (out / f".{victim.name}.partial").write_bytes(b"half")
    prepare(out)
    assert contents(out) == whole


def test_resuming_after_each_shard(prepare, tmp_path, monkeypatch):
    prepare(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    real = prepare_data.ShardWriter.close
    out, stops = tmp_path / "out", 0

    class Killed(Exception):
        pass

    while stops < 20:
        closed = []

        def close(self, source_end, closed=closed):
            if closed:
                raise Killed
            closed.append(source_end)
            return real(self, source_end)

        monkeypatch.setattr(prepare_data.ShardWriter, "close", close)
        try:
            prepare(out)
            break
        except Killed:
            stops += 1
            assert not json.loads((out / "manifest.json").read_text())["complete"]
    assert stops == len(whole) - 2  # one new shard each time
    assert contents(out) == whole


def _alive(process):
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_kill_minus_nine(tmp_path):
    def command(out):
        tool = [sys.executable, str(TOOLS / "prepare_data.py"), "--source", "builtin", "--tokenizer", "byte"]
        return [*tool, "--shard-tokens", "150000", "--workers", "2", "--out", str(out)]

    out = tmp_path / "out"
    process = subprocess.Popen(command(out), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "train-00003.bin").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not json.loads((out / "manifest.json").read_text())["complete"]
    workers = [Path("/proc", pid) for pid in listing.split()]
    assert workers
    while any(map(_alive, workers)):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.02)
    subprocess.run(command(out), check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    data = Data(source="builtin")
    prepare_data.prepare(data, tmp_path / "whole", shard_tokens=150_000, workers=1, quiet=True)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_folder_is_left_alone(prepare, tmp_path):
    prepare(tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.bin")}
    prepare(tmp_path / "out")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.bin")} == before


def test_ordinary_text_that_cannot_be_split_is_told_with_the_tools_own_flags(tmp_path, capsys):
    """One document; then a record that is none, mended: what the failed run left does not stand in the way."""
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    arguments = ["--path", str(text), "--out", str(out), "--workers", "1", "--held-out"]
    text.write_text('{"text": "once"}\n')
    for held_out in ("0.02", "0.9"):
        assert prepare_data.main([*arguments, held_out]) == 2
        error = capsys.readouterr().err
        assert "--held-out must leave" in error and "one document in" in error and "[data]" not in error
        assert "write 0 and train with --validation.no-enable" in error
    text.write_text('{"text": "once"}\n["pretty"]\n')
    assert prepare_data.main([*arguments, "0"]) == 2
    error = capsys.readouterr().err
    assert "line 2" in error and "correct or remove the file, or set --text-key" in error
    text.write_text('{"text": "once"}\n{"text": "more"}\n')
    assert prepare_data.main([*arguments, "0"]) == 0
    with pytest.raises(UserError, match=r"the split validation; .* or train with --validation\.no-enable"):
        Shards(out, "validation", BYTE)


def test_other_arguments_never_touch_a_folder(prepare, tmp_path):
    out = tmp_path / "out"
    prepare(out)
    whole = contents(out)
    for change in ({"shard_tokens": 700}, {"held_out": 0.1}, {"source": "builtin"}):
        with pytest.raises(UserError, match="choose another --out"):
            prepare(out, **change)
    assert contents(out) == whole
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train-00000.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"empty or hold shards; got .*train-00000\.bin"):
        prepare(tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"train-00000.bin": b"precious"}


def test_shards_among_the_text_are_refused(prepare, corpus, tmp_path):
    """They would be text the next time."""
    (tmp_path / "link").symlink_to(corpus)
    for out in (corpus, corpus / "shards", tmp_path / "link" / "a" / "b"):
        with pytest.raises(UserError, match="--out must lie outside --path"):
            prepare(out)
    assert sorted(contents(corpus)) == ["0.jsonl", "1.jsonl", "2.jsonl"]


def test_two_writers_are_refused(prepare, tmp_path):
    (tmp_path / "out").mkdir()
    other = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another is writing"):
        prepare(tmp_path / "out")
    os.close(other)
    assert prepare(tmp_path / "out")["complete"]


def test_the_command(corpus, tmp_path, capsys):
    arguments = ["--path", str(corpus), "--out", str(tmp_path / "out"), "--workers", "1", "--held-out", "0.2"]
    assert prepare_data.main(arguments) == 0
    assert "tokens for training" in capsys.readouterr().out
    verify = ["--verify", "--out", str(tmp_path / "out")]
    assert prepare_data.main(verify) == 0
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text((facts := manifest.read_text()).replace('"complete": true', '"complete": false'))
    assert prepare_data.main(verify) == 2
    assert "error: shards must be finished; got" in capsys.readouterr().err
    manifest.write_text(facts)
    shard = tmp_path / "out" / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert prepare_data.main(verify) == 2
    assert "error: a shard must be whole; got" in capsys.readouterr().err
    assert prepare_data.main(["--path", "/nowhere", "--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
    assert prepare_data.main([*arguments, "--workers", "0"]) == 2


def test_a_worker_that_ends_before_its_time(corpus, tmp_path, capsys, monkeypatch):
    """As one does that the kernel kills where memory ends."""
    monkeypatch.setattr(prepare_data, "_start_worker", sys.exit)
    assert prepare_data.main(["--path", str(corpus), "--out", str(tmp_path / "out"), "--workers", "2"]) == 2
    error = capsys.readouterr().err
    assert "error: the processes" in error and "use fewer --workers" in error and "Traceback" not in error


def test_verify_finds_one_changed_byte_anywhere(tmp_path):
    out = tmp_path / "out"
    prepare_data.prepare(Data(), out, shard_tokens=10**9, workers=1, quiet=True)
    shard = out / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1  # between two of the blocks that loading looks at
    shard.write_bytes(content)
    with pytest.raises(UserError, match="sha256"):
        prepare_data.verify(out)
    content[5001] = 255  # an id that bytes do not have
    shard.write_bytes(content)
    stream = ShardStream(out, "train", BYTE, 64, seed=0, repeat=False)
    with pytest.raises(UserError, match=r"ids below the tokenizer's 259; got 6\d+ in .*--verify"):
        list(stream.groups(Position(), 64, slice(0, 64)))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_unshuffled_shards_give_the_same_samples_as_text(prepare, corpus, job, tmp_path, split):
    manifest = prepare(tmp_path / "out")
    build = build_dataloader if split == "train" else build_validation_dataloader
    text = build(1, 0, BYTE, job(corpus, batch=3, shuffle=False))
    shards = build(1, 0, BYTE, job(tmp_path / "out", batch=3, shuffle=False, source="shards"))
    n = (sum(entry["tokens"] for entry in manifest["splits"][split]) - 1) // 8 // 3 * 3
    assert n > 60
    assert rows_of(shards, n) == rows_of(text, n)


def test_a_shuffled_epoch_of_shards_holds_every_sample_once(prepare, job, tmp_path):
    manifest = prepare(tmp_path / "out")
    n = (sum(entry["tokens"] for entry in manifest["splits"]["train"]) - 1) // 8
    plain = rows_of(build_dataloader(1, 0, BYTE, job(tmp_path / "out", source="shards", shuffle=False)), n)
    drawn = rows_of(build_dataloader(1, 0, BYTE, job(tmp_path / "out", source="shards")), 2 * n)
    assert sorted(drawn[:n]) == sorted(drawn[n:]) == sorted(plain)
    assert drawn[:n] != drawn[n:] and drawn[:n] != plain


def test_shards_do_not_depend_on_ranks_and_resume_anywhere(prepare, job, tmp_path):
    manifest = prepare(tmp_path / "out")
    n = (sum(entry["tokens"] for entry in manifest["splits"]["train"]) - 1) // 8

    def loaders(world, batch):
        config = job(tmp_path / "out", batch=batch, source="shards")
        return [build_dataloader(world, rank, BYTE, config) for rank in range(world)]

    def gather(ranks, groups, batch):
        parts = [rows_of(loader, groups * batch) for loader in ranks]
        return [row for j in range(groups) for part in parts for row in part[j * batch : (j + 1) * batch]]

    groups = n // 4 + 5  # across the epoch border
    whole = gather(loaders(1, 4), groups, 4)
    assert gather(loaders(2, 2), groups, 2) == whole
    assert gather(loaders(4, 1), groups, 1) == whole
    [stopped] = loaders(1, 4)
    assert rows_of(stopped, 4 * (n // 4 - 2)) == whole[: 4 * (n // 4 - 2)]
    resumed = loaders(2, 2)
    for loader in resumed:
        loader.load_state_dict(stopped.state_dict())
    assert gather(resumed, 7, 2) == whole[4 * (n // 4 - 2) :]


def test_resume_on_other_shards_or_on_text_is_refused(prepare, corpus, job, tmp_path):
    prepare(tmp_path / "out")
    prepare(tmp_path / "other", held_out=0.3)
    saved = build_dataloader(1, 0, BYTE, job(tmp_path / "out", source="shards")).state_dict()
    with pytest.raises(UserError, match=r"the shards of .data. path differs"):
        build_dataloader(1, 0, BYTE, job(tmp_path / "other", source="shards")).load_state_dict(saved)
    with pytest.raises(UserError, match=r"the text of .data. source and path differs"):
        build_dataloader(1, 0, BYTE, job(corpus)).load_state_dict(saved)


def test_statistics_of_shards_are_those_of_the_text(prepare, corpus, job, tmp_path):
    prepare(tmp_path / "out")
    shards = text_statistics(job(tmp_path / "out", source="shards"), BYTE)
    assert shards == pytest.approx(text_statistics(job(corpus), BYTE), rel=1e-12)


def test_what_loading_refuses(prepare, job, tmp_path):
    out = tmp_path / "out"
    prepare(out)
    config = job(out, source="shards")

    def refused(words, tokenizer=BYTE, config=config):
        with pytest.raises(UserError, match=words) as caught:
            build_dataloader(1, 0, tokenizer, config)
        assert "\n" not in str(caught.value)

    refused("must name the shard folder", config=job("", source="shards"))
    refused("without one; prepare it", config=job(tmp_path / "nothing", source="shards"))
    refused("seq_len", config=job(out, seq_len=100_000, source="shards"))
    other = build_tokenizer(Data())
    other.identity = "byte:other"
    refused(f"made with {BYTE.identity} and .* byte:other", tokenizer=other)

    shard, manifest = out / "train-00001.bin", out / "manifest.json"
    content, facts = shard.read_bytes(), manifest.read_text()
    shard.write_bytes(content[:-2])
    refused(r"train-00001\.bin: \d+ bytes where the manifest says")
    shard.write_bytes(content[::-1])
    refused(r"train-00001\.bin: other bytes")
    shard.unlink()
    refused(r"train-00001\.bin: No such file")
    shard.write_bytes(content)

    manifest.write_text(facts.replace('"complete": true', '"complete": false'))
    refused("with the same arguments to finish it")
    manifest.write_text(facts.replace('"version": 1', '"version": 2'))
    refused("of format version 1; got version 2")
    manifest.write_text(facts[:50])
    refused("prepare the shards again")
    manifest.write_text(facts)
    build_dataloader(1, 0, BYTE, config)


def test_no_validation_split_is_refused(prepare, job, tmp_path):
    prepare(tmp_path / "out", held_out=0.0)
    with pytest.raises(UserError, match="hold the split validation"):
        build_validation_dataloader(1, 0, BYTE, job(tmp_path / "out", source="shards"))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permute_is_a_permutation(n):
    for key in (0, 1):
        images = permute(np.arange(n), n, key)
        assert sorted(images) == list(range(n))
        # One index alone, and any order of asking, gives the same.
        assert permute(np.array([n - 1]), n, key)[0] == images[-1]
    if n >= 16:
        assert permute(np.arange(n), n, 0).tolist() != permute(np.arange(n), n, 1).tolist()


def test_permute_mixes_and_reaches_large_n():
    n = 10_000
    images = permute(np.arange(n), n, 5)
    # For a random permutation: |correlation| < 5 / sqrt(n), neighbours n/3 apart within 5 standard errors.
    assert abs(np.corrcoef(images, np.arange(n))[0, 1]) < 5 / np.sqrt(n)
    gaps = np.abs(np.diff(images)) / n
    assert abs(gaps.mean() - 1 / 3) < 5 * np.sqrt(1 / 18 / n) * np.sqrt(2)
    large = permute(np.arange(1000), 10**13, 5)
    assert len(set(large)) == 1000 and large.min() >= 0 and large.max() < 10**13
    assert large.max() > 0.9 * 10**13
