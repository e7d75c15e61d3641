#!/usr/bin/env python3
"""Tokenises text once, into shards that training maps into memory.

    python tools/prepare_data.py --path corpus/ --out shards/ --tokenizer tekken
    python tools/prepare_data.py --out shards/ --verify

Then, in the run's TOML: [data] source = "shards", path = "shards/", tokenizer = "tekken".

A killed run loses nothing but its unfinished shards: give the same arguments again. The bytes written do not
depend on --workers, nor on having been killed. titan_fp8/data/shards.py tells the format.
"""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from titan_fp8.config import Data
from titan_fp8.data.shards import (
    MANIFEST,
    ShardWriter,
    damage,
    entropy,
    new_manifest,
    read_manifest,
    write_manifest,
)
from titan_fp8.data.sources import SPLITS, Source, Split, open_source
from titan_fp8.data.tokenizer import Tokenizer, build_tokenizer
from titan_fp8.errors import UserError

_CHUNK_BYTES = 1 << 20


class Chunk(NamedTuple):
    """Documents of one split in a row. `index`: each one's number in the source, both splits counted."""

    split: Split
    index: list[int]
    texts: list[bytes]


class Tokens(NamedTuple):
    """A chunk, tokenised. ids: uint32 [tokens]; ends, text_bytes: int64 [documents], ends cumulative."""

    split: Split
    index: list[int]
    ids: np.ndarray
    ends: np.ndarray
    text_bytes: np.ndarray


def tokenize(tokenizer: Tokenizer, chunk: Chunk) -> Tokens:
    documents = [tokenizer.encode_document(text) for text in chunk.texts]
    ends = np.cumsum([len(ids) for ids in documents])
    text_bytes = np.array([len(text) for text in chunk.texts])
    return Tokens(chunk.split, chunk.index, np.concatenate(documents), ends, text_bytes)


_worker_tokenizer: Tokenizer | None = None


def _start_worker(data: Data) -> None:
    global _worker_tokenizer
    _worker_tokenizer = build_tokenizer(data)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A parent that was killed cannot stop its workers: they watch it themselves.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _tokenize_in_worker(chunk: Chunk) -> Tokens:
    assert _worker_tokenizer is not None
    return tokenize(_worker_tokenizer, chunk)


def tokenized(chunks: Iterator[Chunk], data: Data, tokenizer: Tokenizer, workers: int) -> Iterator[Tokens]:
    """The chunks, tokenised by `workers` processes, in their order; a bounded number is under way."""
    if workers == 1:
        yield from (tokenize(tokenizer, chunk) for chunk in chunks)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(data,)) as pool:
        under_way: deque[Future[Tokens]] = deque()
        for chunk in chunks:
            under_way.append(pool.submit(_tokenize_in_worker, chunk))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def chunks_of(source: Source, first: dict[Split, int]) -> Iterator[Chunk]:
    """The source in chunks of about 1 MiB, without each split's documents numbered below first[split]."""
    waiting = {split: Chunk(split, [], []) for split in SPLITS}
    size = dict.fromkeys(SPLITS, 0)
    for index, (split, text) in enumerate(source.documents()):
        if index < first[split]:
            continue
        waiting[split].index.append(index)
        waiting[split].texts.append(text)
        size[split] += len(text)
        if size[split] >= _CHUNK_BYTES:
            yield waiting[split]
            waiting[split] = Chunk(split, [], [])
            size[split] = 0
    yield from (chunk for chunk in waiting.values() if chunk.texts)


def prepare(data: Data, out: Path, *, shard_tokens: int, workers: int, quiet: bool = False) -> dict[str, Any]:
    """Writes the shards, or what is missing of them, and returns the finished manifest.

    Args:
        data: source ("builtin" or "files"), path, text_key, tokenizer, held_out.
        out: folder; made if missing.
        shard_tokens: a shard is closed after the document that reaches this many tokens.
        workers: processes that tokenise.
        quiet: no progress bar.

    Raises:
        UserError: bad data or tokenizer; `out` lies in the data, holds something else, or is being written by
            another process.
    """
    if shard_tokens < 1 or workers < 1:
        raise UserError(
            "--shard-tokens and --workers must be at least 1; "
            f"got {shard_tokens} and {workers}; leave them out for the defaults"
        )
    if data.path and out.resolve().is_relative_to(Path(data.path).expanduser().resolve()):
        raise UserError(
            f"--out must lie outside --path, or it would be read as text; got {out} in {data.path}; choose another --out"
        )
    source = open_source(data)
    source.require("train")
    if data.held_out > 0:
        source.require("validation")
    tokenizer = build_tokenizer(data)
    facts = {"identity": source.identity, "held_out": data.held_out, "shard_tokens": shard_tokens}
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"one process may write a shard folder; got {out}, which another is writing; "
                "wait for it or stop it"
            ) from error
        manifest = _begin_or_resume(out, new_manifest(tokenizer, facts))
        if not manifest["complete"]:
            _fill(manifest, out, source, data, tokenizer, workers, quiet)
        return manifest
    finally:
        os.close(lock)


def _begin_or_resume(out: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The manifest to go on from: the one in `out` without its damaged shards, or the new one."""
    if not (out / MANIFEST).exists():
        strangers = sorted(path.name for path in out.iterdir() if not path.name.endswith(".partial"))
        if strangers:
            raise UserError(
                f"--out must be empty or hold shards; got {out} with {strangers[0]}; choose another --out"
            )
        write_manifest(out, new)
        return new
    manifest = read_manifest(out)
    if not any(manifest["splits"].values()):  # of a run that was stopped before its first shard
        manifest = new
    for fact in ("tokenizer", "source"):
        if manifest[fact] != new[fact]:
            raise UserError(
                f"--out must be new or hold shards of the same {fact} and arguments; got {out} with "
                f"{manifest[fact]} instead of {new[fact]}; choose another --out or repeat the first arguments"
            )
    for split, entries in manifest["splits"].items():
        whole = 0
        while whole < len(entries) and not damage(out, manifest, entries[whole], whole=False):
            whole += 1
        if whole < len(entries):
            # What follows a damaged shard is written again too, to the same bytes.
            manifest["splits"][split] = entries[:whole]
            manifest |= {"complete": False, "unigram": None}
    write_manifest(out, manifest)
    return manifest


def _fill(
    manifest: dict[str, Any],
    out: Path,
    source: Source,
    data: Data,
    tokenizer: Tokenizer,
    workers: int,
    quiet: bool,
) -> None:
    """Writes the shards that the manifest lacks, then completes it."""
    shards, dtype, limit = manifest["splits"], manifest["dtype"], manifest["source"]["shard_tokens"]
    counts = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for entry in shards["train"]:
        counts += np.bincount(np.fromfile(out / entry["file"], dtype), minlength=len(counts))
    first = {split: shards[split][-1]["source_end"] if shards[split] else 0 for split in SPLITS}
    writers: dict[Split, ShardWriter] = {}
    read = dict(first)

    def close(split: Split) -> None:
        shards[split].append(writers.pop(split).close(read[split]))
        write_manifest(out, manifest)

    chunks = tokenized(chunks_of(source, first), data, tokenizer, workers)
    with tqdm(unit="tok", unit_scale=True, disable=quiet) as bar:
        for split, index, ids, ends, text_bytes in chunks:
            at = 0  # documents of this chunk already written
            while at < len(ends):
                if split not in writers:
                    name = f"{split}-{len(shards[split]):05d}.bin"
                    writers[split] = ShardWriter(out, name, dtype, counts if split == "train" else None)
                begin = int(ends[at - 1]) if at else 0
                room = limit - writers[split].tokens
                stop = min(int(np.searchsorted(ends, begin + room)) + 1, len(ends))
                writers[split].append(ids[begin : ends[stop - 1]], stop - at, int(text_bytes[at:stop].sum()))
                read[split] = index[stop - 1] + 1
                if writers[split].tokens >= limit:
                    close(split)
                at = stop
            bar.update(len(ids))
    for split in list(writers):
        close(split)
    text = sum(entry["text_bytes"] for entry in shards["train"])
    tokens = int(counts.sum())
    manifest["unigram"] = {
        "tokens": tokens,
        "entropy_nats": entropy(counts),
        "bytes_per_token": text / tokens,
    }
    manifest["complete"] = True
    write_manifest(out, manifest)


def verify(out: Path) -> int:
    """Hashes every byte of every shard; returns the tokens seen. UserError naming what is missing or damaged."""
    manifest = read_manifest(out)
    if not manifest["complete"]:
        raise UserError(
            f"shards must be finished; got {out}, whose preparation was stopped; run again with the arguments that made it"
        )
    entries = [entry for split in SPLITS for entry in manifest["splits"][split]]
    for entry in tqdm(entries, unit="shard"):
        problem = damage(out, manifest, entry, whole=True)
        if problem:
            raise UserError(
                f"a shard must be whole; got {out / entry['file']}: {problem}; "
                "delete it and run again with the arguments that made it"
            )
    return sum(entry["tokens"] for entry in entries)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tokenise text into shards for titan_fp8.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument(
        "--source", choices=("files", "builtin"), default="files", help="where text comes from"
    )
    parser.add_argument("--path", default="", help="file or folder of text, for --source files")
    parser.add_argument(
        "--tokenizer", default="byte", help='"byte", "tekken", or the path of a tokenizer file'
    )
    parser.add_argument("--text-key", default="text", help="field that holds the text in jsonl and parquet")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of documents for validation")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that tokenise")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens of a shard, about")
    parser.add_argument("--verify", action="store_true", help="only check every byte of the shards in --out")
    args = parser.parse_args(argv)
    data = Data(
        source=args.source,
        path=args.path,
        text_key=args.text_key,
        tokenizer=args.tokenizer,
        held_out=args.held_out,
    )
    try:
        if args.verify:
            print(f"{args.out}: {verify(args.out):,} tokens, every shard is whole")
            return 0
        manifest = prepare(data, args.out, shard_tokens=args.shard_tokens, workers=args.workers)
    except UserError as error:
        words = re.sub(r"\[data\] (\w+)", lambda key: "--" + key[1].replace("_", "-"), str(error))
        print(f"error: {words}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print(
            f"error: the processes that tokenise must stay alive, and one of {args.workers} was ended, for want of memory "
            "perhaps; use fewer --workers, and otherwise the same arguments: finished shards are kept",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        print(
            f"error: --out must be a folder with room that can be written; got {error}; "
            "mend that and give the same arguments again: finished shards are kept",
            file=sys.stderr,
        )
        return 2
    tokens = {split: sum(entry["tokens"] for entry in manifest["splits"][split]) for split in SPLITS}
    unigram = manifest["unigram"]
    print(
        f"{args.out}: {tokens['train']:,} tokens for training, {tokens['validation']:,} held out, "
        f"{unigram['bytes_per_token']:.2f} bytes per token, unigram entropy {unigram['entropy_nats']:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
