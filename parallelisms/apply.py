"""`parallelize`: the one place that fixes the order in which a plan's parallelisms are applied."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from models.plan import ModelPlan
from parallelisms.activation_checkpoint import (
    ActivationCheckpointConfig,
    checkpointed,
    set_memory_budget,
)
from parallelisms.compile import (
    CompileConfig,
    compile_loss,
    compiled,
    overlap_tensor_parallel,
)
from parallelisms.context import apply_context
from parallelisms.copy_engine import unsupported_reason
from parallelisms.freeze import trainable_names
from parallelisms.fsdp import PrecisionConfig, apply_fsdp
from parallelisms.low_precision import Float8, convert_linears
from parallelisms.materialise import tie
from parallelisms.mesh import ParallelConfig, ParallelDims
from parallelisms.nf4 import first_reasons, pack_frozen
from parallelisms.resolve import ResolvedPlan, resolve
from parallelisms.tensor import apply_tensor

log = logging.getLogger("tessera")


def parallelize(
    model: nn.Module,
    plan: ModelPlan,
    dims: ParallelDims,
    *,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    activation_checkpoint: ActivationCheckpointConfig,
    compile: CompileConfig,
    frozen: Sequence[str] = (),
    float8: Float8 | None = None,
    packs_frozen: bool = False,
) -> ResolvedPlan:
    """Apply every parallelism that the configuration asks for to a meta model, in place.

    `frozen` says what is not trained, as `model.freeze` does; `packs_frozen` keeps the linear
    layers among it in four bits. Every rank must call this with the same arguments; `dims` has
    its meshes.

    The order matters: float8 layers first, whose weights tensor parallelism splits; then that,
    because the others wrap what it makes; ties and frozen parameters after it, because its styles
    undo both; context parallelism before the blocks are compiled, which would not see it later;
    checkpointing before FSDP, so that gathering stays outside the recomputed region; FSDP last,
    because its units are final modules, and packing just before it, which only FSDP knows of.
    """
    check(parallel, activation_checkpoint, compile, dims)
    resolved = resolve(model, plan, dims)
    trainable = trainable_names(model, frozen, resolved.blocks)
    for name, parameter in model.named_parameters():  # buffers, such as angles, stay exact
        # An adapter that is not trained keeps the bits of the file it came from.
        keeps_bits = name in trainable or resolved.is_of_adapter(name)
        parameter.data = parameter.data.to(precision.stored(keeps_bits))
    if float8 is not None:
        left = convert_linears(model, resolved, float8, tp=dims.tp)
        log.info("float8: layers left as they are: %s", first_reasons(left))
    if dims.tp > 1:
        _split_tensors(model, resolved, dims, parallel)
    for owner, other in resolved.tied:
        tie(model, owner, other)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    if dims.cp > 1:
        apply_context(model, resolved, dims, mode=parallel.context_parallel_mode)
    _wrap_blocks(model, resolved, activation_checkpoint, compile)
    if packs_frozen:
        left = pack_frozen(model, resolved, trainable=trainable, num_shards=dims.fsdp_degree)
        log.info("nf4: layers left as they are: %s", first_reasons(left))
    apply_fsdp(
        model,
        resolved,
        dims.mesh("fsdp"),
        precision=precision,
        reshard=parallel.fsdp_reshard_after_forward,
        copy_engine=parallel.fsdp_copy_engine,
    )
    now = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert now == trainable, "parallelisms leave the set of trained parameters as it was"
    return resolved


def _split_tensors(
    model: nn.Module, plan: ResolvedPlan, dims: ParallelDims, parallel: ParallelConfig
) -> None:
    apply_tensor(
        model,
        plan,
        dims.mesh("tp"),
        sequence_parallel=parallel.sequence_parallel,
        loss_parallel=not parallel.disable_loss_parallel,
    )
    if parallel.enable_async_tensor_parallel:
        overlap_tensor_parallel(dims.mesh("tp"))


def check(
    parallel: ParallelConfig,
    activation_checkpoint: ActivationCheckpointConfig,
    compile: CompileConfig,
    dims: ParallelDims,
) -> None:
    """Refuse combinations of these sections that cannot work; needs no model."""
    if activation_checkpoint.mode == "memory_budget" and not compile.compiles("model"):
        raise ValueError(
            'activation_checkpoint.mode = "memory_budget" is a choice of the compiler; set '
            'compile.enable = true with "model" among compile.components, or use mode = "selective"'
        )
    if parallel.fsdp_copy_engine and dims.fsdp_degree > 1 and (lack := unsupported_reason()):
        raise ValueError(
            f"parallelism.fsdp_copy_engine = true cannot work: {lack}; set it to false"
        )
    if not parallel.enable_async_tensor_parallel or dims.tp == 1:
        return
    reason = None
    if not parallel.sequence_parallel:
        reason = "it overlaps the collectives of parallelism.sequence_parallel, which is false"
    elif not (compile.compiles("model") and compile.backend == "inductor"):
        reason = 'the compiler does it: set compile.enable = true, with backend "inductor"'
    elif not torch.cuda.is_available():
        reason = "it needs CUDA devices that reach each other's memory"
    if reason is not None:
        raise ValueError(f"parallelism.enable_async_tensor_parallel = true cannot work: {reason}")


def _wrap_blocks(
    model: nn.Module,
    plan: ResolvedPlan,
    activation_checkpoint: ActivationCheckpointConfig,
    compile: CompileConfig,
) -> None:
    """Replace each block's `forward`, checkpointed and compiled; hooks stay outside of it.

    The head likewise, which checkpoints its own chunks.

    A whole block is checkpointed outside the compiled graph: the other way torch saves the mesh
    of tensor parallelism as if it were a tensor. A choice per operation must be seen by the
    compiler, so there the checkpoint is inside.
    """
    set_memory_budget(activation_checkpoint)
    compiles = compile.compiles("model")
    for number, name in enumerate(plan.blocks):
        block = model.get_submodule(name)
        forward = block.forward
        if compiles and not activation_checkpoint.is_per_operation:
            forward = compiled(forward, compile)
        if activation_checkpoint.covers(number):
            forward = checkpointed(forward, activation_checkpoint, block)
        if compiles and activation_checkpoint.is_per_operation:
            forward = compiled(forward, compile)
        block.forward = forward
    for name, role in plan.roles.items():
        if role == "vocab_columns":
            head: Any = model.get_submodule(name)
            head.recompute_logits = activation_checkpoint.recomputes_logits
            if compile.compiles("loss"):
                compile_loss(head, compile)
