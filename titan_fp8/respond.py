"""Carries out what the policy decides (stability/policy.py), on all ranks alike, through the trainer's parts.

At logged steps and before checkpoints rank 0 decides, and its actions and state go to all ranks in one small tensor.
A roll-back waits until the loop is between two steps:

    later checkpoints are removed -> model, optimizer, schedule, FP8 scales, gate as of the target
    the data go on where they are: what lies between is skipped -> the journal's later rows move to metrics.dropped.jsonl
    the target is saved again, with the new position of the data and the policy's state: a restart goes on just like that
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from titan_fp8 import checkpoint_folder as folders
from titan_fp8.stability.gate import GradientGate
from titan_fp8.stability.policy import Action, Facts, Policy, in_effect

_SHEET = 1 << 14  # bytes of the tensor that carries actions and state: MOST_TENSORS names twice, and counts


class Response:
    """The policy of one trainer, and its hands. A checkpoint state of its own ("policy").

    Attributes:
        gate: skips steps, see stability/gate.py.
        rolls_back: the action that goes back, to be done before the next step, or None.
    """

    def __init__(self, trainer: Any):
        settings = trainer.job_config.stability
        self.trainer = trainer
        self.policy = Policy(settings)
        self.gate = GradientGate(
            settings.gradient_outlier, settings.sigma, settings.warmup_steps, settings.max_skips_in_a_row, trainer.device
        )  # fmt: skip
        self.rolls_back: Action | None = None

    def look(self, loss: float | None) -> None:
        """Decide after the trainer's step and do at once what can be; `loss`, of all ranks, if it was logged. Collective."""
        trainer, processor = self.trainer, self.trainer.metrics_processor
        actions: list[Action] = []
        if dist.get_rank() == 0:
            actions = self.policy.decide(trainer.step, processor.prediction, self._facts(loss))
        actions = self._agree(actions)
        self._apply()
        for action in actions:
            processor.act(trainer.step, action, self.policy.counts)
            if action.kind == "checkpoint":
                trainer.checkpointer.request()
            elif action.kind == "roll_back":
                self.rolls_back = action
                trainer.checkpointer.paused = True  # the step that is given up is not worth a checkpoint
        if dist.get_rank() == 0:
            back = self.rolls_back
            trainer.checkpointer.held = back.target if back else self.policy.hold(self._checkpoints)

    def roll_back(self) -> None:
        """Take up the checkpoint that was decided upon, if one was. Collective; to be called between steps."""
        action, self.rolls_back = self.rolls_back, None
        if action is None or action.target is None:
            return
        trainer, since = self.trainer, self.trainer.step
        state = self.policy.state_dict()
        trainer.checkpointer.roll_back(action.target)
        self.policy.load_state_dict(state)
        self.policy.count(self._facts(None))
        self._apply()
        if trainer.scaling is not None:
            trainer.scaling.scale_weights()  # the amaxes of columns are not in the checkpoint
        trainer.optimizers.zero_grad()
        trainer.watch.in_a_row.zero_()
        trainer.watch.forget()
        trainer.metrics_processor.roll_back(action, since)
        trainer.checkpointer.save_now(action.target)
        trainer.checkpointer.held = None

    def _facts(self, loss: float | None) -> Facts:
        trainer = self.trainer
        first, longest, total, outliers, skipped, last = torch.stack(
            [
                trainer.watch.step, trainer.watch.longest, trainer.watch.total, self.gate.outliers, self.gate.skipped,
                self.gate.last_step,
            ]
        ).tolist()  # fmt: skip
        report = trainer.metrics_processor.report
        return Facts(
            loss=loss,
            first_bad=first,
            bad_in_a_row=longest,
            bad_steps=total,
            outliers=outliers,
            outliers_skipped=skipped,
            last_outlier=last,
            outlier_norm=float(self.gate.last_norm),
            saturation={name: values["saturation"] for name, values in report.items()},
            checkpoints=self._checkpoints,
        )

    def _checkpoints(self) -> list[int]:
        checkpointer = self.trainer.checkpointer
        if not checkpointer.enable or checkpointer.load_only:
            return []
        return folders.complete_steps(checkpointer.folder)

    def _agree(self, actions: list[Action]) -> list[Action]:
        """Rank 0's actions and policy state, on every rank."""
        if dist.get_world_size() == 1:
            return actions
        sheet = torch.zeros(_SHEET, dtype=torch.uint8)
        if dist.get_rank() == 0:
            text = json.dumps([self.policy.state_dict(), actions]).encode()
            assert len(text) <= _SHEET, f"{len(text)} bytes of actions and state"
            sheet[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        sheet = sheet.to(self.trainer.device)
        dist.broadcast(sheet, 0)
        state, rows = json.loads(sheet.cpu().numpy().tobytes().rstrip(b"\0"))
        if dist.get_rank() != 0:
            self.policy.load_state_dict(state)
        return [Action(*row)._replace(tensors=tuple(row[4])) for row in rows]

    def _apply(self) -> None:
        """Bring the FP8 layers in line with the policy's state."""
        scaling = self.trainer.scaling
        if scaling is None:
            return
        scaling.recipe.attention_16bit = self.policy.attention_until is not None
        names = in_effect(self.policy, scaling.names)
        if names != scaling.current:
            scaling.use_current(names)

    def state_dict(self) -> dict[str, Any]:
        return {"policy": json.dumps(self.policy.state_dict()), "gate": self.gate.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(json.loads(state["policy"]))
        self.gate.load_state_dict(state["gate"])
        self.trainer.metrics_processor.actions = self.policy.counts
        self._apply()
