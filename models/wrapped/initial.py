"""Initial values of a wrapped model: transformers' own, the same bits for every layout of ranks."""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from models.initialise import adapter_values
from models.layers.lora import adapter_of
from models.wrapped.describe import WrappedSizes
from models.wrapped.module import WrappedLM, build


def initial_values(
    model: nn.Module, config: WrappedSizes, *, seed: int
) -> Callable[[str, Sequence[slice]], Tensor]:
    """Return the function that draws part of a named parameter of `model`.

    A block, or a layer outside of the blocks, is drawn as a whole on the CPU by each rank, from a
    generator of its own, and kept until another one is asked for: that much memory is needed.
    ValueError on every rank, before anything is asked for, where transformers leaves values open.
    """
    with torch.device("meta"):
        twin = build(config.hf, config.attention)
    blocks = config.plan.blocks[0].removesuffix(".*")
    unit_of = _units(twin, blocks)
    for unit in set(unit_of.values()):
        if unit == f"{blocks}.0" or not unit.startswith(f"{blocks}."):
            _draw_unit(twin, unit, seed)
    drawn: dict[str, Mapping[str, Tensor]] = {}
    draw_adapter = adapter_values(model, seed=seed)

    def draw(name: str, slices: Sequence[slice]) -> Tensor:
        if adapter_of(name) is not None:
            return draw_adapter(name, slices)
        unit = unit_of[name]
        if unit not in drawn:
            drawn.clear()
            drawn[unit] = _draw_unit(twin, unit, seed)
        return drawn[unit][name][tuple(slices)]

    return draw


def _units(model: nn.Module, blocks: str) -> dict[str, str]:
    """Return for each parameter the block that holds it, or the layer outside of the blocks."""
    depth = blocks.count(".") + 2
    units = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        units[name] = ".".join(parts[:depth] if name.startswith(f"{blocks}.") else parts[:-1])
    return units


@torch.no_grad()
def _draw_unit(model: WrappedLM, unit: str, seed: int) -> dict[str, Tensor]:
    module = copy.deepcopy(model.get_submodule(unit)).to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.fill_(torch.nan)
    digest = hashlib.blake2b(f"{seed}:{unit}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # The sign bit stays free: manual_seed takes a signed number.
        torch.manual_seed(int.from_bytes(digest) >> 1)
        module.apply(model.initialise)
    values = {f"{unit}.{name}": value.detach() for name, value in module.named_parameters()}
    unset = [name for name, value in values.items() if value.isnan().any()]
    if unset:
        raise ValueError(
            f"transformers sets no initial value of {', '.join(unset)}; start from weights: "
            "checkpoint.initial_load_in_hf = true"
        )
    return values
