"""Tensor parallel, activation checkpointing, torch.compile and FSDP2, in this order, on a model that still lies on the meta
device."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra.parallelize import disable_fsdp_gradient_division
from torchtitan.tools.logging import logger

from titan_fp8.device import gloo_safe, launch_quickly
from titan_fp8.errors import UserError
from titan_fp8.float8.kernels import attention as _attention  # noqa: F401  (registers the operator named below)
from titan_fp8.tensor_parallel import Ranks, local

# With [activation_checkpoint] selective_ac_option = "op": results of these operators are kept, the rest is recomputed (and
# every second aten.mm, says torchtitan).
KEPT_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.titan_fp8.attention_forward.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch._higher_order_ops.inductor_compiled_code,
}


# Tensor parallel, by the name of the module that owns the weight; every other parameter is on all ranks, whole.
COLUMNS, ROWS = Shard(0), Shard(1)
PLACEMENTS = {
    "tok_embeddings": COLUMNS, "output": COLUMNS, "wq": COLUMNS, "wk": COLUMNS, "wv": COLUMNS, "w1": COLUMNS, "w3": COLUMNS,
    "wo": ROWS, "w2": ROWS,
}  # fmt: skip


def parallelize(model: nn.Module, parallel_dims: Any, job_config: Any) -> nn.Module:
    """torchtitan's TrainSpec.parallelize_fn. Every block is checkpointed, compiled and sharded as a unit.

    Raises UserError if the model cannot be split over as many tensor-parallel ranks.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = Ranks(dist.group.WORLD.group_name, dist.get_world_size(), dist.get_rank())
        for module in model.modules():
            if hasattr(module, "recipe"):
                module.recipe.ranks = everyone
    if parallel_dims.tp_enabled:
        split(model, parallel_dims.get_mesh("tp"), job_config.fp8)
    compiled = job_config.compile.enable and "model" in job_config.compile.components
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compiled,
            op_sac_save_list=KEPT_OPS,
            base_folder=job_config.job.dump_folder,
        )
    if compiled:
        launch_quickly()
        layers = model.get_submodule("layers")
        for name, block in layers.named_children():
            graph = torch.compile(block, backend=job_config.compile.backend, fullgraph=True)
            if parallel_dims.tp_enabled:
                _keep_dtensors_out(graph, block)
            layers.register_module(name, graph)
        logger.info("Compiling each block with torch.compile")
    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        _shard(model, parallel_dims.get_mesh(names), job_config)
        gloo_safe(model)
    return model


def split(model: nn.Module, mesh: Any, fp8: Any) -> None:
    """Tensor parallel over a one-dimensional mesh, in place: parameters become DTensors, modules get their `tp`.

    `fp8`: [fp8] of the configuration. Raises UserError if the model's dimensions do not divide.
    """
    _check_split(model.model_args, mesh.size(), fp8)
    tp = Ranks(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())
    for name, module in model.named_modules():
        placement = PLACEMENTS.get(name.rpartition(".")[2], Replicate())
        for key, parameter in list(module.named_parameters(recurse=False)):
            part = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
            module.register_parameter(key, nn.Parameter(part))
        # A linear has to know only if its outputs are parts of a sum; the others' inputs are gathered by who calls them.
        if hasattr(module, "tp") and (placement == ROWS or not isinstance(module, nn.Linear)):
            module.tp = tp
    logger.info(f"Applied tensor and sequence parallel over {tp.size} ranks")


def _keep_dtensors_out(graph: Any, block: nn.Module) -> None:
    """Let the compiled block see the rank's parts of the parameters. A DTensor brings its device mesh into the graph as an
    input, and torch 2.13 then fails where activations are recomputed."""
    run = graph.forward
    # torch.nn.utils.stateless does the same, and looks at all modules each time: as long as four launches.
    places = [(module._parameters, name) for module in block.modules() for name in module._parameters]

    def forward(*args: Any) -> Any:
        whole = [parameters[name] for parameters, name in places]
        try:
            for (parameters, name), parameter in zip(places, whole, strict=True):
                parameters[name] = None if parameter is None else local(parameter)  # type: ignore
            return run(*args)
        finally:
            for (parameters, name), parameter in zip(places, whole, strict=True):
                parameters[name] = parameter

    graph.forward = forward


def _check_split(args: Any, size: int, fp8: Any) -> None:
    for what, number, width, fp8_gemm in (
        ("heads", args.n_heads, args.head_dim, fp8.recipe != "bf16"),
        ("kv heads", args.n_kv_heads, args.head_dim, fp8.recipe != "bf16"),
        ("hidden size of the feed-forward", args.hidden_dim, 1, fp8.recipe != "bf16"),
        ("vocabulary", args.vocab_size, 1, fp8.lm_head == "fp8"),
    ):
        unit = size * (16 // math.gcd(16, width) if fp8_gemm else 1)
        if number % unit:
            why = f" (FP8 GEMMs need multiples of 16 on each of {size} ranks)" if unit > size else ""
            remedy = "use a smaller degree"
            if what == "vocabulary":
                remedy = f"write [architecture] vocab_size = {-(-number // unit) * unit}"
            raise UserError(
                f"with [parallelism] tensor_parallel_degree {size} the model's {what} must be a multiple of {unit}{why}, "
                f"got {number}: {remedy}"
            )


def _shard(model: nn.Module, mesh: Any, job_config: Any) -> None:
    training = job_config.training
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            # Blocks already get the compute dtype from the embedding; the RoPE tables beside it must stay float32.
            cast_forward_inputs=False,
        ),
    }
    reshard = job_config.parallelism.fsdp_reshard_after_forward != "never"
    for block in model.get_submodule("layers").children():
        fully_shard(block, **options, reshard_after_forward=reshard)
    # Embedding, final norm and head stay in the root's group: a tied embedding is used at both ends of the forward.
    fully_shard(model, **options)
    # torchtitan divides the summed loss by the global token count itself.
    disable_fsdp_gradient_division(model)
    logger.info("Applied FSDP2 to the model")
