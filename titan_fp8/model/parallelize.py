"""Activation checkpointing, torch.compile and FSDP2, in this order, on a model that still lies on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra.parallelize import disable_fsdp_gradient_division
from torchtitan.tools.logging import logger

from titan_fp8.device import gloo_safe
from titan_fp8.float8.kernels import attention as _attention  # noqa: F401  (registers the operator named below)

# With [activation_checkpoint] selective_ac_option = "op": results of these operators are kept, the rest is recomputed.
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


def parallelize(model: nn.Module, parallel_dims: Any, job_config: Any) -> nn.Module:
    """torchtitan's TrainSpec.parallelize_fn. Every block is checkpointed, compiled and sharded as a unit."""
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
        layers = model.get_submodule("layers")
        for name, block in layers.named_children():
            layers.register_module(
                name, torch.compile(block, backend=job_config.compile.backend, fullgraph=True)
            )
        logger.info("Compiling each block with torch.compile")
    if parallel_dims.fsdp_enabled:
        names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
        _shard(model, parallel_dims.get_mesh(names), job_config)
        gloo_safe(model)
    return model


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
    if training.enable_cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    reshard = job_config.parallelism.fsdp_reshard_after_forward != "never"
    for block in model.get_submodule("layers").children():
        fully_shard(block, **options, reshard_after_forward=reshard)
    # Embedding, final norm and head stay in the root's group: a tied embedding is used at both ends of the forward.
    fully_shard(model, **options)
    # torchtitan divides the summed loss by the global token count itself.
    disable_fsdp_gradient_division(model)
    logger.info("Applied FSDP2 to the model")
