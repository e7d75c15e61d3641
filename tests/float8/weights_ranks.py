"""Run by test_weights.py under torchrun on three ranks, which cannot share 64 rows evenly. Each rank prints "ok"."""

from __future__ import annotations

import gc
import os
import weakref
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.distributed as dist

from titan_fp8 import device

device.install()  # before anything of torchtitan is imported

from torch import Tensor, nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torchtitan.config.job_config import ActivationCheckpoint  # noqa: E402

from titan_fp8.checkpoint import _unwrapped  # noqa: E402
from titan_fp8.config import Architecture, Fp8  # noqa: E402
from titan_fp8.float8.convert import convert, scaling_state  # noqa: E402
from titan_fp8.float8.weights import ShardedWeight  # noqa: E402
from titan_fp8.model.args import DecoderArgs  # noqa: E402
from titan_fp8.model.decoder import Decoder  # noqa: E402
from titan_fp8.model.parallelize import parallelize  # noqa: E402


class GatheredBytes(TorchDispatchMode):
    """Bytes that arrive by all-gathers, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.c10d._allgather_base_.default:
            self.bytes[args[0].dtype] += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def build(gather: str, compile: bool, checkpointing: str, smooth: bool) -> nn.Module:
    config = SimpleNamespace(
        activation_checkpoint=ActivationCheckpoint(mode=checkpointing),
        compile=SimpleNamespace(enable=compile, components=["model"], backend="aot_eager"),
        job=SimpleNamespace(dump_folder="."),
        training=SimpleNamespace(mixed_precision_param="bfloat16", mixed_precision_reduce="float32"),
        parallelism=SimpleNamespace(fsdp_reshard_after_forward="default"),
    )
    args = DecoderArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, seq_len=16)
    if smooth:
        args.apply(Architecture(preset="llama", activation="smooth_swiglu", vocab_size=96))
    else:
        args.apply(Architecture(preset="fog_max", vocab_size=96))
    with torch.device("meta"):
        model = Decoder(args)
        convert(model, Fp8(attention="full", amax_history=4, all_gather=gather), sharded=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    dims = SimpleNamespace(
        fsdp_enabled=True, tp_enabled=False, dp_replicate_enabled=False, get_mesh=lambda _: mesh
    )
    model = parallelize(model, dims, config)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    return model


def train(
    gather: str, compile: bool = False, checkpointing: str = "none", smooth: bool = False
) -> tuple[list[Tensor], Counter, nn.Module]:
    """(loss of three steps, all weights and the FP8 state at the end), bytes gathered, the model."""
    model = build(gather, compile, checkpointing, smooth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(dist.get_rank())
    seen, counted = [], GatheredBytes()
    for _ in range(3):
        tokens = torch.randint(0, 96, (2, 17), generator=generator)
        with nullcontext() if compile else counted:  # dynamo takes no dispatch mode
            loss = model(tokens[:, :-1], tokens[:, 1:]) / 100
            loss.backward()
        optimizer.step()
        scaling_state(model).update()
        optimizer.zero_grad()
        seen.append(loss.detach())
    seen += [p.full_tensor() for p in model.parameters()]
    return seen + list(scaling_state(model).state_dict().values()), counted.bytes, model


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def main() -> None:
    fp8, bytes_fp8, model = train("fp8")
    bf16, bytes_bf16, _ = train("bf16")
    assert all(t.isfinite().all() for t in fp8) and fp8[0] != fp8[2]
    assert equal(fp8, bf16), "E4M3 of a gathered bf16 weight is the gathered E4M3"
    compiled, _, gone = train("fp8", compile=True)
    assert equal(fp8, compiled) and equal(fp8, train("fp8", checkpointing="full")[0])

    # Nothing keeps a model that is not needed any more: neither FSDP2 nor the scales' slots.
    gone = weakref.ref(gone)
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None

    # Smooth-SwiGLU: w2 travels divided by its features' scales.
    smooth, _, model_smooth = train("fp8", smooth=True)
    assert scaling_state(model_smooth).channel_amax.all()
    assert equal(smooth, train("bf16", smooth=True)[0])
    assert equal(smooth, train("fp8", compile=True, checkpointing="full", smooth=True)[0])

    # A block's converted weights are all of it but norms and two scalars; embedding and head stay in bf16.
    blocks = bytes_fp8[torch.uint8]
    assert blocks and 0.5 <= blocks / (bytes_bf16.total() - bytes_fp8[torch.bfloat16]) < 0.52, (
        bytes_fp8,
        bytes_bf16,
    )

    state = scaling_state(model)
    everyone = [torch.empty_like(state.scale) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, state.scale)
    assert all(torch.equal(scale, state.scale) for scale in everyone)

    weights = model.state_dict()
    wrapped = {
        n for n, w in weights.items() if isinstance(w, DTensor) and isinstance(w._local_tensor, ShardedWeight)
    }
    assert len(wrapped) == 2 * 6
    for name, saved in _unwrapped(weights).items():
        local = saved._local_tensor if isinstance(saved, DTensor) else saved
        assert type(local) in (Tensor, nn.Parameter), name
        if name in wrapped:
            assert local.data_ptr() == weights[name]._local_tensor.rows.data_ptr()
            assert torch.equal(saved.full_tensor(), weights[name].full_tensor())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.barrier()
    print("ok", flush=True)
    # Not through Python's shutdown: gloo's threads may hold tensors then, and torch, rarely, aborts.
    os._exit(0)
