"""What to do about a risk or a step that went wrong: a pure decision from numbers. Knows no torch, no trainer, no disk.

    cause              seen in                                                  answer
    predicted          risk at or above [stability] risk                        checkpoint now
    fp8_range          ... led by the range of an FP8 tensor or of what fills   its tensor, and those that clamp most, to
                       it (RANGE)                                               current scaling, for answer_steps
    attention          ... led by attention's logits (LOGITS)                   attention in 16 bits, for answer_steps
    loss_spike         the logged loss: confirmed, see below                    roll back
    nonfinite          non-finite steps, more in a row than skip_nonfinite_steps roll back (else the run stops)
    gradient_outlier   the gradient norm of each step, on the device (gate.py)  skip the step

Each cause is "off", "warn" (said, written down, nothing done) or "act". `Policy.decide` is called at logged steps and,
without a loss, before checkpoints; only the gate acts between them. It runs on rank 0, whose actions and state all ranks
then take over. The state is plain JSON.

A spike. With x = ln(loss) of a logged step that was normal, and x' of the one before (weights 1/n, later 1/LEVEL, 1/NOISE):

    mean over x        sd^2 = mean over (x - x')^2 / 2    differences, so that a loss that falls has no more spread for it
    above:      x > mean + sigma * max(sd, FLOOR)         judged from warmup_steps and FEW rows on
    confirmed:  so in spike_rows logged steps in a row; one that is normal ends it

Rows above never enter the mean. A spike that nobody rolls back becomes the new normal: the mean starts anew.

A checkpoint is good if its weights have proved themselves: a later step, before the spike, had a normal loss. The loss of
step t is that of the weights after t - 1, so with t the last normal logged step, those of steps before t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from titan_fp8.errors import UserError

if TYPE_CHECKING:
    from titan_fp8.stability.predictor import Cause, Prediction

RANGE = {
    "headroom", "max_saturation", "saturated_share", "amax_jump", "amax", "kurtosis",
    "alignment_max", "alignment_q999",
}  # fmt: skip
LOGITS = {"logit_max", "entropy"}
# Which FP8 tensor of a layer a site of the statistics fills.
FILLS = {
    "qkv_in": "attention.wqkv.x",
    "q": "attention.inner_attention.q",
    "k": "attention.inner_attention.k",
    "v": "attention.inner_attention.v",
    "attention_out": "attention.wo.x",
    "ffn_up": "feed_forward.z",
    "ffn_act": "feed_forward.z",
    "feed_forward": "feed_forward.z",  # gate and up rows that align
}
MOST_TENSORS = 16  # switched at a time; a handful of tensors is a remedy, half the model is another recipe
LEVEL, NOISE = 10.0, 100.0  # rows
FEW = 10  # rows from which no spread is known
FLOOR = 0.02  # of sd, in ln(loss): two runs' losses in a row differ by a few percent in health
VERSION = 1  # of state_dict

WORDS = {
    "warn": "warned",
    "checkpoint": "writing a checkpoint",
    "current_scaling": "scaling by current amaxes",
    "delayed_scaling": "back to delayed scaling",
    "attention_16bit": "attention in 16 bits",
    "attention_fp8": "attention back in FP8",
    "skip_step": "skipped the optimizer",
    "roll_back": "rolling back",
}


class Action(NamedTuple):
    """One line of what is done: the keys of an "action" row in metrics.jsonl, less those that are empty."""

    kind: str
    """A key of WORDS."""
    cause: str
    why: str
    until: int | None = None
    """The first logged step from here on ends it."""
    tensors: tuple[str, ...] = ()
    """FP8 tensors that it is about."""
    target: int | None = None
    """The step whose checkpoint is taken up again."""
    times: int = 1
    """Steps that were skipped; otherwise 1."""

    def __str__(self) -> str:
        where = f" to step {self.target}" if self.target is not None else ""
        which = f" ({', '.join(self.tensors)})" if self.tensors else ""
        until = f" until step {self.until}" if self.until is not None else ""
        return f"[{self.cause}] {WORDS[self.kind]}{where}{which}{until}: {self.why}"

    def row(self, step: int) -> dict[str, Any]:
        """For metrics.jsonl."""
        facts = {"until": self.until, "tensors": list(self.tensors) or None, "target": self.target}
        known = {key: value for key, value in facts.items() if value is not None}
        times = {} if self.times == 1 else {"times": self.times}
        row = {"kind": "action", "step": step, "action": self.kind, "cause": self.cause, "why": self.why}
        return row | known | times


class Facts(NamedTuple):
    """What the host knows at a logged step, or before a checkpoint."""

    loss: float | None = None
    """Mean over all ranks; None: not a logged step."""
    first_bad: int = 0
    """The first non-finite step since the host last looked; 0: none."""
    bad_in_a_row: int = 0
    """The longest run of them."""
    bad_steps: int = 0
    """Non-finite steps of the run so far."""
    outliers: int = 0
    """Steps so far that the gate found to be outliers,"""
    outliers_skipped: int = 0
    """and how many of them it skipped."""
    last_outlier: int = 0
    """The last outlier's step."""
    outlier_norm: float = 0.0
    """Its gradient norm."""
    saturation: Mapping[str, float] = {}
    """FP8 tensor -> amax * scale / largest number, above 1 if it clamped; all tensors that the model has."""
    checkpoints: Callable[[], list[int]] = list
    """Steps of the complete checkpoints, ascending. Asked only when there is need."""


class Policy:
    """Decides what to do. `settings` is [stability] of the configuration.

    Attributes:
        counts: (action, cause) -> how often, over the whole run.
        tensors: FP8 tensor under current scaling -> the step at which that ends.
        attention_until: the step at which attention in 16 bits ends, or None.
        returning: FP8 attention has just come back, and its tensors' histories are from before: until the next logged step
            they belong under current scaling too.
    """

    def __init__(self, settings: Any):
        self.settings = settings
        self.counts: dict[tuple[str, str], int] = {}
        self.tensors: dict[str, int] = {}
        self.attention_until: int | None = None
        self.returning = False
        self._last: dict[str, int] = {}  # cause -> the step of its last answer
        self._rollbacks = 0
        self._rows, self._mean, self._variance, self._before = 0, 0.0, 0.0, 0.0  # of ln(loss)
        self._normal: int | None = None  # the last logged step whose loss was normal
        self._above = 0  # logged steps since, in a row
        self._bad_steps = self._outliers = self._skips = 0  # of Facts, as counted so far

    def decide(self, step: int, prediction: Prediction | None, facts: Facts) -> list[Action]:
        """What to do after `step`. After a "roll_back" nothing else is under way."""
        actions = self._skipped(step, facts)
        too_many = facts.bad_in_a_row > self.settings.skip_nonfinite_steps
        if facts.loss is not None:
            actions += self._ended(step)
            actions += self._spike(step, facts)
        if too_many:
            # The row of bad steps may have begun before the host last looked; no earlier than this.
            before = facts.first_bad - facts.bad_in_a_row
            before = before if self._normal is None or not self._above else min(before, self._normal)
            why = f"{facts.bad_in_a_row} steps in a row were not finite, step {facts.first_bad} among them"
            actions += self._back(step, "nonfinite", before, why, facts)
        if facts.loss is not None and not any(action.kind == "roll_back" for action in actions):
            actions += self._predicted(step, prediction, facts)
        for action in actions:
            key = action.kind, action.cause
            self.counts[key] = self.counts.get(key, 0) + action.times
        return actions

    def hold(self, checkpoints: Callable[[], list[int]]) -> int | None:
        """The checkpoint that must not be purged now, because a spike may lead back to it."""
        return self._good(checkpoints(), self._normal) if self._above and self._normal is not None else None

    def count(self, facts: Facts) -> None:
        """Take the totals of `facts` as known: after going back, those of the step gone back to."""
        self._bad_steps, self._outliers, self._skips = facts.bad_steps, facts.outliers, facts.outliers_skipped

    # ---- Causes ----

    def _skipped(self, step: int, facts: Facts) -> list[Action]:
        """What the device did since the host last looked."""
        actions = []
        bad, outliers = facts.bad_steps - self._bad_steps, facts.outliers - self._outliers
        skipped = facts.outliers_skipped - self._skips
        self.count(facts)
        if bad > 0:
            why = f"loss or gradients were not finite, first in step {facts.first_bad}"
            actions.append(Action("skip_step", "nonfinite", why, times=bad))
        if outliers > 0:
            why = (
                f"gradient norm {facts.outlier_norm:.4g} in step {facts.last_outlier}, beyond "
                f"{self.settings.sigma:g} sigma"
            )
            if skipped > 0:
                actions.append(Action("skip_step", "gradient_outlier", why, times=skipped))
            elif self.settings.gradient_outlier == "warn":
                actions += self._answer(step, "gradient_outlier", Action("skip_step", "", why))
        return actions

    def _ended(self, step: int) -> list[Action]:
        actions = []
        self.returning = False
        over = [name for name, until in self.tensors.items() if step >= until]
        if over:
            for name in over:
                del self.tensors[name]
            actions.append(Action("delayed_scaling", "fp8_range", "its time is over", tensors=tuple(over)))
        if self.attention_until is not None and step >= self.attention_until:
            self.attention_until, self.returning = None, True
            actions.append(Action("attention_fp8", "attention", "its time is over"))
        return actions

    def _spike(self, step: int, facts: Facts) -> list[Action]:
        loss, settings = facts.loss, self.settings
        if settings.loss_spike == "off" or loss is None or not (math.isfinite(loss) and loss > 0):
            return []
        x, spread = math.log(loss), max(math.sqrt(self._variance), FLOOR)
        judged = self._rows >= FEW and step > settings.warmup_steps
        if not (judged and x > self._mean + settings.sigma * spread):
            if self._rows:
                self._variance += max(1 / self._rows, 1 / NOISE) * (
                    (x - self._before) ** 2 / 2 - self._variance
                )
            self._rows += 1
            self._mean += max(1 / self._rows, 1 / LEVEL) * (x - self._mean)
            self._before = x
            self._normal, self._above = step, 0
            return []
        self._above += 1
        if self._above < settings.spike_rows or self._normal is None:
            return []
        why = (
            f"loss {loss:.4g} is above {math.exp(self._mean + settings.sigma * spread):.4g} "
            f"({settings.sigma:g} sigma) for {self._above} logged steps; step {self._normal} was normal"
        )
        actions = self._back(step, "loss_spike", self._normal, why, facts)
        if not any(action.kind == "roll_back" for action in actions):
            self._rows = self._above = 0
            self._mean = self._variance = 0.0
        return actions

    def _back(self, step: int, cause: str, before: int, why: str, facts: Facts) -> list[Action]:
        """Roll back to the last checkpoint that step `before` has proved good."""
        if getattr(self.settings, cause) != "act":
            return self._answer(step, cause, Action("roll_back", "", why))
        if self._rollbacks >= self.settings.max_rollbacks:
            return [Action("warn", cause, f"{why}; the {self._rollbacks} of max_rollbacks are used up")]
        target = self._good(facts.checkpoints(), before)
        if target is None:
            return [Action("warn", cause, f"{why}; there is no checkpoint from before step {before}")]
        self._rollbacks += 1
        self._above, self._normal = 0, None
        self.tensors, self.attention_until, self.returning = {}, None, False
        self._last = {name: min(last, target) for name, last in self._last.items()}
        return [Action("roll_back", cause, why, target=target)]

    def _predicted(self, step: int, prediction: Prediction | None, facts: Facts) -> list[Action]:
        if prediction is None or prediction.cause is None or prediction.risk < self.settings.risk:
            return []
        if prediction.cause.kind == "nonfinite":  # no prediction but a fact, and the business of `nonfinite`
            return []
        cause, until = prediction.cause, step + self.settings.answer_steps
        why = f"risk {prediction.risk:.2f}, led by {cause.series} ({cause.kind})"
        actions = self._answer(step, "predicted", Action("checkpoint", "", why))
        if cause.statistic in RANGE:
            if tensors := self._worst(cause, facts.saturation):
                answer = Action("current_scaling", "", why, until, tensors)
                answered = self._answer(step, "fp8_range", answer)
                if any(action.kind == "current_scaling" for action in answered):
                    self.tensors |= dict.fromkeys(tensors, until)
                actions += answered
        elif (
            cause.statistic in LOGITS
            and self.attention_until is None
            and any(map(_in_attention, facts.saturation))
        ):
            answered = self._answer(step, "attention", Action("attention_16bit", "", why, until))
            if any(action.kind == "attention_16bit" for action in answered):
                self.attention_until = until
            actions += answered
        return actions

    # ---- Parts ----

    def _answer(self, step: int, cause: str, action: Action) -> list[Action]:
        """The action under its cause's setting, at most once in `cooldown_steps`."""
        mode, last = getattr(self.settings, cause), self._last.get(cause)
        if mode == "off" or (last is not None and step - last < self.settings.cooldown_steps):
            return []
        self._last[cause] = step
        if mode == "act":
            return [action._replace(cause=cause)]
        which = f" ({', '.join(action.tensors)})" if action.tensors else ""
        return [Action("warn", cause, f'{action.why}; with {cause} = "act": {WORDS[action.kind]}{which}')]

    def _worst(self, cause: Cause, saturation: Mapping[str, float]) -> tuple[str, ...]:
        """The tensor of the cause, then those that clamped most; MOST_TENSORS with those switched already."""
        site = cause.series.rpartition(".")[0]
        tensor = site if site in saturation else f"layers.{cause.layer}.{FILLS.get(cause.site)}"
        clamped = sorted((name for name, s in saturation.items() if s > 1), key=lambda n: -saturation[n])
        names = dict.fromkeys([*([tensor] if tensor in saturation else []), *clamped])
        room = max(MOST_TENSORS - len(self.tensors), 0)
        return tuple(name for name in names if name not in self.tensors)[:room]

    @staticmethod
    def _good(checkpoints: list[int], before: int) -> int | None:
        return max((step for step in checkpoints if 0 < step < before), default=None)

    # ---- State ----

    def state_dict(self) -> dict[str, Any]:
        """All that later decisions depend on, as plain JSON."""
        state = {key: value for key, value in vars(self).items() if key not in ("settings", "counts")}
        state = {
            key: dict(value) if isinstance(value, dict) else value for key, value in state.items()
        }  # copies
        counts = [[kind, cause, n] for (kind, cause), n in self.counts.items()]
        return {"version": VERSION, "counts": counts} | state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Raises UserError for one of another version; then nothing changes."""
        if state.get("version") != VERSION:
            raise UserError(
                f"the checkpoint's [stability] state must be of version {VERSION}, got {state.get('version')}: "
                'leave it out with checkpoint.exclude_from_loading = ["policy"]'
            )
        for key in vars(self).keys() - {"settings", "counts"}:
            value = state[key]
            setattr(self, key, dict(value) if isinstance(value, dict) else value)
        self.counts.clear()
        self.counts.update({(kind, cause): n for kind, cause, n in state["counts"]})


def _in_attention(name: str) -> bool:
    return ".inner_attention." in name


def in_effect(policy: Policy, names: list[str]) -> list[str]:
    """Which of a model's FP8 tensors are under current scaling now."""
    return [name for name in names if name in policy.tensors or (policy.returning and _in_attention(name))]
