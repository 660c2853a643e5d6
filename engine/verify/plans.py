"""Which plans `--all` runs: every layout of the ranks, with switches that meet pair by pair."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from engine.verify.case import CHECKPOINTING, CONTEXT_MODES, DEFAULTS, KERNELS, RESHARD, Case

Item = tuple[str, object]
Choices = Mapping[str, tuple[object, ...]]
Refusal = Callable[[Case], str | None]

SWITCHES: Choices = {
    "checkpointing": CHECKPOINTING[:-1],
    "reshard": RESHARD,
    "loss_parallel": (True, False),
    "balanced": (True, False),
    "packed": (True, False),
    "tied": (False, True),
    "offload": (False, True),
    "accumulate": (1, 2),
    "chunks": (False, True),
    "vocab": (DEFAULTS["vocab"], 61),
    "bias": (False, True),
    "neftune": (False, True),
}
"""What an eager fp32 plan chooses from; 61 is a vocabulary that no degree divides."""

GPU_ATTENTION = ("cudnn", "flex", "sdpa", "varlen")
"""Backends that bf16 plans on GPUs choose from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanList:
    """What to run, and what cannot be run with the reason."""

    cases: list[Case] = field(default_factory=list[Case])
    refused: dict[Case, str] = field(default_factory=dict[Case, str])


def list_plans(
    world_size: int,
    *,
    device_type: str,
    refusal: Refusal,
    fixed: Mapping[str, object],
    is_short: bool = False,
) -> PlanList:
    """Return the plans of all of `world_size` ranks that a device of this type is checked with.

    Eager fp32: every layout, and each two choices together in some plan. Compiled fp32, bf16
    compute, and on GPUs Liger's kernels: each choice in some plan. `fixed` holds switches that
    are not to choose. The short list is eager fp32: every layout that keeps rows whole, and each
    mode of context parallelism and each choice in some plan.
    """
    found = PlanList()
    layouts = [replace(layout, **fixed) for layout in every_layout(world_size)]
    found.refused.update({c: reason for c in layouts if (reason := refusal(c))})
    layouts = [layout for layout in layouts if layout not in found.refused]
    switches = {name: values for name, values in SWITCHES.items() if name not in fixed}
    compiler = "inductor" if device_type == "cuda" else "aot_eager"
    if is_short:
        whole = [layout for layout in layouts if layout.cp == 1]
        cover(found, whole, switches, refusal, together=1, each_layout=True)
        cover(found, [c for c in layouts if c.cp > 1], {}, refusal, together=1)
        return found
    cover(found, layouts, switches, refusal, together=2, each_layout=True)
    every_mode = {**switches, "checkpointing": CHECKPOINTING}
    compiled = [replace(layout, backend=compiler) for layout in layouts]
    cover(found, compiled, every_mode, refusal, together=1)
    bf16 = dict(switches)
    if device_type == "cuda":  # how GPUs train; on the CPU a compiler only costs time here
        cover(found, [replace(c, kernels="liger") for c in layouts], {}, refusal, together=1)
        kernels = {"backend": (compiler, ""), "attention": GPU_ATTENTION, "kernels": KERNELS}
        bf16 = {**kernels, **switches, "copy_engine": (False, True)}
    cover(found, [replace(c, bfloat16=True) for c in layouts], bf16, refusal, together=1)
    return found


def every_layout(world_size: int) -> Iterator[Case]:
    """Yield each way to divide the ranks, in each mode of context and sequence parallelism."""
    sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
    for tp in sizes:
        for cp in (n for n in sizes if world_size % (tp * n) == 0):
            for replicate in (n for n in sizes if world_size % (tp * cp * n) == 0):
                shard = world_size // (tp * cp * replicate)
                for context in CONTEXT_MODES if cp > 1 else CONTEXT_MODES[:1]:
                    for sequence in (True, False) if tp > 1 else (True,):
                        yield Case(
                            replicate=replicate,
                            shard=shard,
                            tp=tp,
                            cp=cp,
                            context=context,
                            sequence=sequence,
                        )


def traits(case: Case) -> dict[str, object]:
    """Return what of a layout has to meet the switches, whatever the degrees."""
    return {
        "replicated": case.replicate > 1,
        "sharded": case.shard > 1,
        "context": case.context if case.cp > 1 else None,
        "tensor": case.sequence if case.tp > 1 else None,
    }


def effective(layout: Case, choices: Choices) -> dict[str, tuple[object, ...]]:
    """Return the choices that change something in a layout."""
    idle = set() if layout.tp > 1 else {"loss_parallel"}
    if layout.cp == 1 or layout.context == "ulysses":
        idle.add("balanced")
    if layout.shard * layout.cp == 1:
        idle.add("copy_engine")
    return {name: values for name, values in choices.items() if name not in idle}


def cover(
    found: PlanList,
    layouts: Sequence[Case],
    choices: Choices,
    refusal: Refusal,
    *,
    together: int,
    each_layout: bool = False,
) -> None:
    """Add cases until every `together` items that some layout can have are in one, greedily.

    With `each_layout` every layout is there at least once. What no layout may have is added to
    the refused ones.
    """
    state = _Cover(together=together)
    state.missing.update(
        dict.fromkeys(group for c in layouts for group in _groups(c, choices, together))
    )
    order = list(layouts) if each_layout else []
    while order or state.missing:
        group: frozenset[Item] = frozenset()
        candidates = order[:1]
        if order:
            order.pop(0)
        else:
            group = next(iter(state.missing))
            candidates = sorted(
                (c for c in layouts if _can_have(c, choices, group)),
                key=lambda c: -sum(item in g for item in traits(c).items() for g in state.missing),
            )
        tried = [_fill(c, choices, state, group, refusal) for c in candidates]
        case = next((c for c in tried if refusal(c) is None), None)
        state.missing.pop(group, None)
        if case is None:
            found.refused[tried[0]] = str(refusal(tried[0]))
            continue
        if case not in found.cases:
            found.cases.append(case)
        state.take(_items(case, choices))


@dataclass(kw_only=True, slots=True)
class _Cover:
    """What has met so far."""

    together: int
    missing: dict[frozenset[Item], None] = field(default_factory=dict[frozenset[Item], None])
    met: Counter[frozenset[Item]] = field(default_factory=Counter[frozenset[Item]])

    def take(self, items: Sequence[Item]) -> None:
        for group in map(frozenset, combinations(items, self.together)):
            self.missing.pop(group, None)
            self.met[group] += 1


def _items(case: Case, choices: Choices) -> list[Item]:
    chosen = [(name, getattr(case, name)) for name in effective(case, choices)]
    return [*traits(case).items(), *chosen]


def _groups(layout: Case, choices: Choices, size: int) -> Iterator[frozenset[Item]]:
    """Yield each group of items that a layout can have."""
    values = {name: (value,) for name, value in traits(layout).items()}
    values |= effective(layout, choices)
    for names in combinations(values, size):
        groups: list[frozenset[Item]] = [frozenset()]
        for name in names:
            groups = [group | {(name, value)} for group in groups for value in values[name]]
        yield from groups


def _can_have(layout: Case, choices: Choices, group: frozenset[Item]) -> bool:
    own, switches = traits(layout), effective(layout, choices)
    return all(own[n] == v if n in own else n in switches for n, v in group)


def _fill(
    layout: Case,
    choices: Choices,
    state: _Cover,
    group: frozenset[Item],
    refusal: Refusal,
) -> Case:
    """Return the layout with those allowed choices that cover most of what is missing.

    Where nothing is, those that were met least often.
    """
    own = traits(layout)
    asked: dict[str, Any] = {name: value for name, value in group if name not in own}
    case = replace(layout, **asked)
    picked = [*own.items(), *asked.items()]
    for name, values in effective(layout, choices).items():
        if name in asked:
            continue

        def gain(value: object, name: str = name) -> tuple[int, int]:
            others = combinations(picked, state.together - 1)
            groups = [frozenset(((name, value), *rest)) for rest in others]
            new = sum(group in state.missing for group in groups)
            return new, -sum(state.met[group] for group in groups)

        for value in sorted(values, key=gain, reverse=True):
            candidate = replace(case, **{name: value})
            if refusal(candidate) is None:
                case = candidate
                break
        picked.append((name, getattr(case, name)))
    return case
