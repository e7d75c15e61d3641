"""The loss scale: when it moves and how far; and a whole step that overflows, with the optimizer and FP8 scales in it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from titan_fp8.config import Fp8, LossScale
from titan_fp8.float8.convert import convert, scaling_state
from titan_fp8.float8.formats import E5M2
from titan_fp8.float8.loss_scale import LossScaler

CPU = torch.device("cpu")
GOOD, OVERFLOW = torch.tensor(False), torch.tensor(True)


def scaler(**settings) -> LossScaler:
    return LossScaler(LossScale(**({"enable": True, "init": 1024.0, "growth_interval": 3} | settings)), CPU)


def test_grows_after_good_steps_in_a_row_and_backs_off_at_once():
    it = scaler()
    steps = [GOOD, GOOD, GOOD, GOOD, GOOD, OVERFLOW, GOOD, GOOD, GOOD, OVERFLOW, OVERFLOW]
    ratios = [it.update(step).item() for step in steps]
    # the overflow after five good steps starts the count anew
    assert ratios == [1, 1, 2, 1, 1, 0.5, 1, 1, 2, 0.5, 0.5]
    assert it.scale == 1024 * 2 * 0.5 * 2 * 0.5 * 0.5
    assert (int(it.good_steps), int(it.skipped)) == (0, 3)


def test_factors_are_the_configurations():
    it = scaler(growth_interval=1, growth_factor=4.0, backoff_factor=0.25)
    assert [it.update(step).item() for step in (GOOD, GOOD, OVERFLOW)] == [4, 4, 0.25]


def test_stays_between_min_and_max():
    it = scaler(growth_interval=1, init=6.0, min=4.0, max=10.0)
    assert not it.at_minimum()
    assert [it.update(GOOD).item() for _ in range(2)] == [pytest.approx(10 / 6), 1]
    assert it.scale == 10
    assert [it.update(OVERFLOW).item() for _ in range(3)] == [0.5, pytest.approx(0.8), 1]
    assert it.scale == 4 and it.at_minimum()
    assert int(it.skipped) == 3


def test_state_survives_a_checkpoint(tmp_path):
    it, other = scaler(), scaler(init=2.0)
    for step in (OVERFLOW, GOOD, GOOD):
        it.update(step)
    torch.save(it.state_dict(), tmp_path / "scaler.pt")
    kept = other.scale  # the trainer and the compiled step hold on to the tensor
    assert other.load_state_dict(torch.load(tmp_path / "scaler.pt", weights_only=True)) == 1
    assert kept is other.scale and kept == 512
    assert (int(other.good_steps), int(other.skipped)) == (2, 1)
    assert other.update(GOOD) == 2 == it.update(GOOD)


def test_switched_on_or_off_in_a_resumed_run():
    """The scale is the configured one, and gradients change by what is returned."""
    on, off = scaler(), LossScaler(LossScale(), CPU)
    on.update(OVERFLOW)  # 512
    with_scale, without = on.state_dict(), off.state_dict()
    now_off, now_on = LossScaler(LossScale(), CPU), scaler(init=64.0)
    assert now_off.load_state_dict(with_scale) == 1 / 512
    assert now_off.scale == 1 and now_off.update(OVERFLOW) == 1 and int(now_off.skipped) == 1
    assert now_on.load_state_dict(without) == 64
    assert now_on.scale == 64 and not now_on.at_minimum()
    assert off.load_state_dict(without) == 1 and off.scale == 1
    # At its minimum of 1 it is still one that is on.
    worn = scaler(init=2.0)
    worn.update(OVERFLOW)
    assert scaler().load_state_dict(worn.state_dict()) == 1


def test_a_checkpoint_is_read_beside_the_scale_in_use():
    it = scaler()
    it.state_dict()["scale"].fill_(1.0)
    assert it.scale == 1024


def test_disabled_is_one_for_ever():
    it = LossScaler(LossScale(growth_interval=1), CPU)
    for step in (GOOD, OVERFLOW, GOOD):
        assert it.update(step) == 1
    assert it.scale == 1 and int(it.skipped) == 0


def test_an_overflowing_step_is_skipped_and_everything_else_moves_on(tiny_decoder):
    """The trainer's order: scaled backward, norm, gated optimizer, FP8 scales, then the loss scale."""
    model = tiny_decoder()
    convert(model, Fp8(amax_history=4))
    state = scaling_state(model)
    state.init_weights()
    it = scaler(init=256.0, growth_interval=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(1))
    parameters = list(model.parameters())

    def step(factor: float = 1.0) -> bool:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        (loss * it.scale * factor).backward()
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        overflow = ~norm.isfinite()
        for p in parameters:
            p.grad /= it.scale
        optimizer.found_inf = overflow.float()
        optimizer.step()
        state.update()
        state.rescale_gradients(it.update(overflow))
        return bool(overflow)

    gradients = [slot.dtype == E5M2 for slot in state.slots]
    assert not step() and not step()
    weights = [p.detach().clone() for p in parameters]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in parameters]
    scales, history = state.scale.clone(), state.history.clone()

    assert step(factor=1e38)
    assert it.scale == 128 and int(it.skipped) == 1
    assert all(torch.equal(p, w) for p, w in zip(parameters, weights, strict=True))
    assert all(
        torch.equal(optimizer.state[p]["exp_avg"], m) for p, m in zip(parameters, moments, strict=True)
    )
    assert all(optimizer.state[p]["step"] == 2 for p in parameters)
    assert (
        state.nonfinite_steps[gradients].sum() > 0
        and state.nonfinite_steps.sum() == state.nonfinite_steps[gradients].sum()
    )
    # what overflowed left the earlier amaxes in place, in units of the new loss scale
    overflowed = state.nonfinite_steps > 0
    assert torch.equal(state.history[:2, overflowed], history[:2, overflowed] / 2)
    assert torch.equal(state.history[2, overflowed], history[1, overflowed] / 2)
    assert torch.equal(state.scale[overflowed], scales[overflowed] * 2)

    assert not step()
    assert all(optimizer.state[p]["step"] == 3 for p in parameters)
    assert not any(torch.equal(p, w) for p, w in zip(parameters, weights, strict=True))
    # the gradients of the next step lie in the range that the halved amaxes promised
    assert (state.saturation[overflowed] < 1.5).all() and (state.saturation[overflowed] > 0.25).all()
