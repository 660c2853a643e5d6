"""`LoRALinear`: a linear layer with low-rank adapters beside its weight: LoRA, rsLoRA and DoRA.

The base keeps its own parameter names, and adapters have those of PEFT's modules in memory. Which
layers become adapted is decided in `models/adapters.py`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
"""Modules of an adapted linear that hold an adapter's parameters, each under the adapter's name."""

Part = Literal["weight", "bias", "lora_A", "lora_B", "lora_magnitude_vector"]


class LowRank(NamedTuple):
    """One adapter of one layer: scale x B A, and for DoRA the magnitude of each output."""

    a: Tensor
    """(rank, inputs)."""

    b: Tensor
    """(outputs, rank)."""

    scale: float

    magnitude: Tensor | None = None
    """(outputs,); None for LoRA."""

    dropout: float = 0.0
    """Share of the channels of its input that are dropped in training."""


class Layout(Protocol):
    """How a rank sees the parameters of an adapted linear; parallelisms put in another one."""

    def local(self, part: Part, parameter: Tensor) -> Tensor | None:
        """Return the plain tensor to compute with; None leaves a bias to whoever split the sum."""
        ...

    def sum_over_inputs(self, partial: Tensor) -> Tensor:
        """Add up what each rank found over its inputs; needs no gradient."""
        ...


class Whole:
    """Every parameter is whole and here."""

    def local(self, part: Part, parameter: Tensor) -> Tensor | None:
        """Return the parameter."""
        del part
        return parameter

    def sum_over_inputs(self, partial: Tensor) -> Tensor:
        """Return it: all inputs are here."""
        return partial


WHOLE = Whole()


class Magnitude(nn.Module):
    """DoRA's length of each row of the weight; `LoRALinear` computes with it."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs))


class LoRALinear(nn.Linear):
    """x W^T + bias, plus what each adapter adds; W and bias are those of the layer it replaces.

    LoRA adds scale x dropout(x) A^T B^T. DoRA replaces W by m (W + scale x B A) / ||W + scale x B
    A||, each row by its own length, which gets no gradient; with dropout, what it adds to x W^T is
    computed from dropout(x). Several adapters add up. Sources: Hu et al. 2021, arXiv:2106.09685,
    eq. 3; Kalajdzievski 2023, arXiv:2312.03732 (scale alpha / sqrt(rank)); Liu et al. 2024,
    arXiv:2402.09353, eq. 5 and section 4.3; PEFT 0.21 where they leave a choice.

    Dropout draws from torch's generator of the device: one layout of ranks repeats itself and goes
    on from a checkpoint exactly, but another layout draws other masks.
    """

    def __init__(self, base: nn.Linear) -> None:
        bias = base.bias is not None
        super().__init__(base.in_features, base.out_features, bias=bias, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.scales: dict[str, float] = {}
        self.dropouts: dict[str, float] = {}
        self.is_adapted = True
        self.layout: Layout = WHOLE

    def add(
        self, name: str, *, rank: int, scale: float, dropout: float, has_magnitude: bool
    ) -> None:
        """Add an adapter whose parameters have no memory yet."""
        assert name not in self.scales, "adapters have names of their own"
        with torch.device("meta"):
            self.lora_A[name] = nn.Linear(self.in_features, rank, bias=False)
            self.lora_B[name] = nn.Linear(rank, self.out_features, bias=False)
            if has_magnitude:
                self.lora_magnitude_vector[name] = Magnitude(self.out_features)
        self.scales[name], self.dropouts[name] = scale, dropout

    def forward(self, input: Tensor) -> Tensor:
        """Return the outputs for each token, adapters included unless they are switched off."""
        x, layout = input, self.layout
        weight = layout.local("weight", self.weight)
        assert weight is not None, "only a bias is left out"
        bias = None if self.bias is None else layout.local("bias", self.bias)
        active = [self._adapter(name) for name in (self.scales if self.is_adapted else ())]
        if all(adapter.magnitude is None for adapter in active):
            base = out = functional.linear(x, weight, bias)  # to the bit what it was before
        else:
            base = functional.linear(x, weight)
            out = base if bias is None else base + bias
        for adapter in active:
            is_dropped = adapter.dropout > 0.0 and self.training
            entered = functional.dropout(x, adapter.dropout) if is_dropped else x
            # Scaled where there are few channels.
            inner = functional.linear(entered, adapter.a) * adapter.scale
            added = functional.linear(inner, adapter.b)
            if adapter.magnitude is not None:
                factor = gain(weight, adapter, adapter.magnitude, layout)
                through = functional.linear(entered, weight) if is_dropped else base
                added = (factor - 1.0).to(x.dtype) * through + factor.to(x.dtype) * added
            out = out + added
        return out

    def _adapter(self, name: str) -> LowRank:
        found: dict[str, Tensor] = {}
        for part in PARTS:
            module: nn.ModuleDict = getattr(self, part)
            if name in module:
                parameter: Tensor = module[name].weight  # pyright: ignore[reportAssignmentType]
                local = self.layout.local(part, parameter)
                assert local is not None, "only a bias is left out"
                found[part] = local
        a, b, magnitude = (found.get(part) for part in PARTS)
        assert a is not None and b is not None, "an adapter has both"
        scale, dropout = self.scales[name], self.dropouts[name]
        return LowRank(a=a, b=b, scale=scale, magnitude=magnitude, dropout=dropout)


def gain(weight: Tensor, adapter: LowRank, magnitude: Tensor, layout: Layout = WHOLE) -> Tensor:
    """Return DoRA's m / ||W + scale x B A|| of each output, in fp32; the length is a constant.

    The length is rounded as the magnitude is, so that one that is the length of W gives exactly 1.
    """
    length = row_lengths(weight, adapter, layout)
    return magnitude.float() / length.to(magnitude.dtype).float()


@torch.no_grad()
def row_lengths(weight: Tensor, adapter: LowRank, layout: Layout = WHOLE) -> Tensor:
    """Return the length of each row of W + scale x B A, in fp32, and never make that matrix.

    ||w + s b A||^2 = ||w||^2 + 2 s (w A^T) . b + s^2 b (A A^T) . b for each row w of W and b of B.
    """
    weight, a, b = weight.detach(), adapter.a.detach().float(), adapter.b.detach().float()
    squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    crossed = functional.linear(weight, adapter.a.detach().to(weight.dtype)).float()
    own = functional.linear(b, a @ a.T)
    squares = squares + ((2.0 * crossed + adapter.scale * own) * b).sum(dim=1) * adapter.scale
    return layout.sum_over_inputs(squares).clamp_min(0.0).sqrt()


def merged_weight(weight: Tensor, adapters: Sequence[LowRank]) -> Tensor:
    """Return the weight of the plain linear that computes what the base and all adapters do.

    In the dtype of `weight`; the arithmetic is done in fp32, or in float64 where an input is.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = base = weight.to(wide)
    for adapter in adapters:
        added = adapter.scale * (adapter.b.to(wide) @ adapter.a.to(wide))
        if adapter.magnitude is None:
            merged = merged + added
        else:
            adapted = base + added
            length = torch.linalg.vector_norm(adapted, dim=1)
            merged = merged + (adapter.magnitude.to(wide) / length)[:, None] * adapted - base
    return merged.to(weight.dtype)


def scale_of(rank: int, alpha: float, *, use_rslora: bool) -> float:
    """Return what B A is multiplied with: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def adapter_of(parameter_name: str) -> str | None:
    """Return the name of the adapter that a parameter belongs to, None for one of the base."""
    parts = parameter_name.split(".")
    is_part = len(parts) >= 3 and parts[-3] in PARTS and parts[-1] == "weight"
    return parts[-2] if is_part else None


def adapted_linears(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yield every adapted linear of a model with its name."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Compute as the base alone inside; compiled blocks get a second variant, once.

    Ranks that share a forward pass must all be inside, or all outside.
    """
    before = [(module, module.is_adapted) for _, module in adapted_linears(model)]
    for module, _ in before:
        module.is_adapted = False
    try:
        yield
    finally:
        for module, was_adapted in before:
            module.is_adapted = was_adapted
