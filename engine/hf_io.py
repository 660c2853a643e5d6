"""Hugging Face folders: their configuration is read, and whole ones are written tensor by tensor.

How tensor names differ between here and there is the family's key map (`models/weights.py`);
`hf_weights.py` reads the weights.
"""

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import Buffer

from engine.checkpoint_state import base_tensors, model_tensors
from engine.checkpoint_storage import RankGroup
from engine.hf_weights import INDEX_NAME, SINGLE_NAME
from engine.manifest import refuse_small_disk, set_aside, sync_folder, write_synced
from models.adapters import AdapterSpec
from models.layers.lora import PARTS, LoRALinear, LowRank, adapted_linears, merged_weight
from models.weights import KeyMap
from parallelisms.stored import full_precision

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
MAX_SHARD_BYTES = 5 * 10**9

_FORMAT_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterAssets:
    """What an export says of adapters."""

    specs: Sequence[AdapterSpec]
    base: str
    """Hugging Face folder of the model that they adapt; empty where it has none."""

    merge: bool
    """Export a complete model with the adapters in its weights, not the adapters alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HfAssets:
    """What a complete Hugging Face folder holds besides the weights."""

    key_map: KeyMap
    """Names of the tensors there."""

    config: Mapping[str, object]
    """Content of config.json."""

    save_tokenizer: Callable[[Path], None]
    """Writes the tokenizer's files into a folder."""

    generation_config: Mapping[str, object] = field(default_factory=dict[str, object])
    """Content of generation_config.json; empty: the special tokens of `config`."""

    adapters: AdapterAssets | None = None
    """Where adapters are trained."""

    @property
    def only_adapters(self) -> bool:
        """Whether an export is of the adapters and not of a whole model."""
        return self.adapters is not None and not self.adapters.merge


def read_hf_config(folder: Path | str) -> dict[str, object]:
    """Return the content of a folder's config.json; a ValueError says what is wrong with it."""
    path = Path(folder) / CONFIG_NAME
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give a Hugging Face model folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__} instead of an object")
    return content


def read_generation_config(folder: Path | str) -> dict[str, object]:
    """Return the content of a folder's generation_config.json, empty where there is none."""
    path = Path(folder) / GENERATION_CONFIG_NAME
    return json.loads(path.read_text()) if folder and path.is_file() else {}


def export(
    model: nn.Module,
    folder: Path,
    assets: HfAssets,
    *,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    ranks: RankGroup | None = None,
) -> None:
    """Write a complete Hugging Face folder, in place of what was there, in one rename at the end.

    Adapters are merged into the weights. Every rank must call this: tensors are gathered one by
    one, rank 0 writes them. A failure to write is raised on every rank and leaves the old folder as
    it was.
    """
    tensors, adapted = base_tensors(model_tensors(model)), dict(adapted_linears(model))
    shapes = assets.key_map.shapes({name: tuple(t.shape) for name, t in tensors.items()})
    group = RankGroup() if ranks is None else ranks
    writer = FolderWriter(folder, shapes, dtype, max_shard_bytes=max_shard_bytes)
    failure: Exception | None = None
    try:
        group.on_first(writer.open)
        for name, parts in assets.key_map.parts(tensors).items():
            # The others wait for rank 0's disk here, where no short timeout of training counts.
            group.together(partial(_raise, failure))
            whole = [_merged(part, tensors[part], adapted, dtype) for part in parts]
            if group.rank == 0:
                try:
                    writer.add(name, join(whole))
                except OSError as error:
                    failure = error
        group.together(lambda: _raise(failure))
        group.on_first(lambda: writer.finish(asset_files(assets, dtype)))
    finally:
        if group.rank == 0:
            writer.discard()
        if ranks is None:
            group.close()


def join(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors one below the other; a single one without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _merged(
    name: str, tensor: Tensor, adapted: Mapping[str, LoRALinear], dtype: torch.dtype
) -> Tensor:
    """Gather a parameter as `dtype`, with its adapters; every rank of its mesh must call this."""
    module, _, kind = name.rpartition(".")
    if module not in adapted or kind != "weight":
        return whole(tensor.detach().to(dtype))
    adapters = low_ranks(adapted[module], lambda _, parameter: whole(parameter.detach()))
    wide = torch.promote_types(tensor.dtype, dtype)
    return merged_weight(whole(tensor.detach()).to(wide), adapters).to(dtype)


def low_ranks(linear: LoRALinear, read: Callable[[str, Tensor], Tensor]) -> list[LowRank]:
    """Return the adapters of a layer, of which `read(name in the layer, parameter)` gives each."""
    found: list[LowRank] = []
    for name, scale in linear.scales.items():
        a, b, magnitude = (
            read(f"{part}.{name}.weight", getattr(linear, part)[name].weight)
            if name in getattr(linear, part)
            else None
            for part in PARTS
        )
        assert a is not None and b is not None, "an adapter has both"
        found.append(LowRank(a=a, b=b, scale=scale, magnitude=magnitude))
    return found


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor of any layout; every rank of its mesh must call this."""
    tensor = full_precision(tensor)
    if not isinstance(tensor, DTensor):
        return tensor
    # Parameters offloaded to host memory are gathered where their mesh lives.
    return cast(DTensor, tensor.to(tensor.device_mesh.device_type)).full_tensor()


def asset_files(assets: HfAssets, dtype: torch.dtype) -> dict[str, bytes]:
    """Return everything of a Hugging Face folder but the weights, which are `dtype`, by name."""
    name = str(dtype).removeprefix("torch.")
    # Version 5 of transformers reads `dtype`, version 4 `torch_dtype`.
    config = {**assets.config, "dtype": name, "torch_dtype": name}
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = assets.generation_config or {
        key: assets.config[key] for key in special if assets.config.get(key) is not None
    }
    with tempfile.TemporaryDirectory() as scratch:
        assets.save_tokenizer(Path(scratch))
        files = {
            str(path.relative_to(scratch)): path.read_bytes()
            for path in sorted(Path(scratch).rglob("*"))
            if path.is_file()
        }
    files[CONFIG_NAME] = json.dumps(config, indent=2, sort_keys=True).encode()
    files[GENERATION_CONFIG_NAME] = json.dumps(generation, indent=2, sort_keys=True).encode()
    return files


class FolderWriter:
    """Writes the safetensors files of a folder one tensor at a time, in the order of `shapes`.

    The format is 8 bytes with the header's length, the header (JSON), then the tensors' bytes.
    Source: https://github.com/huggingface/safetensors#format.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self._folder, self._shapes, self._dtype = folder, shapes, dtype
        self._temporary = folder.with_name(f"{folder.name}.tmp")
        self._shards = self._deal(max_shard_bytes)
        self._stream: BinaryIO | None = None

    def _bytes_of(self, name: str) -> int:
        return torch.Size(self._shapes[name]).numel() * self._dtype.itemsize

    def _deal(self, max_shard_bytes: int) -> dict[str, list[str]]:
        """Return the tensors of each file."""
        groups: list[list[str]] = [[]]
        size = 0
        for name in self._shapes:
            if groups[-1] and size + self._bytes_of(name) > max_shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += self._bytes_of(name)
        if len(groups) == 1:
            return {SINGLE_NAME: groups[0]}
        return {
            f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
            for number, group in enumerate(groups, 1)
        }

    def open(self) -> None:
        """Make the temporary folder, once there is room for the weights."""
        self.discard()
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        total = sum(self._bytes_of(name) for name in self._shapes)
        refuse_small_disk(self._folder.parent, total, f"export to {self._folder}")
        self._temporary.mkdir()
        self._starts = {group[0]: file for file, group in self._shards.items() if group}

    def add(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor."""
        assert tuple(tensor.shape) == self._shapes[name] and tensor.dtype == self._dtype
        if name in self._starts:
            self._close_shard()
            self._stream = (self._temporary / self._starts[name]).open("wb")
            self._stream.write(self._header(self._shards[self._starts[name]]))
        assert self._stream is not None, "the first tensor of the order starts a file"
        content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        self._stream.write(cast(Buffer, content.numpy()))

    def _header(self, names: Iterable[str]) -> bytes:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            end = offset + self._bytes_of(name)
            header[name] = {
                "dtype": _FORMAT_NAMES[self._dtype],
                "shape": list(self._shapes[name]),
                "data_offsets": [offset, end],
            }
            offset = end
        content = json.dumps(header).encode()
        content += b" " * (-len(content) % 8)
        return struct.pack("<Q", len(content)) + content

    def _close_shard(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None

    def finish(self, files: Mapping[str, bytes]) -> None:
        """Write the index and the other files, then put the folder in place."""
        self._close_shard()
        if len(self._shards) > 1:
            total = sum(self._bytes_of(name) for name in self._shapes)
            weight_map = {name: file for file, group in self._shards.items() for name in group}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            files = {**files, INDEX_NAME: json.dumps(index, indent=2, sort_keys=True).encode()}
        for name, content in files.items():
            write_synced(self._temporary / name, content)
        for entry in [*self._temporary.rglob("*"), self._temporary]:
            if entry.is_dir():
                sync_folder(entry)
        old = set_aside(self._folder, "old") if self._folder.exists() else None
        self._temporary.rename(self._folder)
        sync_folder(self._folder.parent)
        if old is not None:
            shutil.rmtree(old)

    def discard(self) -> None:
        """Remove what an unfinished writing left."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        shutil.rmtree(self._temporary, ignore_errors=True)
