"""What a checkpoint holds, as named tensors: parameters, optimizer state, random generators.

Of a model with adapters these alone: its base stays where it came from, which `counters.json` says.
Keys of the tensors: a parameter has its own name (which is the Hugging Face one), optimizer state
is `optimizer.<parameter>.<slot>`, the generators of a rank are `rng.<rank>`. Counters lie beside
them in `counters.json`. The learning rate is a function of the step, so it is not stored.
"""

import base64
import json
import logging
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.optim import Optimizer

from engine.checkpoint_storage import RankGroup, read_metadata, read_tensors
from models.layers.lora import adapter_of
from parallelisms.low_precision import refuse_other_state
from parallelisms.stored import full_precision, stored, zeros_by_rows

COUNTERS_NAME = "counters.json"
Part = Literal["model", "optimizer", "dataloader", "train_state", "rng"]
PARTS: tuple[Part, ...] = get_args(Part)

_OPTIMIZER_PREFIX = "optimizer."
_RNG_PREFIX = "rng."
_SHOWN_NAMES = 8

log = logging.getLogger("tessera")


@dataclass(kw_only=True, slots=True)
class TrainingState:
    """Everything that a run needs to go on where it was."""

    model: nn.Module
    """Parallelised or not; its tensors are read and written in place."""

    optimizer: Optimizer | None = None
    """None where only the model matters."""

    counters: dict[str, int | float] = field(default_factory=dict[str, int | float])
    """Updated in place by a load. `step` and `rows_consumed` (batches, where the data is dealt in
    batches) have a meaning here, others do not."""

    data_fingerprint: str = ""
    """What `rows_consumed` counts in; a full load refuses a cursor into other data."""

    reference: dict[str, str] = field(default_factory=dict[str, str])
    """What answers are compared with, as `origin.py` tells one from another; empty: nothing."""

    base: dict[str, str] = field(default_factory=dict[str, str])
    """What adapters stand beside, told apart likewise; empty: all parameters are trained."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, sharded, a tied one once."""
    # state_dict and not named_parameters: its hooks return FSDP modules to their shards first.
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def base_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that belong to no adapter."""
    return {name: tensor for name, tensor in tensors.items() if adapter_of(name) is None}


def kept_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a model: adapters where there are some, else all."""
    adapters = {n: tensor for n, tensor in tensors.items() if adapter_of(n) is not None}
    return adapters or dict(tensors)


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(tensor): name for name, tensor in model_tensors(model).items()}


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the memory of a model's tensors: float8 layers in full, four bits as they are."""
    return {name: stored(tensor.detach()) for name, tensor in tensors.items()}


def collect(state: TrainingState, rank: int) -> dict[str, Tensor]:
    """Return the tensors of a full checkpoint, as views of what training uses."""
    tensors = _stored(kept_tensors(model_tensors(state.model)))
    if state.optimizer is not None:
        names = _parameter_names(state.model)
        for parameter, slots in state.optimizer.state.items():
            for slot, value in slots.items():
                assert isinstance(value, Tensor), f"optimizer state {slot} is a tensor"
                tensors[f"{_OPTIMIZER_PREFIX}{names[id(parameter)]}.{slot}"] = value.detach()
    tensors[f"{_RNG_PREFIX}{rank}"] = _pack_generators()
    return tensors


def collect_model(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what is kept of the model alone, floating-point tensors as `dtype`."""
    kept = kept_tensors(model_tensors(model))
    values = {name: full_precision(tensor.detach()) for name, tensor in kept.items()}
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in values.items()
    }


def count_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of all tensors together, over all ranks, each shard counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def encode_counters(state: TrainingState) -> bytes:
    """Return the content of `counters.json`."""
    content = {
        "counters": state.counters,
        "data_fingerprint": state.data_fingerprint,
        "reference": state.reference,
        "base": state.base,
    }
    return json.dumps(content, indent=1, sort_keys=True).encode()


def saved_identity(folder: Path, name: Literal["reference", "base"]) -> dict[str, str]:
    """Return that field of `TrainingState` as a checkpoint has it, empty where it has none."""
    return json.loads((folder / COUNTERS_NAME).read_text()).get(name, {})


def restore(
    state: TrainingState,
    folder: Path,
    ranks: RankGroup,
    *,
    parts: Collection[Part],
    widen: bool,
    only_base: bool = False,
) -> None:
    """Load the named parts of a verified checkpoint folder into `state`, in place.

    Of the model that is what a checkpoint of it would hold, or with `only_base` all but adapters.

    A checkpoint of another model, shape or dtype is a ValueError that lists the keys, before
    anything is changed; `widen` allows 16-bit parameters in the file for 32-bit ones in memory.
    Every rank must call this.
    """
    metadata = read_metadata(folder)
    counters = _read_counters(state, folder, parts)
    tensors: dict[str, Tensor] = {}
    if "model" in parts:
        whole = model_tensors(state.model)
        tensors = _stored(base_tensors(whole) if only_base else kept_tensors(whole))
        refuse_other_model(tensors, metadata, folder, widen=widen)
    slots = _optimizer_slots(state, metadata) if "optimizer" in parts else {}
    for name, parameter_slots in slots.items():
        for slot, tensor in parameter_slots.items():
            tensors[f"{_OPTIMIZER_PREFIX}{name}.{slot}"] = tensor
    generators = _empty_generators(metadata, ranks.rank) if "rng" in parts else {}
    read_tensors({**tensors, **generators}, folder, metadata, ranks)
    _install_slots(state, slots)
    for packed in generators.values():
        _unpack_generators(packed)
    last = f"{_RNG_PREFIX}{ranks.world_size - 1}"
    if "rng" in parts and ranks.rank == 0 and last not in metadata.state_dict_metadata:
        log.warning("%s was saved by fewer ranks: the added ones keep their seeds", folder)
    state.counters.update(counters)


def _read_counters(
    state: TrainingState, folder: Path, parts: Collection[Part]
) -> dict[str, int | float]:
    if not {"train_state", "dataloader"} & set(parts):
        return {}
    content = json.loads((folder / COUNTERS_NAME).read_text())
    fingerprint = content["data_fingerprint"]
    if "dataloader" in parts and fingerprint != state.data_fingerprint:
        raise ValueError(
            f"{folder} counts its rows in data with fingerprint {fingerprint!r}, this run reads "
            f"{state.data_fingerprint!r}: the position would be meaningless; give the same data, "
            f"or start the data anew with checkpoint.exclude_from_loading = ['dataloader']"
        )
    owners: dict[str, Part] = {"rows_consumed": "dataloader"}
    return {
        name: value
        for name, value in content["counters"].items()
        if owners.get(name, "train_state") in parts
    }


def list_names(names: Collection[str], separator: str = ", ") -> str:
    """Join names for an error message, a long list cut short."""
    shown = separator.join(sorted(names)[:_SHOWN_NAMES])
    return shown if len(names) <= _SHOWN_NAMES else f"{shown} and {len(names) - _SHOWN_NAMES} more"


def refuse_other_model(
    tensors: Mapping[str, Tensor],
    metadata: Metadata,
    folder: Path,
    *,
    widen: bool = False,
    any_dtype: bool = False,
) -> None:
    """Raise a ValueError listing every disagreement between the model and the checkpoint."""
    stored = {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
        and not name.startswith((_OPTIMIZER_PREFIX, _RNG_PREFIX))
    }
    if any(map(adapter_of, stored)) and not any(map(adapter_of, tensors)):
        raise ValueError(
            f"{folder} holds adapters alone, without the model that they adapt; write both as one "
            "with scripts/convert_dcp_to_hf.py --merge and start from that folder, or without "
            "--merge the adapters, and go on training these beside their base with that folder as "
            "adapter.path"
        )
    _refuse_other_packing(tensors, stored, folder)
    complaints: list[str] = []
    if missing := tensors.keys() - stored.keys():
        complaints.append(f"the checkpoint lacks {list_names(missing)}")
    if unexpected := stored.keys() - tensors.keys():
        complaints.append(f"the model lacks {list_names(unexpected)}")
    for name in sorted(tensors.keys() & stored.keys()):
        here, there = tensors[name], stored[name]
        if tuple(here.shape) != tuple(there.size):
            complaints.append(
                f"{name} has shape {tuple(there.size)} in the checkpoint, {tuple(here.shape)} here"
            )
        dtype = there.properties.dtype
        if not (dtype == here.dtype or any_dtype or (widen and _widens(dtype, here.dtype))):
            complaints.append(f"{name} is {dtype} in the checkpoint, {here.dtype} here")
    if complaints:
        raise ValueError(
            f"{folder} is a checkpoint of another model: {list_names(complaints, '; ')}; set "
            f"model.* and training.dtype as they were, or give another job.dump_folder"
        )


def _refuse_other_packing(
    tensors: Mapping[str, Tensor], stored: Mapping[str, TensorStorageMetadata], folder: Path
) -> None:
    """Raise a ValueError where weights are packed in four bits on one side alone."""
    for name in sorted(tensors.keys() & stored.keys()):
        is_packed_here = tensors[name].dtype == torch.uint8
        is_packed_there = stored[name].properties.dtype == torch.uint8
        if is_packed_here and not is_packed_there:
            raise ValueError(
                f'{folder} holds {name} unpacked, and model.converters = ["nf4"] packs weights '
                "only while they are read from a Hugging Face folder; write one with "
                "scripts/convert_dcp_to_hf.py, and start a new run from it with "
                "checkpoint.initial_load_path and checkpoint.initial_load_in_hf = true"
            )
        if is_packed_there and not is_packed_here:
            raise ValueError(
                f"{folder} holds {name} packed in four bits; read it with model.converters = "
                '["nf4"] and the model.freeze of its run, which can export it unpacked with '
                "checkpoint.last_save_in_hf = true"
            )


def _widens(stored: torch.dtype, here: torch.dtype) -> bool:
    return stored.is_floating_point and here.is_floating_point


def _optimizer_slots(state: TrainingState, metadata: Metadata) -> dict[str, dict[str, Tensor]]:
    """Make empty optimizer state as the checkpoint has it, laid out as the parameters are."""
    assert state.optimizer is not None, "the optimizer is loaded only where there is one"
    names = _parameter_names(state.model)
    trained = {
        names[id(parameter)]: parameter
        for group in state.optimizer.param_groups
        for parameter in group["params"]
    }
    slots: dict[str, dict[str, Tensor]] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not key.startswith(_OPTIMIZER_PREFIX):
            continue
        name, _, slot = key.removeprefix(_OPTIMIZER_PREFIX).rpartition(".")
        if name not in trained:
            raise ValueError(
                f"the checkpoint holds optimizer state of {name}, which this run does not train; "
                f"leave it out with checkpoint.exclude_from_loading = ['optimizer']"
            )
        assert isinstance(entry, TensorStorageMetadata), "optimizer state is stored as tensors"
        parameter, dtype = trained[name], entry.properties.dtype
        if entry.size == parameter.shape:
            value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        elif len(entry.size) == parameter.ndim:
            value = zeros_by_rows(parameter, tuple(entry.size), dtype)
        else:
            value = torch.zeros(entry.size, dtype=dtype)
        slots.setdefault(name, {})[slot] = value
    refuse_other_state(state.optimizer, {slot for one in slots.values() for slot in one})
    return slots


def _install_slots(state: TrainingState, slots: Mapping[str, dict[str, Tensor]]) -> None:
    """Hand loaded slots to the optimizer; its hyperparameters stay those of this run."""
    if state.optimizer is None or not slots:
        return
    names = _parameter_names(state.model)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    by_number = {
        number: slots[names[id(parameter)]]
        for number, parameter in enumerate(parameters)
        if names[id(parameter)] in slots
    }
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": by_number, "param_groups": groups})


def _pack_generators() -> Tensor:
    """Return the states of this process's random generators as bytes."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    content = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "cuda": None,
    }
    if torch.cuda.is_available():
        state = torch.cuda.get_rng_state().numpy().tobytes()
        content["cuda"] = base64.b64encode(state).decode()
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def _empty_generators(metadata: Metadata, rank: int) -> dict[str, Tensor]:
    key = f"{_RNG_PREFIX}{rank}"
    entry = metadata.state_dict_metadata.get(key)
    if not isinstance(entry, TensorStorageMetadata):
        return {}
    return {key: torch.zeros(entry.size, dtype=torch.uint8)}


def _unpack_generators(packed: Tensor) -> None:
    content = json.loads(packed.numpy().tobytes())
    version, internal, gauss = content["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = content["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_decode(content["torch"]))
    if content["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(content["cuda"]))


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
