"""Activation checkpointing and torch.compile must not change a number, FP8 state included; FSDP2 shards by block."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import needs_scaled_mm
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from titan_fp8.config import Fp8
from titan_fp8.float8.convert import scaling_state
from titan_fp8.model.parallelize import parallelize

FP8 = Fp8(recipe="delayed", attention="full", amax_history=4)
LINEARS = 2 * 4  # qkv, o, up, down
NO_FSDP = SimpleNamespace(fsdp_enabled=False, tp_enabled=False)


def config(
    mode: str = "none", option: str = "op", compile: bool = False, reshard: str = "default"
) -> SimpleNamespace:
    """What parallelize reads of a job's configuration."""
    from torchtitan.config.job_config import ActivationCheckpoint

    return SimpleNamespace(
        activation_checkpoint=ActivationCheckpoint(mode=mode, selective_ac_option=option),
        compile=SimpleNamespace(enable=compile, components=["model", "loss"], backend="aot_eager"),
        job=SimpleNamespace(dump_folder="."),
        training=SimpleNamespace(mixed_precision_param="float32", mixed_precision_reduce="float32"),
        parallelism=SimpleNamespace(fsdp_reshard_after_forward=reshard),
    )


class CountGemms(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self):
        super().__init__()
        self.ran = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran[func] += 1
        return func(*args, **(kwargs or {}))


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def train(model, tokens: Tensor, steps: int = 3, after_step=lambda step: None) -> list[list[Tensor]]:
    """Plain gradient descent, two micro-batches a step. Per step: loss, every gradient, the amax history and scales."""
    seen = []
    state = scaling_state(model)
    for step in range(steps):
        losses = []
        for microbatch in range(2):
            inputs = (tokens * (step + 3) + microbatch) % 96
            loss = model(inputs, inputs.roll(-1, 1)) / inputs.numel()
            loss.backward()
            losses.append(loss.detach())
        state.update()
        grads = [whole(p.grad) for p in model.parameters()]
        seen.append([*losses, *grads, state.history.clone(), state.scale.clone(), state.saturation.clone()])
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
                p.grad = None
        after_step(step)
    return seen


def equal(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


@pytest.fixture(scope="module")
def build(make_args, make_model):
    def build(job_config, dims=NO_FSDP, fp8: Fp8 = FP8):
        return make_model(make_args(), fp8=fp8, wrap=lambda m: parallelize(m, dims, job_config))

    return build


@pytest.fixture(scope="module")
def plain(build, tokens):
    """What training without checkpointing and compile gives."""
    seen = train(build(config()), tokens)
    # Were it all zeros, or the same every step, equality would prove nothing.
    assert all(t.isfinite().all() and t.any() for t in seen[-1]) and (seen[-1][-3][:3] > 0).all()
    assert not torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[1][-2], seen[2][-2])
    return seen


@needs_scaled_mm
@pytest.mark.parametrize(
    ("mode", "option", "recomputed_layers", "fp8_gemms_per_linear"),
    # Full recomputation repeats the forward GEMM; "op" keeps its result; "2" checkpoints every second layer.
    [("none", "op", 0, 3), ("full", "op", 2, 4), ("selective", "op", 2, 3), ("selective", "2", 1, 3.5)],
)
def test_checkpointing_changes_no_bit(
    mode, option, recomputed_layers, fp8_gemms_per_linear, build, plain, tokens, monkeypatch
):
    from torchtitan.distributed import activation_checkpoint

    monkeypatch.setattr(activation_checkpoint, "_layer_sac_count", 0)  # it counts on from model to model
    model = build(config(mode, option))
    assert equal(train(model, tokens), plain)

    calls = Counter()
    for name, module in model.named_modules():
        if name.endswith("attention.wqkv"):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    with CountGemms() as gemms:
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert len(calls) == 2 and calls.total() == 2 + recomputed_layers
    assert gemms.ran[torch.ops.aten._scaled_mm.default] == fp8_gemms_per_linear * LINEARS


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_compiled_blocks_train_alike_and_compile_twice(mode, build, plain, tokens):
    """Two graphs for all layers: the first step takes scales from its own tensors, later steps from earlier ones."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []

    def count(step: int) -> None:
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    model = build(config(mode, compile=True))
    assert all(type(block).__name__ == "OptimizedModule" for block in model.layers.values())
    compiled = train(model, tokens, after_step=count)
    assert graphs == [1, 2, 2]
    for ours, expected in zip(compiled, plain, strict=True):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(model, tokens, steps=2)


@pytest.mark.parametrize("reshard", ["default", "never"])
def test_fsdp_shards_blocks_and_changes_nothing(reshard, gloo, build, plain, tokens):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
    dims = SimpleNamespace(
        fsdp_enabled=True, tp_enabled=False, dp_replicate_enabled=False, get_mesh=lambda names: mesh
    )
    model = build(config("full", reshard=reshard), dims)
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    assert units == ["", "layers.0", "layers.1"]
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert equal(train(model, tokens), plain)
    model(tokens)  # for backward blocks are still there, or gathered again
    assert {isinstance(p, DTensor) for p in model.layers.parameters()} == {reshard == "default"}
