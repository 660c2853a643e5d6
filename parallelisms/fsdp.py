"""FSDP2, HSDP and pure replication: one path for every layout, and with it for every dtype.

Even one rank goes through `fully_shard`, so compute, master and reduction dtypes are the same
code everywhere.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from parallelisms.copy_engine import gather_by_copy_engine
from parallelisms.resolve import ResolvedPlan

Reshard = Literal["default", "always", "never"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """The dtypes of a run, and where the master parameters live."""

    param_dtype: torch.dtype = torch.bfloat16
    """Dtype of gathered parameters, and so of activations."""

    reduce_dtype: torch.dtype = torch.float32
    """Dtype in which gradients are added over ranks."""

    master_dtype: torch.dtype = torch.float32
    """Dtype of the parameters and optimizer states that each rank keeps."""

    frozen_dtype: torch.dtype | None = None
    """Dtype of parameters of the base that are not trained; None: `master_dtype`."""

    cpu_offload: bool = False
    """Keep master parameters, gradients and optimizer states in host memory."""

    def stored(self, keeps_bits: bool) -> torch.dtype:
        """Return the dtype in which each rank keeps a parameter: trained and adapters', or not."""
        return self.master_dtype if keeps_bits else self.frozen_dtype or self.master_dtype

    def describe(self) -> str:
        """Return the dtypes in one line for the log."""
        names = {
            "compute": self.param_dtype,
            "master": self.master_dtype,
            "reduce": self.reduce_dtype,
        }
        if self.frozen_dtype is not None:
            names["frozen"] = self.frozen_dtype
        text = ", ".join(f"{k} {str(v).removeprefix('torch.')}" for k, v in names.items())
        return text + (", masters in host memory" if self.cpu_offload else "")


def apply_fsdp(
    model: nn.Module,
    plan: ResolvedPlan,
    mesh: DeviceMesh,
    *,
    precision: PrecisionConfig,
    reshard: Reshard,
    copy_engine: bool = False,
) -> None:
    """Shard parameters over the last axis of `mesh`, and replicate over the first if it has two.

    Units are each module of `first`, each block, `last` together, and the model for what is left.
    Gradients are added, never averaged: the loss is already divided by global counts. With
    `copy_engine` no multiprocessor takes part in gathering.
    """
    # Nothing is cast on the way in: cos and sin must reach a block in fp32.
    precision_policy = MixedPrecisionPolicy(
        param_dtype=precision.param_dtype,
        reduce_dtype=precision.reduce_dtype,
        cast_forward_inputs=False,
    )
    whole = _whole_frozen(model, mesh, precision)
    offload = OffloadPolicy()
    if precision.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())

    def shard(unit: nn.Module | list[nn.Module], *, reshard_after_forward: bool) -> None:
        fully_shard(
            unit,  # pyright: ignore[reportArgumentType]
            mesh=mesh,
            mp_policy=precision_policy,
            offload_policy=offload,
            reshard_after_forward=reshard_after_forward,
            ignored_params=whole,
        )

    tied = {name.rpartition(".")[0] for pair in plan.tied for name in pair}
    for name in (*plan.first, *plan.blocks):
        if name not in tied:
            shard(model.get_submodule(name), reshard_after_forward=reshard != "never")
    # The last unit is needed again as soon as the backward starts, so it stays gathered. Tied
    # modules run first and last, so they belong to the model's own unit, which does the same.
    for name in plan.last:
        model.get_submodule(name).register_forward_hook(_leave_no_view)
    if plan.last and not tied:
        last = [model.get_submodule(name) for name in plan.last]
        shard(last if len(last) > 1 else last[0], reshard_after_forward=reshard == "always")
    shard(model, reshard_after_forward=False)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in units:
        _sum_gradients(module, mesh)
    if copy_engine and mesh.size(-1) > 1:
        gather_by_copy_engine(units, mesh)


def reshard(model: nn.Module) -> None:
    """Free what the last forward pass left gathered, where no backward pass will.

    The next one gathers again. Every rank may call this alone.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _whole_frozen(
    model: nn.Module, mesh: DeviceMesh, precision: PrecisionConfig
) -> set[nn.Parameter]:
    """Return the frozen parameters that each rank holds whole and in the dtype that computes.

    FSDP2 would copy them in every pass, even on a mesh of one.
    """
    if mesh.size(-1) > 1 or precision.cpu_offload:
        return set()
    return {
        parameter
        for parameter in model.parameters()
        if not parameter.requires_grad
        and parameter.dtype == precision.param_dtype
        and not hasattr(getattr(parameter, "_local_tensor", parameter), "fsdp_pre_all_gather")
    }


def _leave_no_view(module: nn.Module, args: Any, output: Any) -> Any:
    # FSDP hooks the gradient of what leaves a unit, and warns on every rank that an in-place
    # change of a view would drop the hook; log-probabilities are few, so copy them.
    is_view = isinstance(output, Tensor) and output._base is not None
    return output.clone() if is_view else output


def _sum_gradients(module: FSDPModule, mesh: DeviceMesh) -> None:
    # gloo has no scaled sum, and NCCL needs none: a plain sum is what is wanted.
    module.set_force_sum_reduction_for_comms(True)
    if mesh.size() > 1:  # on one rank the default divides by one, without touching the tensor
        module.set_gradient_divide_factor(1.0)
