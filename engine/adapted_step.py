"""A checkpoint step of adapters, on its own: what they are, and the base that they stand beside.

The step says where the base came from; its files must still be there, and be the same.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata

from engine.checkpoint_search import Source, verify_or_refuse
from engine.checkpoint_state import base_tensors, model_tensors, refuse_other_model, saved_identity
from engine.checkpoint_storage import RankGroup, read_metadata, read_tensors
from engine.hf_weights import HfWeights, refuse_other_weights
from engine.origin import weights_digest
from models.adapters import AdapterSpec
from models.weights import KeyMap
from parallelisms.materialise import Draw

ADAPTERS_NAME = "adapters.json"

Read = Callable[[str], Tensor]
"""Returns a whole tensor by our name."""


def encode_specs(specs: Sequence[AdapterSpec]) -> bytes:
    """Return the content of the file in a step that says what its adapters are."""
    return json.dumps([asdict(spec) for spec in specs], indent=1, sort_keys=True).encode()


def read_specs(step: Path) -> list[AdapterSpec]:
    """Return the adapters of a step; none where it holds a whole model."""
    path = step / ADAPTERS_NAME
    return [AdapterSpec(**one) for one in json.loads(path.read_text())] if path.is_file() else []


def base_folder(step: Path) -> str:
    """Return the Hugging Face folder of a step's base; empty where it came from elsewhere."""
    base = saved_identity(step, "base")
    return base["name"] if base["kind"] == "hf" else ""


def open_base(step: Path, model: nn.Module, key_map: KeyMap, draw: Callable[[int], Draw]) -> Read:
    """Return what reads the tensors of a step's base, one at a time.

    `model` is the adapted one, without memory; `draw` makes the function that draws initial values.
    ValueError where the base is gone or another one.
    """
    base = saved_identity(step, "base")
    tensors = base_tensors(model_tensors(model))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if base["kind"] == "drawn":
        value = draw(int(base["seed"]))
        return lambda name: value(name, tuple(slice(0, size) for size in shapes[name]))
    if "seed" in base:
        raise ValueError(
            f"{step} adapts {base['name']}, and values that were drawn where that has none "
            "(checkpoint.initial_load_allow) and are not kept; let the run export them, with "
            "adapter.merge_export = true and checkpoint.last_save_in_hf = true"
        )
    path = Path(base["name"])
    _refuse_other_base(step, path, base)
    if base["kind"] == "hf":
        weights = HfWeights(path)
        names = key_map.of_files(weights.names, shapes)
        refuse_other_weights(weights, names.shapes(shapes), names)
        places = names.places(shapes)

        def read(name: str) -> Tensor:
            whole = tuple(slice(0, size) for size in shapes[name])
            return weights.read(places[name].stored, places[name].slices(whole))

        return read
    refuse_other_model(tensors, read_metadata(path), path, any_dtype=True)
    return step_reader(path)


def step_reader(step: Path) -> Read:
    """Return what reads the tensors of a step, one at a time."""
    metadata = read_metadata(step)
    return lambda name: read_tensor(name, step, metadata)


def read_tensor(name: str, step: Path, metadata: Metadata) -> Tensor:
    """Return a whole tensor of a step, in its stored dtype."""
    entry: Any = metadata.state_dict_metadata[name]
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    read_tensors({name: tensor}, step, metadata, None)
    return tensor


def _refuse_other_base(step: Path, path: Path, base: Mapping[str, str]) -> None:
    remedy = "put the base back there, or export from the run with adapter.merge_export = true"
    if not path.is_dir():
        raise ValueError(f"{step} adapts the weights in {path}, which is not there; {remedy}")
    kind = "hf" if base["kind"] == "hf" else "initial"
    if kind == "initial":
        verify_or_refuse(path, RankGroup(), model_suffices=True)
    found = weights_digest(Source(kind=kind, path=path, step=0, only_model=True), {}, None)
    if found != base["weights"]:
        raise ValueError(
            f"{step} adapts weights {base['weights'][:12]}, and {path} now holds {found[:12]}; "
            f"{remedy}"
        )
