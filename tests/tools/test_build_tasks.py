"""tools/downstream: passages keep their rules, tasks hold all the text, and lm-eval's figure is the model's own loss."""

from __future__ import annotations

import importlib
import json
import lzma
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers import Saved, refusal  # pyrefly: ignore

ROOT = Path(__file__).parents[2]
LM_EVAL = "needs lm-eval: pip install -e .[eval]"


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools" / "downstream"))
        yield importlib.import_module("build_tasks")


FIRST = "The keeper of the lighthouse had painted every wooden shutter in a deep and rather solemn shade of green."
SECOND = "Nobody on the island remembered when that had been done or who had asked the old man to go and see to it."
LAST = "When the storm was over the children found one broken"
WHOLE = f"{FIRST} {SECOND} {LAST} shutter."


def found(tool, text: str) -> list[tuple[str, str]]:
    return [tuple(passage) for passage in tool.passages(text)]


def test_a_passage_is_found(tool):
    expected = [(f"{FIRST} {SECOND} {LAST}", "shutter")]
    assert found(tool, WHOLE) == expected
    assert found(tool, f"A HEADING\n\n{WHOLE}\n\nand more") == expected
    # As few sentences as will do; but one more, where the word stands only there.
    assert found(tool, f"We begin with a short sentence. {WHOLE}") == expected
    other = SECOND.replace("island", "mainland")
    assert found(tool, f"{FIRST} {SECOND} {other} {LAST} shutter.") == [
        (f"{FIRST} {SECOND} {other} {LAST}", "shutter")
    ]
    assert found(tool, f"{WHOLE} {WHOLE}") == expected * 2, "the second one must not reach into the first"
    wrapped = WHOLE.replace(" wooden", "\nwooden")
    assert found(tool, wrapped) == [(wrapped.removesuffix(" shutter."), "shutter")], "text stays as it stands"


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("never said before", WHOLE.replace("wooden shutter", "wooden door")),
        (
            "said in the last sentence only",
            f"{SECOND} {SECOND} The shutter was found and it was one broken shutter.",
        ),
        ("a part of another word", WHOLE.replace("wooden shutter", "wooden shutters")),
        ("a function word", f"{FIRST} {SECOND} {LAST} which."),
        ("too short a word", f"{FIRST} {SECOND} {LAST} old."),
        ("more than letters", f"{FIRST} {SECOND.replace('old', 'ver3')} {LAST} ver3."),
        ("two sentences", f"{FIRST} {SECOND.replace('.', ',')} {LAST.lower()} shutter."),
        ("200 characters", "The shutter is green. It was once red. Nobody could open this shutter."),
        ("1000 characters", f"{FIRST} {' '.join([SECOND] * 9)} {LAST} shutter."),
        ("a heading between", f"{FIRST}\n\nThe Island\n\n{SECOND} {LAST} shutter."),
        ("a list", WHOLE.replace(" wooden", "\n- wooden")),
        ("a new line before it", f"{FIRST} {SECOND} {LAST}\nshutter."),
        ("no full stop", f"{FIRST} {SECOND} {LAST} shutter"),
        ("numbers", WHOLE.replace("every", "1 2 3 4 5 6 7 8 9 0 " * 3)),
    ],
)
def test_what_is_no_passage(tool, rule, text):
    assert not found(tool, text), rule


def random_document() -> str:
    words = ["stone", "river", "bridge", "winter", "market", "quietly", "under", "the", "a", "built", "they"]

    def sentence() -> str:
        return " ".join(random.choices(words, k=random.randint(4, 20))).capitalize() + random.choice(".!?")

    return "\n\n".join(" ".join(sentence() for _ in range(random.randint(1, 8))) for _ in range(12))


def test_passages_are_pieces_of_the_text_that_do_not_overlap(tool):
    count = 0
    for _ in range(30):
        text = random_document()
        place = 0
        for context, target in tool.passages(text):
            place = text.index(f"{context} {target}", place) + len(context) + 1 + len(target)
            assert text[place] in ".!?" and target in context.lower()
            assert 200 <= len(context) + len(target) + 2 <= 1000
            count += 1
    assert count > 30


def test_choice_does_not_depend_on_the_order_of_documents(tool):
    all_of_them = [("a", tool.Passage(f"context {i % 90}", "word")) for i in range(100)]
    chosen = tool.choose(all_of_them, 40)
    assert len(set(chosen)) == 40 and len(tool.choose(all_of_them, 1000)) == 90
    assert tool.choose(random.sample(all_of_them, 100), 40) == chosen
    assert tool.choose(all_of_them, 10) == chosen[:10]


def test_domains(tool):
    documents = [("GNU Ada", "x" * 60), ("tiny", "é" * 49), ("gnu-ada", "y" * 60), ("b", "é" * 50), ("", "z")]
    assert tool.domains(documents, 100) == {
        "b": ["é" * 50],
        "gnu_ada": ["x" * 60, "y" * 60],
        "other": ["z", "é" * 49],
    }
    assert list(tool.domains(documents[:1], 0)) == ["gnu_ada"]


def corpus(folder: Path, documents: Sequence[tuple[str, str]]) -> Path:
    path = folder / "Held-out.val.jsonl.xz"
    with lzma.open(path, "wt", encoding="utf-8") as file:
        for source, text in documents:
            file.write(json.dumps({"text": text, "source": source}) + "\n")
    return path


def test_files(tool, tmp_path, capsys):
    yaml = pytest.importorskip("yaml", reason="needs pyyaml: pip install -e .[dev]")
    documents = [("novels", random_document()) for _ in range(4)] + [("novels", WHOLE), ("json", "[1, 2]")]
    documents += [("code", "x = '\u2028é{{context}}'\n\n"), ("code", "")]
    path = corpus(tmp_path, documents)
    out = tmp_path / "tasks"
    flags = ["--path", str(path), "--domain-bytes", "1000"]
    assert tool.main([*flags, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"--include_path {out} --tasks held_out_cloze,held_out_bits_per_byte" in printed
    configs = {file.stem: yaml.safe_load(file.read_text()) for file in out.glob("*.yaml")}
    group = configs.pop("held_out_bits_per_byte")
    assert set(configs) == {"held_out_cloze", *group["task"]}
    assert group["task"] == ["held_out_bits_per_byte_novels", "held_out_bits_per_byte_other"]
    rows = {}
    for name, config in configs.items():
        assert config["task"] == name and config["dataset_path"] == "json"
        data = Path(config["dataset_kwargs"]["data_files"]["test"])
        assert data == out / f"{name}.jsonl"
        rows[name] = [json.loads(line) for line in data.read_text().split("\n") if line]
    texts = [row["text"] for name in group["task"] for row in rows[name]]
    assert sorted(texts) == sorted(text for _, text in documents if text), "every document once"
    cloze = rows["held_out_cloze"]
    assert any(row["target"] == "shutter" and row["source"] == "novels" for row in cloze)
    assert f"{len(cloze)} passages, 7 documents" in printed

    assert tool.main([*flags, "--out", str(tmp_path / "few"), "--name", "x", "--count", "1"]) == 0
    assert json.loads((tmp_path / "few" / "x_cloze.jsonl").read_text()) == cloze[0]
    assert tool.main([*flags, "--out", str(tmp_path / "none"), "--count", "0"]) == 0
    assert not list((tmp_path / "none").glob("*cloze*"))
    assert "cloze" not in capsys.readouterr().out.rpartition("none")[2]


def test_refusals_leave_nothing_behind(tool, tmp_path, capsys):
    path = corpus(tmp_path, [("a", WHOLE)])
    out = tmp_path / "out"

    def run(path=path, out=out, name="x", count=1, domain_bytes=1):
        return lambda: tool.build(path, out, name, count, domain_bytes)

    refusal(run(name="X y"), "--name", "lower-case")
    refusal(run(count=-1), "--count", "-1")
    refusal(run(out=tmp_path / "o*t"), "--out", "o*t")
    refusal(run(path=tmp_path / "a.parquet"), ".jsonl", "a.parquet")
    refusal(run(path=tmp_path / "gone.jsonl"), "gone.jsonl", "readable")
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    refusal(run(path=empty), "at least one document")
    empty.write_text('{"body": ""}\n')
    refusal(run(path=empty), 'under the key "text"')
    assert {file.name for file in tmp_path.iterdir()} == {path.name, empty.name}
    assert tool.main(["--path", str(empty), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    out.mkdir()
    refusal(run(), "must not exist")


# ---- Bits per byte: the model's own loss, and lm-eval's ----


class Evaluated:
    """A small decoder, exported, and the tasks made of two domains of text that is longer and shorter than its context."""

    def __init__(self, tool, folder: Path, *flags: str):
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(ROOT / "tools"))
            export = importlib.import_module("export_hf").export
        # The same weights and texts each time: of random ones, the two domains' losses are now and then alike.
        torch.manual_seed(0)
        draw = random.Random(0)
        self.ours = Saved(folder, *flags)
        self.folder = folder / "exported"
        export(self.ours.config, self.ours.checkpoint, self.folder, torch.float32)
        letters = "abc dé\n🙂["
        self.texts = {
            name: ["".join(draw.choices(letters, k=draw.randint(1, 300))) for _ in range(6)]
            + ["x" * 64, "[1]"]
            for name in ("one", "two")
        }
        self.texts["one"].append(WHOLE)
        documents = [(name, text) for name, texts in self.texts.items() for text in texts]
        self.tasks = folder / "tasks"
        tool.build(corpus(folder, documents), self.tasks, "held_out", 10, 1)

    def training_loss(self, name: str) -> float:
        """Bits per byte by the decoder that was trained, its tokeniser and its loss.

        The text, with bos before it, in pieces of a context's length; the last piece ends with the text and sees a whole
        context, of which only what no piece before it had counts.
        """
        length = self.ours.config.training.seq_len
        nats = 0.0
        for text in self.texts[name]:
            ids = torch.tensor(self.ours.tokenizer.encode(text, add_bos=True))
            for start in range(0, len(ids) - 1, length):
                end = min(start + length, len(ids) - 1)
                begin = max(end - length, 0)
                labels = ids[begin + 1 : end + 1].clone()
                labels[: start - begin] = -100
                with torch.no_grad():
                    nats += self.ours.model(ids[None, begin:end], labels[None]).item()
        return nats / math.log(2) / sum(len(text.encode()) for text in self.texts[name])

    def cloze_nats(self) -> float:
        """Loss of the one passage's word, by the decoder that was trained, from as much before it as its context holds."""
        ids = torch.tensor(self.ours.tokenizer.encode(WHOLE.removesuffix(".")))
        length = self.ours.config.training.seq_len
        labels = ids[-length:].clone()
        labels[: -len(" shutter")] = -100
        with torch.no_grad():
            return self.ours.model(ids[None, -length - 1 : -1], labels[None]).item()


ARCHITECTURES = {"fog": (), "llama": ("--architecture.preset=llama",)}
# Both sum log-probabilities of logits that differ by some 5e-6 relative (test_export_hf.py) and in their sign: a mean over
# hundreds of them, themselves of about the logits' size, differs by less.
RELATIVE = 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.usefixtures("remote_code_cache")
def test_the_exported_model_gives_training_s_bits_per_byte(tool, tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e .[dev]")
    evaluated = Evaluated(tool, tmp_path, *ARCHITECTURES[name])
    remote = {"trust_remote_code": name == "fog"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        evaluated.folder, dtype=torch.float32, **remote
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(evaluated.folder, **remote)
    data = (evaluated.tasks / "held_out_bits_per_byte_one.jsonl").read_text()
    bits, size = 0.0, 0
    for text in (json.loads(line)["text"] for line in data.split("\n") if line):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert ids[0, 0] == tokenizer.bos_token_id
        size += len(text.encode())
        place = 1  # the first token that has no piece yet
        while place < ids.shape[1]:
            end = min(place + 64, ids.shape[1])
            piece = ids[:, max(end - 65, 0) : end]
            with torch.no_grad():
                log_p = model(piece[:, :-1]).logits.double().log_softmax(-1)
            bits -= log_p.gather(-1, piece[:, 1:, None])[0, place - end :].sum().item() / math.log(2)
            place = end
    assert bits / size == pytest.approx(evaluated.training_loss("one"), rel=RELATIVE)
    assert evaluated.training_loss("one") != pytest.approx(evaluated.training_loss("two"), rel=100 * RELATIVE)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.usefixtures("remote_code_cache")
def test_lm_eval_gives_training_s_loss(tool, tmp_path, monkeypatch, name):
    lm_eval = pytest.importorskip("lm_eval", reason=LM_EVAL)
    datasets = pytest.importorskip("datasets", reason=LM_EVAL)
    from lm_eval.tasks import TaskManager  # pyrefly: ignore

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    evaluated = Evaluated(tool, tmp_path, *ARCHITECTURES[name])
    model = {"pretrained": str(evaluated.folder), "dtype": "float32", "add_bos_token": False}
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=model | {"trust_remote_code": name == "fog"},
        tasks=["held_out_cloze", "held_out_bits_per_byte"],
        task_manager=TaskManager(include_path=str(evaluated.tasks), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )["results"]
    ours = {domain: evaluated.training_loss(domain) for domain in evaluated.texts}
    for domain, expected in ours.items():
        got = results[f"held_out_bits_per_byte_{domain}"]["bits_per_byte,none"]
        assert got == pytest.approx(expected, rel=RELATIVE)
    perplexity = results["held_out_cloze"]["perplexity,none"]
    assert math.log(perplexity) == pytest.approx(evaluated.cloze_nats(), rel=RELATIVE)
    mean = results["held_out_bits_per_byte"]["bits_per_byte,none"]
    assert mean == pytest.approx(sum(ours.values()) / 2, rel=RELATIVE)


def test_lm_eval_knows_the_authors_tasks():
    pytest.importorskip("lm_eval", reason=LM_EVAL)
    yaml = pytest.importorskip("yaml", reason=LM_EVAL)
    from lm_eval.tasks import TaskManager  # pyrefly: ignore

    group = yaml.safe_load((ROOT / "tools" / "downstream" / "authors.yaml").read_text())
    known = TaskManager(include_path=str(ROOT / "tools" / "downstream"))
    assert group["group"] in known.all_groups
    assert len(set(group["task"])) == 11 and set(group["task"]) <= set(known.all_subtasks)
