"""The policy: what it answers to which numbers, how often, and that its state is all of it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from titan_fp8.config import Stability
from titan_fp8.errors import UserError
from titan_fp8.stability.policy import MOST_TENSORS, Action, Facts, Policy, in_effect
from titan_fp8.stability.predictor import Cause, Prediction, split_name

SLOTS = {
    f"layers.{layer}.{name}": 0.5
    for layer in range(2)
    for name in ("attention.wqkv.x", "feed_forward.z", "feed_forward.dh", "attention.inner_attention.q")
}


def make(mode: str = "act", **settings) -> Policy:
    causes = ("nonfinite", "gradient_outlier", "loss_spike", "predicted", "fp8_range", "attention")
    short = {"warmup_steps": 5, "answer_steps": 20, "cooldown_steps": 50}
    return Policy(Stability(**(dict.fromkeys(causes, mode) | short | settings)))


def predicted(series: str, risk: float = 0.95) -> Prediction:
    layer, site, statistic = split_name(series)
    return Prediction(7, risk, Cause(series, layer, site, statistic, "trend", 0.8), None, None, {})


def healthy(policy: Policy, steps: range, loss: float = 2.0, **facts) -> None:
    for step in steps:
        # 2 % of scatter, never twice in the same direction
        assert policy.decide(step, None, Facts(loss=loss * (1.01 if step % 2 else 0.99), **facts)) == []


def kinds(actions: list[Action]) -> list[tuple[str, str]]:
    return [(action.kind, action.cause) for action in actions]


@pytest.mark.parametrize(
    ("series", "tensor"),
    [
        ("layers.1.attention.wqkv.x.headroom", "layers.1.attention.wqkv.x"),
        ("layers.0.feed_forward.dh.amax_jump", "layers.0.feed_forward.dh"),
        ("layers.1.ffn_act.kurtosis", "layers.1.feed_forward.z"),
        ("layers.0.feed_forward.alignment_max", "layers.0.feed_forward.z"),
        ("layers.0.q.kurtosis", "layers.0.attention.inner_attention.q"),
    ],
)
def test_the_tensor_of_the_cause_and_the_worst_go_to_current_scaling_and_back(series, tensor):
    policy = make()
    saturation = SLOTS | {"layers.0.attention.wqkv.x": 3.0, "layers.1.feed_forward.dh": 9.0}
    actions = policy.decide(100, predicted(series), Facts(2.0, saturation=saturation))
    assert kinds(actions) == [("checkpoint", "predicted"), ("current_scaling", "fp8_range")]
    rest = [t for t in ("layers.1.feed_forward.dh", "layers.0.attention.wqkv.x") if t != tensor]
    assert actions[1].tensors == (tensor, *rest) and actions[1].until == 120
    assert set(in_effect(policy, list(SLOTS))) == set(actions[1].tensors)
    assert policy.decide(119, None, Facts(2.0)) == []
    (back,) = policy.decide(123, None, Facts(2.0))  # the first logged step after
    assert back.kind == "delayed_scaling" and set(back.tensors) == set(actions[1].tensors)
    assert in_effect(policy, list(SLOTS)) == []


def test_logits_take_attention_out_of_fp8_and_its_tensors_come_back_by_current_scaling():
    policy = make()
    actions = policy.decide(100, predicted("layers.0.attention.logit_max"), Facts(2.0, saturation=SLOTS))
    assert kinds(actions) == [("checkpoint", "predicted"), ("attention_16bit", "attention")]
    assert policy.attention_until == 120 and in_effect(policy, list(SLOTS)) == []
    assert kinds(policy.decide(120, None, Facts(2.0))) == [("attention_fp8", "attention")]
    assert policy.attention_until is None
    assert in_effect(policy, list(SLOTS)) == [name for name in SLOTS if "inner_attention" in name]
    assert policy.decide(130, None, Facts(2.0)) == [] and in_effect(policy, list(SLOTS)) == []


def test_without_fp8_attention_there_is_nothing_to_take_out():
    plain = {name: s for name, s in SLOTS.items() if "inner_attention" not in name}
    actions = make().decide(100, predicted("layers.0.attention.logit_max"), Facts(2.0, saturation=plain))
    assert kinds(actions) == [("checkpoint", "predicted")]


def test_only_so_many_tensors():
    saturation = {f"layers.{i}.attention.wo.x": 2.0 + i for i in range(40)}
    policy = make(cooldown_steps=0)
    actions = policy.decide(9, predicted("fp8.max_saturation"), Facts(2.0, saturation=saturation))
    assert actions[1].tensors == tuple(f"layers.{i}.attention.wo.x" for i in range(39, 39 - MOST_TENSORS, -1))
    again = policy.decide(10, predicted("fp8.max_saturation"), Facts(2.0, saturation=saturation))
    assert kinds(again) == [("checkpoint", "predicted")]


def test_risk_below_the_threshold_and_cooldown():
    policy = make()
    at = Facts(2.0, saturation=SLOTS)
    series = "layers.1.attention.wqkv.x.headroom"
    assert policy.decide(10, predicted(series, risk=0.49), at) == []
    assert len(policy.decide(20, predicted(series), at)) == 2
    assert policy.decide(30, predicted(series), at) == []  # cool-down
    assert kinds(policy.decide(40, predicted(series), at)) == [("delayed_scaling", "fp8_range")]
    assert len(policy.decide(70, predicted(series), at)) == 2
    assert policy.counts["checkpoint", "predicted"] == 2


def test_what_is_not_finite_is_no_prediction():
    """The cause `nonfinite` answers it; a checkpoint of such a run helps nobody."""
    policy = make()
    told = predicted("layers.1.ffn_act.nonfinite")
    told = told._replace(cause=told.cause._replace(kind="nonfinite"))
    assert policy.decide(100, told, Facts(2.0, saturation=SLOTS)) == []


def test_warn_says_what_act_would_do_and_off_says_nothing():
    policy = make("warn")
    facts = Facts(2.0, saturation=SLOTS, outliers=1, last_outlier=99, outlier_norm=7.0)
    actions = policy.decide(100, predicted("layers.1.attention.wqkv.x.headroom"), facts)
    assert kinds(actions) == [("warn", c) for c in ("gradient_outlier", "predicted", "fp8_range")]
    assert '"act"' in actions[2].why and "layers.1.attention.wqkv.x" in actions[2].why
    assert policy.tensors == {} and policy.counts == {("warn", action.cause): 1 for action in actions}
    assert make("off").decide(100, predicted("layers.1.attention.wqkv.x.headroom"), facts) == []


def test_a_confirmed_spike_goes_back_to_a_checkpoint_that_has_proved_itself():
    policy = make(max_rollbacks=2)
    disk = [10, 20, 29, 30, 31]
    healthy(policy, range(1, 31))
    assert policy.hold(lambda: disk) is None
    for step in (31, 32):
        assert policy.decide(step, None, Facts(3.0, checkpoints=lambda: disk)) == []
    # Step 30's loss was that of the weights of step 29: of 30's own nothing is known.
    assert policy.hold(lambda: disk) == 29
    (action,) = policy.decide(33, None, Facts(3.0, checkpoints=lambda: disk))
    assert (action.kind, action.cause, action.target) == ("roll_back", "loss_spike", 29)
    assert "step 30 was normal" in action.why
    # The baseline stays: a loss that is still high is a spike at once, and has nowhere proven to go.
    for step in (30, 31):
        assert policy.decide(step, None, Facts(3.0)) == []


def test_one_bad_row_and_early_rows_are_no_spike():
    policy = make()
    healthy(policy, range(1, 6), loss=50.0)  # a fall in warm-up, as long as there are few rows
    healthy(policy, range(6, 30))
    assert policy.decide(30, None, Facts(9.0)) == []
    healthy(policy, range(31, 40))
    assert policy.counts == {}


def test_rollbacks_are_bounded_and_then_the_new_level_is_normal():
    policy = make(max_rollbacks=1)
    healthy(policy, range(1, 31))
    disk = lambda: [10]  # noqa: E731
    assert [len(policy.decide(s, None, Facts(5.0, checkpoints=disk))) for s in (31, 32, 33)] == [0, 0, 1]
    healthy(policy, range(11, 31))
    answers = [policy.decide(s, None, Facts(5.0, checkpoints=disk)) for s in (31, 32, 33)]
    assert kinds(answers[2]) == [("warn", "loss_spike")] and "max_rollbacks" in answers[2][0].why
    healthy(policy, range(34, 60), loss=5.0)


def test_no_checkpoint_from_before_is_said():
    policy = make()
    healthy(policy, range(1, 31))
    answers = [policy.decide(s, None, Facts(5.0, checkpoints=lambda: [30, 40])) for s in (31, 32, 33)]
    assert kinds(answers[2]) == [("warn", "loss_spike")] and "no checkpoint" in answers[2][0].why


def test_nonfinite_steps_beyond_the_allowed_roll_back_also_between_logged_steps():
    policy = make(skip_nonfinite_steps=1)
    facts = Facts(bad_steps=1, bad_in_a_row=1, first_bad=11, checkpoints=lambda: [5, 9, 10])
    assert kinds(policy.decide(11, None, facts)) == [("skip_step", "nonfinite")]
    actions = policy.decide(13, None, facts._replace(bad_steps=3, bad_in_a_row=2, first_bad=12))
    assert kinds(actions) == [("skip_step", "nonfinite"), ("roll_back", "nonfinite")]
    # Two in a row of which one is step 12: step 11 may be the other. Step 10 was finite, so step 9's weights are good.
    assert actions[0].times == 2 and actions[1].target == 9
    assert policy.counts == {("skip_step", "nonfinite"): 3, ("roll_back", "nonfinite"): 1}
    # With "warn" the trainer stops the run, as it does without a policy.
    warned = make("warn").decide(13, None, facts._replace(bad_in_a_row=1))
    assert ("roll_back", "nonfinite") not in kinds(warned)


def test_a_rollback_ends_what_was_under_way():
    policy = make(cooldown_steps=0)
    healthy(policy, range(1, 31), saturation=SLOTS)
    policy.decide(31, predicted("layers.1.attention.wqkv.x.headroom"), Facts(2.0, saturation=SLOTS))
    policy.decide(32, predicted("layers.0.attention.logit_max"), Facts(2.0, saturation=SLOTS))
    assert policy.tensors and policy.attention_until
    for step in (33, 34, 35):
        actions = policy.decide(step, None, Facts(9.0, checkpoints=lambda: [20]))
    assert kinds(actions) == [("roll_back", "loss_spike")]
    assert policy.tensors == {} and policy.attention_until is None


def test_state_is_json_and_goes_on_exactly_where_it_was():
    one = make()
    healthy(one, range(1, 31))
    one.decide(31, predicted("layers.1.attention.wqkv.x.headroom"), Facts(2.0, saturation=SLOTS))
    one.decide(32, None, Facts(9.0))
    other = make()
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for step, loss in ((33, 9.0), (34, 9.0), (51, 2.0), (60, 2.0)):
        facts = Facts(loss, checkpoints=lambda: [20])
        assert one.decide(step, None, facts) == other.decide(step, None, facts)
    assert one.state_dict() == other.state_dict() and one.counts == other.counts
    with pytest.raises(UserError, match="version"):
        other.load_state_dict({"version": 0})


def test_a_row_has_what_there_is_and_no_more():
    action = Action("current_scaling", "fp8_range", "risk", 9, ("a", "b"))
    assert action.row(3) == {
        "kind": "action", "step": 3, "action": "current_scaling", "cause": "fp8_range", "why": "risk", "until": 9,
        "tensors": ["a", "b"],
    }  # fmt: skip
    assert str(action) == "[fp8_range] scaling by current amaxes (a, b) until step 9: risk"
    assert set(Action("roll_back", "c", "w", target=4).row(1)) == {
        "kind",
        "step",
        "action",
        "cause",
        "why",
        "target",
    }


def test_settings_are_read_by_name():
    """A policy needs no configuration class: whatever has the fields serves."""
    assert Policy(SimpleNamespace(**vars(Stability()))).decide(1, None, Facts(2.0)) == []
