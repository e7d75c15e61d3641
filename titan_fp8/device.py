"""Lets torchtitan 0.2.2 run where there is no accelerator: CPU tensors, gloo collectives.

torchtitan asks torch for "the" accelerator once, while `torchtitan.tools.utils` is imported, and keeps the
answer: a name ("cuda") and a module shaped like `torch.cuda`. Without an accelerator it assumes CUDA and
fails at the first call. `install` answers "cpu" during that one import, with a module that has the calls
torchtitan makes. It puts torch's own functions back afterwards: torch's checkpointing asks the same question
and must get the truth.

With an accelerator all of this does nothing. Nothing of torchtitan may be imported before `install`.

`launch_quickly` is for where there is one.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch._utils as torch_utils

if TYPE_CHECKING:
    from torch import nn

_CPU_MODULE_NAME = "titan_fp8.cpu_device"
# These two log a warning at import on every rank of every run, about things nobody here can change.
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree")


def device_kind() -> str:
    """The device type torchtitan will use: "cuda", another accelerator's name, or "cpu"."""
    return torch_utils._get_available_device_type() or "cpu"


def launch_quickly() -> None:
    """Settings of torch.compile for the whole process, before it compiles: less host time around each launch.

    What generated code allocates is not checked for the sizes and alignment it was just given. Results are the same.
    """
    from torch._inductor import config

    config.size_asserts = config.alignment_asserts = False


def install() -> bool:
    """Make torchtitan see the device "cpu" if this machine has no accelerator.

    Call it before anything of torchtitan is imported. Imports `torchtitan.tools.utils` on
    CPU only. Calling it again changes nothing.
    Returns True if torchtitan runs on CPU, False if it runs on an accelerator.
    Raises RuntimeError (a developer's error) if torchtitan had already made up its mind.
    """
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if device_kind() != "cpu":
        return False
    utils = sys.modules.get("torchtitan.tools.utils")
    if utils is None:
        utils = _import_as_cpu()
    elif getattr(utils.device_module, "__name__", "") != _CPU_MODULE_NAME:
        raise RuntimeError(
            "titan_fp8.device.install() must run before torchtitan.tools.utils is imported, "
            "but it is imported already: move the call, or the import, in the entry point"
        )
    # torchtitan would run `lspci`, then assume an A100. A CPU has no peak worth naming: call it infinite, and
    # MFU is 0.
    utils.get_peak_flops = lambda device_name: float("inf")
    # Both are torch telling us that we are on CPU.
    warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype is not supported")
    warnings.filterwarnings("ignore", message=r"DTensor (random operators|manual_seed\(\)) may not")
    return True


def gloo_safe(model: nn.Module) -> nn.Module:
    """Let FSDP2 reduce the gradients of `model` by plain sums, in place; returns the same module.

    FSDP2 otherwise divides inside the reduction (PREMUL_SUM), which gloo does not have.
    Call after `fully_shard`.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    return model


def _import_as_cpu() -> types.ModuleType:
    """Import `torchtitan.tools.utils` while torch says that the accelerator is a CPU."""
    cpu = _cpu_module()
    which, module_of = torch_utils._get_available_device_type, torch_utils._get_device_module
    torch_utils._get_available_device_type = lambda: "cpu"
    torch_utils._get_device_module = lambda kind: cpu if kind == "cpu" else module_of(kind)
    try:
        import torchtitan.tools.utils as utils
    finally:
        torch_utils._get_available_device_type, torch_utils._get_device_module = which, module_of
    return utils


def _cpu_module() -> types.ModuleType:
    """`torch.cpu` plus the calls of `torch.cuda` that torchtitan makes and `torch.cpu` lacks."""
    module = types.ModuleType(_CPU_MODULE_NAME, "torch.cpu, completed for torchtitan")
    for name in dir(torch.cpu):
        if not name.startswith("_"):
            setattr(module, name, getattr(torch.cpu, name))

    def ignore(device: Any = None) -> None:
        """Nothing to set, wait for or give back on a CPU."""

    additions: dict[str, Any] = {
        "set_device": ignore,  # rank 1 says "cpu:1", which is harmless
        "synchronize": ignore,
        "empty_cache": ignore,
        "current_device": lambda: 0,  # torch.cpu says "cpu"; barrier(device_ids=...) wants a number
        "get_device_name": lambda device=None: f"CPU ({platform.machine()})",
        "get_device_properties": lambda device=None: types.SimpleNamespace(total_memory=total_memory()),
        "memory_stats": lambda device=None: _memory_stats(),
        "reset_peak_memory_stats": lambda device=None: reset_peak_memory(),
    }
    for name, value in additions.items():
        setattr(module, name, value)
    return module


def total_memory() -> int:
    """Physical memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> int | None:
    """Most memory this process held since `reset_peak_memory`, in bytes; None where /proc does not tell."""
    try:
        with open("/proc/self/status") as status:
            found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def reset_peak_memory() -> None:
    """Start measuring `peak_memory` anew, where the system allows it."""
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")  # 5: set the high-water mark to the present size
    except OSError:
        pass


def _memory_stats() -> dict[str, int]:
    """The keys torchtitan reads. Without a peak they are left out; torchtitan then reports a negative one."""
    stats = {"num_alloc_retries": 0, "num_ooms": 0}
    peak = peak_memory()
    if peak is not None:
        stats |= {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}
    return stats
