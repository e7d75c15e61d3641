"""Text to token ids and back, on tiktoken.

`[data] tokenizer` names one of three kinds:

    "byte"     built in, no file: the 256 bytes, then bos, eos, pad: 259 ids
    "tekken"   Mistral-Nemo's file, inside the package mistral-common: 131072 ids, the first 1000 special
    a path     a Tekken JSON, or a tiktoken BPE file: one "base64-of-the-token rank" per line, as Llama 3's

A tokenizer's `identity` is the hash of everything that decides its ids; prepared shards and checkpoints carry
it. No torch and no torchtitan here: tools/prepare_data.py starts many processes that need only this.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from titan_fp8.config import Data
from titan_fp8.errors import UserError

# How text is cut before merging: tiktoken BPE files carry no pattern, and Llama 3's is the usual one.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_RANKS = 128_000
_LLAMA3_SPECIALS = 256
# Nothing ever merges, so the pieces only bound the work per piece.
_BYTE_PATTERN = r"[\s\S]{1,64}"
# The patterns try every end of a run of white space, and tiktoken gives up where it has 500,000 characters or more. Runs are
# cut into pieces of so many; no text that means anything has one.
_MOST_SPACES = 100_000
_SPACES = re.compile(rf"(?<!\s)\s{{{_MOST_SPACES},}}")
_TEKKEN_NAMES = {0: "<unk>", 1: "<s>", 2: "</s>", 11: "<pad>"}


class Tokenizer:
    """A tiktoken encoding with begin and end of text, in the shape torchtitan asks of a `BaseTokenizer`.

    Attributes:
        identity: "<kind>:<sha256>" of ranks, special tokens and pattern. Equal identities give equal ids.
        bos_id, eos_id, pad_id: ids of begin of text, end of text and padding; None where there is none.
    """

    def __init__(
        self,
        kind: str,
        ranks: Mapping[bytes, int],
        specials: Mapping[str, int],
        pattern: str,
        *,
        bos: str,
        eos: str,
        pad: str | None,
    ) -> None:
        self.bos_id: int | None = specials[bos]
        self.eos_id: int | None = specials[eos]
        self.pad_id: int | None = specials[pad] if pad is not None else None
        self.identity = f"{kind}:{_digest(ranks, specials, pattern)}"
        self._ranks = ranks
        self._encoding = tiktoken.Encoding(
            name=kind, pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=dict(specials)
        )

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Ids of `text`. A special token's name inside the text is plain text, never the special token."""
        ids = [token for piece in _pieces(text) for token in self._encoding.encode_ordinary(piece)]
        if add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def encode_document(self, text: bytes) -> np.ndarray:
        """bos + text (utf-8) + eos as uint32 [tokens]: a document in the packed stream, live or in shards."""
        encode = self._encoding.encode_to_numpy
        pieces = _pieces(text.decode())
        ids = np.concatenate([encode(x, allowed_special=set(), disallowed_special=()) for x in pieces])
        out = np.empty(len(ids) + (self.bos_id is not None) + (self.eos_id is not None), np.uint32)
        start = 0
        if self.bos_id is not None:
            out[0], start = self.bos_id, 1
        out[start : start + len(ids)] = ids
        if self.eos_id is not None:
            out[-1] = self.eos_id
        return out

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are not utf-8 become U+FFFD. KeyError for an unknown id."""
        return self._encoding.decode([int(i) for i in ids])

    def get_vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return self._encoding.n_vocab

    def token_byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, int32 [vocab]; 0 for special ids. For bits per byte."""
        lengths = np.zeros(self.get_vocab_size(), np.int32)
        for token, rank in self._ranks.items():
            lengths[rank] = len(token)
        return lengths


def _pieces(text: str) -> list[str]:
    """`text`, cut where white space has no end: nearly always whole."""
    if len(text) < _MOST_SPACES:
        return [text]
    cuts = [0]
    for run in _SPACES.finditer(text):
        cuts += range(run.start() + _MOST_SPACES, run.end(), _MOST_SPACES)
    return [text[begin:end] for begin, end in pairwise([*cuts, len(text)])]


def build_tokenizer(data: Data) -> Tokenizer:
    """The tokenizer that `[data] tokenizer` names. UserError for a missing, damaged or foreign file."""
    name = data.tokenizer
    if name == "byte":
        return _byte_tokenizer()
    if name == "tekken":
        return _read_tekken(_tekken_file())
    path = Path(name).expanduser()
    try:
        with path.open("rb") as file:
            head = file.read(1)
    except OSError as error:
        raise UserError(
            f'[data] tokenizer must be "byte", "tekken" or the path of a tokenizer file; got "{name}" '
            f"({error.strerror or error}); correct the path"
        ) from error
    # base64 never begins with a brace, JSON always does.
    return _read_tekken(path) if head == b"{" else _read_bpe(path)


def _byte_tokenizer() -> Tokenizer:
    ranks = {bytes([value]): value for value in range(256)}
    specials = {"<|bos|>": 256, "<|eos|>": 257, "<|pad|>": 258}
    return Tokenizer("byte", ranks, specials, _BYTE_PATTERN, bos="<|bos|>", eos="<|eos|>", pad="<|pad|>")


def _tekken_file() -> Path:
    """Mistral-Nemo's file inside the installed package, found without importing the package (slow)."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        raise UserError(
            'tokenizer "tekken" needs the package mistral-common, which is not installed; '
            'run: pip install "mistral-common>=1.13,<1.14"'
        )
    path = Path(spec.origin).parent / "data" / "tekken_240718.json"
    if not path.is_file():
        raise UserError(
            f'tokenizer "tekken" needs mistral-common\'s {path.name}, which is not in {path.parent}; '
            'run: pip install "mistral-common>=1.13,<1.14"'
        )
    return path


def _read_tekken(path: Path) -> Tokenizer:
    """Tekken JSON: ids 0..specials-1 are special, a token's id is its rank + specials."""
    try:
        content: Any = json.loads(path.read_bytes())
        config = content["config"]
        n_special = int(config["default_num_special_tokens"])
        n_ranks = int(config["default_vocab_size"]) - n_special
        pattern = str(config["pattern"])
        # The file holds more tokens than the vocabulary takes.
        rows = [(row["token_bytes"], int(row["rank"])) for row in content["vocab"][:n_ranks]]
        names = dict(_TEKKEN_NAMES)
        for row in content.get("special_tokens") or []:
            names[int(row["rank"])] = str(row["token_str"])
        tokens = [base64.b64decode(token, validate=True) for token, _ in rows]
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise _not_a_tokenizer(path, f"{type(error).__name__}: {error}") from error
    if len(rows) != n_ranks or n_ranks < 256:
        raise _not_a_tokenizer(path, f"{len(rows)} tokens where its config promises {n_ranks}")
    _check_ranks(path, tokens, [rank for _, rank in rows])
    ranks = {token: rank + n_special for rank, token in enumerate(tokens)}
    specials = {names.get(i, f"<SPECIAL_{i}>"): i for i in range(n_special)}
    if len(specials) != n_special or not {"<s>", "</s>"} <= specials.keys():
        raise _not_a_tokenizer(path, "its special tokens lack <s> or </s>, or repeat a name")
    pad = "<pad>" if "<pad>" in specials else None
    return _build(path, "tekken", ranks, specials, pattern, bos="<s>", eos="</s>", pad=pad)


def _read_bpe(path: Path) -> Tokenizer:
    """tiktoken BPE: "base64 rank" per line. 128000 ranks are Llama 3's, with 256 reserved ids behind them."""
    tokens: list[bytes] = []
    numbers: list[int] = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            tokens.append(base64.b64decode(token, validate=True))
            numbers.append(int(rank))
        except (ValueError, binascii.Error) as error:
            raise _not_a_tokenizer(
                path, f'line {number} is not "base64 rank": {line[:40].decode("latin-1")!a}'
            ) from error
    _check_ranks(path, tokens, numbers)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    n = len(ranks)
    if n == _LLAMA3_RANKS:
        # Llama 3.1's names for its chat tokens do not matter here: text never becomes a special token.
        specials = {"<|begin_of_text|>": n, "<|end_of_text|>": n + 1}
        specials |= {f"<|reserved_special_token_{i}|>": n + 2 + i for i in range(_LLAMA3_SPECIALS - 2)}
        bos, eos, pad = "<|begin_of_text|>", "<|end_of_text|>", None
    else:
        specials = {"<|bos|>": n, "<|eos|>": n + 1, "<|pad|>": n + 2}
        bos, eos, pad = "<|bos|>", "<|eos|>", "<|pad|>"
    return _build(path, "tiktoken", ranks, specials, LLAMA3_PATTERN, bos=bos, eos=eos, pad=pad)


def _check_ranks(path: Path, tokens: list[bytes], ranks: list[int]) -> None:
    """Ranks must count 0, 1, 2, …, tokens must differ, and the 256 single bytes be there."""
    for expected, rank in enumerate(ranks):
        if rank != expected:
            raise _not_a_tokenizer(path, f"rank {rank} stands where {expected} should")
    known = set(tokens)
    if len(known) != len(tokens):
        raise _not_a_tokenizer(path, f"{len(tokens) - len(known)} of its {len(tokens)} tokens are repeated")
    missing = sum(bytes([value]) not in known for value in range(256))
    if missing:
        raise _not_a_tokenizer(path, f"{missing} of the 256 single-byte tokens are missing")


def _build(
    path: Path, kind: str, ranks: Mapping[bytes, int], specials: Mapping[str, int], pattern: str, **ids
):
    try:
        return Tokenizer(kind, ranks, specials, pattern, **ids)
    except ValueError as error:  # tiktoken: the pattern does not compile
        raise _not_a_tokenizer(path, str(error).splitlines()[0]) from error


def _not_a_tokenizer(path: Path, reason: str) -> UserError:
    return UserError(
        f"a tokenizer file must be a whole Tekken JSON or tiktoken BPE file; got {path}: {reason}; "
        "copy or download the file again"
    )


def _digest(ranks: Mapping[bytes, int], specials: Mapping[str, int], pattern: str) -> str:
    """sha256 over (rank, length, token), (id, length, name) and the pattern; lengths keep fields apart."""
    total = hashlib.sha256()
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        total.update(b"%d %d " % (rank, len(token)) + token)
    for name, rank in sorted(specials.items(), key=lambda item: item[1]):
        total.update(b"%d %d " % (rank, len(name.encode())) + name.encode())
    total.update(pattern.encode())
    return total.hexdigest()
