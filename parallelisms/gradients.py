"""The global norm of gradients that lie on several meshes, and their clipping by it."""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the global norm of all gradients, a plain fp32 scalar, equal on every rank.

    Parameters may lie on different meshes, split or replicated. Every rank must call this with
    the same parameters; nothing waits for the device.
    """
    by_groups: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    groups: dict[str, dist.ProcessGroup] = {}
    device = torch.device("cpu")
    for gradient in _gradients(parameters):
        names = []
        device = gradient.device
        if isinstance(gradient, DTensor):
            device = torch.device(gradient.device_mesh.device_type)
            for axis, placement in enumerate(gradient.placements):
                assert not placement.is_partial(), "gradients are reduced when backward is over"
                if not placement.is_replicate():
                    group = gradient.device_mesh.get_group(axis)
                    groups[group.group_name] = group
                    names.append(group.group_name)
        by_groups[tuple(names)].append(_local(gradient))

    total = torch.zeros((), dtype=torch.float32, device=device)
    for names, parts in by_groups.items():
        norms = torch._foreach_norm([part for part in parts if part.numel()], dtype=torch.float32)
        squares = torch.stack(norms).square().sum().to(device) if norms else total.new_zeros(())
        for name in names:
            dist.all_reduce(squares, group=groups[name])
        total = total + squares
    return total.sqrt()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return what gradients of this global norm are to be multiplied by: at most one, fp32.

    A norm that is not finite scales nothing, so that the parameters it came from can be named.
    """
    return (max_norm / (norm + 1e-6)).clamp(max=1.0).where(norm.isfinite(), 1.0)


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiply all gradients by a scalar, in place."""
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for gradient in _gradients(parameters):
        by_device[_local(gradient).device].append(_local(gradient))
    for device, parts in by_device.items():
        torch._foreach_mul_(parts, factor.to(device))


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
