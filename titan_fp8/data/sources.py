"""Documents: where text comes from, which split it belongs to, and in which order it is visited.

A document is non-empty utf-8 text, carried as bytes. A source is a list of files:

    builtin   the .py files of Python's standard library and its help topics, at most 12 MB; what is mostly
              a table (character sets, opcodes, build settings …) is left out
    files     one file, or a folder walked recursively, each folder once, links followed, in sorted order:
              .jsonl .ndjson .json (one object per line; also .gz, .xz) and .parquet hold many documents,
              a plain text file (.txt .md .py …) is one document

A document is held out if and only if hash(text) / 2^64 < held_out. Nothing else counts, so a document never
changes sides when files are added, renamed or reordered, and copies of a text are on the same side.

Shuffled order: files in an order drawn from (seed, epoch), their documents through a buffer of `buffer_bytes`
of text from which the next one is drawn. A corpus smaller than the buffer is thus shuffled whole.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import logging
import lzma
import os
import random
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from titan_fp8.config import Data
from titan_fp8.errors import UserError

logger = logging.getLogger(__name__)

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")

_PLAIN_SUFFIXES = """
    .txt .text .md .rst .tex .html .xml .csv .tsv .log .py .pyi .ipynb .c .h .cc .cpp .hpp .cu .cuh .rs .go
    .java .kt .scala .swift .js .jsx .ts .tsx .rb .php .pl .lua .r .jl .hs .ml .sh .sql .toml .yaml .yml .ini
"""
_PLAIN = frozenset(_PLAIN_SUFFIXES.split())
_KNOWN = ".jsonl .ndjson .json (also with .gz, .xz), .parquet, or plain text such as .txt .md .py"

_BUILTIN_BYTES = 12_000_000
_BUILTIN_SKIP = [
    *("__pycache__", "config-*", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "msilib"),
    *("pydoc_data", "site-packages", "test", "tests"),
]
# Files that are mostly a table, however written: a model learns nothing from them that it can use elsewhere.
_BUILTIN_TABLES = [
    *("_compat_pickle.py", "_opcode_metadata.py", "_sysconfigdata*", "_sysconfig_vars*", "keyword.py"),
    *("locale.py", "opcode.py", "sre_constants.py", "stringprep.py", "symbol.py", "token.py"),
    *("ctypes/wintypes.py", "curses/has_key.py", "html/entities.py", "re/_casefix.py", "re/_constants.py"),
]

_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)

Reader = Callable[[Path, str], Iterator[bytes]]
"""(file, text_key) -> the documents of the file, utf-8."""


def hash64(*parts: object) -> int:
    """A stable 64-bit hash of the parts' words; the same on every machine and Python."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class File(NamedTuple):
    """One file of a source; `name` does not change when the whole corpus is moved."""

    name: str
    path: Path
    reader: Reader


class Source:
    """The documents of some files, split by hash.

    Attributes:
        size: bytes of the files, packed ones as they lie on the disk.
        identity: changes when a file is added, renamed, or changes its size, or when `text_key` changes.
        where: the source in words, for messages.
    """

    def __init__(self, where: str, files: Sequence[File], text_key: str, held_out: float) -> None:
        if not 0 <= held_out < 1:
            raise UserError(f"[data] held_out must be at least 0 and below 1; got {held_out}; try 0.02")
        self.where = where
        self.held_out = held_out
        self._files = list(files)
        self._text_key = text_key
        sizes = [(file.name, _size(file.path)) for file in files]
        self.size = sum(size for _, size in sizes)
        self.identity = f"{hash64('documents', text_key, sizes):016x}"
        logger.info("data: %s, %d files, %.1f MB", where, len(sizes), self.size / 1e6)

    def documents(self, order: Iterable[int] | None = None) -> Iterator[tuple[Split, bytes]]:
        """Every non-empty document as (split, text), file by file; `order` permutes the files."""
        threshold = self.held_out * 2.0**64
        for index in range(len(self._files)) if order is None else order:
            for text in self._read(self._files[index]):
                if text:
                    digest = hashlib.blake2b(text, digest_size=8).digest()
                    held = int.from_bytes(digest, "little") < threshold
                    yield SPLITS[held], text

    def _read(self, file: File) -> Iterator[bytes]:
        try:
            yield from file.reader(file.path, self._text_key)
        except _READ_ERRORS as error:
            raise _unreadable(file.path, error) from error

    def split(self, split: Split) -> Iterator[bytes]:
        """One split's documents in the files' order: the order in which tools/prepare_data.py packs them."""
        return (text for side, text in self.documents() if side == split)

    def shuffled(self, split: Split, seed: int, epoch: int, buffer_bytes: int) -> Iterator[bytes]:
        """One split's documents in the shuffled order of this seed and epoch (see the top of this file)."""
        order = sorted(range(len(self._files)), key=lambda i: hash64("file", seed, epoch, i))
        # Of random's methods, only random() promises the same numbers in every Python.
        draw = random.Random(hash64("document", seed, epoch)).random
        buffer: list[bytes] = []
        held = 0

        def pop() -> bytes:
            i = int(draw() * len(buffer))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            return buffer.pop()

        for side, text in self.documents(order):
            if side != split:
                continue
            buffer.append(text)
            held += len(text)
            while held > buffer_bytes:
                text = pop()
                held -= len(text)
                yield text
        while buffer:
            yield pop()

    def require(self, split: Split) -> None:
        """UserError unless the split has a document. Reads up to the first one."""
        seen = 0
        # With held_out 0 there is nothing to look for in what may be a very long source.
        if split == "train" or self.held_out > 0:
            for side, _ in self.documents():
                seen += 1
                if side == split:
                    return
            if not seen:
                raise UserError(
                    f"the data must hold at least one document with text; got none in {self.where}; "
                    "add text or correct [data] path"
                )
        if seen == 1:
            raise UserError(
                f"[data] held_out must leave documents for both splits; got {self.held_out} and one document in "
                f"{self.where}; cut the text into several, or write 0 and train with --validation.no-enable"
            )
        change = "lower" if split == "train" else "raise"
        raise UserError(
            f"[data] held_out must leave documents for both splits; got {self.held_out}, which leaves none "
            f"of {self.where} for {split}; {change} held_out or add documents"
        )


def open_source(data: Data) -> Source:
    """The source that `[data]` names: "builtin" or "files". UserError for a path that cannot be read."""
    if data.source == "builtin":
        return Source("builtin text", _builtin_files(), "", data.held_out)
    if not data.path:
        raise UserError('[data] path must name a file or folder for source "files"; got ""; set [data] path')
    root = Path(data.path).expanduser()
    if not root.exists():
        raise UserError(f"[data] path must exist; got {root}; correct the path")
    if root.is_dir():
        return Source(str(root), _walk(root), data.text_key, data.held_out)
    reader = _reader(root)
    if reader is None:
        raise UserError(f"[data] path must be a kind of file that can be read; got {root}; use {_KNOWN}")
    return Source(str(root), [File(root.name, root, reader)], data.text_key, data.held_out)


def _walk(root: Path) -> list[File]:
    """Every readable file below root, sorted by its name relative to root; dot files are left out."""
    found: list[File] = []
    skipped: list[str] = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename), error)

    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # links may lead to one folder twice, or round in a circle
            folders.clear()
            continue
        seen.add(real)
        # Sorted: by which of its names a folder is met first must not depend on the disk.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            name = path.relative_to(root).as_posix()
            reader = _reader(path)
            if reader is None:
                skipped.append(name)
            else:
                found.append(File(name, path, reader))
    if not found:
        raise UserError(
            f"[data] path must hold files with text; got {root} with none ({len(skipped)} of other kinds); "
            f"use {_KNOWN}"
        )
    if skipped:
        logger.warning(
            "data: %d files of other kinds skipped in %s, such as %s", len(skipped), root, min(skipped)
        )
    return sorted(found, key=lambda file: file.name)


def _builtin_files() -> list[File]:
    """Help topics first, then the standard library in sorted order up to the cap: a quick start."""
    root = Path(sysconfig.get_paths()["stdlib"])
    topics = File("pydoc_data/topics.py", root / "pydoc_data" / "topics.py", _read_topics)
    library = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _matches(name, _BUILTIN_SKIP)]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            name = path.relative_to(root).as_posix()
            if not _matches(name, _BUILTIN_TABLES):
                library.append(File(name, path, _read_plain))
    library.sort(key=lambda file: file.name)
    taken, total = [], 0
    for file in [topics, *library] if topics.path.is_file() else library:
        total += _size(file.path)
        if total > _BUILTIN_BYTES:
            break
        taken.append(file)
    if not taken:
        raise UserError(
            f'[data] source "builtin" needs Python\'s library sources; got none in {root}; use source "files"'
        )
    return taken


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _reader(path: Path) -> Reader | None:
    """How a file of this name is read; None for names of other kinds."""
    if opener := _lines_opener(path):
        return partial(_read_lines, opener)
    if path.suffix.lower() == ".parquet":
        return _read_parquet
    return _read_plain if path.suffix.lower() in _PLAIN else None


def _lines_opener(path: Path) -> Callable | None:
    """What opens a file of this name as JSON lines; None for names of other kinds."""
    suffixes = "".join(path.suffixes[-2:]).lower()
    for packing, opener in ((".gz", gzip.open), (".xz", lzma.open), ("", open)):
        if suffixes.endswith(tuple(lines + packing for lines in (".jsonl", ".ndjson", ".json"))):
            return opener
    return None


def read_records(path: Path, text_key: str) -> Iterator[tuple[str, dict]]:
    """(text, whole record) of each line of one file of JSON lines, in its order. UserError."""
    opener = _lines_opener(path)
    if opener is None:
        raise UserError(
            f"records are read from .jsonl, .ndjson or .json (also with .gz, .xz), got {path}: convert it"
        )
    try:
        for text, record in _records(opener, path, text_key):
            yield text.decode(), record
    except _READ_ERRORS as error:
        raise _unreadable(path, error) from error


def _read_plain(path: Path, text_key: str) -> Iterator[bytes]:
    """The whole file is one document."""
    text = path.read_bytes()
    _check_utf8(text, str(path))
    yield text


def _read_lines(opener: Callable, path: Path, text_key: str) -> Iterator[bytes]:
    return (text for text, _ in _records(opener, path, text_key))


def _records(opener: Callable, path: Path, text_key: str) -> Iterator[tuple[bytes, dict]]:
    """JSON lines as (text, record); blank lines are skipped."""
    with opener(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path} line {number}"
            _check_utf8(line, place)
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _bad_record(place, text_key, f"no JSON ({error})") from error
            if not isinstance(record, dict):
                raise _bad_record(place, text_key, f"a {type(record).__name__}")
            if text_key not in record:
                raise _bad_record(place, text_key, f"the keys {', '.join(sorted(record)[:8]) or '(none)'}")
            yield _text(record[text_key], place, text_key), record


def _read_parquet(path: Path, text_key: str) -> Iterator[bytes]:
    """One column, one row group in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                raise _bad_record(str(path), text_key, f"the columns {', '.join(names[:8])}")
            if names.count(text_key) > 1:
                raise _bad_record(str(path), text_key, f"{names.count(text_key)} columns of that name")
            for group in range(file.num_row_groups):
                for value in file.read_row_group(group, columns=[text_key]).column(text_key):
                    row += 1
                    yield _text(value.as_py(), f"{path} row {row}", text_key)
    except UnicodeDecodeError as error:
        raise _not_utf8(f"{path} row {row}", error) from error
    except pyarrow.ArrowException as error:
        raise _unreadable(path, error) from error


def _read_topics(path: Path, text_key: str) -> Iterator[bytes]:
    """Python's help topics: a module that assigns one dict of name -> text."""
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            yield from (text.encode() for text in ast.literal_eval(node.value).values())


def _text(value: object, place: str, text_key: str) -> bytes:
    if not isinstance(value, str):
        raise _bad_record(place, text_key, f"{type(value).__name__} under that key")
    # JSON can spell lone surrogates, which no utf-8 text holds: they become "?".
    return value.encode("utf-8", "replace")


def _check_utf8(text: bytes, place: str) -> None:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(place, error) from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from error


def _bad_record(place: str, text_key: str, got: str) -> UserError:
    return UserError(
        f'every record must hold text under the key "{text_key}"; got {got} in {place}; '
        "correct or remove the file, or set [data] text_key"
    )


def _not_utf8(place: str, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"text must be utf-8; got byte 0x{error.object[error.start]:02x} at byte {error.start} of {place}; "
        "convert the file"
    )


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__
    return UserError(
        f"every file of the data must be readable and whole; got {path}: {reason}; "
        "mend or remove the file, or correct [data] path"
    )
