"""tools/export_hf.py: transformers loads the folder and gives our logits, our tokens and our greedy continuation."""

from __future__ import annotations

import base64
import copy
import importlib
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import DEBUG, SIZES, Saved, refusal  # pyrefly: ignore

from titan_fp8.config import Data, load_config
from titan_fp8.data.tokenizer import build_tokenizer

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e .[dev]")

pytestmark = pytest.mark.usefixtures("remote_code_cache")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module("export_hf")


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length))


def load(folder: Path, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **({"dtype": torch.float32} | settings)
    ).eval()


LLAMA = "--architecture.preset=llama"
ARCHITECTURES = {
    "fog_max": (),
    "fog_opt": ("--architecture.preset=fog_opt", "--architecture.tie_embeddings=false"),
    "fog_flash": ("--architecture.preset=fog_flash", "--architecture.softmax_scale=0.1"),
    "trained_gain": ("--architecture.qk_norm=rms_gain",),
    "mixed": (LLAMA, "--architecture.qk_norm=rms", "--architecture.activation=smooth_swiglu"),
    "llama": (LLAMA, "--architecture.tie_embeddings=false"),
    "llama_tied": (LLAMA, "--architecture.activation=smooth_swiglu"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_gives_our_logits(tool, tmp_path, name):
    ours = Saved(tmp_path, *ARCHITECTURES[name])
    count = tool.export(ours.config, ours.checkpoint, tmp_path / "out", torch.float32)
    assert count == sum(p.numel() for p in ours.model.parameters())
    remote = (tmp_path / "out" / "modeling_fog.py").exists()
    assert remote is not name.startswith("llama")
    theirs = load(tmp_path / "out")
    assert type(theirs).__name__ == ("FogForCausalLM" if remote else "LlamaForCausalLM")
    inputs = tokens()
    with torch.no_grad():
        expected, got = ours.model(inputs), theirs(inputs).logits
        short = theirs(inputs, logits_to_keep=1).logits
        coarse = load(tmp_path / "out", dtype=torch.bfloat16)(inputs).logits.float()
    size = expected.square().mean().sqrt()
    assert size > 0.5, "else the comparison would prove little"
    # The same float32 operations; only sums may run in another order, some 20 in a row of up to 384 terms: errors of about
    # sqrt(20 * 384) * 2^-24 = 5e-6 of what is summed.
    assert (got - expected).abs().max() < 5e-5 * size
    assert (short - expected[:, -1:]).abs().max() < 5e-5 * size and short.shape[1] == 1
    # bfloat16 rounds to 2^-9 relative (rms about half of it), at 20 places in a row, and weights once: sqrt(40) * 2^-10
    # = 0.6 %; where a norm divides by a small stream the errors grow with it, so a few times that.
    error = (coarse - expected).square().mean().sqrt() / size
    assert 1e-4 < error < 0.04


def test_a_model_trained_in_fp8_with_scaled_features_is_a_plain_llama(tool, tmp_path):
    """Its weights as they are: what the scales did to w2 was done to the cast."""
    from titan_fp8.float8.convert import convert, scaling_state

    ours = Saved(tmp_path, *ARCHITECTURES["llama_tied"])
    trained = copy.deepcopy(ours.model).train()
    convert(trained, ours.config.fp8)
    scaling_state(trained).init_weights()
    inputs = tokens(length=32)
    for _ in range(2):
        trained(inputs, inputs).backward()
        scaling_state(trained).update()
    with torch.no_grad():  # in FP8 with scales that are not 1, the same function
        assert (scaling_state(trained).channel_amax > 0).all()
        error = (trained.eval()(inputs) - ours.model(inputs)).norm() / ours.model(inputs).norm()
        assert 1e-3 < error < 0.3
    state = trained.state_dict()
    assert "float8_state.channel_amax" in state
    dcp.save(state, checkpoint_id=str(tmp_path / "checkpoint" / "step-6"), no_dist=True)
    tool.export(ours.config, tmp_path / "checkpoint" / "step-6", tmp_path / "out", torch.float32)
    theirs = load(tmp_path / "out").state_dict()
    w2 = ours.model.layers["1"].feed_forward.w2.weight
    assert torch.equal(theirs["model.layers.1.mlp.down_proj.weight"], w2)
    assert not any("float8" in name or "channel" in name for name in theirs)


@pytest.mark.parametrize("name", ["fog_max", "mixed"])
def test_generate_continues_as_we_would(tool, tmp_path, name):
    """Greedy, with the KV cache and prompts padded on the left, against our decoder without either."""
    ours = Saved(tmp_path, *ARCHITECTURES[name])
    tool.export(ours.config, ours.checkpoint, tmp_path / "out", torch.float32)
    theirs = load(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    prompts = ["It was a dark", "On"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    out = theirs.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=[])
    for prompt, row in zip(prompts, out, strict=True):
        ids = ours.tokenizer.encode(prompt, add_bos=True)
        for _ in range(12):
            with torch.no_grad():
                logits = ours.model(torch.tensor([ids]))[0, -1]
            logits[ours.tokenizer.get_vocab_size() :] = -torch.inf  # ids that only fill the vocabulary up
            ids.append(int(logits.argmax()))
        assert row.tolist()[-len(ids) :] == ids


def test_cache_and_padding_do_not_change_logits(tool, tmp_path):
    ours = Saved(tmp_path)
    tool.export(ours.config, ours.checkpoint, tmp_path / "out", torch.float32)
    model, inputs = load(tmp_path / "out"), tokens()
    with torch.no_grad():
        whole = model(inputs).logits
        first = model(inputs[:, :10], use_cache=True)
        rest = model(
            inputs[:, 10:], past_key_values=first.past_key_values
        ).logits  # several queries, cached keys
        mask = torch.ones(2, 27, dtype=torch.int64)
        mask[:, :3] = 0
        padded = model(
            torch.nn.functional.pad(inputs, (3, 0)),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).logits
    bound = 5e-5 * whole.square().mean().sqrt()  # as above: other orders of summation
    assert (rest - whole[:, 10:]).abs().max() < bound
    assert padded.isfinite().all() and (padded[:, 3:] - whole).abs().max() < bound
    with pytest.raises(ValueError, match=r"\[batch, 24\]"):
        model(inputs, attention_mask=mask)
    loss = model(inputs, labels=inputs).loss
    expected = torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), inputs[:, 1:].flatten())
    assert torch.allclose(loss, expected, rtol=1e-5)


def bpe_file(folder: Path) -> Path:
    """A tiktoken file with random merges: tokens of tokens, so that the order of merging matters."""
    letters = b"abcde \n\xc3\xa9"
    vocabulary = [bytes([value]) for value in range(256)]
    vocabulary += [b"xy", b"wx", b"yz", b"wxyz"]  # merging "wxyz" begins with "xy" and never makes it
    while len(vocabulary) < 400:
        parts = [t for t in vocabulary if all(byte in letters for byte in t) and len(t) < 6]
        token = random.choice(parts) + random.choice(parts)
        if token not in vocabulary:
            vocabulary.append(token)
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(vocabulary)]
    (folder / "small.tiktoken").write_bytes(b"".join(lines))
    return folder / "small.tiktoken"


@pytest.mark.parametrize("name", ["byte", "tekken", "file"])
def test_tokenizer_gives_our_ids(tool, tmp_path, name):
    ours = build_tokenizer(Data(tokenizer=str(bpe_file(tmp_path)) if name == "file" else name))
    tool.write_tokenizer(ours, tmp_path, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.get_vocab_size()
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        ours.bos_id,
        ours.eos_id,
        ours.pad_id,
    )
    texts = ["", "Hello, wörld! It's 12345  \n\n\tdone. 日本語 🙂‍↔️", Path(__file__).read_text()]
    texts += ["".join(random.choices("abcde \né", k=200)) for _ in range(50)]
    texts += [
        "".join(chr(random.choice((*range(32, 0x250), *range(0x3040, 0x3100)))) for _ in range(99))
        for _ in range(50)
    ]
    # Tokens alone: tiktoken takes a whole piece that is a token without asking whether merging would make it.
    texts += ["wxyz"]
    texts += [ours.decode([number]) for number in random.choices(list(ours._ranks.values()), k=400)]
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text, add_bos=True), text
        assert theirs.decode(ids, skip_special_tokens=True) == text


def test_shards_and_index(tool, tmp_path):
    ours = Saved(tmp_path)
    limit = 300_000
    tool.export(ours.config, ours.checkpoint, tmp_path / "out", torch.float32, shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and {f.name for f in files} == set(index["weight_map"].values())
    assert all(file.stat().st_size < limit + 4096 for file in files)  # the header
    state = load(tmp_path / "out").state_dict()
    assert {
        name.removeprefix("model."): w for name, w in state.items()
    }.keys() == ours.model.state_dict().keys()
    assert all(
        torch.equal(w, ours.model.state_dict()[name.removeprefix("model.")]) for name, w in state.items()
    )
    assert (files[0].stat().st_mode & 0o777) == (Path(DEBUG).stat().st_mode & 0o666)


def test_refusals_leave_nothing_behind(tool, tmp_path, monkeypatch):
    ours = Saved(tmp_path)
    place = ours.checkpoint.parent
    out = tmp_path / "out"

    def run(*flags: str, checkpoint: Path = ours.checkpoint):
        config = load_config(["--job.config_file", str(DEBUG), *SIZES, *flags])
        return lambda: tool.export(config, checkpoint, out, torch.bfloat16)

    with monkeypatch.context() as patch:  # refused before weights take memory
        patch.setattr(tool, "save_file", None)
        refusal(
            run("--architecture.preset=llama"),
            "another architecture",
            "[384, 128] there, [256, 128] here",
            "TOML",
        )
        refusal(run("--architecture.vocab_size=512"), "vocabulary", "[272, 128] there, [512, 128] here")
        small = tmp_path / "259.tiktoken"
        small.write_bytes(b"".join(base64.b64encode(bytes([255 - v])) + b" %d\n" % v for v in range(256)))
        refusal(run(f"--data.tokenizer={small}"), "another tokeniser", "tiktoken:")
        refusal(run(checkpoint=place), "step-<n>", "there are steps 5")
        (place / "partial-6").symlink_to(ours.checkpoint)
        refusal(run(checkpoint=place / "partial-6"), "complete step-<n>")
        (place / "step-7").mkdir()
        (place / "step-7" / "model.safetensors.index.json").touch()
        refusal(run(checkpoint=place / "step-7"), "Hugging Face export")
        patch.setattr(tool.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        refusal(run(), "GiB", "make room")
    (data,) = ours.checkpoint.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:100_000])
    refusal(run(), "must be readable", "choose another step")
    (ours.checkpoint / ".metadata").write_bytes(b"\x80\x04nonsense")
    refusal(run(), "must be readable", "choose another step")
    assert not [name for name in os.listdir(tmp_path) if "out" in name]
    out.mkdir()
    refusal(run(), "must not exist")


def test_command_line(tool, tmp_path, capsys):
    ours = Saved(tmp_path)
    arguments = [
        "--config",
        str(DEBUG),
        "--checkpoint",
        str(ours.checkpoint),
        "--out",
        str(tmp_path / "new" / "out"),
    ]
    assert tool.main([*arguments, *SIZES]) == 0
    assert "trust_remote_code" in capsys.readouterr().out
    assert load(tmp_path / "new" / "out", dtype="auto").dtype == torch.bfloat16
    assert tool.main([*arguments, *SIZES]) == 2
    assert "error: --out must not exist" in capsys.readouterr().err
