"""Sizes, refusals and counting of the decoder's arguments."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import refusal
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titan_fp8.config import Architecture
from titan_fp8.model.args import FLAVORS
from titan_fp8.model.decoder import Decoder


def shaped(flavor: str, **knobs):
    args = FLAVORS[flavor]
    args.apply(Architecture(**({"vocab_size": 131_072} | knobs)))
    return args


def parameters(args) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(args).parameters())


@pytest.mark.parametrize(
    ("flavor", "nominal", "shape"),
    [  # layers, dim, query heads * 128, kv heads * 128, gated FFN, vocabulary matrices: the FOG paper's table
        ("390m", 390e6, (16, 1024, 1024, 512, 4096, 1)),
        ("1.5b", 1.5e9, (16, 2048, 2048, 1024, 8192, 2)),
        ("8b", 8e9, (32, 4096, 4096, 1024, 14336, 2)),
    ],
)
def test_sizes(flavor, nominal, shape):
    layers, dim, queries, kv, ffn, tables = shape
    matrices = layers * dim * (2 * queries + 2 * kv + 3 * ffn) + tables * 131_072 * dim
    counts = {act: parameters(shaped(flavor, activation=act)) for act in ("xielu", "gelu", "swiglu")}
    print(flavor, counts)
    for activation, count in counts.items():
        small = 2 * layers * dim + (2 * layers if activation == "xielu" else 0)  # gains; a_p, a_n
        assert count == matrices + small
        assert count == pytest.approx(nominal, rel=0.03)
        assert count == pytest.approx(counts["swiglu"], rel=0.005), "equal size with and without a gate"


@pytest.mark.parametrize("preset", ["fog_max", "fog_opt", "fog_flash", "llama"])
@pytest.mark.parametrize("flavor", list(FLAVORS))
def test_every_preset_of_every_flavor_builds_on_meta(flavor, preset):
    args = shaped(flavor, preset=preset)
    with torch.device("meta"):
        model = Decoder(args)
    assert len(model.layers) == args.n_layers and all(p.is_meta for p in model.parameters())
    assert (model.layers["0"].feed_forward.w3 is not None) == (preset == "llama")


def test_flops_are_what_torch_counts(make_args, make_model, tokens):
    """Forward and backward of the real model, matrix products only, on the attention path that recomputes nothing."""
    for preset in ("fog_max", "llama"):
        for tied in (True, False):
            args = make_args(preset, tie_embeddings=tied)
            model = make_model(args)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                model(tokens).sum().backward()
            total, per_token = args.get_nparams_and_flops(model, tokens.shape[1])
            assert total == sum(p.numel() for p in model.parameters())
            vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
            assert counter.get_total_flops() == (per_token - 6 * vectors) * tokens.numel()


def test_what_the_user_sets_wins_over_the_preset(make_args):
    args = make_args("llama", qk_norm="tanh", final_norm=False, input_scale=7.0, tie_embeddings=True)
    assert (args.qk_norm, args.final_norm, args.input_scale, args.tie_embeddings) == (
        "tanh",
        False,
        7.0,
        True,
    )
    assert args.norm_placement == "pre" and args.activation == "swiglu", "the rest stays the preset's"
    assert args.softmax_scale == 0.25 and args.hidden_dim == 64
    assert make_args("fog_max").hidden_dim == 96


def test_a_slice_of_a_flavor():
    args = shaped("8b", n_layers=2)
    assert args.n_layers == 2 and args.post_norm_gain == 2**-0.5, "gains belong to the depth that is built"
    per_layer = parameters(shaped("8b", n_layers=2)) - parameters(shaped("8b", n_layers=1))
    assert parameters(shaped("8b")) - parameters(args) == 30 * per_layer
    for wrong in (0, 33, -1):
        refusal(lambda wrong=wrong: shaped("8b", n_layers=wrong), "n_layers", "32", str(wrong), "choose")


def test_flavors_are_copies():
    FLAVORS["debug"].apply(Architecture(preset="llama", vocab_size=512, n_layers=1))
    fresh = FLAVORS["debug"]
    assert (fresh.n_layers, fresh.vocab_size, fresh.norm_placement) == (4, 0, "post")
    assert FLAVORS["debug"] is not FLAVORS["debug"]
    assert len(FLAVORS) == len(list(FLAVORS)) == 9


def test_refusals(make_args):
    refusal(lambda: FLAVORS["1.5B"], "[model] flavor", "'1.5B'", "'1.5b'")
    refusal(lambda: FLAVORS["lama3_8b"], "did you mean 'llama3_8b'")
    refusal(lambda: FLAVORS["70"], "debug, 3m, 50m, 390m, 1.5b, 8b, llama2_7b, llama3_8b")
    refusal(lambda: shaped("debug", vocab_size=50_257), "vocab_size", "multiple of 16", "50257", "50272")
    refusal(lambda: make_args(shape={"n_heads": 3}), "dim 64", "heads 3")
    refusal(lambda: make_args(shape={"n_kv_heads": 3}), "kv heads 3")
    for knob in ("softmax_scale", "input_scale", "post_norm_gain"):
        for wrong in (0.0, -1.0, float("nan")):
            refusal(lambda k=knob, w=wrong: make_args(**{k: w}), knob, "positive", str(wrong), "leave it out")


def test_update_from_config_takes_knobs_and_length():
    config = SimpleNamespace(
        architecture=Architecture(preset="llama", vocab_size=272),
        training=SimpleNamespace(seq_len=4096),
        model=SimpleNamespace(flavor="llama2_7b"),
    )
    args = FLAVORS["llama2_7b"]
    args.update_from_config(config)
    assert (args.seq_len, args.vocab_size, args.final_norm, args.rope_theta) == (4096, 272, True, 10_000.0)
    config.training.seq_len = 4097
    refusal(lambda: args.update_from_config(config), "seq_len", "4097", "llama2_7b", "4096", "shorten")
