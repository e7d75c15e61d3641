"""cuDNN's FP8 attention forward: its operator's CPU form, the choice of backends, and on a Hopper GPU cuDNN itself."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import refusal  # pyrefly: ignore
from torch import Tensor

from titan_fp8.float8 import attention
from titan_fp8.float8.attention import Float8Attention, resolve
from titan_fp8.float8.formats import E4M3
from titan_fp8.float8.kernels import attention as ops
from titan_fp8.float8.kernels import attention_cudnn as cudnn
from titan_fp8.float8.scaling import DelayedScaling, Recipe

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SOFTMAX_SCALE = 0.125


def operands(shape=(2, 4, 2, 100, 64), device="cpu", spoil: str = "") -> SimpleNamespace:
    """Unit-normal q, k, v (fresh), cast as training casts them; `spoil` names a tensor that gets a NaN at row 10."""
    b, h, k, s, c = shape
    made = {
        n: torch.randn(b, s, heads, c).bfloat16().to(device) for n, heads in (("q", h), ("k", k), ("v", k))
    }
    x = SimpleNamespace(**{n: t.transpose(1, 2) for n, t in made.items()}, seq_len=s)
    x.scales = [448 / t.float().abs().max() for t in made.values()]
    if spoil:
        getattr(x, spoil)[0, 1, 10, 3] = math.nan
    seen = torch.zeros((), device=device)
    x.q8, _ = ops.attention_cast(x.q, x.scales[0], seen, E4M3, False, True, False, False)
    x.k8, _ = ops.attention_cast(x.k, x.scales[1], seen, E4M3, False, True, False, False)
    x.v8, x.v8_t = ops.attention_cast(x.v, x.scales[2], seen, E4M3, False, True, True, False)
    return x


def both(x: SimpleNamespace) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(o, shift) of cuDNN's operator and of ours."""
    theirs = cudnn.forward(x.q8, x.k8, x.v8, *x.scales, SOFTMAX_SCALE, x.seq_len)
    return theirs, ops.attention_forward(x.q8, x.k8, x.v8_t, *x.scales, SOFTMAX_SCALE, x.seq_len)


def check_against_ours(fp8, device: str, tolerance: float) -> None:
    """O is ours rounded to E4M3 once more. Values spread evenly over a binade have a relative rounding error of
    2^-4 / sqrt(3) / 1.5 = 2.4 % of the norm at most; 1.5 to 2.7 % is what unit-normal v gives (subnormals included)."""
    (o, shift), (ours, our_shift) = both(operands(device=device))
    assert (o.shape, o.stride(), o.dtype) == (ours.shape, ours.stride(), torch.bfloat16)
    assert 0.015 < fp8.relative(o, ours) < tolerance
    torch.testing.assert_close(shift[..., :100], our_shift[..., :100], rtol=0, atol=1e-4)


def test_o_and_shift_are_ours_but_for_the_rounding_of_o(fp8):
    check_against_ours(fp8, "cpu", 0.027)


@pytest.mark.gpu
def test_cudnn_agrees_with_our_kernel(fp8):
    """The online softmax of either rounds P against another maximum: up to 1.5 % more (test_attention_kernels.compare)."""
    pytest.importorskip("cudnn", reason="needs nvidia-cudnn-frontend")
    check_against_ours(fp8, "cuda", 0.035)


@pytest.mark.gpu
@pytest.mark.parametrize("spoil", ["q", "k", "v"])
def test_nan_does_not_vanish_in_cudnn(spoil):
    pytest.importorskip("cudnn", reason="needs nvidia-cudnn-frontend")
    (o, _), _ = both(operands(device="cuda", spoil=spoil))
    heads = slice(1, 2) if spoil == "q" else slice(2, 4)
    rows = slice(10, 11) if spoil == "q" else slice(10, None)
    assert o[0, heads, rows].isnan().any(-1).all()


def test_fake_tensors_and_flops():
    x = operands()
    arguments = (x.q8, x.k8, x.v8, *x.scales, SOFTMAX_SCALE)
    torch.library.opcheck(cudnn.attention_forward_cudnn, arguments, test_utils="test_faketensor")
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        cudnn.attention_forward_cudnn(*arguments)
    assert (
        counter.get_total_flops() == 2 * 2 * 2 * 4 * 128 * 128 * 64
    )  # two GEMMs; 100 rows are padded to 128


def train(forward: str, compiled: bool = False, seed: int = 0) -> list[Tensor]:
    """o, dq, dk, dv of three steps, the calibrating one included."""
    layer = Float8Attention(SOFTMAX_SCALE, Recipe(history=4), True, E4M3, forward, "triton")
    state = DelayedScaling(layer.slots(), layer.recipe)
    state.init_weights()
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    generator, results = torch.Generator().manual_seed(seed), []
    for _ in range(3):
        q, k, v, do = (torch.randn(1, n, 100, 64, generator=generator).bfloat16() for n in (4, 2, 2, 4))
        leaves = [t.requires_grad_() for t in (q, k, v)]
        o = call(*leaves)
        o.backward(do)
        results += [o.detach(), *(t.grad for t in leaves)]
        state.update()
    return results


def test_a_layer_with_cudnn_forward_trains_as_ours_does(fp8):
    """O's rounding (2.6 %) reaches the gradients through delta alone: dv not at all; dq and dk through dS, whose own two
    roundings then need not agree (2.6 % each): 4.5 % in all if dS were nothing but delta."""
    torch._dynamo.reset()
    theirs, ours, compiled = train("cudnn"), train("triton"), train("cudnn", compiled=True)
    for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        assert fp8.relative(a, b) < (0.03, 0.05, 0.05, 1e-3)[i % 4], i
        assert (i % 4 == 3) == torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(compiled, theirs, strict=True))


def test_auto_is_the_reference_on_cpu_and_the_kernels_on_hopper(monkeypatch):
    assert [resolve("auto", which, CPU) for which in ("forward", "backward")] == ["reference"] * 2
    assert resolve("triton", "forward", CPU) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    attention.require_hopper.cache_clear()
    assert [resolve("auto", which, GPU) for which in ("forward", "backward")] == ["triton", "triton"]
    monkeypatch.setattr(cudnn, "library", lambda: None)
    assert resolve("cudnn", "forward", GPU) == "cudnn"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    attention.require_hopper.cache_clear()
    for name in ("auto", "triton", "cudnn"):
        refusal(lambda name=name: resolve(name, "forward", GPU), "Hopper", "8.9", 'attention = "off"')
    assert resolve("reference", "forward", GPU) == "reference"
    attention.require_hopper.cache_clear()


def test_backends_that_do_not_exist_or_do_not_go_together(monkeypatch):
    refusal(
        lambda: resolve("cudnn", "backward", CPU), 'no backward backend "cudnn"', "auto, triton, reference"
    )
    refusal(lambda: resolve("flash", "forward", CPU), "auto, triton, cudnn, reference")
    monkeypatch.setitem(sys.modules, "cudnn", None)
    cudnn.library.cache_clear()
    refusal(cudnn.library, "pip install nvidia-cudnn-frontend")
    recipe = Recipe(history=2)
    refusal(
        lambda: Float8Attention(0.1, recipe, True, E4M3, "cudnn", "reference"),
        'forward "cudnn", backward "reference"',
    )
    refusal(lambda: Float8Attention(0.1, recipe, False, E4M3, "triton", "triton"), 'attention = "full"')
