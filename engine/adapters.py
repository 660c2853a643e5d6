"""The section `adapter`: what is trained beside a frozen base model, and its first values.

The layer is `models/layers/lora.py`, the rewriting of a model and its plan `models/adapters.py`.
"""

import math
import re
from collections import Counter
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from engine.data.cache import digest_of
from engine.model import Architecture
from models.adapters import ALL_LINEAR, AdapterSpec, adapt
from models.initialise import adapter_values
from models.layers.lora import adapted_linears, adapter_of, scale_of
from models.plan import ModelPlan
from parallelisms.adapters import local_row_lengths
from parallelisms.materialise import fill
from parallelisms.mesh import ParallelDims


@dataclass(frozen=True, kw_only=True, slots=True)
class OneAdapterConfig:
    """One adapter: low-rank matrices beside the weights of some linear layers."""

    kind: Literal["none", "lora", "dora"] = "lora"
    """What is trained: low-rank updates of the weights (lora), or these and the length of each row
    of the weights (dora); none trains the model itself."""

    name: str = "default"
    """What the adapter's tensors and files call it: letters, digits, `_` and `-`."""

    rank: int = 16
    """Rank of the updates."""

    alpha: float = 32.0
    """Updates are multiplied with alpha / rank."""

    use_rslora: bool = False
    """Multiply them with alpha / sqrt(rank) instead, so that larger ranks keep their effect."""

    dropout: float = 0.0
    """Share of the input channels that the updates do not see, drawn anew for each forward pass in
    training."""

    targets: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    """Which linears get it: last parts of their names (`q_proj`, `self_attn.[qv]_proj`, `*` within
    one part), `regex:` and an expression for whole names, or "all-linear", all of the blocks."""

    path: str = ""
    """Folder of an adapter in PEFT's format to start from; empty starts without an effect."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name, re.ASCII):
            raise ValueError(
                f"adapter.name = {self.name!r} may hold only letters, digits, '_' and '-', and not "
                "be empty; give another"
            )
        if hasattr(nn.ModuleDict(), self.name):
            raise ValueError(
                f"adapter.name = {self.name!r} is what torch calls a part of every module; give "
                f"another, such as {self.name + '_1'!r}"
            )
        remedies = {
            "rank": None if self.rank >= 1 else "at least 1, such as 16",
            "alpha": None if 0.0 < self.alpha < math.inf else "a positive number, such as 32",
            "dropout": None if 0.0 <= self.dropout < 1.0 else "a share from 0 to below 1",
            "targets": None if self.targets else f"names of linears, or {ALL_LINEAR!r} for all",
        }
        for key, remedy in remedies.items():
            if remedy is not None:
                raise ValueError(
                    f"adapter.{key} = {getattr(self, key)!r} of the adapter {self.name!r}; give "
                    f"{remedy}"
                )

    def describe(self) -> str:
        """Return a line for the log."""
        begins = f"begins as {self.path}" if self.path else "begins without an effect"
        scale = scale_of(self.rank, self.alpha, use_rslora=self.use_rslora)
        return (
            f"{self.name}: {self.kind}, rank {self.rank}, scale {scale:g}, dropout {self.dropout}, "
            f"on {', '.join(self.targets)}; {begins}"
        )

    @property
    def spec(self) -> AdapterSpec | None:
        """What the rewriting of the model needs; None where there is no adapter."""
        if self.kind == "none":
            return None
        return AdapterSpec(
            name=self.name,
            kind=self.kind,
            rank=self.rank,
            alpha=self.alpha,
            use_rslora=self.use_rslora,
            dropout=self.dropout,
            targets=tuple(self.targets),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig(OneAdapterConfig):
    """Section `adapter`: train low-rank updates (LoRA, DoRA) of a model that is frozen."""

    kind: Literal["none", "lora", "dora"] = "none"
    """What is trained: low-rank updates of the weights (lora), or these and the length of each row
    of the weights (dora); none trains the model itself."""

    merge_export: bool = False
    """Export a complete model with the adapters in its weights, in place of the adapters alone. The
    base's weights are those that the run computes with: rounded, or dequantised from four bits."""

    more: list[OneAdapterConfig] = field(default_factory=list[OneAdapterConfig])
    """Further adapters that are trained at once, `[[adapter.more]]`, each with a name of its own
    and the same keys; a linear that several target adds them all up."""

    def __post_init__(self) -> None:
        OneAdapterConfig.__post_init__(self)  # slots leave `super()` without its class
        given = [f.name for f in fields(self) if getattr(self, f.name) != _default(f)]
        apart = {"more", "merge_export"} if self.more else {"more"}
        idle = [name for name in given if name not in apart]
        if self.kind == "none" and idle:
            name = idle[0]
            raise ValueError(
                f"adapter.{name} = {getattr(self, name)!r} has no effect: adapter.kind = 'none'; "
                "set adapter.kind = 'lora' or 'dora', or leave it out"
            )
        nothing = [one.name for one in self.more if one.kind == "none"]
        if nothing:
            raise ValueError(
                f"adapter.more: kind = 'none' of the adapter {nothing[0]!r} has no effect; set it "
                "to 'lora' or 'dora', or take the adapter out"
            )
        counts = Counter(spec.name for spec in self.specs)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ValueError(
                f"adapter.more: {counts[twice[0]]} adapters have the name {twice[0]!r}; give each "
                "a name of its own"
            )

    @property
    def all(self) -> list[OneAdapterConfig]:
        """Every adapter that there is."""
        return [one for one in (self, *self.more) if one.kind != "none"]

    @property
    def specs(self) -> list[AdapterSpec]:
        """What the rewriting of the model needs of each."""
        return [spec for one in self.all if (spec := one.spec) is not None]

    @property
    def has_dropout(self) -> bool:
        """Whether random numbers are drawn in training."""
        return any(one.dropout > 0.0 for one in self.all)


def _default(key: Field[object]) -> object:
    make = key.default_factory
    return key.default if make is MISSING else make()


def build_adapted(
    architecture: Architecture, section: AdapterConfig
) -> tuple[nn.Module, ModelPlan]:
    """Build the model without memory, with its adapters, and return it with its plan."""
    model = architecture.build_meta()
    return model, adapt(model, architecture.plan, section.specs)


def frozen_dtype(section: AdapterConfig, param_dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype in which a frozen base is kept, None where there is no adapter.

    Weights are cast to what they compute in for every forward pass, so that is all they need.
    """
    return param_dtype if section.specs else None


def seed_dropout(section: AdapterConfig, dims: ParallelDims, seed: int) -> None:
    """Let ranks that read other tokens drop other channels, and those that share them the same.

    A resumed run goes on with the generators of its checkpoint.
    """
    if section.has_dropout:
        rank = dims.mesh("loss").get_local_rank()
        torch.manual_seed(int(digest_of("adapter dropout", seed, rank)[:15], 16))


def fill_adapters(model: nn.Module, *, seed: int) -> None:
    """Give adapters the values under which they change nothing; the base must have its values.

    Every rank must call this. The values are the same for every layout of ranks.
    """
    fill(model, adapter_values(model, seed=seed), chosen=lambda name: adapter_of(name) is not None)
    fill_magnitudes(model)


@torch.no_grad()
def fill_magnitudes(model: nn.Module) -> None:
    """Set DoRA's magnitudes to the lengths of the rows of the weights, which must have values.

    Every rank must call this.
    """
    for _, linear in adapted_linears(model):
        if len(linear.lora_magnitude_vector) == 0:
            continue
        lengths = local_row_lengths(linear.weight)
        for magnitude in linear.lora_magnitude_vector.parameters():
            held = magnitude.to_local() if isinstance(magnitude, DTensor) else magnitude
            held.copy_(lengths)
