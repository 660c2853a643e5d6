"""The memory of parameters that are not plain numbers of their dtype: float8 layers, four bits."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from parallelisms.nf4 import NF4Weight, local_part


def stored(tensor: Tensor) -> Tensor:
    """Return the memory of a parameter as a plain tensor, laid out the same.

    For float8 layers that is the weight in full precision; for four bits the packed rows.
    """
    return _with_local(tensor, lambda local: _plain(local, packed=True))


def full_precision(tensor: Tensor) -> Tensor:
    """Return the values of a parameter as a plain tensor, laid out the same; four bits become a
    copy of the parameter's dtype."""
    return _with_local(tensor, lambda local: _plain(local, packed=False))


def _plain(local: Tensor, *, packed: bool) -> Tensor:
    if isinstance(local, NF4Weight):
        return local.packed if packed else local.dequantised()
    fsdp_utils = sys.modules.get("torchao.float8.fsdp_utils")
    if fsdp_utils is not None and isinstance(local, fsdp_utils.WeightWithDynamicFloat8CastTensor):
        return local._tensor  # pyright: ignore[reportAttributeAccessIssue]
    return local


def _with_local(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    local = local_part(tensor)
    changed = change(local)
    if changed is local:
        return tensor
    if not isinstance(tensor, DTensor):
        return changed
    return _laid_out_as(tensor, changed, (*tensor.shape[:-1], changed.shape[-1]))


def _laid_out_as(like: DTensor, local: Tensor, shape: tuple[int, ...]) -> DTensor:
    """Wrap a rank's part of a matrix with as many rows as `like`, and split in the same places."""
    stride = (shape[-1], 1) if len(shape) == 2 else like.stride()
    # Not from_local, which moves memory in the host to the device of the mesh.
    meta = TensorMeta(torch.Size(shape), stride, local.dtype)
    spec = DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta)
    return DTensor(local, spec, requires_grad=False)


def zeros_by_rows(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros laid out as `like`, each row one number for several of its columns.

    ValueError where a rank does not hold whole groups of columns.
    """
    local = local_part(like)
    group = like.shape[-1] // shape[-1]
    if local.shape[-1] % group:
        raise ValueError(
            f"a rank holds {local.shape[-1]} columns of a parameter whose optimizer state was "
            f"saved in groups of {group}: 8-bit state cannot be cut there; keep "
            "parallelism.tensor_parallel_degree, or leave the state out with "
            "checkpoint.exclude_from_loading = ['optimizer']"
        )
    size = (*local.shape[:-1], local.shape[-1] // group)
    zeros = torch.zeros(size, dtype=dtype, device=local.device)
    return _laid_out_as(like, zeros, shape) if isinstance(like, DTensor) else zeros
