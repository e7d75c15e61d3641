"""Every file of train_configs/ loads, builds on meta, and gets exactly the FP8 that it asks for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from titan_fp8.config import load_config
from titan_fp8.float8.attention import Float8Attention
from titan_fp8.float8.convert import convert, scaling_state
from titan_fp8.float8.feed_forward import Float8FeedForward
from titan_fp8.float8.linear import Float8FanOut, Float8Linear
from titan_fp8.model.args import FLAVORS
from titan_fp8.model.decoder import Decoder

FILES = sorted((Path(__file__).parents[2] / "train_configs").glob("*.toml"))
FOG = ["attention.wk", "attention.wo", "attention.wq", "attention.wv", "feed_forward.w1", "feed_forward.w2"]
LLAMA = sorted([*FOG, "feed_forward.w3"])
# With Tekken's 131072 entries; Llama 2's own 32000 would make its 7.55 the known 6.74.
MILLIONS = {
    "debug": 17.37,
    "390m": 385.9,
    "1.5b": 1543.6,
    "llama2_7b": 7550,
    "8b": 8053.3,
    "llama3_8b": 8053.3,
}


def test_there_are_files():
    assert {"debug.toml", "fog_8b.toml", "llama3_8b.toml"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_builds_with_its_fp8(path):
    config = load_config(["--job.config_file", str(path)])
    config.architecture.vocab_size = 131_072
    args = FLAVORS[config.model.flavor]
    args.update_from_config(config)
    with torch.device("meta"):
        model = Decoder(args)
    fog = config.architecture.preset.startswith("fog")
    layer = FOG if fog else LLAMA
    every = sorted(f"layers.{i}.{name}" for i in range(args.n_layers) for name in layer)

    assert convert(model, config.fp8) == len(every)
    kinds = (Float8Linear, Float8FanOut, Float8FeedForward)
    joined = ["attention.wqkv", "attention.wo"]
    joined += ["feed_forward"]
    here = sorted(n for n, m in model.named_modules() if isinstance(m, kinds))
    assert here == sorted(f"layers.{i}.{name}" for i in range(args.n_layers) for name in joined)

    # The FOG block runs with FP8 attention, forward and backward; Llama's would diverge (FOG paper, section 2).
    attention = sorted(n for n, m in model.named_modules() if isinstance(m, Float8Attention))
    if fog:
        assert attention == sorted(f"layers.{i}.attention.inner_attention" for i in range(args.n_layers))
        scale = model.layers["0"].attention.inner_attention.softmax_scale
        assert scale == pytest.approx((2 / args.head_dim) ** 0.5), "taken over from the plain attention"
    else:
        assert attention == []
    state = scaling_state(model)
    assert state is not None and state.history.shape[0] == config.fp8.amax_history
    tensors = 3 + 3 + 6  # x, w, dy twice; x, up, z, down, dh, dy
    assert len(state.names) == tensors * args.n_layers + 5 * len(attention), "q, k, v, do, ds"

    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(MILLIONS[config.model.flavor], rel=1e-3)
