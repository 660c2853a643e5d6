"""Names and shapes of an adapter's tensors, here and in the files of PEFT.

They differ in the adapter's name, which files leave out, in a prefix, and where files join
projections that are apart here (`models/weights.py`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.layers.lora import PARTS, LowRank
from models.weights import KeyMap, Shape

PREFIX = "base_model.model."
MAGNITUDE = PARTS[-1]


def joined_modules(key_map: KeyMap) -> dict[str, tuple[str, ...]]:
    """Return the modules of files that hold several of ours, and which, in the order of rows."""
    end = ".weight"
    return {
        hf.removesuffix(end): tuple(part.removesuffix(end) for part in parts)
        for hf, parts in key_map.joined.items()
        if hf.endswith(end) and len(parts) > 1
    }


def file_tensors(module: str, adapter: LowRank) -> dict[str, Tensor]:
    """Return what adapts a module, by the names in a file."""
    found = {f"{PREFIX}{module}.lora_A.weight": adapter.a.contiguous()}
    found[f"{PREFIX}{module}.lora_B.weight"] = adapter.b.contiguous()
    if adapter.magnitude is not None:
        found[f"{PREFIX}{module}.{MAGNITUDE}"] = adapter.magnitude.contiguous()
    return found


def our_names(module: str, adapter: str) -> tuple[str, ...]:
    """Return our names of A, B and the magnitude that adapt a module; LoRA has no magnitude."""
    return tuple(f"{module}.{part}.{adapter}.weight" for part in PARTS)


def adapted_modules(names: Iterable[str], adapter: str) -> list[str]:
    """Return the modules that an adapter of this name adapts, in the order of our names."""
    end = f".lora_A.{adapter}.weight"
    return [name.removesuffix(end) for name in names if name.endswith(end)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Joint:
    """A module of files, with those of ours that it holds, one below the other."""

    module: str
    parts: tuple[str, ...]
    rows: Mapping[str, slice]
    """Which outputs of it are those of each part."""

    adapted: tuple[str, ...]
    """The parts that are adapted."""

    @property
    def num_rows(self) -> int:
        """Outputs of all parts together."""
        return self.rows[self.parts[-1]].stop


def joints_of(
    shapes: Mapping[str, Shape], joined: Mapping[str, tuple[str, ...]], adapter: str
) -> list[Joint]:
    """Return the modules of files that an adapter adapts, given the shapes of all our tensors."""
    owner = {part: hf for hf, parts in joined.items() for part in parts}
    ours = adapted_modules(shapes, adapter)
    found: list[Joint] = []
    for hf in dict.fromkeys(owner.get(name, name) for name in ours):
        parts = joined.get(hf, (hf,))
        rows: dict[str, slice] = {}
        first = 0
        for part in parts:
            last = first + shapes[f"{part}.weight"][0]
            rows[part] = slice(first, last)
            first = last
        adapted = tuple(part for part in parts if part in ours)
        found.append(Joint(module=hf, parts=parts, rows=rows, adapted=adapted))
    return found


def split_up(joint: Joint, stored: LowRank, rank: int) -> dict[str, LowRank] | None:
    """Return what adapts each part of a joint module, None where parts of `rank` cannot say it.

    Parts that share their A in the file get a copy of it each; where they have rows of their own
    (B is block-diagonal, as `join_up` makes it), each gets these.
    """
    others = [rows for part, rows in joint.rows.items() if part not in joint.adapted]
    if any(stored.b[rows].any() for rows in others):
        return None
    found: dict[str, LowRank] = {}
    for number, part in enumerate(joint.adapted):
        rows = joint.rows[part]
        a, b = stored.a, stored.b[rows]
        if len(joint.adapted) > 1 and len(a) == len(joint.adapted) * rank:
            block = slice(number * rank, (number + 1) * rank)
            rest = b.clone()
            rest[:, block] = 0
            if rest.any():
                return None
            a, b = a[block], b[:, block]
        if len(a) != rank:
            return None
        magnitude = None if stored.magnitude is None else stored.magnitude[rows]
        found[part] = LowRank(a=a, b=b, scale=stored.scale, magnitude=magnitude)
    return found


def join_up(joint: Joint, parts: Mapping[str, LowRank]) -> LowRank:
    """Return what adapts a joint module: all A below each other, B block-diagonal."""
    if len(joint.parts) == 1:
        return parts[joint.module]
    first = parts[joint.adapted[0]]
    rank = len(first.a)
    b = first.b.new_zeros(joint.num_rows, rank * len(joint.adapted))
    for number, part in enumerate(joint.adapted):
        b[joint.rows[part], number * rank : (number + 1) * rank] = parts[part].b
    magnitudes = [m for part in joint.adapted if (m := parts[part].magnitude) is not None]
    assert not magnitudes or joint.adapted == joint.parts, "DoRA adapts all parts or none"
    return LowRank(
        a=torch.cat([parts[part].a for part in joint.adapted]),
        b=b,
        scale=first.scale,
        magnitude=torch.cat(magnitudes) if magnitudes else None,
    )
