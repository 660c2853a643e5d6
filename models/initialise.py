"""Initial values as pure functions of seed, parameter name and place, the same for every layout.

A parameter is drawn in fixed blocks of rows, each from a generator of its own, so a rank that
holds a part draws only the blocks it touches and gets the bits that one process would get.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.decoder import DecoderConfig
from models.layers.lora import adapter_of
from models.layers.norm import RMSNorm

BLOCK_ROWS = 64
"""Changing this changes every initial value."""

RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialRule:
    """What a parameter starts from."""

    kind: Literal["normal", "uniform", "zeros", "ones"]
    """Family of values."""

    std: float = 0.0
    """Standard deviation of `normal`."""

    bound: float = 0.0
    """Largest size of a `uniform` value."""


def initial_values(
    model: nn.Module, config: DecoderConfig, *, seed: int, num_threads: int = 1
) -> Callable[[str, Sequence[slice]], Tensor]:
    """Return the function that draws part of a named parameter of `model`, in so many threads.

    The model may be on the meta device and may be split; names and whole shapes are what counts.
    """
    parameters = dict(model.named_parameters())
    rules = {name: initial_rule(model, config, name) for name in parameters}

    def draw(name: str, slices: Sequence[slice]) -> Tensor:
        shape, rule = parameters[name].shape, rules[name]
        return initial_slice(name, shape, rule, slices, seed, num_threads=num_threads)

    return draw


def initial_rule(model: nn.Module, config: DecoderConfig, name: str) -> InitialRule:
    """Return the rule of one parameter, by the kind of its module and the depth of the model.

    Norm weights are ones, or zeros where they are stored as their distance from 1; biases are
    zeros; matrices are normal with standard deviation `initializer_range`, divided by
    sqrt(2 x num_layers) where the result is added to the residual stream. Source: Radford et al.
    2019, "Language Models are Unsupervised Multitask Learners", section 2.3, with Llama's
    `initializer_range`.
    """
    if adapter_of(name) is not None:
        return adapter_rule(name, model.get_parameter(name).shape)
    owner_name, _, kind = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(owner, RMSNorm):
        return InitialRule(kind="zeros" if owner.zero_centered else "ones")
    if kind == "bias":
        return InitialRule(kind="zeros")
    assert isinstance(owner, nn.Linear | nn.Embedding), f"{name} has no rule"
    std = config.initializer_range
    if name.endswith(RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * config.num_layers)
    return InitialRule(kind="normal", std=std)


def adapter_rule(name: str, shape: Sequence[int]) -> InitialRule:
    """Return the rule of an adapter's parameter, under which it begins without an effect.

    As in PEFT: A by `kaiming_uniform_(a=sqrt(5))`, which is uniform up to 1 / sqrt(inputs), and B
    zero. A magnitude has its value once the weight beside it has: `engine/adapters.py`.
    """
    if ".lora_A." in name:
        return InitialRule(kind="uniform", bound=1.0 / math.sqrt(shape[1]))
    return InitialRule(kind="zeros" if ".lora_B." in name else "ones")


def adapter_values(model: nn.Module, *, seed: int) -> Callable[[str, Sequence[slice]], Tensor]:
    """Return the function that draws part of a named parameter of an adapter of `model`."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def draw(name: str, slices: Sequence[slice]) -> Tensor:
        rule = adapter_rule(name, shapes[name])
        return initial_slice(name, shapes[name], rule, slices, seed)

    return draw


def initial_slice(
    name: str,
    shape: Sequence[int],
    rule: InitialRule,
    slices: Sequence[slice],
    seed: int,
    *,
    num_threads: int = 1,
) -> Tensor:
    """Return a rectangular part of a parameter; fp32, on the CPU.

    Memory stays near the size of the part, whatever the size of the parameter.
    """
    ranges = [range(*s.indices(n)) for s, n in zip(slices, shape, strict=False)]
    sizes = [len(r) for r in ranges] + list(shape[len(ranges) :])
    if rule.kind not in ("normal", "uniform"):
        return torch.full(sizes, 1.0 if rule.kind == "ones" else 0.0)
    part = torch.empty(sizes)
    rows, inner = ranges[0], tuple(slices[1:])

    def draw_block(block: int) -> None:
        first = block * BLOCK_ROWS
        last = min(first + BLOCK_ROWS, shape[0])
        generator = _generator(seed, name, block)
        values = _draw(rule, (last - first, *shape[1:]), generator)
        start, stop = max(first, rows.start), min(last, rows.stop)
        wanted = values[(slice(start - first, stop - first), *inner)]
        part[start - rows.start : stop - rows.start] = wanted

    blocks = range(rows.start // BLOCK_ROWS, math.ceil(rows.stop / BLOCK_ROWS))
    if num_threads == 1:
        for block in blocks:
            draw_block(block)
        return part
    with ThreadPoolExecutor(num_threads) as pool:  # torch lets go of the interpreter's lock
        for _ in pool.map(draw_block, blocks):
            pass
    return part


def _draw(rule: InitialRule, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if rule.kind == "normal":
        return torch.randn(size, generator=generator, device="cpu").mul_(rule.std)
    uniform = torch.rand(size, generator=generator, device="cpu")
    return uniform.mul_(2.0).sub_(1.0).mul_(rule.bound)


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}:{block}".encode(), digest_size=8).digest()
    # The sign bit stays free: manual_seed takes a signed number.
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest) >> 1)
