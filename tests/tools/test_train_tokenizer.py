"""tools/train_tokenizer.py: its file is a tokenizer of ours, merges what is frequent, and is the same each time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from titan_fp8.config import Data
from titan_fp8.data.tokenizer import build_tokenizer

pytest.importorskip("tokenizers", reason="Hugging Face's tokenizers is not installed")
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tools"))
import train_tokenizer


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox, naïve and 北京, jumps over the quicker dog. " * 50)
    return path


def test_its_file_is_a_tokenizer(tmp_path, text):
    outs = [tmp_path / name for name in ("a.tiktoken", "b.tiktoken")]
    for out in outs:
        assert train_tokenizer.main(["--path", str(text), "--size", "300", "--out", str(out)]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    tokenizer = build_tokenizer(Data(tokenizer=str(outs[0])))
    sample = "the quick 北京 fox\n\tnaïver than 1234 dogs"
    ids = tokenizer.encode(sample, add_bos=False, add_eos=False)
    assert tokenizer.decode(ids) == sample
    assert len(tokenizer.encode(" quick", add_bos=False, add_eos=False)) == 1
    assert len(ids) < len(sample.encode()) and max(ids) < 300


@pytest.mark.parametrize("size, words", [("100", "256 to 1048576"), ("50000", "at most what the text gives")])
def test_sizes_that_cannot_be_are_refused(tmp_path, text, capsys, size, words):
    assert (
        train_tokenizer.main(["--path", str(text), "--size", size, "--out", str(tmp_path / "t.tiktoken")])
        == 2
    )
    assert words in capsys.readouterr().err
    assert not (tmp_path / "t.tiktoken").exists()


@pytest.mark.parametrize("out", ["nowhere/t.tiktoken", "."])
def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path, text, capsys, monkeypatch, out):
    monkeypatch.setattr(train_tokenizer, "train", None)
    assert train_tokenizer.main(["--path", str(text), "--size", "300", "--out", str(tmp_path / out)]) == 2
    assert "choose another place" in capsys.readouterr().err
