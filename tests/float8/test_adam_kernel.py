"""The AdamW kernel beside its reference, on a GPU and (stochastic rounding only) in Triton's interpreter.

Moments and scales: bit for bit. Parameters: to the bound that the kernel's docstring derives.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from titan_fp8.float8.formats import E4M3, E5M2, FP8_MAX, is_fp8, scale_from_amax
from titan_fp8.float8.kernels import adam

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def new_slot(shape, p, m, v, block, number=0, device="cpu"):
    """A tensor in the middle of its training: random moments with random scales."""

    def moment(dtype, positive):
        x = torch.randn(shape) * 10.0 ** torch.randint(-9, -3, (*shape[:-1], 1))
        x = (x * x).to(device) if positive else x.to(device)
        codes = torch.zeros_like(x, dtype=dtype)
        scale = None
        if is_fp8(dtype):
            blocks = [*shape[:-1], -(-shape[-1] // block)] if block else []
            scale = torch.full(blocks, 7.0, device=device)
        adam.encode(x, codes, scale, block, positive)
        return codes, scale

    (codes_m, scale_m), (codes_v, scale_v) = moment(m, False), moment(v, True)
    weights = torch.randn(shape, device=device).to(p)
    return adam.Slot(weights, codes_m, codes_v, scale_m, scale_v, number, row=3, column=5)


def gradient(shape, dtype, device):
    """Of all sizes: a row's gradients differ by up to ten orders of magnitude; some are 0."""
    g = torch.randn(shape, device=device) * 10.0 ** torch.randint(-10, 1, shape, device=device)
    return torch.where(torch.rand(shape, device=device) < 0.05, 0.0, g).to(dtype)


def copy(slot):
    return adam.Slot(*(x.clone() if isinstance(x, torch.Tensor) else x for x in slot))


def differences(a, b):
    """How many bytes of two slots differ, NaN of any sign and payload being equal."""
    total = 0
    for x, y in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor):
            different = x.reshape(-1, 1).view(torch.uint8) != y.reshape(-1, 1).view(torch.uint8)
            total += int((different.any(1) & ~(x.float().isnan() & y.float().isnan()).reshape(-1)).sum())
    return total


def differences_of_p(slot, twin, before, lr, limit, weight_decay=0.1, master=1.0):
    """How many parameters differ by more than the kernel's bound and, rounded, by more than the spacing that they cross."""
    p, q, old = slot.p.double(), twin.p.double(), before.double()
    size = master * lr * (limit + weight_decay * old.abs() / master)
    bound = 2.0**-20 * size + 2.0**-23 * old.abs().maximum(q.abs())
    dtype, neighbours = slot.p.dtype, 0.0
    if dtype != F32:
        mantissa = 2.0 ** (adam.DROPPED[dtype] - 23)
        # A spacing above the smaller of the two; one of subnormals at the least.
        neighbours = mantissa * p.abs().maximum(q.abs()).clamp(min=adam.MIN_NORMAL[dtype])
        # Only those near a boundary between two roundings cross it: a share of bound / spacing.
        assert (p != q).double().mean() <= 1e-2
    both = p.isnan() & q.isnan()
    return int((~((p - q).abs() <= bound + neighbours) & ~both).sum())


def compare(formats, grad_dtype, block, rounding, whole, device, steps=3, spoil=False, most_rows=70):
    """Run kernel and reference side by side; how many elements differ in any step (of p: by more than its bound)."""
    p, m, v = formats
    rule = adam.Rule(0.9, 0.95, 1e-8, 0.1, block, *rounding, seed=2**31 - 5)
    columns = 512 if whole else 307
    heights = 1, most_rows, most_rows // 2
    slots = [new_slot((rows, columns), p, m, v, block, i, device) for i, rows in enumerate(heights)]
    twins = [copy(slot) for slot in slots]
    launch = adam.Launch(slots, range(3), grad_dtype, rule, whole)
    inverse, go = torch.tensor(0.7, device=device), torch.zeros((), device=device)
    total = 0
    for step in range(1, steps + 1):
        grads = [gradient(slot.p.shape, grad_dtype, device) for slot in slots]
        grads[2][5] = 0.0  # with moments of 0 below: a block of zeros
        if step == 1:
            for slot in (slots[2], twins[2]):
                slot.m[5], slot.v[5] = 0.0, 0.0
        if spoil:
            grads[1][3, 4], grads[1][4, 5] = torch.nan, torch.inf
        table = adam.numbers(torch.full((3,), float(step), device=device), 1e-3, 0.9, 0.95)
        if p == F16:
            table[:, 4] = 8.0
        amaxes = torch.zeros((3, 2), dtype=torch.int32, device=device)
        p_amaxes = torch.zeros(3, dtype=torch.int32, device=device)
        addresses = torch.tensor([g.data_ptr() for g in grads], device=device)
        if not block:
            launch(addresses, table, inverse, go, amaxes, p_amaxes, only_amax=True)
        launch(addresses, table, inverse, go, amaxes, p_amaxes)
        for i, (slot, twin, grad) in enumerate(zip(slots, twins, grads, strict=True)):
            if not block:
                for scale, dtype, amax in ((slot.m_scale, m, amaxes[i, 0]), (slot.v_scale, v, amaxes[i, 1])):
                    if scale is not None:
                        scale.copy_(scale_from_amax(amax.view(F32), FP8_MAX[dtype]))
            before = twin.p.clone()
            adam.reference(twin, grad, table[i], inverse, rule)
            lr, limit, master = float(table[i, 3]), float(table[i, 2]), float(table[i, 4])
            total += differences_of_p(slot, twin, before, lr, limit, master=master if p == F16 else 1.0)
            torch.testing.assert_close(
                p_amaxes[i].view(F32), slot.p.abs().amax().float(), rtol=0, atol=0, equal_nan=True
            )
            twin.p.copy_(slot.p)  # each step by itself
            total += differences(slot, twin)
    if spoil:
        assert (
            slots[1].p[3, 4].isnan() and slots[1].m[3, 4].float().isnan() and slots[1].v[3, 4].float().isnan()
        )
        assert slots[1].p[4, 5].isnan()
        assert int(slots[1].p.isnan().sum()) == 2
    return total


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("formats", "grad_dtype", "block", "rounding"),
    [
        ((BF16, E4M3, E5M2), BF16, 256, (False, False)),
        ((BF16, E4M3, E5M2), BF16, 256, (True, True)),
        ((F32, E4M3, E5M2), F32, 256, (False, False)),
        ((F32, E4M3, E5M2), BF16, 128, (True, False)),
        ((F16, E4M3, E5M2), BF16, 256, (False, True)),
        ((BF16, E5M2, E4M3), BF16, 16, (False, False)),
        ((BF16, E4M3, E4M3), F32, 512, (True, True)),
        ((BF16, E4M3, E5M2), BF16, 0, (False, False)),
        ((BF16, E4M3, E5M2), BF16, 0, (True, False)),
        ((F32, BF16, F32), F32, 256, (True, True)),
        ((BF16, F32, BF16), BF16, 256, (False, False)),
    ],
)
def test_kernel_equals_reference(formats, grad_dtype, block, rounding, whole):
    assert compare(formats, grad_dtype, block, rounding, whole, "cuda") == 0


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", [(False, False), (True, True)])
def test_not_a_number_stays(rounding):
    """NaN and inf gradients end as NaN where they were, and nowhere else."""
    assert compare((BF16, E4M3, E5M2), BF16, 256, rounding, True, "cuda", steps=1, spoil=True) == 0


def test_in_the_interpreter():
    """Triton's interpreter truncates where hardware rounds, so only stochastic rounding, which is exact, can be compared."""
    done = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout == "0 0 0 0 0 0\n", done.stdout + done.stderr[-2000:]


if __name__ == "__main__":
    torch.manual_seed(0)
    kinds = [
        ((BF16, E4M3, E5M2), BF16, 64, (True, True)),
        ((F16, E5M2, E4M3), BF16, 32, (True, True)),
        ((BF16, E4M3, E5M2), F32, 0, (True, True)),
    ]
    print(
        *(
            compare(*kind, whole, "cpu", steps=2, most_rows=14)
            for kind, whole in itertools.product(kinds, (True, False))
        )
    )
