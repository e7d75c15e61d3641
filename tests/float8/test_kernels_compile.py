"""Without a GPU: operators take CUDA tensors (fake ones), and the Triton kernels that they launch compile for Hopper."""

from __future__ import annotations

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from titan_fp8 import loss
from titan_fp8.float8.formats import E4M3, E5M2
from titan_fp8.float8.kernels import (
    activation,
    adam,
    attention,
    attention_backward,
    attention_cast,
    attention_forward,
    cast,
    cosines,
    moments,
    softmax,
)


@pytest.fixture
def compiled(monkeypatch):
    """compiled(function, *arguments) -> names of the kernels it launches, each compiled for Hopper as it would be there.

    function: an operator or a launcher. Tensors are on CPU: Triton specialises on alignment, sizes and dtypes alone.
    """

    class Hopper:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 90  # no device has that number: what is compiled here is kept apart

        def get_current_stream(self, device=None):
            return 0

    names: list[str] = []
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"] and kernel.metadata.shared <= 232448
        names.append(self.fn.__name__)

    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    monkeypatch.setattr(JITFunction, "run", compile_only)

    def compiled(function, *arguments) -> list[str]:
        names.clear()
        getattr(function, "_init_fn", function)(*arguments)
        return list(names)

    return compiled


def half(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def one() -> Tensor:
    return torch.ones(())


@pytest.mark.parametrize("kind", activation.KINDS)
def test_activations(compiled, kind):
    h = half(64, 512 if kind == "swiglu" else 256)
    alphas = torch.ones(2) if kind == "xielu" else None
    channels = torch.ones(256) if kind == "swiglu" else None
    for channel in (None, channels):
        forward = (h, alphas, one(), one(), kind, True, channel)
        assert compiled(activation.activate_op, *forward) == ["_forward_kernel"]
        backward = (half(64, 256), h, alphas, one(), one(), one(), kind, E5M2, True, channel, channel)
        assert compiled(activation.activate_backward_op, *backward) == ["_backward_kernel"]


def test_casts(compiled):
    for dtype in (E4M3, E5M2):
        assert compiled(cast.cast_op, half(64, 128), one(), one(), dtype, True, True, True) == [
            "_cast_kernel"
        ]
    matrices = [half(64, 128), half(32, 128), half(32, 128)]
    for transposed in (False, True):
        assert compiled(cast.cast_joined_op, matrices, one(), E4M3, transposed) == ["_join_kernel"]
    for dtype in (E4M3, E5M2):
        gathered = [torch.zeros(64, 128, dtype=dtype)]
        assert compiled(cast.cast_joined_op, gathered, one(), dtype, True) == ["_cast_kernel"]
        assert compiled(cast.cast_joined_op, 2 * gathered, one(), dtype, True) == ["_join_kernel"]


@pytest.mark.parametrize("C", [64, 128])
def test_attention(compiled, C, monkeypatch):
    """Casts, forward and backward as they follow each other; odd length, GQA."""
    for module in (attention_forward, attention_backward):
        monkeypatch.setattr(module, "require_hopper", lambda device: None)
    B, S, L = 2, 200, 256

    def rows(heads: int) -> Tensor:
        return half(B, S, heads, C).transpose(1, 2)

    def fp8(heads: int, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
        return torch.zeros(B, heads, L, C, dtype=dtype), torch.zeros(B, heads, C, L, dtype=dtype)

    for pairs in (False, True):
        arguments = (rows(2), one(), one(), E4M3, True, True, True, pairs)
        assert compiled(attention_cast.launch_cast, *arguments) == ["_cast_kernel"]
    (q8, q8_t), (k8, k8_t), (v8, v8_t) = fp8(4), fp8(2), fp8(2)
    forward = (q8, k8, v8_t, one(), one(), one(), 0.1, S)
    assert compiled(attention_forward.launch_forward, *forward) == ["forward_kernel"]
    for dtype in (E4M3, E5M2):
        arguments = (rows(4), rows(4), one(), one(), one(), dtype, True)
        assert compiled(attention_cast.launch_cast_gradient, *arguments) == ["_cast_gradient_kernel"]
        scales = [one() for _ in range(5)]
        backward = (
            q8, k8, q8_t, k8_t, v8, *fp8(4, dtype), torch.zeros(B, 4, L), torch.zeros(B, 4, L), *scales,
            torch.zeros(()), 0.1, S, dtype, True,
        )  # fmt: skip
        assert compiled(attention_backward.launch_backward, *backward) == ["kv_kernel", "q_kernel"]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("block", [0, 16, 256])
def test_adam(compiled, block, whole):
    """Each format of moments and parameters; stochastic rounding."""
    columns = 512 if whole else 300
    kinds = [
        (torch.float32, E4M3, E5M2),
        (torch.bfloat16, E5M2, E4M3),
        (torch.float16, torch.float32, torch.bfloat16),
    ]
    for formats in kinds:
        p, m, v = (torch.zeros(64, columns, dtype=dtype) for dtype in formats)
        shape = (64, -(-columns // block)) if block else ()
        scales = [torch.ones(shape) if x.dtype.itemsize == 1 else None for x in (m, v)]
        rule = adam.Rule(0.9, 0.95, 1e-8, 0.1, block, True, True, seed=2**40)
        launch = adam.Launch([adam.Slot(p, m, v, *scales)], [0], torch.bfloat16, rule, whole)
        amaxes = torch.zeros(1, 2, dtype=torch.int32)
        arguments = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 6), one(), one(), amaxes, amaxes[:, 0]
        for only_amax in (False, True)[: 1 if block else 2]:
            assert compiled(launch, *arguments, only_amax) == ["_adam_kernel"]


def test_cosines(compiled):
    for width in (64, 1500, 4096):
        assert compiled(cosines._launch, half(70, width), half(70, width)) == ["_cosines_kernel"]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("sums", [False, True], ids=["counts", "moments"])
def test_moments(compiled, sums, known):
    x, table = half(1, 2, 64, 1, 512), torch.zeros(2, 4, 8, dtype=torch.float64)
    scale = None if sums and known else one()
    arguments = (x, table, scale, one() if known else None, 448.0, 2.0**-10, sums, known)
    assert compiled(moments.moments_op, *arguments) == ["_moments_kernel"]


def test_loss(compiled):
    labels, lse = torch.zeros(64, dtype=torch.int64), torch.zeros(64)
    arguments = (half(64, 128), labels, lse, torch.zeros(128, 64, dtype=E5M2))
    assert compiled(softmax.softmax_gradient_op, *arguments) == ["_softmax_gradient_kernel"]


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a build of torch for CUDA, though no GPU")
@pytest.mark.parametrize("grad", [False, True])
def test_operators_take_cuda_tensors(grad, monkeypatch):
    """Dispatch, schemas and shapes, as torch has them for CUDA: what torch 2.11 refuses, it refuses here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="cuda")

    bf16 = torch.bfloat16
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        for kind in activation.KINDS:
            h = zeros(64, 512 if kind == "swiglu" else 256, dtype=bf16)
            alphas = zeros(2) if kind == "xielu" else None
            assert activation.activate(h, alphas, zeros(), zeros(), kind, True).shape == (64, 256)
            dz = zeros(64, 256, dtype=bf16)
            found = activation.activate_backward(dz, h, alphas, zeros(), zeros(), zeros(), kind, E5M2, True)
            assert [t.shape for t in found[:3]] == [h.shape, h.shape[::-1], (256, 64)]
        found = activation.activate_backward(
            dz, zeros(64, 512, dtype=bf16), None, zeros(), zeros(), zeros(), "swiglu", E5M2, True, zeros(256), zeros(256)
        )  # fmt: skip
        assert found[2].shape == (256, 64)
        q, qt = cast.cast(zeros(64, 96, dtype=bf16), zeros(), zeros(), E4M3, True, True, True)
        assert (q.shape, qt.shape) == ((64, 96), (96, 64))
        matrices = [zeros(64, 96, dtype=bf16), zeros(32, 96, dtype=bf16)]
        assert cast.cast_joined(matrices, zeros(), E4M3, True).shape == (96, 96)
        heads = [zeros(2, 128, n, 64, dtype=bf16).transpose(1, 2) for n in (4, 2, 2)]
        casts = [
            attention.attention_cast(x, zeros(), zeros(), E4M3, True, True, True, i == 1)
            for i, x in enumerate(heads)
        ]
        (q8, q8_t), (k8, k8_t), (v8, v8_t) = casts
        o, shift = attention.attention_forward(q8, k8, v8_t, zeros(), zeros(), zeros(), 0.1, 128)
        do8, do8_t, delta = attention.attention_cast_gradient(o, o, zeros(), zeros(), zeros(), E5M2, True)
        found = attention.attention_backward(
            q8, k8, q8_t, k8_t, v8, do8, do8_t, shift, delta, *(zeros() for _ in range(6)), 0.1, 128, E5M2, True
        )  # fmt: skip
        assert [t.shape for t in found] == [x.shape for x in heads]
        moments.look(zeros(128, 512, dtype=bf16), zeros(2, 4, 8, dtype=torch.float64))
        logits, labels = zeros(64, 128, dtype=bf16), zeros(64, dtype=torch.int64)
        loss.cross_entropy_op(logits, labels, True)
        loss.scale_op(logits, zeros())
        softmax.softmax_gradient_op(logits, labels, zeros(64), zeros(128, 64, dtype=E5M2))
