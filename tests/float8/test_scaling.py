"""Delayed scaling against sequences worked out by hand: history, first step, non-finite amaxes, checkpoints, ranks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from titan_fp8.float8.formats import E4M3, E5M2, FP8_MAX
from titan_fp8.float8.scaling import (
    ChannelScale,
    DelayedScaling,
    FoldedScale,
    Recipe,
    TensorScale,
    WeightScale,
    channel_scales,
    quantize,
)


class Setup(NamedTuple):
    state: DelayedScaling
    x: TensorScale  # E4M3
    dy: TensorScale  # E5M2


def setup(**recipe) -> Setup:
    x, dy = TensorScale(E4M3), TensorScale(E5M2, gradient=True)
    state = DelayedScaling({"layer.x": x, "layer.dy": dy}, Recipe(**recipe))
    state.init_weights()
    return Setup(state, x, dy)


def cast(state: DelayedScaling, slot: TensorScale, largest: float, record: bool = True) -> float:
    """Quantise a tensor whose amax is `largest`, as a layer does. Returns the scale that the cast used."""
    x = torch.tensor([0.25 * largest, -largest])
    _, scale = quantize(x, slot.scale, slot.amax, slot.dtype, state.recipe.rule(record))
    return float(scale)


def test_scales_follow_the_amaxes_of_earlier_steps_only():
    state, x, dy = setup(history=3)
    amaxes = [4.0, 2.0, 1.0, 0.5, 8.0, 1.0, 1.0, 1.0, 1.0]
    # The first step has no history and uses its own amax; step t then the largest of t-1, t-2, t-3.
    maxima = [4.0, 4.0, 4.0, 4.0, 2.0, 8.0, 8.0, 8.0, 1.0]
    for largest, known in zip(amaxes, maxima, strict=True):
        assert cast(state, x, largest) == 448 / known
        assert cast(state, dy, 2 * largest) == 57344 / (2 * known)
        state.update()
        assert all(torch.equal(slot.inverse, 1 / slot.scale) for slot in (x, dy))
    # Only step 4 (8 where 2 was the largest known) lay outside its range.
    assert state.saturated_steps.tolist() == [1, 1]
    assert state.nonfinite_steps.tolist() == [0, 0]
    assert int(state.steps) == len(amaxes)


@pytest.mark.parametrize(("margin", "power_of_two"), [(0, False), (2, False), (0, True), (1, True)])
def test_scales_against_a_list_of_past_amaxes(margin, power_of_two):
    state, x, dy = setup(history=5, margin=margin, power_of_two=power_of_two)
    amaxes = torch.randn(23, 2, generator=torch.Generator().manual_seed(1)).exp().tolist()
    saturated = [0, 0]
    for t, pair in enumerate(amaxes):
        for i, slot in enumerate((x, dy)):
            known = max(past[i] for past in amaxes[max(t - 5, 0) : t] or [pair])
            expected = FP8_MAX[slot.dtype] / 2**margin / known
            expected = 2.0 ** math.floor(math.log2(expected)) if power_of_two else expected
            assert cast(state, slot, pair[i]) == pytest.approx(expected, rel=2**-22)
            saturated[i] += pair[i] * expected > FP8_MAX[slot.dtype] * (1 + 1e-5) and t > 0
        state.update()
    assert state.saturated_steps.tolist() == saturated
    assert margin or power_of_two or min(saturated) > 0


def test_saturation_says_how_far_the_last_step_went():
    state, x, dy = setup(history=2, margin=1)
    for largest in (3.0, 4.5):
        cast(state, x, largest)
        cast(state, dy, largest)
        state.update()
    # scale 448 / (2 * 3): 4.5 reaches 0.75 of the range
    assert state.report() == {
        "layer.x": {
            "amax": 4.5, "scale": pytest.approx(448 / 9), "saturation": pytest.approx(0.75),
            "saturated_steps": 0, "nonfinite_steps": 0,
        },
        "layer.dy": {
            "amax": 4.5, "scale": pytest.approx(57344 / 9), "saturation": pytest.approx(0.75),
            "saturated_steps": 0, "nonfinite_steps": 0,
        },
    }  # fmt: skip


def test_an_amax_that_repeats_exactly_does_not_count_as_saturated():
    for largest in torch.linspace(1, 2, 50).tolist():
        state, x, _ = setup(history=1)
        for _ in range(2):
            cast(state, x, largest)
            state.update()
        assert state.saturation[0] == pytest.approx(1.0) and state.saturated_steps[0] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_amaxes_that_are_not_finite_are_counted_and_forgotten(bad):
    state, x, dy = setup(history=2)
    used = []
    for largest in (4.0, bad, 1.0, 1.0, 1.0):
        used.append(cast(state, x, largest))
        cast(state, dy, 1.0)
        state.update()
        assert state.history.isfinite().all() and state.scale.isfinite().all()
    # After the bad step its row repeats the 4 before it, so 4 is remembered for one step more.
    assert used == [112.0, 112.0, 112.0, 112.0, 448.0]
    assert state.nonfinite_steps.tolist() == [1, 0]
    assert state.saturated_steps.tolist() == [0, 0]


def test_a_bad_step_is_visible_as_an_infinite_amax_until_the_next():
    state, x, _ = setup(history=2)
    cast(state, x, math.nan)
    assert x.amax.isnan()
    state.update()
    assert state.report()["layer.x"]["amax"] == math.inf
    assert x.amax == 0


def test_a_tensor_that_sees_nothing_keeps_its_scale():
    state, x, dy = setup(history=2)
    cast(state, x, 4.0)
    cast(state, dy, 0.0)
    for _ in range(4):  # the 4 leaves the history
        state.update()
        assert x.scale == 112.0
        assert dy.scale == 1.0


def test_recomputation_changes_nothing_and_micro_batches_add_up_to_their_maximum():
    state, x, dy = setup(history=2)
    first = cast(state, x, 3.0)
    assert cast(state, x, 3.0) == first  # again under activation checkpointing
    assert x.amax == 3.0
    for largest in (1.0, 5.0, 2.0):
        cast(state, dy, largest)
    assert dy.amax == 5.0
    state.update()
    assert x.scale == 448 / 3 and dy.scale == torch.tensor(57344 / 5)
    assert (x.amax, dy.amax) == (0.0, 0.0)


def test_evaluation_uses_scales_and_records_nothing():
    state, x, _ = setup(history=2)
    assert cast(state, x, 7.0, record=False) == 64.0  # nothing known yet: its own
    assert x.amax == 0
    cast(state, x, 4.0)
    state.update()
    assert cast(state, x, 7.0, record=False) == 112.0
    assert x.amax == 0


def test_a_new_loss_scale_moves_gradient_tensors_only():
    state, x, dy = setup(history=3)
    for largest in (4.0, 2.0):
        cast(state, x, largest)
        cast(state, dy, largest)
        state.update()
    state.rescale_gradients(torch.tensor(0.5))
    assert (x.scale, dy.scale) == (112.0, 57344 / 2)
    assert state.history[:, 0].tolist() == [4.0, 2.0, 0.0]
    assert state.history[:, 1].tolist() == [2.0, 1.0, 0.0]
    # The same gradient, half as large now, fills the range again; and the next scale comes from the halved history.
    cast(state, dy, 2.0)
    state.update()
    assert state.saturation[1] == state.jump[1] == 1.0 and state.saturated_steps.tolist() == [0, 0]
    assert dy.scale == 57344 / 2


def test_fresh_state_after_to_empty():
    with torch.device("meta"):
        state, x, dy = setup(history=3)
    for module in (state, x, dy):
        module.to_empty(device="cpu")
        for buffer in module.buffers():
            buffer.copy_(
                torch.full_like(buffer, 7) if not buffer.is_floating_point() else buffer.new_tensor(torch.nan)
            )
    state.recipe.calibrating = False
    state.init_weights()
    expected = setup(history=3).state
    for (name, fresh), known in zip(state.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(fresh, known), name
    for slot in (x, dy):
        assert (slot.scale, slot.inverse, slot.amax) == (1.0, 1.0, 0.0)
    assert state.recipe.calibrating


@pytest.mark.parametrize("how", ["replaced", "other memory", "copied"])
def test_slots_that_moved_are_found(how):
    """`Module.to` replaces buffers, FSDP2 gives them other memory."""
    it = setup(history=3)
    cast(it.state, it.x, 4.0)
    it.state.update()
    for module in it:
        if how == "replaced":
            module.to(torch.float64).to(torch.float32)
        elif how == "other memory":
            for buffer in module.buffers():
                buffer.data = buffer.clone()
    state, x, _ = copy.deepcopy(it) if how == "copied" else it
    cast(state, x, 8.0)
    state.update()
    assert (x.scale, x.inverse, x.amax) == (56.0, torch.tensor(1 / 56), 0.0)


def sequence(it: Setup, amaxes: list[float]) -> list[float]:
    used = []
    for largest in amaxes:
        used += [cast(it.state, it.x, largest), cast(it.state, it.dy, 3 * largest)]
        it.state.update()
    return used


def save_and_load_torch(old: DelayedScaling, new: DelayedScaling, folder: Path) -> None:
    torch.save(old.state_dict(), folder / "state.pt")
    new.load_state_dict(torch.load(folder / "state.pt", weights_only=True))


def save_and_load_dcp(old: DelayedScaling, new: DelayedScaling, folder: Path) -> None:
    """As torchtitan does."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    dcp.save(get_model_state_dict(old), checkpoint_id=folder / "dcp")
    loaded = get_model_state_dict(new)
    dcp.load(loaded, checkpoint_id=folder / "dcp")
    set_model_state_dict(new, loaded, options=StateDictOptions(strict=False))


@pytest.mark.parametrize("save_and_load", [save_and_load_torch, save_and_load_dcp])
@pytest.mark.parametrize("steps", [0, 4, 5])
def test_a_checkpoint_continues_bit_for_bit(gloo, tmp_path, save_and_load, steps):
    amaxes = [4.0, 0.3, 7.0, 1.1, math.nan, 0.7, 0.2, 0.1, 0.05]
    old, new = setup(history=3), setup(history=3)
    sequence(old, amaxes[:steps])
    sequence(new, [100.0, 200.0, 300.0])  # all of it must be overwritten
    cast(new.state, new.x, 1e9)
    save_and_load(old.state, new.state, tmp_path)
    assert new.state.recipe.calibrating == (steps == 0)
    for slot, known in ((new.x, old.x), (new.dy, old.dy)):
        assert torch.equal(slot.scale, known.scale) and slot.amax == 0
        assert torch.equal(slot.inverse, known.inverse)
    for largest in amaxes[steps:]:
        assert sequence(new, [largest]) == sequence(old, [largest])
        assert torch.equal(new.state.jump, old.state.jump)
    saved, known = new.state.state_dict(), old.state.state_dict()
    assert saved.keys() == known.keys() and "fp8_max" not in saved
    for name in known:
        assert torch.equal(saved[name], known[name]), name


def test_a_load_into_another_history_length_is_an_error():
    with pytest.raises(RuntimeError, match="size mismatch for history"):
        setup(history=3).state.load_state_dict(setup(history=4).state.state_dict())


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    it = setup(history=2)
    for amaxes in ((4.0, 1.0), (1.0, math.nan)):  # what rank 0 and rank 1 see, for two steps
        cast(it.state, it.x, amaxes[rank])
        cast(it.state, it.dy, amaxes[1 - rank])
        it.state.update()
    torch.save(it.state.state_dict(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_ranks_agree_on_the_largest_amax_and_on_nan(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, known in states[0].items():
        assert torch.equal(known, states[1][name]), name
    state = SimpleNamespace(**states[0])
    assert state.history.tolist() == [[4.0, 4.0], [4.0, 4.0]]  # NaN on one rank: the step before stands in
    assert state.nonfinite_steps.tolist() == [1, 1]
    assert state.scale.tolist() == [112.0, 57344 / 4]


def test_a_skipped_step_stays_out_of_the_history():
    """What is huge and just finite, in a step skipped for another's overflow, must not flush later tensors to zero."""
    state, x, dy = setup(history=4)
    for activation, gradient, skipped in ((2.0, 1.0, False), (1e38, 1e38, True), (2.0, 1.0, False)):
        cast(state, x, activation)
        cast(state, dy, gradient)
        state.skipped = torch.tensor(skipped)
        state.update()
        assert (float(x.scale), float(dy.scale)) == (448 / 2, 57344)
    assert state.saturated_steps.tolist() == [1, 1]  # it is seen all the same
    assert state.skipped is None


def test_the_first_step_that_is_not_skipped_is_the_first():
    """Nothing is known of a skipped one: scales from its amaxes, or from none, would clamp or flush whole tensors."""
    state, x, dy = setup(history=2)
    for activation, gradient, skipped in ((1.0, math.inf, True), (1e38, 1e-30, True), (4.0, 2.0, False)):
        assert cast(state, x, activation) == torch.tensor(448.0) / activation
        cast(state, dy, gradient)
        state.skipped = torch.tensor(skipped)
        state.update()
        assert state.recipe.calibrating is skipped and int(state.steps) == (not skipped)
    assert (float(x.scale), float(dy.scale)) == (448 / 4, 57344 / 2)
    assert state.nonfinite_steps.tolist() == [0, 1] and state.saturated_steps.tolist() == [0, 0]


def test_weights_amaxes_from_the_optimizer_or_read_once_more():
    """A 0 says that the step was skipped: the scale stays that of the weight, also one just loaded."""
    a, b, c = (torch.nn.Linear(4, 4, bias=False) for _ in range(3))
    slots = {"a.w": WeightScale((a,)), "bc.w": WeightScale((b, c))}
    state = DelayedScaling(slots, Recipe(history=2))

    def fill(*values: float) -> None:
        with torch.no_grad():
            for linear, value in zip((a, b, c), values, strict=True):
                linear.weight.fill_(value)

    def scales() -> list[float]:
        return [448 / float(slot.scale) for slot in slots.values()]

    def given(*values: float) -> dict[torch.Tensor, torch.Tensor]:
        pairs = zip((a, b, c), values, strict=False)
        return {linear.weight: torch.tensor(value) for linear, value in pairs}

    fill(1.0, 2.0, 4.0)
    state.init_weights()
    assert scales() == [1.0, 4.0]
    state.stepped, state.skipped = given(0.0, 0.0, 0.0), torch.tensor(True)  # the first step is skipped
    state.update()
    assert scales() == [1.0, 4.0] and state.last_amax.tolist() == [1.0, 4.0]
    state.stepped = given(3.5, 7.0, 1.75)  # other numbers than the weights': these are taken
    state.update()
    assert scales() == [3.5, 7.0]
    state.stepped = given(100.0, 100.0)  # not all: the weights are read
    state.update()
    assert scales() == [1.0, 4.0]
    fill(0.5, 0.25, 0.125)  # as loaded
    state.stepped = given(100.0, 100.0, 100.0)
    state.scale_weights()
    assert scales() == [0.5, 0.25]
    state.stepped, state.skipped = given(0.0, 0.0, 0.0), torch.tensor(True)
    state.update()
    assert scales() == [0.5, 0.25]
    state.stepped = given(1.0, math.nan, 1.0)
    state.update()
    assert scales() == [1.0, 0.25] and state.nonfinite_steps.tolist() == [0, 1]


def test_named_tensors_are_scaled_by_their_own_amax_and_then_as_before():
    state, x, dy = setup(history=3)
    for largest in (4.0, 2.0):
        cast(state, x, largest)
        cast(state, dy, largest)
        state.update()
    state.use_current(["layer.x"])
    for largest in (64.0, 1.0):
        assert cast(state, x, largest) == 448 / largest  # nothing is clamped, nothing flushed
        assert cast(state, dy, largest) == 57344 / max(4.0, float(state.history[:, 1].max()))
        state.update()
        assert state.saturation[0] == 1.0
    assert state.saturated_steps.tolist() == [0, 1]
    state.use_current([])
    assert not state.recipe.current
    assert cast(state, x, 1.0) == 448 / 64  # the history went on


def test_current_scaling_refuses_what_is_not_there():
    state = setup().state
    with pytest.raises(ValueError, match=r"got layer\.y"):
        state.use_current(["layer.x", "layer.y"])
    assert not state.is_current.any() and not state.recipe.current


def test_current_scaling_survives_a_load():
    """The policy, whose state it is, says when it ends; the buffers in the checkpoint are the delayed scales."""
    it = setup(history=2)
    cast(it.state, it.x, 2.0)
    it.state.update()
    it.state.use_current(["layer.x"])
    it.state.load_state_dict(it.state.state_dict())
    assert float(it.state.scale[0]) == 224 and float(it.x.scale) == 0
    assert cast(it.state, it.x, 7.0) == 64


# ---- Scales by feature ----


def features(**recipe) -> tuple[DelayedScaling, ChannelScale, FoldedScale]:
    z = ChannelScale(4)
    linear = torch.nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(
            torch.tensor([[1.0, -2.0, 4.0, 0.5], [0.5, 3.0, -8.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
        )
    down = FoldedScale(linear, z)
    other = WeightScale((torch.nn.Linear(4, 4, bias=False),))
    state = DelayedScaling({"other": other, "z": z, "down": down}, Recipe(**recipe))
    state.init_weights()
    return state, z, down


def see(z: ChannelScale, amaxes: list[float]) -> None:
    z.channel_amax.copy_(torch.maximum(z.channel_amax, torch.tensor(amaxes)))


@pytest.mark.parametrize("margin", [0, 1])
def test_features_are_scaled_by_powers_of_two_with_headroom(margin):
    state, z, down = features(margin=margin)
    assert z.channel_scale.tolist() == [1.0] * 4, "nothing known yet"
    assert down.scale == 448 / 8 and down.multiplier().tolist() == [56.0] * 4
    amaxes = [7.0, 3.6, 7.1, 1e-9]
    see(z, amaxes)
    state.update()
    # 448 / 2^6 = 7 is what features may reach, each at the largest power of two below; the last as if it reached
    # 8 * 7.1 / 2^12 / 0.5.
    assert z.channel_scale.tolist() == [x / 2**margin for x in (1.0, 1.0, 0.5, 128.0)]
    assert z.scale == 1.0 and state.report()["z"]["amax"] == 7 / 2**margin
    columns = torch.tensor([1.0, 3.0, 8.0, 0.5]) / z.channel_scale
    assert down.scale == pytest.approx(448 / columns.max().item())
    torch.testing.assert_close(down.multiplier(), down.scale / z.channel_scale)
    assert state.report()["down"]["amax"] == columns.max()
    see(z, [70.0, 3.6, 7.1, 1e-9])  # ten times what is known
    state.update()
    assert state.report()["z"]["amax"] == 70 / 2**margin
    assert state.report()["z"]["saturation"] == pytest.approx(70 / 448 / 2**margin)
    see(z, [700.0 * 2**margin, 3.6, 7.1, 1e-9])  # scaled for 70 times 64
    state.update()
    assert state.saturated_steps.tolist() == [0, 0, 0]
    see(z, [0.0, 600.0 * 2**margin, 0.0, 0.0])  # 3.6 times 64 is the limit
    state.update()
    assert state.saturated_steps.tolist() == [0, 1, 0]


def test_features_forget_by_half_in_4_steps():
    state, z, _ = features()
    see(z, [8.0, 2.0, 2.0, 2.0])
    for _ in range(5):
        state.update()
        see(z, [1.0, 2.0, 2.0, 2.0])
    torch.testing.assert_close(state.channel_amax, torch.tensor([[4.0, 2.0, 2.0, 2.0]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_features_amax_that_is_not_finite_is_counted_and_forgotten(bad):
    state, z, down = features()
    see(z, [4.0, 4.0, 4.0, 4.0])
    state.update()
    see(z, [4.0, bad, 4.0, 4.0])
    state.update()
    assert state.nonfinite_steps.tolist() == [0, 1, 0] and state.report()["z"]["amax"] == math.inf
    torch.testing.assert_close(state.channel_amax, torch.tensor([[4.0, 4.0 / 2**0.25, 4.0, 4.0]]))
    assert z.channel_scale.isfinite().all() and down.scale.isfinite() and not z.channel_amax.any()


def test_features_of_a_skipped_step_are_forgotten():
    state, z, down = features()
    state.skipped = torch.tensor(True)
    see(z, [1e30, math.inf, 4.0, 4.0])
    state.update()
    assert z.channel_scale.tolist() == [1.0] * 4 and down.scale == 448 / 8, "as before the first step"
    see(z, [6.0, 6.0, 6.0, 6.0])
    state.update()
    known = z.channel_scale.clone()
    state.skipped = torch.tensor(True)
    see(z, [6.0, 1e30, 6.0, 6.0])
    state.update()
    assert state.report()["z"]["amax"] == 1e30 * known[1]
    assert torch.equal(z.channel_scale, known) and down.scale.isfinite()


def test_features_scales_come_back_from_a_checkpoint():
    state, z, down = features()
    see(z, [1.0, 10.0, 100.0, 0.0])
    state.update()
    again, z_again, down_again = features()
    again.load_state_dict(state.state_dict())
    assert torch.equal(z_again.channel_scale, z.channel_scale)
    assert torch.equal(down_again.multiplier(), down.multiplier())
    again.scale_weights()
    assert torch.equal(down_again.multiplier(), down.multiplier()) and z_again.scale == 1


def test_scales_of_features_at_the_extremes():
    """Zero, subnormal, huge: all finite powers of two, and columns no more than 2^12 apart (and 2 for rounding)."""
    for amaxes in ([0.0, 0.0], [1e-42, 1e-40], [3e38, 1e-30], [math.nan, 1.0]):
        for columns in ([1.0, 1.0], [0.0, 1.0], [1e-6, 3.0]):
            scales = channel_scales(torch.tensor(amaxes), torch.tensor(columns), 6)
            mantissa, _ = torch.frexp(scales)
            assert (mantissa == 0.5).all()
            if all(columns):
                folded = torch.tensor(columns) / scales
                assert not max(amaxes) > 1 or folded.max() / folded.min() <= 2**13


def test_a_feature_that_outweighs_the_others_gives_up_headroom():
    """Up to all of it, by what it is above 64 times the median; so others' columns of the weight stay in E4M3's range."""
    amaxes = torch.tensor([[1.0, 1.0, 1.0, 1.0, large] for large in (60.0, 256.0, 1e4, 1e6)])
    scales = channel_scales(amaxes, torch.ones(5), 6)
    assert scales[:, 4].tolist() == [
        2.0**-4,
        2.0**-4,
        2.0**-5,
        2.0**-12,
    ]  # 7 / 60, 7 * 4 / 256, 448 / 1e4, 448 / 1e6
    assert scales[:3, 0].tolist() == [4.0] * 3
    assert scales[3, 0] == 1.0  # 448 / 2^6 / (1e6 / 2^6 / 2^12) = 1.8: columns 2^12 apart
