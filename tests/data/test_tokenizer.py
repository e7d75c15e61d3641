"""Tokenizers: round trips, ids at both ends, identities, and files that are not tokenizers."""

import base64
import importlib.util
import json

import pytest

from titan_fp8.config import Data
from titan_fp8.data.tokenizer import build_tokenizer
from titan_fp8.errors import UserError

TEXT = "Hello world, naïve café 12345\n\tdef f(x):\r\n    return '你好' 🙂"
BYTES = [bytes([value]) for value in range(256)]
MERGES = [b"he", b"ll", b"hell", b"hello", b" w"]


def bpe_lines(tokens):
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def tekken(tokens, specials=20):
    vocab = [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(tokens)]
    size = len(tokens) + specials
    config = {"pattern": r"\w+|\W", "default_vocab_size": size, "default_num_special_tokens": specials}
    return {"config": config, "vocab": vocab}


@pytest.fixture
def bpe(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(bpe_lines(BYTES + MERGES))
    return path


@pytest.fixture
def load(tmp_path):
    def load(content):
        path = tmp_path / "some.tok"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return build_tokenizer(Data(tokenizer=str(path)))

    return load


def check_round_trip(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode(TEXT, add_bos=True, add_eos=True) == [tokenizer.bos_id, *ids, tokenizer.eos_id]
    document = tokenizer.encode_document(TEXT.encode())
    assert document.tolist() == [tokenizer.bos_id, *ids, tokenizer.eos_id]
    lengths = tokenizer.token_byte_lengths()
    assert lengths.shape == (tokenizer.get_vocab_size(),)
    assert lengths[document].sum() == len(TEXT.encode())
    assert max(document) < tokenizer.get_vocab_size()


def test_byte_tokenizer_is_utf8():
    tokenizer = build_tokenizer(Data(tokenizer="byte"))
    check_round_trip(tokenizer)
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, 258)
    assert tokenizer.get_vocab_size() == 259


def test_special_token_names_in_text_are_text():
    tokenizer = build_tokenizer(Data(tokenizer="byte"))
    assert tokenizer.encode("<|eos|>") == list(b"<|eos|>")
    assert tokenizer.encode_document(b"<|bos|>").tolist() == [256, *b"<|bos|>", 257]


def test_tekken_from_the_package():
    if importlib.util.find_spec("mistral_common") is None:
        pytest.skip("mistral-common is not installed: no Tekken file")
    tokenizer = build_tokenizer(Data(tokenizer="tekken"))
    check_round_trip(tokenizer)
    assert tokenizer.get_vocab_size() == 131072
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 11)
    # Mistral-Nemo's own ids.
    assert tokenizer.encode("Hello world") == [22177, 4304]


def test_tekken_without_the_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        build_tokenizer(Data(tokenizer="tekken"))


def test_tekken_json_by_path(load):
    tokenizer = load(tekken(BYTES + MERGES))
    check_round_trip(tokenizer)
    assert tokenizer.get_vocab_size() == 256 + len(MERGES) + 20
    assert tokenizer.encode("hello") == [20 + 256 + MERGES.index(b"hello")]


def test_bpe_file_appends_specials(bpe):
    tokenizer = build_tokenizer(Data(tokenizer=str(bpe)))
    check_round_trip(tokenizer)
    n = 256 + len(MERGES)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (n, n + 1, n + 2)
    assert tokenizer.encode("hello") == [256 + MERGES.index(b"hello")]
    assert tokenizer.get_vocab_size() == n + 3


def test_128000_ranks_get_the_reserved_ids_of_llama3(load):
    pairs = (bytes([a, b, c]) for a in range(256) for b in range(256) for c in range(2))
    tokenizer = load(bpe_lines([*BYTES, *(next(pairs) for _ in range(128000 - 256))]))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (128000, 128001)
    assert tokenizer.get_vocab_size() == 128256
    assert tokenizer.decode([128000]) == "<|begin_of_text|>"


@pytest.mark.parametrize("space", [" ", "\t ", "\u00a0"])
def test_white_space_without_end_is_encoded(bpe, space):
    tokenizer = build_tokenizer(Data(tokenizer=str(bpe)))
    text = "hello" + space * 1_000_000 + "hello"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_document(text.encode()).tolist() == [tokenizer.bos_id, *ids, tokenizer.eos_id]


def test_only_white_space_without_end_is_cut(bpe):
    """Elsewhere ids are tiktoken's own for the whole text, however long."""
    tokenizer = build_tokenizer(Data(tokenizer=str(bpe)))
    for text in ("hello w\n" * 20_000, "l" * 150_000, "w" + " " * 99_999 + "w" + "\n" * 99_999 + "hell"):
        assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)


def test_identity_follows_content_not_place(load, bpe):
    first = build_tokenizer(Data(tokenizer=str(bpe))).identity
    assert load(bpe_lines(BYTES + MERGES)).identity == first
    assert load(bpe_lines(BYTES + MERGES[:-1])).identity != first
    swapped = [*BYTES, MERGES[1], MERGES[0], *MERGES[2:]]
    assert load(bpe_lines(swapped)).identity != first
    other_pattern = tekken(BYTES)
    other_pattern["config"]["pattern"] = r"\w|\W"
    assert load(other_pattern).identity != load(tekken(BYTES)).identity


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "256 of the 256 single-byte tokens are missing"),
        (b"just some text\n", "line 1"),
        (bpe_lines(BYTES + MERGES)[:-3], r"line 261|rank"),
        (bpe_lines(BYTES)[7:], "rank 1 stands where 0"),
        (bpe_lines([*BYTES, b"a"]), "repeated"),
        (bpe_lines(BYTES[:-1]), "1 of the 256"),
        (json.dumps(tekken(BYTES)).encode()[:500], "JSONDecodeError"),
        (b'{"model": "other"}', "KeyError"),
        ({**tekken(BYTES), "vocab": tekken(BYTES)["vocab"][:-1]}, "255 tokens where its config promises 256"),
        (tekken(BYTES, specials=2), "lack"),
        ({**tekken(BYTES), "config": tekken(BYTES)["config"] | {"pattern": "(("}}, "some.tok"),
    ],
)
def test_files_that_are_no_tokenizers(load, content, words):
    with pytest.raises(UserError, match=words) as caught:
        load(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "bytes", "/nowhere/tokenizer.model", "/tmp"])
def test_names_that_lead_nowhere(name):
    with pytest.raises(UserError, match="correct the path"):
        build_tokenizer(Data(tokenizer=name))
