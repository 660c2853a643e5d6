"""Adapted linears under tensor parallelism: every part split as what it meets, one reduction.

They compute on local tensors. A parameter that is whole on every rank, but met a share of the
inputs or outputs there, has a gradient that is still to be summed: it leaves as `Partial`, and the
sum is made where FSDP takes the gradient.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel.style import ParallelStyle

from models.plan import Role

Split = Literal["columns", "rows", "whole"]

PLACEMENTS: Mapping[Split, Mapping[str, Placement]] = {
    "columns": {
        "weight": Shard(0),
        "bias": Shard(0),
        "lora_A": Replicate(),
        "lora_B": Shard(0),
        "lora_magnitude_vector": Shard(0),
    },
    "rows": {
        "weight": Shard(1),
        "bias": Replicate(),
        "lora_A": Shard(1),
        "lora_B": Replicate(),
        "lora_magnitude_vector": Replicate(),
    },
    "whole": dict.fromkeys(
        ("weight", "bias", "lora_A", "lora_B", "lora_magnitude_vector"), Replicate()
    ),
}
"""Where each part of an adapted linear lies, by how its base is split."""


class SplitLayout:
    """What one rank sees of an adapted linear: see `models.layers.lora.Layout`."""

    def __init__(self, mesh: DeviceMesh, split: Split) -> None:
        self.mesh = mesh
        self.split: Split = split

    def local(self, part: str, parameter: Tensor) -> Tensor | None:
        """Return this rank's part; the bias of a split sum is added once the sum is whole."""
        if self.split == "rows" and part == "bias":
            return None
        assert isinstance(parameter, DTensor), "the style distributed it"
        is_shared = self.split != "whole" and parameter.placements[0].is_replicate()
        return parameter.to_local(grad_placements=(Partial(),) if is_shared else None)

    def sum_over_inputs(self, partial: Tensor) -> Tensor:
        """Add up over the ranks if they share the inputs."""
        if self.split != "rows":
            return partial
        summed = DTensor.from_local(partial, self.mesh, (Partial(),), run_check=False)
        return summed.redistribute(placements=(Replicate(),)).to_local()


class AdaptedLinear(ParallelStyle):
    """What `columns`, `rows` and `replicated` are for a plain linear, for one with adapters."""

    def __init__(self, split: Split, *, arrives: Placement, leaves: Placement) -> None:
        self.split: Split = split
        self.arrives = arrives
        self.leaves = leaves

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters()):
            path, _, leaf = name.rpartition(".")
            placement = PLACEMENTS[self.split][path.partition(".")[0] or leaf]
            split = distribute_tensor(parameter, device_mesh, (placement,))
            owner = module.get_submodule(path)
            owner.register_parameter(leaf, nn.Parameter(split, parameter.requires_grad))
        adapted: Any = module
        adapted.layout = SplitLayout(device_mesh, self.split)
        module.register_forward_pre_hook(self._enter(device_mesh))
        module.register_forward_hook(self._leave(device_mesh))
        return module

    def _enter(self, mesh: DeviceMesh) -> Any:
        is_split = self.split == "rows"
        # Each rank finds its outputs' share of the gradient; the entrance of the region sums it.
        gradient = (Partial(),) if self.split == "columns" else None

        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, mesh, (_last(self.arrives, x),), run_check=False)
            wanted = Shard(x.ndim - 1) if is_split else Replicate()
            x = x.redistribute(placements=(wanted,))
            return (x.to_local(grad_placements=gradient), *args[1:])

        return enter

    def _leave(self, mesh: DeviceMesh) -> Any:
        found = Partial() if self.split == "rows" else Shard(-1)

        def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if self.split == "whole":
                return output
            whole = DTensor.from_local(output, mesh, (_last(found, output),), run_check=False)
            whole = whole.redistribute(placements=(_last(self.leaves, output),)).to_local()
            bias = module.bias if self.split == "rows" else None
            if bias is None:
                return whole
            assert isinstance(bias, DTensor), "the style distributed it"
            shares_tokens = not self.leaves.is_replicate()
            return whole + bias.to_local(grad_placements=(Partial(),) if shares_tokens else None)

        return leave


def _last(placement: Placement, tensor: Tensor) -> Placement:
    """Return the placement with -1 as the number of the last dim."""
    return Shard(tensor.ndim - 1) if placement == Shard(-1) else placement


def adapted_styles(tokens: Placement) -> dict[Role, ParallelStyle]:
    """Return the style of an adapted linear by the role of its base.

    `tokens` is where they are between blocks.
    """
    columns, whole = Shard(-1), Replicate()
    return {
        "columns": AdaptedLinear("columns", arrives=whole, leaves=columns),
        "columns_whole": AdaptedLinear("columns", arrives=whole, leaves=whole),
        "rows": AdaptedLinear("rows", arrives=columns, leaves=tokens),
        "rows_whole": AdaptedLinear("rows", arrives=whole, leaves=tokens),
        "replicated": AdaptedLinear("whole", arrives=whole, leaves=whole),
    }


@torch.no_grad()
def local_row_lengths(weight: Tensor) -> Tensor:
    """Return the length of each whole row of which this rank holds a part, on its device.

    Summed in float64, so that layouts differ by a rounding at most. Every rank must call this.
    """
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    squares = torch.linalg.vector_norm(local, dim=1, dtype=torch.float64).square()
    if isinstance(weight, DTensor):
        mesh = weight.device_mesh
        for axis, placement in enumerate(weight.placements):
            if placement.is_shard(1):
                squares = _sum_over(squares.to(mesh.device_type), mesh, axis).to(local.device)
    return squares.sqrt().float()


def _sum_over(partial: Tensor, mesh: DeviceMesh, axis: int) -> Tensor:
    torch.distributed.all_reduce(partial, group=mesh.get_group(axis))
    return partial
