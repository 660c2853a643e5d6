"""Turns a meta model into a real one, and writes into each rank's part of its parameters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement

from parallelisms.collectives import shard_range

Draw = Callable[[str, tuple[slice, ...]], Tensor]


def materialise(
    model: nn.Module, device: torch.device | str, *, computes_on: torch.device | str | None = None
) -> None:
    """Give the parameters memory on `device`, with undefined values; ties stay ties.

    With CPU offload that is the CPU, and `computes_on` is where the model's arithmetic is done:
    buffers, which a model must hold in memory, are copied there.
    """
    buffers = dict(model.named_buffers())
    assert not any(b.is_meta for b in buffers.values()), "they would hold undefined values"
    ties = tied_names(model)
    model.to_empty(device=torch.device(device))
    for name, buffer in buffers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, buffer.to(computes_on or device))
    for owner, *others in ties:
        for other in others:
            tie(model, owner, other)
    assert tied_names(model) == ties, "tied parameters are one tensor after materialising"


def tie(model: nn.Module, owner: str, other: str) -> None:
    """Make the parameter called `other` the same object as the one called `owner`."""
    parent, _, leaf = other.rpartition(".")
    module = model.get_submodule(parent)
    parameter = model.get_parameter(owner)
    if getattr(module, leaf) is not parameter:
        setattr(module, leaf, parameter)


def tied_names(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the groups of names that share one parameter, in model order."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tuple(group) for group in names.values() if len(group) > 1]


def local_slices(parameter: Tensor) -> tuple[slice, ...]:
    """Return which part of the global tensor this rank holds, one slice a dim.

    A dim that several axes split is cut in the order in which the splits were made: FSDP cuts
    last although its axis comes first, which torch calls a strided shard.
    """
    slices = [slice(0, size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return tuple(slices)
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is part of the parameter's mesh"
    splits = [(axis, p) for axis, p in enumerate(parameter.placements) if not p.is_replicate()]
    splits.sort(key=lambda split: _is_strided(split[1]))
    for axis, placement in splits:
        dim: int = placement.dim  # pyright: ignore[reportAttributeAccessIssue]
        held = slices[dim]
        part = shard_range(held.stop - held.start, mesh.size(axis), coordinate[axis])
        slices[dim] = slice(held.start + part.start, held.start + part.stop)
    return tuple(slices)


def _is_strided(placement: Placement) -> bool:
    return type(placement).__name__ == "_StridedShard"


@torch.no_grad()
def fill(
    model: nn.Module, draw: Draw, *, chosen: Callable[[str], bool] = lambda name: True
) -> None:
    """Set every parameter that is `chosen` from `draw(name, slices)`, called for this rank's part.

    A tied parameter is drawn once, under its first name. `draw` is not called for an empty part.
    """
    for name, parameter in model.named_parameters():
        if not chosen(name):
            continue
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        slices = local_slices(parameter)
        if local.numel():
            values = draw(name, slices)
            assert values.shape == local.shape, f"{name}: {values.shape} for {local.shape}"
            local.copy_(values)
