"""How parameters are named and joined in a Hugging Face checkpoint."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one of our parameters lies in a checkpoint."""

    stored: str
    """Name of the stored tensor."""

    first_row: int
    """Row of the stored tensor at which the parameter begins."""

    def slices(self, slices: tuple[slice, ...]) -> tuple[slice, ...]:
        """Return the part of the stored tensor that is this part of the parameter."""
        rows, *others = slices
        return slice(rows.start + self.first_row, rows.stop + self.first_row), *others


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyMap:
    """The identity, except for what a checkpoint joins, and need not or does not store."""

    not_stored: frozenset[str] = frozenset()
    """Our names that share their tensor with another parameter, so files leave them out."""

    ignorable: tuple[str, ...] = ()
    """Regular expressions of stored names that carry no parameter, such as rotary tables."""

    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Stored name of a tensor that holds several of ours, one below the other, and their names."""

    optional_prefix: str = ""
    """What the names in a checkpoint may lack, as in files that a model without its head wrote."""

    def of_files(self, stored: Collection[str], names: Iterable[str]) -> "KeyMap":
        """Return the map of our `names` to a checkpoint that holds `stored`, with or without it."""
        prefix = self.optional_prefix
        if not prefix or any(name.startswith(prefix) for name in stored):
            return self
        bare = {n.removeprefix(prefix): (n,) for n in names if n.startswith(prefix)}
        return replace(self, joined={**self.joined, **bare})

    def to_hf(self, name: str) -> str | None:
        """Return the name of the stored tensor that holds our parameter; None if none does."""
        if name in self.not_stored:
            return None
        return next((hf for hf, parts in self.joined.items() if name in parts), name)

    def from_hf(self, hf_name: str) -> str | None:
        """Return our name of a stored tensor; None if it is known and carries nothing.

        The name of a joined tensor, and one that the model does not have, come back unchanged: the
        reader reports the latter.
        """
        if hf_name in self.not_stored:
            return None
        if any(re.fullmatch(pattern, hf_name) for pattern in self.ignorable):
            return None
        return hf_name

    def parts(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Return the stored tensors of our parameters in their order, and which each holds."""
        owner = {part: hf for hf, parts in self.joined.items() for part in parts}
        stored = dict.fromkeys(owner.get(n, n) for n in names if n not in self.not_stored)
        return {hf: self.joined.get(hf, (hf,)) for hf in stored}

    def shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the shapes of the stored tensors, given those of our parameters."""
        return {
            hf: (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:])
            for hf, parts in self.parts(shapes).items()
        }

    def places(self, shapes: Mapping[str, Shape]) -> dict[str, Place]:
        """Return where each of our stored parameters lies, given the shapes of all."""
        found: dict[str, Place] = {}
        for hf, parts in self.parts(shapes).items():
            first_row = 0
            for part in parts:
                found[part] = Place(stored=hf, first_row=first_row)
                first_row += shapes[part][0]
        return found
