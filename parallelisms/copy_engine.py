"""FSDP's all-gather by copy engines: no kernel of it takes multiprocessors from the model.

NCCL (2.28 and later) moves a collective so where its communicator prefers that and the buffer is
symmetric, at the same place of every rank's window; FSDP2 takes both through its interface for
collectives of one's own. From torch 2.13 on FSDP2 can do it alone (`set_symm_mem_for_comm`), and
scatters so too: then this file is of no more use.
"""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import nccl
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

LEAST_NCCL = (2, 28)

NO_MULTIPROCESSORS = "2"
"""NCCL_CTA_POLICY_ZERO. What lies in no symmetric memory is moved by kernels as before."""


def unsupported_reason() -> str | None:
    """Say why copy engines cannot gather here; None where they can."""
    if not torch.cuda.is_available():
        return "it needs CUDA devices"
    if (found := nccl.version()) < LEAST_NCCL:
        return f"it needs NCCL {'.'.join(map(str, LEAST_NCCL))}, and torch has {found}"
    return None


def prefer_copy_engines() -> None:
    """Let NCCL's communicators of this process, which must not exist yet, take copy engines.

    A policy that the user's environment names stands.
    """
    os.environ.setdefault("NCCL_CTA_POLICY", NO_MULTIPROCESSORS)


class CopyEngineAllGather:
    """All-gather into symmetric memory, of the group that it is made for.

    It has the methods of FSDP2's `AllGather`, which torch exports from no public module.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group_name = group.group_name

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return a buffer from the pool of symmetric memory, which keeps and reuses its windows."""
        from torch.distributed._symmetric_memory import get_mem_pool

        with torch.cuda.use_mem_pool(get_mem_pool(device)):
            return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Gather `input_tensor`, this rank's part of `output_tensor`, from every rank."""
        from torch.distributed._symmetric_memory import rendezvous

        rendezvous(output_tensor, self.group_name)
        return dist.all_gather_into_tensor(
            output_tensor, input_tensor, group=group, async_op=async_op
        )


def gather_by_copy_engine(modules: Sequence[FSDPModule], mesh: DeviceMesh) -> None:
    """Let units of FSDP gather so over the last axis of `mesh`; every rank must call this."""
    from torch.distributed._symmetric_memory import set_backend

    group = mesh.get_group(mesh.ndim - 1)
    set_backend("NCCL")
    dist.barrier(group=group, device_ids=[torch.cuda.current_device()])  # makes the communicator
    for module in modules:
        module.set_custom_all_gather(CopyEngineAllGather(group))  # pyright: ignore[reportArgumentType]
