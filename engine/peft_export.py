"""Writes adapters as folders that PEFT loads; `peft_io.py` reads them."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors.torch import save
from torch import Tensor, nn

from engine.checkpoint_state import kept_tensors, model_tensors
from engine.checkpoint_storage import RankGroup
from engine.hf_io import CONFIG_NAME as MODEL_CONFIG_NAME
from engine.hf_io import AdapterAssets, FolderWriter, HfAssets, asset_files, export, whole
from engine.peft_io import CONFIG_NAME, WEIGHTS_NAME, adapters_below, is_adapter_folder
from engine.peft_names import Joint, file_tensors, join_up, joined_modules, joints_of, our_names
from models.adapters import AdapterSpec
from models.layers.lora import LowRank
from models.weights import Shape

ROOT_ADAPTER = "default"
"""Name of the adapter that lies in a folder itself and not below it, as PEFT has it."""


def export_trained(
    model: nn.Module, folder: Path, assets: HfAssets, *, dtype: torch.dtype, ranks: RankGroup
) -> None:
    """Export a model, or its adapters alone where these are trained and not to be merged.

    Every rank must call this.
    """
    write = export_adapters if assets.only_adapters else export
    write(model, folder, assets, dtype=dtype, ranks=ranks)


def export_adapters(
    model: nn.Module,
    folder: Path,
    assets: HfAssets,
    *,
    dtype: torch.dtype,
    ranks: RankGroup,
) -> None:
    """Write a model's adapters, in place of what was in `folder`, in one rename at the end.

    Every rank must call this. A failure to write is raised on every rank and leaves the old folder
    as it was.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
    gathered: dict[str, Tensor] = {}
    for name, tensor in kept_tensors(model_tensors(model)).items():
        value = whole(tensor.detach().to(dtype))
        if ranks.rank == 0:
            gathered[name] = value.cpu()
    ranks.on_first(lambda: write_adapters(gathered, shapes, folder, assets, dtype))


def place_of(spec: AdapterSpec, specs: Sequence[AdapterSpec]) -> PurePosixPath:
    """Return where one of several adapters lies in their folder."""
    is_alone = len(specs) == 1 or spec.name == ROOT_ADAPTER
    return PurePosixPath() if is_alone else PurePosixPath(spec.name)


def is_exported(folder: Path, *, only_adapters: bool) -> bool:
    """Say whether a run has left an export in a folder: of a whole model, or of its adapters."""
    if not only_adapters:
        return (folder / MODEL_CONFIG_NAME).is_file()
    return is_adapter_folder(folder) or bool(adapters_below(folder))


def write_adapters(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    folder: Path,
    assets: HfAssets,
    dtype: torch.dtype,
) -> None:
    """Write whole adapter tensors, given the shapes of all tensors of the adapted model.

    A single adapter and the one called "default" lie in the folder itself, others in folders below.
    The tokenizer and the settings of generation lie beside them.
    """
    adapters = assets.adapters
    assert adapters is not None, "there are adapters to write"
    files = asset_files(assets, dtype)
    del files[MODEL_CONFIG_NAME]  # or the folder would pass for a model
    for spec in adapters.specs:
        place = place_of(spec, adapters.specs)
        joints = joints_of(shapes, joined_modules(assets.key_map), spec.name)
        stored = stored_adapter(tensors, joints, spec)
        weights: dict[str, Tensor] = {}
        for module, one in stored.items():
            weights |= file_tensors(module, one)
        files[str(place / WEIGHTS_NAME)] = save(weights, metadata={"format": "pt"})
        content = adapter_config(spec, stored, _module_names(shapes, assets), adapters)
        files[str(place / CONFIG_NAME)] = json.dumps(content, indent=2, sort_keys=True).encode()
    writer = FolderWriter(folder, {}, dtype)
    try:
        writer.open()
        writer.finish(files)
    finally:
        writer.discard()


def stored_adapter(
    tensors: Mapping[str, Tensor], joints: Sequence[Joint], spec: AdapterSpec
) -> dict[str, LowRank]:
    """Return what adapts each module of files, from our tensors."""

    def of(part: str) -> LowRank:
        a, b, magnitude = (tensors.get(name) for name in our_names(part, spec.name))
        assert a is not None and b is not None, "an adapter has both"
        return LowRank(a=a, b=b, scale=spec.scale, magnitude=magnitude)

    return {joint.module: join_up(joint, {p: of(p) for p in joint.adapted}) for joint in joints}


def adapter_config(
    spec: AdapterSpec,
    stored: Mapping[str, LowRank],
    modules: Collection[str],
    adapters: AdapterAssets,
) -> dict[str, object]:
    """Return the content of adapter_config.json; `modules` are those of the whole model."""
    sizes = {module: _size(len(one.a), spec) for module, one in stored.items()}
    usual = next(iter(sizes.values())) if len(set(sizes.values())) == 1 else _size(spec.rank, spec)
    others = {module: size for module, size in sizes.items() if size != usual}
    leaves = {module.rpartition(".")[2] for module in stored}
    alike = {module for module in modules if module.rpartition(".")[2] in leaves}
    return {
        "base_model_name_or_path": adapters.base or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual.alpha,
        "lora_dropout": spec.dropout,
        "modules_to_save": None,
        "alpha_pattern": {module: size.alpha for module, size in others.items()},
        "peft_type": "LORA",
        "r": usual.rank,
        "rank_pattern": {module: size.rank for module, size in others.items()},
        "target_modules": sorted(leaves) if alike == stored.keys() else sorted(stored),
        "task_type": "CAUSAL_LM",
        "use_dora": spec.kind == "dora",
        "use_rslora": spec.use_rslora,
    }


@dataclass(frozen=True, slots=True)
class _Size:
    rank: int
    alpha: float


def _size(rank: int, spec: AdapterSpec) -> _Size:
    """Return rank and alpha as a file has them, so that the scale is the adapter's."""
    alpha = spec.alpha
    if rank != spec.rank:
        alpha = spec.scale * (math.sqrt(rank) if spec.use_rslora else rank)
    return _Size(rank, int(alpha) if float(alpha).is_integer() else alpha)


def _module_names(shapes: Mapping[str, Shape], assets: HfAssets) -> set[str]:
    """Return the modules with a weight, by their names in files."""
    owner = {p: hf for hf, parts in joined_modules(assets.key_map).items() for p in parts}
    ours = {name.removesuffix(".weight") for name in shapes if name.endswith(".weight")}
    return {owner.get(name, name) for name in ours if ".lora_" not in name}
