"""Weights of Hugging Face folders: safetensors files are opened, judged and read slice by slice.

Each rank reads whole rows of its own, so that a node reads each file once, and replicas on several
nodes read it once together.
"""

import json
import logging
import os
import re
import struct
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.checkpoint_state import base_tensors, list_names, model_tensors
from engine.checkpoint_storage import RankGroup
from engine.distributed import launched_world_size
from models.layers.lora import adapter_of
from models.weights import KeyMap
from parallelisms.shared_fill import fill_shared

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

log = logging.getLogger("tessera")


def has_weights(folder: Path | str) -> bool:
    """Say whether a folder holds safetensors weights, in one file or several."""
    return any((Path(folder) / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))


class HfWeights:
    """The tensors of a Hugging Face folder, one file or sharded, read slice by slice."""

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        self._open: dict[str, Any] = {}
        self._bytes_read = 0
        self._files = self._locate()
        for file in sorted(set(self._files.values()) - self._open.keys()):
            self._open_shard(file)
        self._check_index()

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return self._folder

    @property
    def bytes_read(self) -> int:
        """Bytes of all parts that were read through this object."""
        return self._bytes_read

    @property
    def names(self) -> Collection[str]:
        """Names of all stored tensors."""
        return self._files.keys()

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._folder / self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the whole tensor's shape without reading it."""
        return tuple(self._open[self._files[name]].get_slice(name).get_shape())

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """Read a part of a tensor (all of it without `slices`) in its stored dtype."""
        try:
            whole = self._open[self._files[name]].get_slice(name)
            part = whole[slices] if slices else whole[...]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.file_of(name)}: cannot read {name}: {error}") from error
        self._bytes_read += part.nbytes
        return part

    def _locate(self) -> dict[str, str]:
        """Return the file of each tensor."""
        index = self._folder / INDEX_NAME
        if index.is_file():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index} cannot be read: {error}") from error
        single = self._folder / SINGLE_NAME
        if not single.is_file():
            raise ValueError(
                f"{self._folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}; give a folder with "
                f"safetensors weights"
            )
        self._open_shard(SINGLE_NAME)
        return dict.fromkeys(self._open[SINGLE_NAME].keys(), SINGLE_NAME)

    def _open_shard(self, file: str) -> Any:
        path = self._folder / file
        if not path.is_file():
            raise ValueError(f"{path} is missing, {INDEX_NAME} names it")
        try:
            self._open[file] = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            what = _first_cut_off(path) or f"is corrupt or cut short ({error})"
            raise ValueError(f"{path} {what}; download it again") from error
        return self._open[file]

    def _check_index(self) -> None:
        for name, file in self._files.items():
            if name not in self._open[file].keys():  # noqa: SIM118 -- not a mapping
                raise ValueError(
                    f"{self._folder / file} lacks {name}, which {INDEX_NAME} puts there"
                )


def _first_cut_off(path: Path) -> str:
    """Say which tensor of a safetensors file is the first that is not whole; empty if none is.

    Source of the layout: https://github.com/huggingface/safetensors#format.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        ends = {n: 8 + length + e["data_offsets"][1] for n, e in header.items() if n[:2] != "__"}
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
        return ""  # the header itself is damaged
    cut = [name for name in sorted(ends, key=ends.__getitem__) if ends[name] > size]
    if not cut:
        return ""
    return (
        f"is cut short: {cut[0]} ends at byte {ends[cut[0]]:,}, the file at {size:,} "
        f"({len(cut)} of {len(ends)} tensors are not whole)"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What one rank did to fill its part of a model."""

    bytes_read: int
    seconds: float
    """From opening the folder to the last value in place, waiting for other ranks included."""

    missing: tuple[str, ...]
    """Tensors of the model that the folder lacks, as allowed: their parameters are as before."""

    unexpected: tuple[str, ...]
    """Tensors of the folder that the model has no place for, as allowed."""


def load_into(
    model: nn.Module,
    folder: Path,
    key_map: KeyMap,
    *,
    allowed: Sequence[str] = (),
    ranks: RankGroup | None = None,
) -> Imported:
    """Fill a model from a folder's safetensors files, each rank reading rows of its own.

    Anything missing, unexpected or of another shape is a ValueError that lists the names, raised
    before anything is read; values are converted to the parameters' dtype. Stored names that
    match a pattern of `allowed` may be missing, and then keep their value, or be left over. Every
    rank must call this; with `ranks`, an error of one is raised on all.
    """
    started = time.perf_counter()
    group = ranks or RankGroup()
    tensors = base_tensors(model_tensors(model))  # a folder of a model holds no adapters
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def open_checked() -> tuple[HfWeights, KeyMap]:
        weights = HfWeights(folder)
        names = key_map.of_files(weights.names, shapes)
        refuse_other_weights(weights, names.shapes(shapes), names, allowed=allowed)
        return weights, names

    try:
        # Before any rank waits for another's rows: a node may lack the files.
        weights, names = group.together(open_checked)
        places = names.places(shapes)

        def draw(name: str, slices: tuple[slice, ...]) -> Tensor:
            return weights.read(places[name].stored, places[name].slices(slices))

        kept = {name for name, place in places.items() if place.stored not in weights.names}
        kept |= {name for name, _ in model.named_parameters() if adapter_of(name) is not None}
        fill = partial(fill_shared, skip=kept, share_replicas=_on_several_nodes())
        group.together(lambda: fill(model, draw))
    finally:
        if ranks is None:
            group.close()
    stored = names.shapes(shapes)
    return Imported(
        bytes_read=weights.bytes_read,
        seconds=time.perf_counter() - started,
        missing=tuple(sorted(stored.keys() - weights.names)),
        unexpected=tuple(sorted(_with_a_meaning(weights, key_map) - stored.keys())),
    )


def _on_several_nodes() -> bool:
    """Say whether replicas may lie on nodes that do not share a page cache."""
    world_size = launched_world_size()
    return world_size > int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))


def load_together(
    model: nn.Module,
    folder: Path,
    key_map: KeyMap,
    ranks: RankGroup,
    *,
    allowed: Sequence[str] = (),
) -> None:
    """Call `load_into` on every rank, and log on rank 0 what was read and what was let pass."""
    done = load_into(model, folder, key_map, allowed=allowed, ranks=ranks)
    everyone = ranks.gather(done)
    if ranks.rank != 0:
        return
    log.info("%s", describe([one.bytes_read for one in everyone], done.seconds))
    if names := list_groups(done.missing):
        log.warning("not in %s, as allowed, and left at its initial value: %s", folder, names)
    if names := list_groups(done.unexpected):
        log.warning("in %s without a place in the model, as allowed: %s", folder, names)


def describe(bytes_read: Sequence[int], seconds: float) -> str:
    """Return the log line of an import, given the bytes that each rank read."""
    total = sum(bytes_read) / 1e9
    return (
        f"read {total:.2f} GB of weights in {seconds:.1f} s, {total / max(seconds, 1e-9):.2f} GB/s "
        f"together: {min(bytes_read) / 1e9:.2f} to {max(bytes_read) / 1e9:.2f} GB on each of "
        f"{len(bytes_read)} ranks"
    )


def list_groups(names: Iterable[str]) -> str:
    """Join names for a message; those that differ in numbers alone, as of layers, count as one."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(name)
    return list_names(
        [
            one[0] if len(one) == 1 else f"{pattern} ({len(one)}, the first {one[0]})"
            for pattern, one in groups.items()
        ]
    )


def _with_a_meaning(weights: HfWeights, key_map: KeyMap) -> set[str]:
    """Return the stored names that ought to have a place in the model."""
    return {name for name in weights.names if key_map.from_hf(name) is not None}


def refuse_other_weights(
    weights: HfWeights,
    shapes: Mapping[str, tuple[int, ...]],
    key_map: KeyMap,
    *,
    allowed: Sequence[str] = (),
) -> None:
    """Raise a ValueError listing every disagreement between a model's shapes and the files."""

    def matter(names: Iterable[str]) -> set[str]:
        return {name for name in names if not any(fnmatchcase(name, p) for p in allowed)}

    complaints: list[str] = []
    if missing := matter(shapes.keys() - weights.names):
        complaints.append(f"the files lack {list_groups(missing)}")
    if unexpected := matter(_with_a_meaning(weights, key_map) - shapes.keys()):
        complaints.append(f"the model has no place for {list_groups(unexpected)}")
    for name in sorted(shapes.keys() & set(weights.names)):
        if (stored := weights.shape(name)) != shapes[name]:
            complaints.append(
                f"{name} in {weights.file_of(name).name} has shape {stored}, the model has "
                f"{shapes[name]}"
            )
    if complaints:
        raise ValueError(
            f"the weights in {weights.folder} are not this model's: "
            f"{list_names(complaints, '; ')}; give the folder of this model, or name in "
            "checkpoint.initial_load_allow what may be missing or left over"
        )
