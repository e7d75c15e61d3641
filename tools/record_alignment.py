"""Recordings for tools/backtest.py of runs whose SwiGLU is pushed into alignment, step by step, with all statistics of each.

    python tools/record_alignment.py --out studies/alignment/results [--seeds 1 2 3 4]       on CPU, 15 minutes

The same instability as tools/instability.py shows, and the same model, text and arms, but it does not come out of the blue.
What is INDUCED: from step PUSH on, in every layer, one feature's gate and up rows turn towards each other and grow, so that
the outlier z which a rare token makes in SwiGLU's output grows evenly in its logarithm, from 1 to 1e8 at the last step; the
feature's column of w2 shrinks as z grows, so what it adds stays as long as the stream is. The token is in one batch of ten.
"Scaling FP8 training to trillion-token LLMs" (arXiv 2409.12517, section 4.2) sees this take 200 billion tokens.

    pushed bf16, pushed fp8, pushed smooth       as above, from the same weights, on the same batches
    calm fp8                                     the same, and nothing is pushed
"""

from __future__ import annotations

import argparse
import copy
import gzip
import math
import sys
import time
from pathlib import Path

import torch
from instability import ARMS, RARE, SIZES, Text, feed_forward_inputs, free_direction, start  # pyrefly: ignore
from torch import Tensor
from train_parts import build  # pyrefly: ignore

from titan_fp8.errors import UserError, in_one_line
from titan_fp8.files import save
from titan_fp8.float8.convert import convert, scaling_state
from titan_fp8.model.decoder import Decoder
from titan_fp8.stability.journal import encode
from titan_fp8.stability.predictor import COUNT, KINDS
from titan_fp8.stability.statistics import Statistics, Table

SIZE = SIZES["tiny"]
STEPS, PUSH = 400, 100
OUTLIER = 1e8
OFTEN = 10
READ = {statistic for kind in KINDS for statistic in kind.statistics} | {COUNT}
RUNS = {"pushed bf16": "bf16", "pushed fp8": "fp8", "pushed smooth": "fp8 smooth", "calm fp8": "fp8"}


class Push:
    """Turns the first feature of each layer of `model`, which has its `free_direction`, step by step."""

    @torch.no_grad()
    def __init__(self, model: Decoder, text: Text, direction: Tensor):
        special = text.batch(-1, event=True)[0]
        rare = (special == RARE).flatten()
        self.layers = []
        for block, (stream, x) in zip(
            model.layers.values(), feed_forward_inputs(model, special), strict=True
        ):
            row = direction / block.ffn_norm.weight
            row /= (x[rare] @ row).mean()  # z of the rare token is 1
            ffn = block.feed_forward
            own = [w.detach().clone() for w in (ffn.w1.weight[0], ffn.w3.weight[0], ffn.w2.weight[:, 0])]
            self.layers.append((row, *own, stream[~rare].norm(dim=1).mean()))

    @torch.no_grad()
    def __call__(self, model: Decoder, step: int) -> None:
        """The weights that step `step` is to see."""
        done = (step - PUSH) / (STEPS - 1 - PUSH)
        if done < 0:
            return
        z = OUTLIER**done
        for block, (row, gate, up, down, length) in zip(model.layers.values(), self.layers, strict=True):
            ffn, turned = block.feed_forward, min(2 * done, 1.0)
            ffn.w1.weight[0] = (1 - turned) * gate + math.sqrt(z) * row
            ffn.w3.weight[0] = (1 - turned) * up + math.sqrt(z) * row
            ffn.w2.weight[:, 0] = down * min(1.0, float(length / (z * down.norm())))


def shortened(table: Table) -> Table:
    """What the predictor reads, with 3 digits but where 1 - |cos| is read."""
    return {
        site: {
            key: value if key.startswith("alignment") else float(f"{value:.3g}")
            for key, value in values.items()
            if key in READ
        }
        for site, values in table.items()
    }


def record(out: Path, seed: int) -> None:
    """Every run of RUNS with one seed."""
    size, device = SIZE, torch.device("cpu")
    text = Text(size, device, 1_000_000 * seed)
    base = start(build(size, seed), size, device)
    for step in range(size.warm_up):
        base.step(*text.batch(step), size.lr * min(1.0, (step + 1) / 50))
    direction = free_direction(base.model, text)
    push = Push(base.model, text, direction)
    for run, arm in RUNS.items():
        activation, fp8 = ARMS[arm]
        model = build(size, seed, activation=activation)
        model.load_state_dict(base.model.state_dict())
        convert(model, fp8)
        if (state := scaling_state(model)) is not None:
            state.init_weights()
        trained = start(model, size, device)
        trained.optimizer.load_state_dict(copy.deepcopy(base.optimizer.state_dict()))
        statistics = Statistics(model, model.observer, size.batch, None, state)
        trained.statistics = statistics
        about = {"model": f"llama {size.dim} x {size.layers}", "recipe": fp8.recipe, "activation": activation}
        rows, began = [{"kind": "run", "step": 0, **about}], time.perf_counter()
        for step in range(STEPS):
            if run.startswith("pushed"):
                push(model, step)
            rare = int(torch.randint(OFTEN, (), generator=text.generator(-1000 - step))) == 0
            batch = text.batch(size.warm_up + step, rare)
            loss, norm = trained.step(*batch, size.lr / 5)
            row = {"kind": "train", "step": step + 1, "loss": float(loss), "grad_norm": float(norm)}
            rows.append(row | {"statistics": shortened(statistics.collect())})
        packed = gzip.compress("".join(f"{encode(row)}\n" for row in rows).encode(), mtime=0)
        path = out / f"{run.replace(' ', '-')}-{seed}.jsonl.gz"
        save(path, lambda partial, packed=packed: partial.write_bytes(packed))
        print(f"{path.name}: {time.perf_counter() - began:.0f} s, loss {rows[-1]['loss']:.3f}", flush=True)


@in_one_line
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the recordings; made if need be")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    options = parser.parse_args(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out must be a folder that can be written, got {options.out} ({error.strerror}): choose another"
        ) from error
    for seed in options.seeds:
        record(options.out, seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
