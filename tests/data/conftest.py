"""A small corpus, and job configurations as the builders read them."""

import json
from types import SimpleNamespace

import pytest

from titan_fp8.config import Data

CORPUS = [f"document {i}: " + "abcdefghij"[: i % 11] * (1 + i % 5) for i in range(120)]


@pytest.fixture
def corpus(tmp_path):
    """A folder of 120 documents of 13 to 63 bytes in three files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in CORPUS[i * 40 : i * 40 + 40]]
        (folder / f"{i}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def job():
    """job(path, seq_len=…, batch=…, seed=…, **data) -> what the builders read of a JobConfig."""

    def job(path, seq_len=8, batch=2, seed=None, **data):
        sizes = {"seq_len": seq_len, "local_batch_size": batch}
        return SimpleNamespace(
            data=Data(**({"source": "files", "path": str(path), "held_out": 0.2} | data)),
            training=SimpleNamespace(**sizes),
            validation=SimpleNamespace(**sizes, steps=-1),
            debug=SimpleNamespace(seed=seed),
        )

    return job
