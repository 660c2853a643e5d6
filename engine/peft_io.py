"""Adapter folders of PEFT: `adapter_config.json` and `adapter_model.safetensors`, read and judged.

How their tensors are ours is in `peft_names.py`; `peft_export.py` writes them.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.checkpoint_state import list_names, model_tensors
from engine.hf_io import CONFIG_NAME as MODEL_CONFIG_NAME
from engine.hf_weights import list_groups
from engine.model import Architecture, difference_from
from engine.peft_names import (
    MAGNITUDE,
    PREFIX,
    Joint,
    joined_modules,
    joints_of,
    our_names,
    split_up,
)
from models.adapters import AdapterSpec
from models.layers.lora import PARTS, LowRank, merged_weight, scale_of
from models.weights import KeyMap, Shape
from parallelisms.materialise import fill

if TYPE_CHECKING:
    from engine.config import JobConfig

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
UNFELT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
        *("revision", "task_type", "megatron_core", "qalora_group_size", "lora_dropout"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
        *("init_lora_weights", "eva_config", "runtime_config", "ensure_weight_tying"),
    }
)
"""Keys of adapter_config.json that are read, seen in the tensors, or without effect on them."""

KEEPS_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base's weights as they are."""


def is_adapter_folder(folder: Path | str) -> bool:
    """Say whether a folder holds an adapter in PEFT's format."""
    return (Path(folder) / CONFIG_NAME).is_file()


def adapters_below(folder: Path) -> list[Path]:
    """List the adapters in folders inside this one, where PEFT keeps those with other names."""
    return sorted(file.parent for file in folder.glob(f"*/{CONFIG_NAME}"))


class AdapterFolder:
    """An adapter as PEFT saved it; a ValueError says what is wrong with it, or not there.

    `modules` is what adapts each module, by its name in the base model.
    """

    def __init__(self, folder: Path | str, key: str = "adapter.path") -> None:
        self.folder, self._key = Path(folder).expanduser(), key
        self.config = self._read_config()
        self._refuse_other_kinds()
        self.modules = self._read_modules()

    @property
    def base(self) -> str:
        """Name or path of the model that it adapts; empty where the file does not say."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def is_dora(self) -> bool:
        """Whether it has magnitudes."""
        return bool(self.config.get("use_dora"))

    def mistake(self, said: str, remedy: str) -> ValueError:
        """Return the error of a setting that does not fit this folder."""
        return ValueError(f"{self._key} = {str(self.folder)!r}: {said}; {remedy}")

    @property
    def base_folder(self) -> Path:
        """The Hugging Face folder of the base; ValueError where it is not on this machine."""
        folder = Path(self.base)
        if not (self.base and (folder / MODEL_CONFIG_NAME).is_file()):
            raise self.mistake(
                f"base_model_name_or_path is {self.base!r}, which is no Hugging Face folder here",
                f"put the path of the base there, in {CONFIG_NAME}, or merge the adapter into it",
            )
        return folder

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / CONFIG_NAME
        try:
            content = json.loads(path.read_text())
        except FileNotFoundError:
            raise self.mistake(
                f"it holds no {CONFIG_NAME}", "give a folder that PEFT or this engine wrote"
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise self.mistake(f"{path.name} cannot be read ({error})", "save it again") from error
        if not isinstance(content, dict):
            raise self.mistake(f"{path.name} holds no object", "save it again")
        return content

    def _refuse_other_kinds(self) -> None:
        """Refuse what changes the arithmetic in a way that is not there."""
        config, remedy = self.config, "give an adapter of LoRA or DoRA on linear layers alone"
        if config.get("peft_type") != "LORA":
            raise self.mistake(f"peft_type is {config.get('peft_type')!r}", remedy)
        start = config.get("init_lora_weights", True)
        if start not in KEEPS_THE_BASE:
            raise self.mistake(
                f"init_lora_weights is {start!r}, which changes the base's weights as well",
                "convert it with PEFT's path_initial_model_for_weight_conversion",
            )
        for name, value in config.items():
            if name not in UNFELT and value not in (None, False, "none", [], {}):
                raise self.mistake(f"{name} is {value!r}, which is not there", remedy)

    def _read_modules(self) -> dict[str, LowRank]:
        """Return what adapts each module, by its name in the base model."""
        path = self.folder / WEIGHTS_NAME
        if not path.is_file():
            raise self.mistake(
                f"it holds no {WEIGHTS_NAME}", "load it with PEFT and save it again as safetensors"
            )
        try:
            stored = load_file(path)
        except (SafetensorError, OSError) as error:
            raise self.mistake(f"{path.name} cannot be read ({error})", "copy it again") from error
        found: dict[str, dict[str, Tensor]] = {}
        strange: list[str] = []
        for name, tensor in stored.items():
            match = re.fullmatch(rf"(?:{PREFIX})?(.+)\.({'|'.join(PARTS)})(?:\.weight)?", name)
            if match is None:
                strange.append(name)
            else:
                found.setdefault(match[1], {})[match[2]] = tensor
        wanted = set(PARTS if self.is_dora else PARTS[:-1])
        others = {name: sorted(has) for name, has in found.items() if has.keys() != wanted}
        strange += [f"{name} with {has}" for name, has in others.items()]
        if strange or not found:
            raise self.mistake(
                f"{path.name} does not hold {' and '.join(sorted(wanted))} of some linear layers "
                f"and nothing else, but {list_groups(strange) or 'no tensor'}",
                "save the adapter again, without other trained modules",
            )
        return {
            module: LowRank(
                a=has["lora_A"],
                b=has["lora_B"],
                scale=self._scale(module, len(has["lora_A"])),
                magnitude=has.get(MAGNITUDE),
            )
            for module, has in found.items()
        }

    def _scale(self, module: str, rank: int) -> float:
        alpha = float(_of_pattern(self.config, "alpha_pattern", module, "lora_alpha", 8))
        return scale_of(rank, alpha, use_rslora=bool(self.config.get("use_rslora")))


def _of_pattern(
    config: Mapping[str, Any], pattern: str, module: str, otherwise: str, default: Any
) -> Any:
    """Return what a table of patterns says of a module, as PEFT's get_pattern_key finds it."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return config.get(otherwise, default)


def read_adapter(
    folder: AdapterFolder,
    spec: AdapterSpec,
    shapes: Mapping[str, Shape],
    key_map: KeyMap,
) -> dict[str, Tensor]:
    """Return an adapter by our names, given the shapes of all tensors of the adapted model.

    A ValueError where the folder's is another one: other modules, rank, scale or kind.
    """
    if folder.is_dora != (spec.kind == "dora"):
        kind = "dora" if folder.is_dora else "lora"
        raise folder.mistake(
            f"it is of the other kind than adapter.kind = {spec.kind!r}",
            f"set adapter.kind = {kind!r}",
        )
    joints = joints_of(shapes, joined_modules(key_map), spec.name)
    ours, theirs = {joint.module for joint in joints}, folder.modules.keys()
    complaints: list[str] = []
    if missing := ours - theirs:
        complaints.append(f"it does not adapt {list_groups(missing)}")
    if unexpected := theirs - ours:
        complaints.append(f"it adapts {list_groups(unexpected)} as well")
    if complaints:
        raise folder.mistake(
            f"{list_names(complaints, '; ')}, other than adapter.targets = {list(spec.targets)}",
            "set adapter.targets to its modules",
        )
    found: dict[str, Tensor] = {}
    for joint in joints:
        found |= _our_tensors(folder, spec, joint, shapes)
    return found


def _our_tensors(
    folder: AdapterFolder, spec: AdapterSpec, joint: Joint, shapes: Mapping[str, Shape]
) -> dict[str, Tensor]:
    stored = folder.modules[joint.module]
    wanted = (joint.num_rows, shapes[f"{joint.parts[0]}.weight"][1])
    if (len(stored.b), stored.a.shape[1]) != wanted:
        raise folder.mistake(
            f"it adapts {joint.module} as a matrix of {len(stored.b)} x {stored.a.shape[1]}, and "
            f"that of this model has {wanted[0]} x {wanted[1]}",
            "give an adapter of this model",
        )
    parts = split_up(joint, stored, spec.rank)
    if parts is None:
        raise folder.mistake(
            f"its rank for {joint.module} is {len(stored.a)}, and adapter.rank = {spec.rank}",
            f"set adapter.rank = {len(stored.a)}",
        )
    if not math.isclose(stored.scale, spec.scale, rel_tol=1e-6):
        raise folder.mistake(
            f"it scales what it adds to {joint.module} by {stored.scale:g}, and this run by "
            f"{spec.scale:g} (adapter.alpha = {spec.alpha:g}, adapter.use_rslora = "
            f"{str(spec.use_rslora).lower()})",
            f"set adapter.alpha = {folder.config.get('lora_alpha', 8)} and adapter.use_rslora = "
            f"{str(bool(folder.config.get('use_rslora'))).lower()}",
        )
    found: dict[str, Tensor] = {}
    for part, one in parts.items():
        named = zip(our_names(part, spec.name), (one.a, one.b, one.magnitude), strict=True)
        found |= {name: tensor for name, tensor in named if tensor is not None}
    return found


def merge_into(model: nn.Module, folder: AdapterFolder, key_map: KeyMap) -> None:
    """Add an adapter to the weights of a model that is whole and has none beside them."""
    joined = joined_modules(key_map)
    for module, adapter in folder.modules.items():
        names = [f"{part}.weight" for part in joined.get(module, (module,))]
        try:
            parts = [model.get_parameter(name) for name in names]
        except AttributeError:
            raise folder.mistake(
                f"it adapts {module}, which its base {folder.base} has not",
                "give an adapter of that base",
            ) from None
        weight = torch.cat([part.detach() for part in parts])
        if weight.shape != (len(adapter.b), adapter.a.shape[1]):
            raise folder.mistake(
                f"it adapts {module} as a matrix of {len(adapter.b)} x {adapter.a.shape[1]}, and "
                f"its base {folder.base} has one of {' x '.join(map(str, weight.shape))}",
                "give an adapter of that base",
            )
        here = LowRank(
            a=adapter.a.to(weight.device),
            b=adapter.b.to(weight.device),
            scale=adapter.scale,
            magnitude=None if adapter.magnitude is None else adapter.magnitude.to(weight.device),
        )
        merged = merged_weight(weight, [here]).split([len(part) for part in parts])
        with torch.no_grad():
            for part, value in zip(parts, merged, strict=True):
                part.copy_(value)


def load_with_peft(folders: Mapping[str, Path]) -> Any:
    """Return the base of adapters as transformers loads it, all of them added by the package peft.

    `folders` is where each of them lies, by its name.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(
            "--verify of an adapter needs the package peft, which is not installed; install it, or "
            "write a whole model with --merge"
        ) from error
    from transformers import AutoModelForCausalLM

    (name, folder), *others = folders.items()
    base = AdapterFolder(folder, key="--verify").base_folder
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    for other, its_folder in others:
        model.load_adapter(str(its_folder), other)
    model.base_model.set_adapter(list(folders))
    return model.eval()


def read_adapters(
    model: nn.Module, config: "JobConfig", architecture: Architecture
) -> dict[str, Tensor]:
    """Return what the adapters of an adapted model start from, whole, by our names.

    Empty where no adapter has a path. ValueError where a folder holds another adapter; the model
    may be without memory.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
    key_map = architecture.family.key_map(architecture.config)
    found: dict[str, Tensor] = {}
    for one in config.adapter.all:
        spec = one.spec
        assert spec is not None, "adapters that there are have a kind"
        _refuse_parts_of_a_magnitude(spec, joints_of(shapes, joined_modules(key_map), spec.name))
        if not one.path:
            continue
        folder = AdapterFolder(one.path)
        if folder.base and (Path(folder.base) / MODEL_CONFIG_NAME).is_file():
            other = difference_from(Path(folder.base), config.model, architecture.config)
            if other is not None:
                raise folder.mistake(
                    f"it adapts {folder.base}, which is another model: {other}",
                    "give an adapter of this model",
                )
        found |= read_adapter(folder, spec, shapes, key_map)
    return found


def _refuse_parts_of_a_magnitude(spec: AdapterSpec, joints: Sequence[Joint]) -> None:
    """Refuse DoRA on a part of what files join, where one magnitude is that of all rows."""
    if spec.kind != "dora":
        return
    for joint in joints:
        if others := set(joint.parts) - set(joint.adapted):
            raise ValueError(
                f"adapter.targets = {list(spec.targets)} with adapter.kind = 'dora' adapts "
                f"{', '.join(joint.adapted)} and not {', '.join(sorted(others))}, which files of "
                f"PEFT keep as one {joint.module} with one magnitude; target all of them or none"
            )


def fill_from(model: nn.Module, adapters: Mapping[str, Tensor]) -> None:
    """Set parameters of adapters, of which each rank may hold a part, from whole tensors."""
    fill(model, lambda name, slices: adapters[name][slices], chosen=adapters.__contains__)
