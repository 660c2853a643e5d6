"""Where the hidden states of two models of the same weights part: the first module that differs.

Our modules carry transformers' names, so what enters and leaves each is compared by name.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Side = Literal["input", "output"]
_BLOCK = re.compile(r"model\.layers\.\d+")
_SUBLAYERS = (
    ("norm", "norm"),
    ("self_attn", "attention"),
    ("mlp", "feed-forward"),
    ("embed_tokens", "embedding"),
    ("lm_head", "head"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What enters or leaves a module."""

    name: str
    """Dotted name of the module."""

    side: Side

    @property
    def is_stream(self) -> bool:
        """Say whether it is all that later blocks see of the earlier ones."""
        return self.side == "input" and _BLOCK.fullmatch(self.name) is not None

    @property
    def sublayer(self) -> str:
        """Return the kind of part that it belongs to."""
        leaf = self.name.rpartition(".")[2]
        for part, kind in _SUBLAYERS:
            if part in (leaf if kind == "norm" else self.name):
                return kind
        return "block"

    def __str__(self) -> str:
        return f"{self.side} of {self.name}"


@dataclass(kw_only=True)
class States:
    """The states of one forward pass in the order in which they arose, in fp32 on the CPU."""

    tensors: dict[Event, Tensor] = field(default_factory=dict[Event, Tensor])

    @contextmanager
    def recorded(self, model: nn.Module) -> Iterator[None]:
        """Keep what enters and leaves each module during the one call of `model` inside."""
        with _watched(model, lambda event, state: self.tensors.setdefault(event, state)):
            yield


@dataclass(kw_only=True)
class StateErrors:
    """How far the states of another model are from recorded ones; none of them is kept."""

    states: States
    errors: dict[Event, float] = field(default_factory=dict[Event, float])
    """Largest difference relative to the largest value, for what both models have."""

    @contextmanager
    def compared(self, model: nn.Module) -> Iterator[None]:
        """Compare what enters and leaves each module during the one call of `model` inside."""

        def compare(event: Event, theirs: Tensor) -> None:
            ours = self.states.tensors.get(event)
            if ours is not None and ours.shape == theirs.shape and event not in self.errors:
                size = theirs.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
                self.errors[event] = ((ours - theirs).abs().max() / size).item()

        with _watched(model, compare):
            yield

    def in_order(self) -> list[tuple[Event, float]]:
        """Return what was compared, in the order in which it arose in the recorded model."""
        return [(e, self.errors[e]) for e in self.states.tensors if e in self.errors]

    def first_difference(self, tolerance: float) -> Event | None:
        """Return where the states part.

        Differences before a block whose input is equal are none: there the models only cut the
        same arithmetic into other modules.
        """
        events = self.in_order()
        equal_streams = [
            place
            for place, (event, error) in enumerate(events)
            if event.is_stream and error <= tolerance
        ]
        start = max(equal_streams, default=0)
        parted = (event for event, error in events[start:] if not error <= tolerance)
        return next(parted, None)

    def blocks(self) -> Mapping[str, dict[str, float]]:
        """Return the errors of what leaves attention, feed-forward and block, by block."""
        found: dict[str, dict[str, float]] = {}
        for event, error in self.in_order():
            block, _, part = event.name.rpartition(".")
            if event.side == "output" and _BLOCK.fullmatch(event.name):
                found.setdefault(event.name, {})["block"] = error
            elif event.side == "output" and part in ("self_attn", "mlp"):
                found.setdefault(block, {})[part] = error
        return found


def explain(event: Event) -> str:
    """Return what a first difference at `event` means, in words."""
    leaf = event.name.rpartition(".")[2]
    if event.side == "output":
        return f"{leaf} gets equal values and returns others: look at its weights and settings"
    if leaf == "o_proj":
        return "its projections are equal: look at rotary embedding, mask, window and scaling"
    if leaf == "down_proj":
        return "what it multiplies is equal: look at the activation"
    return "what is added or scaled before it differs"


@contextmanager
def _watched(model: nn.Module, see: Callable[[Event, Tensor], object]) -> Iterator[None]:
    """Call `see` with every state of floating point that enters or leaves a module."""

    def hook(name: str, side: Side, value: Any) -> None:
        state = value[0] if isinstance(value, tuple) and value else value
        if isinstance(state, Tensor) and state.is_floating_point():
            see(Event(name=name, side=side), state.detach().to("cpu", torch.float32))

    handles: list[Any] = []
    for name, module in model.named_modules():
        if not name:
            continue

        def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            hook(name, "input", args[0] if args else kwargs.get("hidden_states"))

        def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            hook(name, "output", output)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
