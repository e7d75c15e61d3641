"""Documents: every kind of file, the split by hash, shuffled order, and what is refused."""

import gzip
import importlib
import json
import lzma
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from titan_fp8.config import Data
from titan_fp8.data.sources import open_source, read_records
from titan_fp8.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["first", "zweites, naïve", "第三", "fourth"]


def jsonl(texts, key="text"):
    return "".join(json.dumps({key: text, "n": i}) + "\n" for i, text in enumerate(texts)).encode()


def source_of(path, **settings):
    return open_source(Data(source="files", path=str(path), **({"held_out": 0.0} | settings)))


def texts_of(path, **settings):
    return [text.decode() for _, text in source_of(path, **settings).documents()]


@pytest.mark.parametrize(
    "name, pack",
    [
        ("a.jsonl", bytes),
        ("a.json", bytes),
        ("a.ndjson", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.xz", lzma.compress),
    ],
)
def test_json_lines(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(jsonl(TEXTS) + b"\n" + jsonl(["", "last"])))
    assert texts_of(path) == [*TEXTS, "last"]


@pytest.mark.parametrize(
    "name, pack", [("a.jsonl", bytes), ("a.ndjson.gz", gzip.compress), ("a.json.xz", lzma.compress)]
)
def test_whole_records(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(jsonl(TEXTS)))
    assert list(read_records(path, "text")) == [
        (text, {"text": text, "n": i}) for i, text in enumerate(TEXTS)
    ]
    path.write_bytes(pack(jsonl(TEXTS))[:-9])
    with pytest.raises(UserError, match=name):
        list(read_records(path, "text"))
    with pytest.raises(UserError, match=r"\.jsonl, \.ndjson or \.json"):
        list(read_records(tmp_path / "a.parquet", "text"))


def test_another_text_key(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS, "content"))
    assert texts_of(path, text_key="content") == TEXTS


def test_parquet_row_groups(tmp_path):
    pq.write_table(pa.table({"text": TEXTS, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet", row_group_size=2)
    assert texts_of(tmp_path / "a.parquet") == TEXTS


def test_a_folder_is_walked_in_sorted_order(tmp_path, caplog):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "x.txt").write_text("plain\n")
    (tmp_path / ".hidden" / "y.txt").write_text("hidden")
    (tmp_path / "c.md").write_text("# markdown")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    assert texts_of(tmp_path) == [*TEXTS, "plain\n", "# markdown"]
    assert "picture.png" in caplog.text


def test_links_are_followed_each_folder_once(tmp_path):
    """Data that lie elsewhere, a circle, and two names of one folder, of which the first in sorted order counts."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "b", elsewhere / "deep"):
        folder.mkdir(parents=True)
    (root / "b" / "x.txt").write_text("in b")
    (elsewhere / "deep" / "y.txt").write_text("elsewhere")
    (elsewhere / "z.txt").write_text("file")
    (root / "b" / "up").symlink_to(root)
    (root / "c").symlink_to(elsewhere / "deep")
    (root / "d").symlink_to(elsewhere / "deep")
    (root / "e.txt").symlink_to(elsewhere / "z.txt")
    assert texts_of(root) == ["in b", "elsewhere", "file"]
    (root / "a").symlink_to("b")
    assert [file.name for file in source_of(root)._files] == ["a/x.txt", "c/y.txt", "e.txt"]


def test_lone_surrogates_become_question_marks(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert texts_of(tmp_path) == ["a?b"]


def test_builtin_is_text_in_a_fixed_order():
    source = open_source(Data())
    documents = list(source.documents())
    assert documents == list(open_source(Data()).documents())
    total = sum(len(text) for _, text in documents)
    assert 1e6 < total < 13e6
    assert {split for split, _ in documents} == {"train", "validation"}
    assert any(text.startswith(b'The "assert" statement') for _, text in documents)  # a help topic


def test_builtin_leaves_tables_out():
    documents = [text for _, text in open_source(Data()).documents()]
    assert any(b"def namedtuple(" in text for text in documents)  # code
    for table in ("encodings.cp437", "stringprep", "html.entities", "opcode", "locale"):
        text = Path(importlib.import_module(table).__file__).read_bytes()
        assert text not in documents, table


def test_debug_run_holds_out_enough_for_its_validation():
    config = tomllib.loads((ROOT / "train_configs" / "debug.toml").read_text())
    data, validation = Data(**config["data"]), config["validation"]
    held = [len(text) for text in open_source(data).split("validation")]
    asked = validation["steps"] * validation["local_batch_size"] * validation["seq_len"]
    assert data.tokenizer == "byte" and len(held) >= 20 and sum(held) > 10 * asked
    assert max(held) < sum(held) / 3  # no one document decides


def test_held_out_is_a_share_and_follows_the_text(tmp_path):
    texts = [f"document {i}" for i in range(2000)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    held = {share: set(source_of(tmp_path, held_out=share).split("validation")) for share in (0.1, 0.2)}
    assert 140 < len(held[0.1]) < 260
    assert held[0.1] < held[0.2]
    assert not held[0.1] & set(source_of(tmp_path, held_out=0.1).split("train"))
    # The same texts under other names and in another order.
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "z.jsonl").write_bytes(jsonl(texts[::-1]))
    assert set(source_of(tmp_path, held_out=0.1).split("validation")) == held[0.1]


def test_shuffled_order(tmp_path):
    texts = [f"document {i:03}".encode() for i in range(300)]
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_bytes(jsonl([t.decode() for t in texts[i * 100 : i * 100 + 100]]))
    source = source_of(tmp_path)

    def order(seed, epoch, buffer_bytes=1 << 20):
        return list(source.shuffled("train", seed, epoch, buffer_bytes))

    assert sorted(order(0, 0)) == texts
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(*which)) for which in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4
    # The whole fits in the buffer: a full shuffle leaves a document in its file's third one time in three.
    assert 60 < sum(a[:-2] == b[:-2] for a, b in zip(order(0, 0), texts, strict=True)) < 140
    # A small buffer still visits all, and mixes no further than it can hold.
    small = order(0, 0, buffer_bytes=10 * len(texts[0]))
    assert sorted(small) == texts and small != order(0, 0)
    assert len({t[:-2] for t in small[:80]}) == 1


def test_order_of_a_seed_is_pinned(tmp_path):
    # A changed order would break every resume: this may change only together with the state's format number.
    (tmp_path / "a.jsonl").write_bytes(jsonl([str(i) for i in range(10)]))
    assert b"".join(source_of(tmp_path).shuffled("train", 7, 1, 1 << 20)) == b"4827053691"


def test_identity_follows_names_sizes_and_key(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for folder in ("one", "two"):
        (tmp_path / folder / "a.txt").write_text("abc")
    first = source_of(tmp_path / "one").identity
    assert source_of(tmp_path / "two").identity == first
    assert source_of(tmp_path / "one", text_key="content").identity != first
    (tmp_path / "two" / "a.txt").write_text("abcd")
    assert source_of(tmp_path / "two").identity != first


BAD = {
    "no JSON": ("a.jsonl", jsonl(["ok"]) + b"{broken\n", r"a\.jsonl line 2"),
    "no object": ("a.jsonl", b'["text"]\n', r"got a list in .*line 1"),
    "array file": ("a.json", b'[\n{"text": "x"}\n]\n', r"line 1"),
    "nested JSON": (
        "a.jsonl",
        b'{"text": "x", "n": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n",
        r"no JSON .*line 1",
    ),
    "no key": ("a.jsonl", jsonl(["ok"]) + b'{"body": "x"}\n', r'"text"; got the keys body in .*line 2'),
    "null": ("a.jsonl", b'{"text": null}\n', "NoneType under that key"),
    "number": ("a.jsonl", b'{"text": 3}\n', "int under that key"),
    "latin-1": ("a.jsonl", '{"text": "é"}\n'.encode("latin-1"), r"utf-8; got byte 0xe9 .*a\.jsonl line 1"),
    "latin-1 text": ("a.txt", "né".encode("latin-1"), r"utf-8; got byte 0xe9 at byte 1 of .*a\.txt"),
    "cut gz": ("a.jsonl.gz", gzip.compress(jsonl(TEXTS))[:-12], r"whole; got .*a\.jsonl\.gz"),
    "no gz": ("a.jsonl.gz", jsonl(TEXTS), r"whole; got .*a\.jsonl\.gz"),
    "cut xz": ("a.jsonl.xz", lzma.compress(jsonl(TEXTS))[:-12], r"whole; got .*a\.jsonl\.xz"),
    "no parquet": ("a.parquet", b"PAR1 not really", r"whole; got .*a\.parquet"),
    "empty file": ("a.jsonl", b"", "at least one document"),
    "empty texts": ("a.jsonl", jsonl(["", ""]), "at least one document"),
}


@pytest.mark.parametrize("name, content, words", BAD.values(), ids=BAD.keys())
def test_bad_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        source = source_of(tmp_path)
        source.require("train")
        list(source.documents())
    assert "\n" not in str(caught.value)


def test_bad_parquet_columns_are_named(tmp_path):
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'"text"; got the columns body in .*a\.parquet'):
        texts_of(tmp_path)
    columns = [pa.array(["one"]), pa.array(["other"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r'"text"; got 2 columns of that name in .*a\.parquet'):
        texts_of(tmp_path)
    pq.write_table(pa.table({"text": ["ok", None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"NoneType under that key in .*a\.parquet row 2"):
        texts_of(tmp_path)


def test_bad_paths(tmp_path):
    with pytest.raises(UserError, match="must name a file or folder"):
        source_of("")
    with pytest.raises(UserError, match="must exist"):
        source_of(tmp_path / "nothing")
    with pytest.raises(UserError, match="hold files with text"):
        source_of(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="kind of file"):
        source_of(tmp_path / "a.png")
    with pytest.raises(UserError, match="1 of other kinds"):
        source_of(tmp_path)


@pytest.mark.parametrize("share", [-0.1, 1.0, 2, float("nan")])
def test_held_out_must_be_a_share(tmp_path, share):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="at least 0 and below 1"):
        source_of(tmp_path, held_out=share)


def test_an_empty_split_says_what_to_change(tmp_path):
    (tmp_path / "a.txt").write_text("the first document")
    with pytest.raises(UserError, match=r"one document in .* cut the text into several, or write 0"):
        source_of(tmp_path, held_out=0.02).require("validation")
    (tmp_path / "b.txt").write_text("the second document")
    with pytest.raises(UserError, match="for validation; raise held_out"):
        source_of(tmp_path, held_out=1e-9).require("validation")
    with pytest.raises(UserError, match="for validation; raise held_out"):
        source_of(tmp_path, held_out=0.0).require("validation")
    with pytest.raises(UserError, match="for train; lower held_out"):
        source_of(tmp_path, held_out=1 - 1e-9).require("train")
