"""What tests of several rooms share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from titan_fp8.errors import UserError

DEBUG = Path(__file__).parents[1] / "train_configs" / "debug.toml"
SIZES = ("--architecture.n_layers=2", "--training.seq_len=64", "--validation.enable=false")
"""What makes the debug model one of a few milliseconds."""

needs_scaled_mm = pytest.mark.skipif(
    TorchVersion(torch.__version__) < (2, 12),
    reason="torch 2.11 has no fast _scaled_mm on CPU: titan_fp8::bmm runs",
)


def refusal(call: Callable[[], object], *words: str) -> str:
    """The one-line UserError of `call`, which must contain all `words`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


class Saved:
    """A small decoder with random weights, and a checkpoint of it as the trainer writes one."""

    def __init__(self, folder: Path, *flags: str):
        import torch
        import torch.distributed.checkpoint as dcp

        from titan_fp8.config import load_config
        from titan_fp8.data.sources import hash64
        from titan_fp8.model.args import FLAVORS
        from titan_fp8.model.decoder import Decoder
        from titan_fp8.spec import build_tokenizer

        self.config = load_config(["--job.config_file", str(DEBUG), *SIZES, *flags])
        self.tokenizer = build_tokenizer(self.config)
        args = FLAVORS[self.config.model.flavor]
        args.update_from_config(self.config)
        self.model = Decoder(args).eval()
        with torch.no_grad():
            self.model.init_weights()
            for parameter in self.model.parameters():  # nothing as it starts: gains, curvatures, alphas too
                parameter.add_(torch.randn_like(parameter) * 0.1)
        self.checkpoint = folder / "checkpoint" / "step-5"
        state = self.model.state_dict() | {
            "optimizer": {"state.tok_embeddings.weight.exp_avg": torch.ones(3)},
            "dataloader": {"fingerprint": torch.tensor([1, hash64(self.tokenizer.identity) >> 1])},
            "float8_state.scale": torch.ones(4),
        }
        dcp.save(state, checkpoint_id=str(self.checkpoint), no_dist=True)
