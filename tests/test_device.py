"""torchtitan on CPU: what it asks of the device module, and the wall against importing it too early."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
import torch
import torch._utils as torch_utils
from torch import nn

from titan_fp8 import device

on_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has an accelerator: nothing to install"
)


@on_cpu
def test_torchtitan_sees_the_cpu_and_torch_the_truth():
    assert device.install() and device.install(), "installing twice is allowed"
    from torchtitan.tools import utils

    assert device.device_kind() == utils.device_type == "cpu"
    assert torch_utils._get_available_device_type() is None, "torch's own answer must be back"
    assert torch_utils._get_device_module("cpu") is torch.cpu
    assert utils.device_module is not torch.cpu
    assert utils.device_module.current_stream() == torch.cpu.current_stream(), "the rest is torch.cpu's"


@on_cpu
def test_too_late_is_refused(monkeypatch):
    from torchtitan.tools import utils

    monkeypatch.setattr(utils, "device_module", torch.cuda)  # as if imported before install()
    with pytest.raises(RuntimeError, match=r"install\(\) must run before"):
        device.install()


@on_cpu
def test_metrics_get_memory_and_no_peak_flops(capfd):
    from torchtitan.components.metrics import build_device_memory_monitor
    from torchtitan.tools import utils

    monitor = build_device_memory_monitor()
    monitor.reset_peak_stats()
    before = monitor.get_peak_stats().max_reserved_gib
    block = torch.ones(2**26)  # 256 MiB
    del block
    grown = monitor.get_peak_stats().max_reserved_gib - before
    assert 0.2 < grown < 0.3
    monitor.reset_peak_stats()
    assert monitor.get_peak_stats().max_reserved_gib < before + 0.1, "a reset forgets the block"
    assert 0 < monitor.get_peak_stats().max_reserved_pct < 100
    peak = utils.get_peak_flops(monitor.device_name)
    assert math.isinf(peak) and 1e12 / peak == 0
    assert "lspci" not in "".join(capfd.readouterr())


@on_cpu
def test_no_proc_no_peak(monkeypatch):
    def refuse(*args, **kwargs):
        raise FileNotFoundError("/proc")

    monkeypatch.setattr("builtins.open", refuse)
    device.reset_peak_memory()
    assert device.peak_memory() is None
    assert device._memory_stats() == {"num_alloc_retries": 0, "num_ooms": 0}


@on_cpu
def test_torchtitan_sets_timeouts_seeds_and_precision(gloo, recwarn):
    from torchtitan.config import Debug
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed import utils as dist_utils

    device.install()  # again: pytest has put its own warning filters over ours
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    dist_utils.set_pg_timeouts(timedelta(seconds=60), dims)  # a barrier with device_ids
    with torch.random.fork_rng():
        dist_utils.set_determinism(dims, torch.device("cpu:0"), Debug(seed=7), ["pp"])
        first = torch.rand(3)
        torch.manual_seed(7)
        assert torch.equal(first, torch.rand(3))
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        with dist_utils.maybe_enable_amp(dims, precision, "cpu"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert not [str(warning.message) for warning in recwarn]


def test_gloo_safe_reaches_every_fsdp_module(gloo):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU())
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    forced = []
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms = forced.append
    assert device.gloo_safe(model) is model
    assert forced == [True, True]


def test_quick_launches_are_settings_that_this_torch_has():
    from torch._inductor import config

    names = ("size_asserts", "alignment_asserts")
    with config.patch(dict.fromkeys(names)):
        device.launch_quickly()
        assert [getattr(config, name) for name in names] == [False, False]
