#!/usr/bin/env python3
"""Write lm-eval tasks whose data is a held-out file of ours: what a model is worth, measured without the hub.

    python tools/downstream/build_tasks.py --path english.val.jsonl.xz --out tasks/english
    lm_eval --model hf --model_args pretrained=exported,trust_remote_code=True,add_bos_token=False,softmax_dtype=float32 \\
        --include_path tasks --tasks english_cloze,english_bits_per_byte

`--path` is a file of JSON lines (also .gz, .xz) with a `text`, and perhaps a `source`, per document. `exported` is what
tools/export_hf.py wrote. `add_bos_token=False` matters: lm-eval puts begin of text before a document by itself, and if the
tokeniser adds another, the model is charged for not having predicted it. Without `softmax_dtype`, the softmax of a model in
bfloat16 is rounded to bfloat16, and bits per byte with it (by 2e-4 of their value in a debug run).

<name>_cloze, in the form of LAMBADA (arXiv 1606.06031): the last word of a passage, which the passage before its last
sentence contains. A right answer is all of the word's tokens, greedily. Passages are found by rule, not by people:

  * A sentence ends with . ! or ? before white space and a capital letter, or at the end of a paragraph.
  * The word ends its sentence, has at least 4 letters and nothing else, one space before it, and is no function word.
  * The passage is the fewest whole sentences before that, in a row, so that there are at least 3 with the last, 200 to
    1000 characters, and the word stands (in any case) in one before the last. Text is as it stands in the document,
    without the last full stop.
  * It is prose: every line begins with a letter, digit, quotation mark or round bracket, no paragraph ends without a full
    stop (as headings do), and at least 90 % of the characters are letters or white space.
  * Passages of a document do not overlap: the first one that passes is taken. No passage is taken twice.
  * Of all of these, the `--count` whose text has the smallest hash.

<name>_bits_per_byte: every document whole, as one task for each `source` with at least `--domain-bytes` of text and one,
"other", for the rest. Within a task all bytes count alike; the group's figure is the mean over tasks. A document longer
than the model's context is read in pieces of that length.

The task files name their data by absolute path: a moved folder must be built again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout, installed or not

from titan_fp8.data.sources import hash64, read_records
from titan_fp8.errors import UserError, in_one_line
from titan_fp8.files import new_folder

_BORDER = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\s*\n\s*\n\s*")
_LAST_WORD = re.compile(r"(?<=\S) ([A-Za-z]{4,})[.!?]$")
_ODD_LINE = re.compile(r"^\s*[^\w\s\"'(]", re.MULTILINE)
COUNT, DOMAIN_BYTES = 2000, 20_000  # defaults of the options
_SENTENCES = 3
_CHARACTERS = (200, 1000)
_PROSE_SHARE = 0.9
_FUNCTION_LIST = """
about above across after again against ahead along also although always among another anything around away because
been before behind being below beneath beside between beyond both cannot could does doing done down during each either
else ever every everything from have having hence here hers herself himself however indeed instead into itself just
least less like many mine more most much must myself neither never nothing once only onto other others otherwise ours
ourselves over perhaps quite rather same shall should since some something soon still such than that their theirs them
themselves then there therefore these they this those though through thus together toward towards under unless until
upon used very well were what whatever when where whether which while whom whose will with within without would yours
yourself
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_LIST.split())

_CLOZE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{' ' + target}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
metadata:
  version: 1.0
"""

# The target is the field itself: a template's result that begins with [ and ends with ] lm-eval would read as a list.
_BITS_PER_BYTE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: text
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
  - metric: byte_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
metadata:
  version: 1.0
"""

_GROUP = """\
group: {name}
task:
{tasks}
aggregate_metric_list:
  - metric: bits_per_byte
    weight_by_size: false
metadata:
  version: 1.0
"""


class Passage(NamedTuple):
    """`context`, a space and `target` are a piece of a document, word for word."""

    context: str
    target: str


def passages(text: str) -> Iterator[Passage]:
    """The passages of one document by the rules above, in its order."""
    sentences = list(_sentences(text))
    free = 0  # the first sentence that a passage may begin with
    for last, (start, end) in enumerate(sentences):
        if text[end - 1 : end] not in (".", "!", "?"):
            free = last + 1
            continue
        found = _LAST_WORD.search(text, start, end)
        if found is None or found[1].lower() in _FUNCTION_WORDS:
            continue
        word = re.compile(rf"\b{found[1]}\b", re.IGNORECASE)
        for first in range(last + 1 - _SENTENCES, free - 1, -1):
            begin = sentences[first][0]
            if end - begin > _CHARACTERS[1]:
                break
            if end - begin >= _CHARACTERS[0] and word.search(text, begin, start):
                if _is_prose(text[begin:end]):
                    yield Passage(text[begin : found.start()], found[1])
                    free = last + 1
                break


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of every sentence and of whatever else stands between two borders."""
    start = 0
    for border in _BORDER.finditer(text):
        yield start, border.start()
        start = border.end()
    yield start, len(text.rstrip())


def _is_prose(passage: str) -> bool:
    plain = sum(sign.isalpha() or sign.isspace() for sign in passage)
    return plain >= _PROSE_SHARE * len(passage) and not _ODD_LINE.search(passage)


def choose(found: Iterable[tuple[str, Passage]], count: int) -> list[tuple[str, Passage]]:
    """The `count` (source, passage) whose passage has the smallest hash, in that order, each passage once."""
    unique = {passage: source for source, passage in found}
    chosen = sorted(unique, key=lambda passage: hash64("cloze", *passage))[:count]
    return [(unique[passage], passage) for passage in chosen]


def domains(documents: Iterable[tuple[str, str]], least: int) -> dict[str, list[str]]:
    """Texts of (source, text) by domain, sorted by name; sources of fewer than `least` bytes are "other" together.

    A domain is called as its source, in lower case and "_" for all that is no letter or digit; sources that then have the
    same name are one domain.
    """
    by_name: dict[str, list[str]] = defaultdict(list)
    for source, text in documents:
        by_name[_slug(source)].append(text)
    big: dict[str, list[str]] = {}
    other: list[str] = []
    for name in sorted(by_name):
        enough = sum(len(text.encode()) for text in by_name[name]) >= least
        if enough and name != "other":
            big[name] = by_name[name]
        else:
            other += by_name[name]
    return big | ({"other": other} if other else {})


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "other"


def build(path: Path, out: Path, name: str, count: int, domain_bytes: int) -> dict[str, int]:
    """Write the folder `out`. Returns each task's documents. UserError; nothing is left behind then.

    Args:
        path: JSON lines, `text` and perhaps `source` in each.
        out: folder; must not exist.
        name: what the names of the tasks begin with: lower-case letters, digits, "_".
        count: cloze passages at most.
        domain_bytes: utf-8 bytes from which on a source has a task of its own.
    """
    out = out.absolute()
    if out.exists():
        raise UserError(f"--out must not exist yet, got {out}: remove it, or choose another")
    if re.search(r"[][*?]|::", str(out)):
        raise UserError(
            f"--out must be a path without * ? [ ] and ::, which lm-eval expands, got {out}: choose another"
        )
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise UserError(
            f'--name must be of lower-case letters, digits and "_", got "{name}": give another --name'
        )
    if count < 0 or domain_bytes < 0:
        raise UserError(
            f"--count and --domain-bytes must be at least 0, got {count} and {domain_bytes}: raise them"
        )
    documents = [(str(record.get("source", "")), text) for text, record in read_records(path, "text")]
    documents = [(source, text) for source, text in documents if text]
    if not documents:
        raise UserError(
            f"--path must hold at least one document with text, got none in {path}: give another file"
        )
    cloze = choose(((source, found) for source, text in documents for found in passages(text)), count)
    rolling = domains(documents, domain_bytes)

    tasks: dict[str, int] = {}
    with new_folder(out) as partial:

        def write(task: str, template: str, rows: list[dict[str, str]]) -> None:
            data = f"{task}.jsonl"
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (partial / data).write_text("".join(lines), encoding="utf-8")
            # JSON's strings are YAML's.
            config = template.format(name=task, data=json.dumps(str(out / data), ensure_ascii=False))
            (partial / f"{task}.yaml").write_text(config, encoding="utf-8")
            tasks[task] = len(rows)

        if cloze:
            rows = [{"context": p.context, "target": p.target, "source": source} for source, p in cloze]
            write(f"{name}_cloze", _CLOZE, rows)
        group = f"{name}_bits_per_byte"
        for domain, texts in rolling.items():
            write(f"{group}_{domain}", _BITS_PER_BYTE, [{"text": text} for text in texts])
        members = "\n".join(f"  - {group}_{domain}" for domain in rolling)
        (partial / f"{group}.yaml").write_text(_GROUP.format(name=group, tasks=members), encoding="utf-8")
    return tasks


@in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", type=Path, required=True, help="held-out documents, JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--name", help="what the tasks' names begin with; default: the file's name up to its first dot"
    )
    parser.add_argument("--count", type=int, default=COUNT, help=f"cloze passages at most ({COUNT})")
    parser.add_argument(
        "--domain-bytes",
        type=int,
        default=DOMAIN_BYTES,
        help=f"text from which on a source has a task of its own ({DOMAIN_BYTES})",
    )
    args = parser.parse_args(argv)
    name = args.name if args.name is not None else _slug(args.path.name.split(".")[0])
    try:
        tasks = build(args.path, args.out, name, args.count, args.domain_bytes)
    except OSError as error:
        raise UserError(
            f"--out must be on a disk that takes it, got {error}: mend that and start again"
        ) from error
    passages_found = tasks.get(f"{name}_cloze", 0)
    print(f"{args.out}: {passages_found} passages, {sum(tasks.values()) - passages_found} documents")
    chosen = ",".join([*([f"{name}_cloze"] if passages_found else []), f"{name}_bits_per_byte"])
    print(f"lm_eval ... --include_path {args.out} --tasks {chosen}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
