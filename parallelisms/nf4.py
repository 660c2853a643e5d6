"""Frozen weights in four bits: NF4 codes with doubly quantised scales, sharded by FSDP2.

A rank keeps its rows in four bits and gathers them so; a unit dequantises what it gathered, for as
long as it is gathered. So blocks, adapters, checkpointing and compilation see plain weights, and
the backward keeps none: it gathers and dequantises again.

Not torchao's NF4Tensor: the mean of its scales is a number of the rank that FSDP2 does not gather,
so shards quantised apart are dequantised wrongly (two whose sizes differ threefold: by twice their
mean size, torchao 0.18); it needs 16,384 weights or a multiple on every rank; made empty on meta it
has no table; its products are hidden from the compiler.

Source: Dettmers et al. 2023, arXiv:2305.14314, section 3 and appendix E.
"""

import math
from collections.abc import Callable, Collection
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from parallelisms.resolve import ResolvedPlan, block_linears

BLOCK = 64
"""Weights of a row that share a scale. Scales are bytes, those of a row share a factor."""

FACTOR_BYTES = 4
_WEIGHTS_AT_ONCE = 1 << 24  # bounds the temporary memory of a conversion to some 200 MB

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Values of the sixteen codes: quantiles of a normal distribution. Source: appendix E."""


def packed_bytes(num_columns: int) -> int:
    """Return the bytes of one packed row: codes, scales, factor."""
    return num_columns // 2 + num_columns // BLOCK + FACTOR_BYTES


@lru_cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the borders between levels, and the two levels of every byte (256, 2)."""
    levels = torch.tensor(LEVELS, device=device)
    codes = torch.arange(256, device=device)
    pairs = torch.stack([levels[codes >> 4], levels[codes & 15]], dim=1)
    return (levels[1:] + levels[:-1]) / 2, pairs


def _by_rows(
    write: Callable[[Tensor, Tensor], None], source: Tensor, target: Tensor, columns: int
) -> None:
    size = max(1, _WEIGHTS_AT_ONCE // columns)
    for part, into in zip(source.split(size), target.split(size), strict=True):
        write(part, into)


def quantise_into(values: Tensor, packed: Tensor) -> None:
    """Write rows of weights as packed rows; a row never depends on another."""
    _by_rows(_quantise_rows, values, packed, values.shape[1])


def _quantise_rows(values: Tensor, packed: Tensor) -> None:
    num_rows, columns = values.shape
    blocks = values.to(packed.device, torch.float32).view(num_rows, -1, BLOCK)
    largest = blocks.abs().amax(dim=2)
    # All scales are positive: unsigned bytes need no mean, which signed ones (section 3) do.
    factor = largest.amax(dim=1, keepdim=True) / 255.0
    scales = (largest / factor).nan_to_num_(0.0).round_().to(torch.uint8)
    borders, _ = _tables(packed.device)
    normal = (blocks / largest.unsqueeze(2)).nan_to_num_(0.0)
    codes = torch.bucketize(normal.view(num_rows, columns), borders, out_int32=True)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed.copy_(torch.cat([pairs, scales, factor.view(torch.uint8)], dim=1))


def dequantise_into(packed: Tensor, values: Tensor) -> None:
    """Write packed rows as weights of the dtype of `values`, each rounded to it once."""
    if not (values.is_cuda and is_fusible()):
        _by_rows(partial(_dequantise_rows, _look_up), packed, values, values.shape[1])
        return
    # One program for each shape of weights, which may be more than the limit.
    with torch._dynamo.utils.disable_cache_limit():
        _dequantise_rows(_fused_look_up(), packed, values)


def _dequantise_rows(look_up: Callable[..., None], packed: Tensor, values: Tensor) -> None:
    columns = values.shape[1]
    codes, scales, factor = packed.split([columns // 2, columns // BLOCK, FACTOR_BYTES], dim=1)
    # A copy, for a view of them may be misaligned.
    factor = factor.clone(memory_format=torch.contiguous_format).view(torch.float32)
    look_up(codes, scales.float() * factor, _tables(packed.device)[1], values)


def _look_up(codes: Tensor, scales: Tensor, pairs: Tensor, values: Tensor) -> None:
    blocks = pairs[codes.int()].view(*scales.shape, BLOCK) * scales.unsqueeze(2)
    values.copy_(blocks.view(values.shape))


@lru_cache
def is_fusible() -> bool:
    """Say whether the compiler can make one kernel of the steps on a GPU."""
    return find_spec("triton") is not None


@lru_cache
def _fused_look_up() -> Callable[..., None]:
    # Step by step it moves 22 bytes of memory a weight, as one kernel 2.5.
    return torch.compile(_look_up, fullgraph=True, dynamic=False)


class NF4Weight(Tensor):
    """A matrix that looks like one of its dtype and keeps packed rows; rows can be sliced.

    Copying into it quantises, so filling it needs the memory of one part at a time. What is
    computed from it is computed from the dequantised values; nothing but a copy changes it.
    """

    packed: Tensor

    @staticmethod
    def __new__(cls, packed: Tensor, shape: torch.Size, dtype: torch.dtype) -> "NF4Weight":
        """Wrap packed rows; `shape` is theirs dequantised, or its flat form."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)
        made.packed = packed
        return made

    def __init__(self, packed: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
        """See `__new__`."""

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"NF4Weight({tuple(self.shape)}, {self.dtype}, {self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.Size, torch.dtype]]:
        return ["packed"], (self.shape, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], context: tuple[torch.Size, torch.dtype], size: Any, stride: Any
    ) -> "NF4Weight":
        return NF4Weight(parts["packed"], *context)

    def dequantised(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weights as a plain tensor."""
        values = torch.empty(
            (self.packed.shape[0], self.numel() // max(self.packed.shape[0], 1)),
            dtype=dtype or self.dtype,
            device=self.device,
        )
        if self.numel():
            dequantise_into(self.packed, values)
        return values.view(self.shape)

    def _with(self, packed: Tensor, *columns: int) -> "NF4Weight":
        columns = columns or tuple(self.shape[1:])
        return NF4Weight(packed, torch.Size((packed.shape[0], *columns)), self.dtype)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OPERATORS:
            return _OPERATORS[func](func, *args, **kwargs)
        if func._schema.is_mutable:
            raise TypeError(f"{func} would change a weight of four bits; they are frozen")
        plain = tree_map_only(NF4Weight, NF4Weight.dequantised, (args, kwargs))
        return func(*plain[0], **plain[1])

    # ---- what FSDP2 calls ----------------------------------------------------------------------

    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple[tuple[Tensor, ...], int]:
        """Return what is gathered, and the columns of a row."""
        return (self.packed,), self.shape[1]

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: int,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the whole matrix dequantised and the memory to free, or write it to `out`."""
        (packed,) = all_gather_outputs
        if out is None:
            values = packed.new_empty((packed.shape[0], metadata), dtype=param_dtype)
            dequantise_into(packed, values)
            return values, (values,)
        # The backward saved this tensor; it gets the same values in the same memory.
        with torch.autograd._unsafe_preserve_version_counter(out):
            dequantise_into(packed, out)
        return None


def _on_packed(func: Any, weight: NF4Weight, *args: Any, **kwargs: Any) -> NF4Weight:
    """Detach, alias, or pin: same operation, same shape."""
    return NF4Weight(func(weight.packed, *args, **kwargs), weight.shape, weight.dtype)


def _empty_like(func: Any, weight: NF4Weight, **kwargs: Any) -> NF4Weight:
    packed = torch.empty_like(weight.packed, device=kwargs.get("device"))
    return NF4Weight(packed, weight.shape, kwargs.get("dtype") or weight.dtype)


def _new_zeros(func: Any, weight: NF4Weight, size: Any, **kwargs: Any) -> NF4Weight:
    num_rows, columns = size
    return weight._with(weight.packed.new_zeros((num_rows, packed_bytes(columns))), columns)


def _slice(func: Any, weight: NF4Weight, dim: int = 0, *args: Any, **kwargs: Any) -> Tensor:
    if dim != 0:
        return func(weight.dequantised(), dim, *args, **kwargs)
    return weight._with(func(weight.packed, dim, *args, **kwargs))


def _split(func: Any, weight: NF4Weight, size: int, dim: int = 0) -> list[NF4Weight]:
    assert dim == 0, "weights of four bits are cut by rows"
    return [weight._with(part) for part in weight.packed.split(size)]


def _view(func: Any, weight: NF4Weight, shape: Any) -> NF4Weight:
    sizes = torch.empty(weight.shape, device="meta").view(shape).shape
    assert len(sizes) == 1 or sizes == weight.shape, "weights of four bits keep their rows"
    return NF4Weight(weight.packed, sizes, weight.dtype)


def _copy(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, NF4Weight):
        assert isinstance(source, NF4Weight), "one of the two is of four bits"
        return target.copy_(source.dequantised())
    if isinstance(source, NF4Weight):
        target.packed.copy_(source.packed, non_blocking)
    elif not target.is_meta:
        quantise_into(source, target.packed)
    return target


def _to_copy(func: Any, weight: NF4Weight, **kwargs: Any) -> Tensor:
    if (kwargs.get("dtype") or weight.dtype) != weight.dtype:
        return func(weight.dequantised(torch.float32), **kwargs)
    packed = weight.packed.to(kwargs.get("device"), copy=True)
    return NF4Weight(packed, weight.shape, weight.dtype)


_ATEN = torch.ops.aten
_OPERATORS: dict[Any, Callable[..., Any]] = {
    _ATEN.detach.default: _on_packed,
    _ATEN.alias.default: _on_packed,
    _ATEN.clone.default: _on_packed,
    _ATEN.empty_like.default: _empty_like,
    _ATEN.new_zeros.default: _new_zeros,
    _ATEN.slice.Tensor: _slice,
    _ATEN.split.Tensor: _split,
    _ATEN.view.default: _view,
    _ATEN.copy_.default: _copy,
    _ATEN._to_copy.default: _to_copy,
}


def pack_frozen(
    model: nn.Module, plan: ResolvedPlan, *, trainable: Collection[str], num_shards: int
) -> dict[str, str]:
    """Turn the frozen linear layers of the blocks of a meta model into packed ones, in place.

    Returns those that stay as they are with the reason. ValueError where none is left to pack.
    """
    linears = block_linears(model, plan.blocks)
    left: dict[str, str] = {}
    for name, module in linears.items():
        weight, is_trained = module.weight, f"{name}.weight" in trainable
        reason = _reason(weight, is_trained=is_trained, num_shards=num_shards)
        if reason is not None:
            left[name] = reason
            continue
        size = (weight.shape[0], packed_bytes(weight.shape[1]))
        packed = torch.empty(size, dtype=torch.uint8, device="meta")
        values = NF4Weight(packed, weight.shape, weight.dtype)
        module.weight = nn.Parameter(values, requires_grad=False)
    if len(left) == len(linears):
        raise ValueError(
            f'model.converters has "nf4", and no linear layer of the blocks can be packed: '
            f"{first_reasons(left)}; freeze some with model.freeze, or take it out"
        )
    return left


def _reason(weight: Tensor, *, is_trained: bool, num_shards: int) -> str | None:
    num_rows, columns = weight.shape
    if is_trained:
        return "it is trained"
    if columns % BLOCK:
        return f"its {columns} inputs are no multiple of {BLOCK}"
    if num_rows % num_shards:
        return f"its {num_rows} outputs do not divide by the {num_shards} ranks that share them"
    return None


def first_reasons(left: dict[str, str]) -> str:
    """Join the different reasons for a message, each with the first layer and how many."""
    groups: dict[str, list[str]] = {}
    for name, reason in left.items():
        groups.setdefault(reason, []).append(name)
    more = {why: f" and {len(names) - 1} more" * (len(names) > 1) for why, names in groups.items()}
    shown = [f"{names[0]}{more[why]}, because {why}" for why, names in groups.items()]
    return "; ".join(shown) or "none"


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_bytes(tensor: Tensor) -> int:
    """Return the memory of this rank's part of a tensor."""
    local = local_part(tensor)
    held = local.packed if isinstance(local, NF4Weight) else local
    return math.prod(held.shape) * held.itemsize
