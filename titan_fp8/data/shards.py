"""Prepared tokens: their files, how they are written and read, and the order in which samples are visited.

A folder holds one stream of tokens per split, cut into shards at document borders:

    manifest.json           every fact: format version, dtype, tokenizer, source; per shard: file, tokens,
                            documents, bytes of text, hashes; the unigram entropy of the training split
    train-00000.bin …       token ids and nothing else: uint16 or uint32, little endian
    validation-00000.bin …

Every file is written under a temporary name, synced, then renamed; the manifest is rewritten after each
shard, so that a killed preparation goes on after the last shard in it. `complete` turns true at the very end.

Sample order: with n samples an epoch, the k-th one visited is P(k), where P is a permutation of [0, n) made
from a key by a Feistel network on the next power of four, walked until it lands below n. It needs no memory,
and any k can be asked alone, which makes resuming free.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from titan_fp8.data.sources import SPLITS, Split, hash64
from titan_fp8.data.tokenizer import Tokenizer
from titan_fp8.errors import UserError

VERSION = 1
MANIFEST = "manifest.json"
PREPARE = "tools/prepare_data.py"
_SAMPLES, _SAMPLE_BYTES = 16, 4096


class ShardWriter:
    """Writes one shard under a temporary name; `close` puts it in place and says what it holds.

    Args:
        folder, name: where the shard goes.
        dtype: numpy name of the tokens' type, "uint16" or "uint32".
        counts: int64 [vocab], to which the shard's tokens are added; None counts nothing.
    """

    def __init__(self, folder: Path, name: str, dtype: str, counts: np.ndarray | None) -> None:
        self.tokens = self.documents = self.text_bytes = 0
        self._path = folder / name
        self._partial = folder / f".{name}.partial"
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._counts = counts
        self._hash = hashlib.sha256()
        self._file = self._partial.open("wb")

    def append(self, tokens: np.ndarray, documents: int, text_bytes: int) -> None:
        """Adds whole documents: their tokens one after another, their number, and their bytes of text."""
        data = tokens.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.tokens += len(tokens)
        self.documents += documents
        self.text_bytes += text_bytes
        if self._counts is not None:
            self._counts += np.bincount(tokens, minlength=len(self._counts))

    def close(self, source_end: int) -> dict[str, Any]:
        """The manifest's entry. `source_end`: documents of the source (both splits) up to the shard's end."""
        _sync_and_rename(self._file, self._partial, self._path)
        return {
            "file": self._path.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "source_end": source_end,
            "sha256": self._hash.hexdigest(),
            "sample_sha256": _sample_sha256(self._path),
        }


def token_dtype(vocab_size: int) -> str:
    """numpy name of the smallest type that holds every id: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def new_manifest(tokenizer: Tokenizer, source: dict[str, Any]) -> dict[str, Any]:
    """A manifest without shards. `source`: what decides the shards' content besides the tokenizer."""
    vocab = tokenizer.get_vocab_size()
    return {
        "version": VERSION,
        "complete": False,
        "dtype": token_dtype(vocab),
        "tokenizer": {"identity": tokenizer.identity, "vocab_size": vocab},
        "source": source,
        "splits": {split: [] for split in SPLITS},
        "unigram": None,
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Replaces the manifest, or leaves the old one: never half of one."""
    partial = folder / f".{MANIFEST}.partial"
    file = partial.open("wb")
    file.write((json.dumps(manifest, indent=1) + "\n").encode())
    _sync_and_rename(file, partial, folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, finished or not. UserError where there is none, or one of another format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["version"]
    except FileNotFoundError as error:
        raise UserError(
            f"a shard folder must hold {MANIFEST}; got {folder} without one; "
            f"prepare it with {PREPARE} or correct [data] path"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{MANIFEST} must be one that {PREPARE} wrote; got {path}: {error}; prepare the shards again"
        ) from error
    if version != VERSION:
        raise UserError(
            f"shards must be of format version {VERSION}; got version {version} in {path}; "
            f"prepare them again with this {PREPARE}"
        )
    return manifest


def finished_manifest(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The manifest of a folder ready for this tokenizer. UserError if it is not."""
    manifest = read_manifest(folder)
    if not manifest["complete"]:
        raise UserError(
            f"shards must be finished; got {folder}, whose preparation was stopped; "
            f"run {PREPARE} with the same arguments to finish it"
        )
    made_with = manifest["tokenizer"]["identity"]
    if made_with != tokenizer.identity:
        raise UserError(
            f"shards must be made with the run's tokenizer; got {folder} made with {made_with} and [data] "
            f"tokenizer {tokenizer.identity}; set [data] tokenizer to the shards', or prepare them again"
        )
    return manifest


def damage(folder: Path, manifest: dict[str, Any], entry: dict[str, Any], *, whole: bool) -> str | None:
    """What is wrong with a shard, in words; None if nothing is found.

    Looks at the size and the hash of 16 blocks of 4 KiB; with `whole` at the hash of every byte.
    """
    path = folder / entry["file"]
    expected = entry["tokens"] * np.dtype(manifest["dtype"]).itemsize
    try:
        size = path.stat().st_size
        if size != expected:
            return f"{size} bytes where the manifest says {expected}"
        if _sample_sha256(path) != entry["sample_sha256"]:
            return "other bytes than the manifest's hash says"
        if whole:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return "other bytes than the manifest's sha256 says"
    except OSError as error:
        return error.strerror or str(error)
    return None


def entropy(counts: np.ndarray) -> float:
    """Entropy of the unigram distribution, in nats per token. counts: int64 [vocab]."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


class Shards:
    """One split of a prepared folder, as one long array of token ids, memory-mapped.

    Attributes:
        tokens: length of the stream.
        identity: hash of the shards' hashes: changes with any token.

    Raises:
        UserError: the folder is not finished, was made with another tokenizer, lacks the split, or a shard is
            missing, of another size, or holds other bytes in those that `damage` looks at.
    """

    def __init__(self, folder: Path, split: Split, tokenizer: Tokenizer) -> None:
        manifest = finished_manifest(folder, tokenizer)
        entries = manifest["splits"][split]
        if not entries:
            raise UserError(
                f"shards must hold the split {split}; got {folder} without it; "
                "prepare them again with another --held-out"
                + (" or train with --validation.no-enable" if split == "validation" else "")
            )
        for entry in entries:
            problem = damage(folder, manifest, entry, whole=False)
            if problem:
                raise UserError(
                    f"a shard must be whole; got {folder / entry['file']}: {problem}; copy it again, or "
                    f"run {PREPARE} with the arguments that made it"
                )
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._arrays = [np.memmap(folder / entry["file"], dtype, mode="r") for entry in entries]
        self._ends = np.cumsum([entry["tokens"] for entry in entries])
        self.tokens = int(self._ends[-1])
        self.identity = f"{hash64('shards', [entry['sha256'] for entry in entries]):016x}"

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the stream, int64 [count]; they may lie in several shards."""
        assert start >= 0 and start + count <= self.tokens
        out = np.empty(count, np.int64)
        shard = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < count:
            array = self._arrays[shard]
            offset = start + done - (int(self._ends[shard]) - len(array))
            part = array[offset : offset + count - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return out


def permute(indices: np.ndarray, n: int, key: int) -> np.ndarray:
    """`indices` under the key's permutation of [0, n): int64 [k] in [0, n) -> int64 [k]."""
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    rounds = [np.uint64(hash64("round", key, i)) for i in range(6)]
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        # Walking on from a value at or above n stays on its cycle, so the whole remains a permutation.
        left, right = values[outside] >> half, values[outside] & mask
        for constant in rounds:
            left, right = right, left ^ (_mix(right ^ constant) & mask)
        values[outside] = (left << half) | right
        outside = values >= n
    return values.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each element: xor-shifts and odd multipliers, modulo 2^64."""
    x = (x ^ (x >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    x = (x ^ (x >> np.uint64(29))) * np.uint64(0xA0761D6478BD642F)
    return x ^ (x >> np.uint64(32))


def _sample_sha256(path: Path) -> str:
    """Hash of blocks spread evenly over the file, its first and last among them."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        last = max(0, os.fstat(file.fileno()).st_size - _SAMPLE_BYTES)
        for i in range(_SAMPLES):
            file.seek(last * i // (_SAMPLES - 1))
            total.update(file.read(_SAMPLE_BYTES))
    return total.hexdigest()


def _sync_and_rename(file: BinaryIO, partial: Path, path: Path) -> None:
    """Closes `file`, once its bytes are on disk, and gives it its name."""
    with file:
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
