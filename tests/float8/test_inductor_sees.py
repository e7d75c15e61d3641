"""What PyTorch believes that our Triton kernels write: exactly their results.

Inductor reads it off a kernel's intermediate code. Where that fails it says so in a warning only, takes every tensor for
written, and copies those that are needed later: a copy of the FFN's hidden state in each block, once.
"""

from __future__ import annotations

import pytest
import torch
import triton
from torch import Tensor
from torch._higher_order_ops import triton_kernel_wrap as wrap
from triton.backends.compiler import GPUTarget

from titan_fp8 import loss
from titan_fp8.float8.formats import E4M3, E5M2
from titan_fp8.float8.kernels import activation, attention_cast, cast, moments, softmax


class Hopper:
    """A driver that only knows what it compiles for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


@pytest.fixture
def written(launched, monkeypatch):
    """written(module, operator, *arguments) -> names of the arguments that each kernel it launches is said to write."""

    def written(module, operator, *arguments) -> list[list[str]]:
        return [analyse(*launch) for launch in launched(module, operator, *arguments)]

    def analyse(kernel, args, options) -> list[str]:
        everything = dict(zip(kernel.arg_names, args, strict=False)) | options
        everything = {name: value for name, value in everything.items() if name in kernel.arg_names}
        tensors = {name: value for name, value in everything.items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in everything.items() if name not in tensors}
        table = wrap.kernel_side_table
        return wrap.get_mutated_tensors(
            table.add_kernel(kernel), table.add_constant_args(constants), tensors, {}
        )

    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    return written


def test_casts_of_attention(written):
    x, launch = half(1, 2, 130, 64), attention_cast.launch_cast
    for plain, transposed, results in (
        (True, True, ["x8", "x8_t"]),
        (True, False, ["x8"]),
        (False, True, ["x8_t"]),
    ):
        got = written(attention_cast, launch, x, one(), one(), E4M3, True, plain, transposed, False)
        assert got == [["seen", *results]]
    arguments = (x, x, one(), one(), one(), E5M2, False)
    got = written(attention_cast, attention_cast.launch_cast_gradient, *arguments)
    assert got == [["x8", "x8_t", "delta"]]


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def one() -> Tensor:
    return torch.ones(())


def test_casts(written):
    for straight, transposed, results in ((True, True, ["q_ptr", "qt_ptr"]), (False, True, ["qt_ptr"])):
        got = written(cast, cast.cast_op, half(64, 96), one(), one(), E4M3, True, straight, transposed)
        assert got == [["seen_ptr", *results]]
    for count in (1, 2, 3, 4):  # three to a launch
        got = written(cast, cast.cast_joined_op, [half(32, 96)] * count, one(), E4M3, True)
        assert got == [["qt_ptr"]] * (1 + count // 4)


@pytest.mark.parametrize("kind", activation.KINDS)
def test_activations(written, kind):
    h = half(64, 256 if kind == "swiglu" else 128)
    alphas = torch.ones(2) if kind == "xielu" else None
    got = written(activation, activation.activate_op, h, alphas, one(), one(), kind, True, None)
    assert got == [["seen_ptr", "z_ptr"]]
    back = (half(64, 128), h, alphas, one(), one(), one(), kind, E5M2, True, None, None)
    (got,) = written(activation, activation.activate_backward_op, *back)
    sums = ["parts_ptr"] if kind == "xielu" else []
    assert got == ["dh_seen_ptr", "dh_ptr", "dh_t_ptr", "z_t_ptr", *sums]


def test_smooth_swiglu(written):
    h, channels = half(64, 256), torch.ones(128)
    got = written(activation, activation.activate_op, h, None, one(), one(), "swiglu", False, channels)
    assert got == [["z_ptr"]]
    back = (half(64, 128), h, None, one(), one(), one(), "swiglu", E5M2, True, channels, torch.zeros(128))
    (got,) = written(activation, activation.activate_backward_op, *back)
    assert got == ["dh_seen_ptr", "z_seen_ptr", "dh_ptr", "dh_t_ptr", "z_t_ptr"]
    got = written(cast, cast.cast_joined_op, [half(64, 96)], torch.ones(96), E4M3, True)
    assert got == [["qt_ptr"]]


@pytest.mark.parametrize("add", [False, True])
def test_sums(written, add):
    sums = torch.zeros(2, 7, 8, dtype=torch.float64)
    more = (one(), one(), 448.0, 2.0**-10) if add else (None, None, 0.0, 0.0)
    got = written(moments, moments.moments_op, half(1, 2, 40, 1, 96), sums, *more, True, add)
    assert got == [["sums_ptr"]]


def test_loss(written):
    labels, lse = torch.zeros(64, dtype=torch.int64), torch.zeros(64)
    got = written(
        softmax, softmax.softmax_gradient_op, half(64, 128), labels, lse, torch.zeros(128, 64, dtype=E5M2)
    )
    assert got == [["q_ptr", "qt_ptr"]]
    assert written(loss, loss.scale_op, half(64), one()) == [["x_ptr"]]


def test_what_an_operator_writes_has_no_default():
    """torch 2.11 counts an argument's versions by its place, and arguments left at their default have none there."""
    from titan_fp8.float8.kernels import attention, attention_cudnn, gemm  # noqa: F401

    ours = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("titan_fp8::")]
    assert len(ours) >= 12
    for schema in ours:
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                assert not argument.has_default_value(), (schema.name, argument.name)
