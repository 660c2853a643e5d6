"""What a model says about its own structure, in words every parallelism can read.

Standard library only: `parallelisms/` reads this file and nothing else of `models/`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

Role = Literal[
    "vocab_rows",  # embedding split over the vocabulary
    "vocab_rows_whole",  # the same, tokens leave whole (features are merged into them)
    "columns",  # linear split over its outputs
    "rows",  # linear split over its inputs; the partial results are summed
    "columns_whole",  # the same as columns, but the results leave whole
    "rows_whole",  # the same as rows, but the inputs arrive whole
    "per_token",  # small and replicated, each token alone (norms)
    "per_head",  # norm over the channels of local heads
    "across_columns",  # norm over columns that ranks share, replicated
    "gather_tokens",  # entrance that needs all tokens of a row
    "split_tokens",  # entrance where tokens arrive whole
    "vocab_columns",  # language-model head: log-probabilities over a split vocabulary
    "replicated",  # not split
    "whole_output",  # results leave as plain tensors
    "adapter_columns",  # part of an adapted linear, split as that is over its outputs
    "adapter_rows",  # part of an adapted linear, split as that is over its inputs
    "adapter_whole",  # part of an adapted linear, replicated
]


def _union(left: tuple[str, ...], right: tuple[str, ...]) -> tuple[str, ...]:
    return left + tuple(name for name in right if name not in left)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """The parallel description of one architecture.

    Names are module names (parameter names in `tied`); `*` and `[qk]` match within one
    dot-separated part, `""` is the model itself.
    """

    first: tuple[str, ...] = ()
    """Run once before the blocks: sharding units of their own, first pipeline stage."""

    blocks: tuple[str, ...] = ()
    """The repeated unit: sharding, checkpointing and compile wrap one, a pipeline cuts between."""

    last: tuple[str, ...] = ()
    """Run once after the blocks: one sharding unit, kept gathered; last pipeline stage."""

    attention: tuple[str, ...] = ()
    """Modules called as `core(q, k, v, *, mask)`: where context parallelism steps in."""

    masks: tuple[str, ...] = ()
    """Modules called as `masks(positions, *, documents, keys)`, which make the attention mask of a
    forward pass; context parallelism steps in here too."""

    experts: tuple[str, ...] = ()
    """Modules called as `experts(x_RD, counts_E)`: where expert parallelism steps in."""

    tied: tuple[tuple[str, str], ...] = ()
    """Parameter pairs that must stay one tensor; the first is the owner."""

    tensor: Mapping[str, Role] = field(default_factory=dict[str, Role])
    """Role of each module under tensor and sequence parallelism."""

    def under(self, prefix: str) -> "ModelPlan":
        """Return the same plan for a model that sits at `prefix` of a larger one.

        Only the outermost model keeps a `last` group gathered, so a tower's `last` becomes
        ordinary units.
        """

        def at(name: str) -> str:
            return f"{prefix}.{name}" if name else prefix

        return ModelPlan(
            first=tuple(at(n) for n in self.first + self.last),
            blocks=tuple(at(n) for n in self.blocks),
            attention=tuple(at(n) for n in self.attention),
            masks=tuple(at(n) for n in self.masks),
            experts=tuple(at(n) for n in self.experts),
            tied=tuple((at(a), at(b)) for a, b in self.tied),
            tensor={at(n): role for n, role in self.tensor.items()},
        )

    def __or__(self, other: "ModelPlan") -> "ModelPlan":
        """Join two plans; where both name a module, the right one's role wins."""
        return ModelPlan(
            first=_union(self.first, other.first),
            blocks=_union(self.blocks, other.blocks),
            last=_union(self.last, other.last),
            attention=_union(self.attention, other.attention),
            masks=_union(self.masks, other.masks),
            experts=_union(self.experts, other.experts),
            tied=self.tied + tuple(pair for pair in other.tied if pair not in self.tied),
            tensor={**self.tensor, **other.tensor},
        )


def match(names: Iterable[str], pattern: str) -> list[str]:
    """Return the names that a pattern matches; wildcards stay within one dot-separated part."""
    parts = pattern.split(".")
    found: list[str] = []
    for name in names:
        name_parts = name.split(".")
        if len(name_parts) == len(parts) and all(map(fnmatchcase, name_parts, parts)):
            found.append(name)
    return found


def match_or_raise(names: Sequence[str], pattern: str, what: str) -> list[str]:
    """Return what `match` finds; ValueError with the nearest names if that is nothing."""
    found = match(names, pattern)
    if not found:
        hint = nearest_names(pattern, names)
        raise ValueError(f"{what} {pattern!r} matches nothing in the model{hint}")
    return found


def match_expression(names: Sequence[str], expression: str, key: str, kind: str) -> list[str]:
    """Return the names that a regular expression matches as a whole; ValueError if none.

    `key` is the setting that holds it, `kind` what the names are of.
    """
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"{key}: {expression!r} is no regular expression ({error}); mend it"
        ) from error
    found = [name for name in names if compiled.fullmatch(name)]
    if not found:
        raise ValueError(
            f"{key} expression {expression!r} matches no whole {kind} name"
            + nearest_names(expression.replace("\\", ""), names)
        )
    return found


def nearest_names(pattern: str, names: Sequence[str]) -> str:
    """Return the end of an error that names what `pattern` may have meant."""
    nearest = get_close_matches(pattern, names, n=3, cutoff=0.3)
    return f"; the nearest names are {', '.join(nearest)}" if nearest else ""
