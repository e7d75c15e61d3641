"""Hugging Face's Llama in and out: the same logits as transformers, exact round trips, refusals in one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers import refusal
from safetensors.torch import load_file, save_file
from torch import nn

from titan_fp8.checkpoint import SafeCheckpointManager
from titan_fp8.config import Fp8
from titan_fp8.model.hf import LlamaAdapter

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -e .[dev]")

SHAPE = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96}
FP8 = Fp8(recipe="delayed", attention="off", amax_history=4)


def theirs(tied: bool = False, theta: float = 500_000.0, attention: str = "sdpa", bias: bool = False):
    """A random transformers Llama in float32, its weights large enough for logits of a few units."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=tied,
        attention_bias=bias,
        max_position_embeddings=64,
        attn_implementation=attention,
    )
    torch.manual_seed(11)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.2)
    return model


def manager(model: nn.Module, adapter: LlamaAdapter, folder: Path, **settings) -> SafeCheckpointManager:
    from torchtitan.components.lr_scheduler import LRSchedulersContainer
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.config import Checkpoint

    optimizers = OptimizersContainer([model], torch.optim.AdamW, {"lr": 0.1})
    config = Checkpoint(enable=True, interval=1, keep_latest_k=0)
    return SafeCheckpointManager(
        dataloader=None,
        model_parts=[model],
        optimizers=optimizers,
        lr_schedulers=LRSchedulersContainer(optimizers, lambda step: 1.0),
        states={},
        checkpoint_config=dataclasses.replace(config, **settings),
        sd_adapter=adapter,
        base_folder=str(folder),
    )


@pytest.fixture
def llama(make_args, make_model):
    """(adapter, filled decoder) of the shape of `theirs`."""

    def build(tied: bool = False, theta: float = 500_000.0, fp8: Fp8 | None = None, **knobs):
        args = make_args("llama", shape=SHAPE | {"rope_theta": theta}, tie_embeddings=tied, **knobs)
        return LlamaAdapter(args, None), make_model(args, seed=5, fp8=fp8).eval()

    return build


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("tied", "theta", "attention"),
    [
        (False, 500_000.0, "eager"),
        (False, 10_000.0, "sdpa"),
        (True, 10_000.0, "eager"),
        (True, 500_000.0, "sdpa"),
    ],
)
@pytest.mark.parametrize("activation", ["swiglu", "smooth_swiglu"])
def test_logits_are_transformers_logits(tied, theta, attention, activation, llama, tokens):
    hf = theirs(tied, theta, attention)
    adapter, model = llama(tied, theta, activation=activation)
    model.load_state_dict(adapter.from_hf(hf.state_dict()))
    with torch.no_grad():
        ours, expected = model(tokens), hf(tokens).logits
    assert expected.std() > 0.5, "else the comparison would prove little"
    # Both round to float32 in the same number of places: the order of sums differs, 1e-6 of logits up to about 20.
    assert (ours - expected).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_round_trips_are_exact(tied, llama):
    adapter, model = llama(tied)
    ours = model.state_dict()
    exported = adapter.to_hf(ours)
    assert exported.keys() == theirs(tied).state_dict().keys() - ({"lm_head.weight"} if tied else set())
    assert same(adapter.from_hf(exported), ours)
    imported = theirs(tied).state_dict()
    again = adapter.to_hf(adapter.from_hf(imported))
    assert same(again, {name: w for name, w in imported.items() if not (tied and name == "lm_head.weight")})
    # A table that old checkpoints carry is no weight.
    old = exported | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert same(adapter.from_hf(old), ours)


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_through_the_manager(tied, gloo, tmp_path, llama, tokens):
    """transformers' folder -> an FP8 model -> our export -> transformers."""
    hf = theirs(tied)
    hf.save_pretrained(tmp_path / "theirs")
    adapter, model = llama(tied, fp8=FP8)
    start = {
        "initial_load_path": str(tmp_path / "theirs"),
        "initial_load_in_hf": True,
        "last_save_in_hf": True,
    }
    run = manager(model, adapter, tmp_path, **start)
    assert run.load()
    assert same(adapter.to_hf(model.state_dict()), adapter.to_hf(adapter.from_hf(hf.state_dict())))
    assert model.get_submodule("float8_state").steps == 0, "a Hugging Face checkpoint brings no FP8 state"

    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.01)
    run.save(1, last_step=True)
    run.close()
    exported = tmp_path / "checkpoint" / "step-1"
    names = {name for path in exported.glob("*.safetensors") for name in load_file(path)}
    assert names == adapter.to_hf(model.state_dict()).keys() and not any("float8" in name for name in names)
    hf.config.save_pretrained(exported)
    back = transformers.LlamaForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    _, plain = llama(tied)
    plain.load_state_dict({n: w for n, w in model.state_dict().items() if not n.startswith("float8_state.")})
    with torch.no_grad():
        assert (back(tokens).logits - plain(tokens)).abs().max() < 1e-4


def test_fp8_state_is_left_out(llama):
    adapter, model = llama(fp8=FP8)
    state = model.state_dict()
    assert any(name.startswith("float8_state.") for name in state)
    assert adapter.to_hf(state).keys() == theirs().state_dict().keys()


def test_what_is_not_a_llama_is_refused(make_args):
    others = [
        {"preset": "fog_max"},
        {"preset": "fog_flash"},
        {"preset": "llama", "qk_norm": "rms"},
        {"preset": "llama", "activation": "gelu"},
        {"preset": "llama", "norm_placement": "post"},
        {"preset": "llama", "final_norm": False},
        {"preset": "llama", "input_scale": 8.0},
        {"preset": "llama", "softmax_scale": 0.5},
    ]
    for knobs in others:
        adapter = LlamaAdapter(make_args(**knobs), None)
        for convert in (adapter.to_hf, adapter.from_hf):
            refusal(lambda convert=convert: convert({}), "Llama", 'preset = "llama"')


def test_foreign_weights_are_refused(llama):
    adapter, model = llama()
    bias = {"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)}
    refusal(lambda: adapter.from_hf(adapter.to_hf(model.state_dict()) | bias), "q_proj.bias", "plain Llama")
    # Llama ties by sharing one tensor; a head of its own would be lost.
    tied, _ = llama(tied=True)
    refusal(lambda: tied.from_hf(theirs().state_dict()), "lm_head.weight", "tie_embeddings = false")


def test_foreign_folders_are_refused(tmp_path, llama):
    """torchtitan reads only the names that it asks for: what else a folder has must not be dropped in silence."""
    adapter, model = llama()
    weights = {name: w.clone() for name, w in adapter.to_hf(model.state_dict()).items()}

    def folder(name: str, tensors: dict[str, torch.Tensor]) -> str:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        return str(tmp_path / name)

    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    adapter.get_hf_storage_reader(folder("good", weights | old))
    theirs(bias=True).save_pretrained(tmp_path / "bias")
    wider = weights | {"lm_head.weight": torch.zeros(112, 64)}
    deeper = weights | {"model.layers.3.input_layernorm.weight": torch.ones(64)}
    (tmp_path / "empty").mkdir()
    for path, words in (
        (str(tmp_path / "bias"), ("12 differ", "bias", "missing here")),
        (
            folder("wider", wider),
            ("1 differ", "lm_head.weight", "(112, 64) there", "(96, 64) here", "vocab_size"),
        ),
        (folder("deeper", deeper), ("layers.3", "missing here", "n_layers")),
        (str(tmp_path / "empty"), (f"{len(weights)} differ", "missing there")),
    ):
        refusal(lambda path=path: adapter.get_hf_storage_reader(path), path, *words)
    tied, _ = llama(tied=True)
    refusal(lambda: tied.get_hf_storage_reader(str(tmp_path / "good")), "lm_head.weight", "tie_embeddings")


def test_a_config_that_computes_something_else_is_refused(tmp_path, llama):
    """The weights fit, and logits would be others."""
    adapter, _ = llama()
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    plain = json.loads(path.read_text())

    def read(left_out: tuple[str, ...] = (), **keys) -> object:
        path.write_text(json.dumps({k: v for k, v in plain.items() if k not in left_out} | keys))
        return adapter.get_hf_storage_reader(str(tmp_path))

    read()
    old = {"left_out": ("rope_parameters",), "rope_theta": 5e5}  # as transformers 4 wrote it
    read(**old, rope_scaling=None)
    read(**old, rope_scaling={"rope_type": "default"})
    read(sliding_window=16)  # as long as the sequences of training
    read(sliding_window=4, use_sliding_window=False)
    llama3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}
    for keys, words in (
        ({"left_out": ("rope_parameters",)}, ("rope_theta 10000.0", "500000.0")),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            ("rope_theta 10000.0", "500000.0"),
        ),
        ({"rope_parameters": llama3}, ("RoPE scaling llama3", "this decoder has none")),
        (old | {"rope_scaling": {"type": "linear", "factor": 2.0}}, ("RoPE scaling linear", "has none")),
        ({"rms_norm_eps": 1e-6}, ("rms_norm_eps 1e-06", "1e-05")),
        ({"hidden_act": "gelu"}, ("hidden_act gelu", "silu")),
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, ("num_attention_heads 8", "it is 4")),
        ({"sliding_window": 8}, ("sliding_window 8", "seq_len 16")),
    ):
        refusal(lambda keys=keys: read(**keys), str(tmp_path), "flavor", *words)
    path.write_text("{")
    refusal(lambda: adapter.get_hf_storage_reader(str(tmp_path)), "must be JSON", "remove it")
    path.unlink()
    adapter.get_hf_storage_reader(str(tmp_path))
