"""Train a BPE tokenizer on text, and write it as a tiktoken file for `[data] tokenizer`.

    python tools/train_tokenizer.py --path ../shared/corpus/english.jsonl.xz --size 32768 --out bpe32k.tiktoken

Merges are learned by Hugging Face's `tokenizers`, within the pieces that titan_fp8/data/tokenizer.py cuts text into. The
file has a line per token, "base64-of-its-bytes rank", in the order of merging.
The same text gives the same file. Documents that a run holds out of its training are learned from too.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from titan_fp8.config import Data
from titan_fp8.data.sources import open_source
from titan_fp8.data.tokenizer import LLAMA3_PATTERN
from titan_fp8.errors import UserError, in_one_line
from titan_fp8.files import save


def byte_of() -> dict[str, int]:
    """`tokenizers` writes a byte as one printable character: these are they."""
    from tokenizers.pre_tokenizers import ByteLevel

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    found = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    assert sorted(found) == sorted(ByteLevel.alphabet())
    return found


def train(texts: Iterator[str], size: int) -> list[bytes]:
    """The tokens by rank: the 256 bytes, then `size` - 256 merged ones."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = byte_of()
    ranks = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(names[character] for character in token) for token, _ in ranks]
    if len(tokens) < size:
        raise UserError(f"--size must be at most what the text gives, {len(tokens)}, got {size}: add text")
    return tokens


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", required=True, help="file or folder of text, as [data] path")
    parser.add_argument("--text-key", default="text", help="field that holds the text in jsonl and parquet")
    parser.add_argument("--size", type=int, default=32_768, help="tokens, without special ones")
    parser.add_argument("--documents", type=int, help="learn from the first so many; default: all")
    parser.add_argument("--out", type=Path, required=True, help="the tiktoken file to write")
    options = parser.parse_args(arguments)
    if not 256 <= options.size <= 1 << 20:
        raise UserError(f"--size must be 256 to 1048576, got {options.size}: 32768 is usual")
    folder = options.out.absolute().parent  # asked now: training may take hours
    if options.out.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(
            f"--out must be a file in a folder that can be written to, got {options.out}: choose another place"
        )
    data = Data(source="files", path=options.path, text_key=options.text_key, held_out=0.0)
    documents = open_source(data).split("train")
    texts = (document.decode(errors="replace") for document in itertools.islice(documents, options.documents))
    tokens = train(texts, options.size)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    try:
        save(options.out, lambda path: path.write_text("".join(lines)))
    except OSError as error:
        raise UserError(
            f"--out must be writable, got {options.out} ({error.strerror}): choose another place"
        ) from error
    print(f"{options.out}: {len(tokens)} tokens, the longest of {max(map(len, tokens))} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
