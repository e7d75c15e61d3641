"""Without a GPU: operators take CUDA tensors (fake ones), and the Triton kernels that they launch compile for Hopper."""

from __future__ import annotations

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from titan_fp8 import loss
from titan_fp8.float8.formats import E4M3, E5M2
from titan_fp8.float8.kernels import activation, attention, attention_cast, cast, moments, softmax

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", E4M3: "fp8e4nv", E5M2: "fp8e5", torch.int64: "i64",
}  # fmt: skip


@pytest.fixture
def compiled(launched):
    """compiled(module, operator, *arguments) -> names of the kernels it launches, each compiled for a Hopper GPU."""

    def compiled(module, operator, *arguments) -> list[str]:
        return [build(*launch) for launch in launched(module, operator, *arguments)]

    def build(kernel, args, options) -> str:
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        signature, constants = {}, {}
        for parameter in kernel.params:
            value = values[parameter.name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
            else:
                signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        source = ASTSource(kernel, signature, constexprs=constants)
        found = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": options["num_warps"]}
        )
        assert found.asm["cubin"] and found.metadata.shared <= 232448
        return kernel.__name__

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
        assert compiled(activation, activation.activate_op, *forward) == ["_forward_kernel"]
        backward = (half(64, 256), h, alphas, one(), one(), one(), kind, E5M2, True, channel, channel)
        assert compiled(activation, activation.activate_backward_op, *backward) == ["_backward_kernel"]


def test_casts(compiled):
    for dtype in (E4M3, E5M2):
        assert compiled(cast, cast.cast_op, half(64, 128), one(), one(), dtype, True, True, True) == [
            "_cast_kernel"
        ]
    matrices = [half(64, 128), half(32, 128), half(32, 128)]
    for transposed in (False, True):
        assert compiled(cast, cast.cast_joined_op, matrices, one(), E4M3, transposed) == ["_join_kernel"]
    x, launch = half(2, 4, 128, 64), attention_cast.launch_cast
    for pairs in (False, True):
        assert compiled(attention_cast, launch, x, one(), one(), E4M3, True, True, True, pairs) == [
            "_cast_kernel"
        ]
    gradient = (x, x, one(), one(), one(), E5M2, True, 256.0)
    assert compiled(attention_cast, attention_cast.launch_cast_gradient, *gradient) == [
        "_cast_gradient_kernel"
    ]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("sums", [False, True], ids=["counts", "moments"])
def test_moments(compiled, sums, known):
    x, table = half(1, 2, 64, 1, 512), torch.zeros(2, 4, 8, dtype=torch.float64)
    scale = None if sums and known else one()
    arguments = (x, table, scale, one() if known else None, 448.0, 2.0**-10, sums, known)
    assert compiled(moments, moments.moments_op, *arguments) == ["_moments_kernel"]


def test_loss(compiled):
    labels, lse = torch.zeros(64, dtype=torch.int64), torch.zeros(64)
    arguments = (half(64, 128), labels, lse, torch.zeros(128, 64, dtype=E5M2))
    assert compiled(softmax, softmax.softmax_gradient_op, *arguments) == ["_softmax_gradient_kernel"]


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
