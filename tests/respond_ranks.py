"""Run by test_respond.py under torchrun: the arguments are the run's flags. Only rank 0 sees predictions and a spike.

Prints "alike" on each rank if after every step all ranks had the same policy, gate, switched tensors and step.
"""

from __future__ import annotations

import json
import os
import sys

import torch.distributed as dist

from titan_fp8.config import load_config
from titan_fp8.stability.predictor import Cause, Prediction
from titan_fp8.train import Trainer


def main(flags: list[str]) -> None:
    trainer = Trainer(load_config(flags))
    response = trainer.response
    look, step_of = response.look, trainer.train_step
    rank, seen = dist.get_rank(), []

    def with_facts(loss):
        cause = Cause("layers.0.feed_forward.x.headroom", 0, "feed_forward.x", "headroom", "trend", 0.8)
        foretold = rank == 0 and trainer.step in (4, 9)
        trainer.metrics_processor.prediction = (
            Prediction(trainer.step, 0.95, cause, None, None, {}) if foretold else None
        )
        done = response.policy.state_dict()["_rollbacks"]
        look(100.0 if rank == 0 and trainer.step > 16 and not done else loss)

    def step(iterator):
        step_of(iterator)
        gate = {name: float(value) for name, value in response.gate.state_dict().items()}
        mine = [
            trainer.step,
            response.policy.state_dict(),
            gate,
            trainer.scaling.current,
            bool(response.rolls_back),
        ]
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, json.dumps(mine))
        assert everyone[0] == everyone[1], everyone
        seen.append((trainer.step, tuple(trainer.scaling.current)))

    response.look, trainer.train_step = with_facts, step
    trainer.train()
    assert [s for s, _ in seen] == [*range(1, 20), *range(16, 21)], seen
    assert ("layers.0.feed_forward.x" in dict(seen)[5]) and dict(seen)[20] == ()
    assert all(parameter.isfinite().all() for parameter in trainer.parameters.values())
    trainer.close()
    dist.barrier()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main(sys.argv[1:])
    print("alike", flush=True)
    # Not through Python's shutdown: gloo's threads may hold tensors then, and torch, rarely, aborts.
    os._exit(0)
