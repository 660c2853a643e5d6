"""Checkpoints to Hugging Face folders and back in one process, one tensor in memory at a time.

Needs nothing but the folder: a step carries its model's config.json and tokenizer under `hf/`.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.nn.functional import kl_div, log_softmax

from engine.adapted_step import Read, base_folder, open_base, read_specs, step_reader
from engine.checkpoint_search import initial_step
from engine.checkpoint_state import (
    COUNTERS_NAME,
    TrainingState,
    base_tensors,
    count_bytes,
    encode_counters,
    kept_tensors,
    model_tensors,
    refuse_other_model,
)
from engine.checkpoint_storage import RankGroup, read_metadata, write_tensors
from engine.data.tokenizer import has_tokenizer, load_tokenizer
from engine.hf_io import (
    CONFIG_NAME,
    MAX_SHARD_BYTES,
    AdapterAssets,
    FolderWriter,
    HfAssets,
    join,
    low_ranks,
    read_generation_config,
    read_hf_config,
)
from engine.hf_weights import HfWeights, refuse_other_weights
from engine.manifest import Manifest, commit, refuse_small_disk, write_synced
from engine.peft_export import place_of, write_adapters
from engine.peft_io import load_with_peft
from engine.provenance import HF_PREFIX, checkpoint_files
from models.adapters import AdapterSpec, adapt
from models.initialise import initial_values
from models.layers.lora import adapted_linears, adapter_of, adapters_disabled, merged_weight
from models.registry import family_for_hf
from models.weights import KeyMap, Shape
from parallelisms.materialise import Draw, materialise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROWS, _TOKENS, _SEED = 2, 64, 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How far the logits of two models are apart on the same tokens."""

    max_abs: float
    """Largest difference of a logit."""

    largest_logit: float
    """Largest absolute logit, to compare `max_abs` with."""

    kl: float
    """Mean over tokens of the Kullback-Leibler divergence of their predictions, in nats."""

    top1: float
    """Share of tokens for which both predict the same next token."""

    def is_within(self, tolerance: float) -> bool:
        """Whether logits agree to `tolerance`, relative to the largest where that is above 1."""
        bound = tolerance * max(1.0, self.largest_logit)
        return self.max_abs <= bound and self.kl <= tolerance and self.top1 >= 0.99

    def __str__(self) -> str:
        return (
            f"max abs difference {self.max_abs:.2e} of logits up to {self.largest_logit:.1f}, "
            f"KL {self.kl:.2e} nats, top-1 agreement {self.top1:.2%}"
        )


def find_step(checkpoint: Path) -> Path:
    """Return the verified step folder at `checkpoint`: itself, or the newest good one inside."""
    if not checkpoint.is_dir():
        raise ValueError(
            f"{checkpoint} is not a folder; give a checkpoint step or a folder of them"
        )
    ranks = RankGroup()
    return initial_step(checkpoint, ranks, model_suffices=True, key="CHECKPOINT")[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Described:
    """What the files of a step say of its model."""

    model: nn.Module
    """Without memory, with its adapters."""

    key_map: KeyMap
    vocab_size: int
    specs: Sequence[AdapterSpec]
    draw: Callable[[int], Draw]
    """Makes the function that draws initial values from a seed."""


def checkpoint_to_hf(
    step: Path,
    out: Path,
    dtype: torch.dtype,
    *,
    merge: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a step's parameters as a complete Hugging Face folder `out`, which must not exist.

    Adapters are written as a folder that PEFT loads, or with `merge` in the weights of their base.
    """
    _refuse_existing(out)
    described = _described(step)
    if described.specs and not merge:
        _write_adapters(step, out, dtype, described)
        return
    if merge and not described.specs:
        raise ValueError(f"--merge: {step} holds a whole model and no adapters; leave it out")
    key_map, tensors = described.key_map, base_tensors(model_tensors(described.model))
    read = _reader(step, described, dtype)
    shapes = key_map.shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    writer = FolderWriter(out, shapes, dtype, max_shard_bytes=max_shard_bytes)
    try:
        writer.open()
        for hf, parts in key_map.parts(tensors).items():
            writer.add(hf, join([read(part) for part in parts]))
        writer.finish(_hf_files(step / HF_PREFIX, dtype))
    finally:
        writer.discard()


def _reader(step: Path, described: _Described, dtype: torch.dtype) -> Read:
    """Return what reads a parameter of a step as `dtype`, its adapters merged into it."""
    kept = kept_tensors(model_tensors(described.model))
    refuse_other_model(kept, read_metadata(step), step, any_dtype=True)
    of_step = step_reader(step)
    if not described.specs:
        return lambda name: of_step(name).to(dtype)
    of_base = open_base(step, described.model, described.key_map, described.draw)
    adapted = dict(adapted_linears(described.model))

    def read(name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        weight = of_base(name)
        if module not in adapted or kind != "weight":
            return weight.to(dtype)
        adapters = low_ranks(adapted[module], lambda part, _: of_step(f"{module}.{part}"))
        wide = torch.promote_types(weight.dtype, dtype)
        return merged_weight(weight.to(wide), adapters).to(dtype)

    return read


def _write_adapters(step: Path, out: Path, dtype: torch.dtype, described: _Described) -> None:
    tensors = model_tensors(described.model)
    kept = kept_tensors(tensors)
    refuse_other_model(kept, read_metadata(step), step, any_dtype=True)
    read, folder = step_reader(step), step / HF_PREFIX
    assets = HfAssets(
        key_map=described.key_map,
        config=read_hf_config(folder),
        save_tokenizer=lambda target: _copy_tokenizer(folder, target),
        generation_config=read_generation_config(folder),
        adapters=AdapterAssets(specs=described.specs, base=base_folder(step), merge=False),
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_adapters({name: read(name).to(dtype) for name in kept}, shapes, out, assets, dtype)


def hf_to_checkpoint(folder: Path, out: Path, dtype: torch.dtype) -> None:
    """Write a Hugging Face folder's parameters as a checkpoint step `out`, which must not exist.

    It holds the model alone: a run starts from it through `checkpoint.initial_load_path`.
    """
    _refuse_existing(out)
    hf_config = read_hf_config(folder)
    model, key_map, _ = _empty_model(hf_config)
    weights = HfWeights(folder)
    tensors = {name: tensor.detach().to(dtype) for name, tensor in model_tensors(model).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    key_map = key_map.of_files(weights.names, shapes)
    refuse_other_weights(weights, key_map.shapes(shapes), key_map)
    assets = HfAssets(
        key_map=key_map,
        config=hf_config,
        save_tokenizer=lambda target: _copy_tokenizer(folder, target),
        generation_config=read_generation_config(folder),
    )
    files = checkpoint_files(
        config_toml="", hf=assets, dtype=dtype, facts={"converted_from": str(folder)}
    )
    files[COUNTERS_NAME] = encode_counters(TrainingState(model=model))
    temporary = out.with_name(f"{out.name}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    refuse_small_disk(out.parent, count_bytes(tensors), f"write {out}")
    try:
        temporary.mkdir()
        planner = _ReadingPlanner(weights, shapes, key_map, dtype)
        records = write_tensors(
            tensors, temporary, RankGroup(), planner=planner, one_file_per_tensor=True
        )
        for name, content in files.items():
            records[name] = write_synced(temporary / name, content)
        commit(temporary, out, Manifest(step=0, contents="model", world_size=1, files=records))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def compare_logits(step: Path, exported: Path, dtype: torch.dtype) -> Difference:
    """Compare our model, filled from the step, with what transformers loads from the export.

    Both compute in fp32 from parameters rounded to `dtype`, on random tokens, one after the other.
    Where the export is of adapters, transformers has PEFT adapt the base. In fp32 our adapters are
    beside the weights also where the export has merged them.
    """
    described = _described(step)
    model, vocab_size = described.model, described.vocab_size
    generator = torch.Generator().manual_seed(_SEED)
    tokens_BT = torch.randint(vocab_size, (_ROWS, _TOKENS), generator=generator)
    positions_BT = torch.arange(_TOKENS).expand(_ROWS, _TOKENS)
    is_whole = (exported / CONFIG_NAME).is_file()
    places = {spec.name: place_of(spec, described.specs) for spec in described.specs}
    adapters = {} if is_whole else {name: exported / place for name, place in places.items()}
    with _filled(described, step, dtype, is_merged=is_whole), torch.no_grad():
        ours = model(tokens_BT, positions_BT=positions_BT).float()
    del model, described
    return difference_of(ours, _transformers_logits(exported, adapters, tokens_BT))


def _filled(
    described: _Described, step: Path, dtype: torch.dtype, *, is_merged: bool
) -> AbstractContextManager[None]:
    """Give the model the values of a step that an export of `dtype` has; compute with it inside.

    Adapters stay beside the weights, except in an export that has merged and then rounded them.
    """
    model = described.model
    is_merged = is_merged and bool(described.specs) and dtype != torch.float32
    of_step = step_reader(step)
    if described.specs and not is_merged:
        of_base = open_base(step, model, described.key_map, described.draw)
    else:
        of_base = _reader(step, described, dtype)
    materialise(model, "cpu")
    with torch.no_grad():
        for name, tensor in model_tensors(model).items():
            is_beside = adapter_of(name) is not None
            tensor.copy_(of_step(name).to(dtype) if is_beside else of_base(name))
    return adapters_disabled(model) if is_merged else nullcontext()


def _transformers_logits(folder: Path, adapters: Mapping[str, Path], tokens_BT: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM  # slow to import and only needed here

    if adapters:
        model = load_with_peft(adapters)
    else:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens_BT).logits.float()


def difference_of(ours: Tensor, theirs: Tensor) -> Difference:
    """Compare the logits (B, T, V) of two models on the same tokens."""
    ours_log, theirs_log = log_softmax(ours, -1), log_softmax(theirs, -1)
    divergence = kl_div(ours_log, theirs_log, log_target=True, reduction="none").sum(-1).mean()
    return Difference(
        max_abs=(ours - theirs).abs().max().item(),
        largest_logit=theirs.abs().max().item(),
        kl=max(0.0, divergence.item()),
        top1=(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    )


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} exists already; remove it, or give another folder")


def _described(step: Path) -> _Described:
    hf_config = read_hf_config(step / HF_PREFIX)
    model, key_map, vocab_size = _empty_model(hf_config)
    family = family_for_hf(hf_config, or_any=True)
    sizes, specs = family.config_from_hf(hf_config), read_specs(step)
    adapt(model, family.plan(sizes), specs)
    draw = family.initial_values or initial_values
    return _Described(
        model=model,
        key_map=key_map,
        vocab_size=vocab_size,
        specs=specs,
        draw=lambda seed: draw(model, sizes, seed=seed),
    )


def _empty_model(hf_config: Mapping[str, object]) -> tuple[nn.Module, KeyMap, int]:
    family = family_for_hf(hf_config, or_any=True)
    sizes = family.config_from_hf(hf_config)
    with torch.device("meta"):
        return family.build(sizes), family.key_map(sizes), sizes.vocab_size


def _hf_files(folder: Path, dtype: torch.dtype) -> dict[str, bytes]:
    """Return the files of a Hugging Face folder, its config.json saying `dtype`."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    name = str(dtype).removeprefix("torch.")
    config = {**read_hf_config(folder), "dtype": name, "torch_dtype": name}
    files[CONFIG_NAME] = json.dumps(config, indent=2, sort_keys=True).encode()
    return files


def _copy_tokenizer(folder: Path, target: Path) -> None:
    if has_tokenizer(folder):
        load_tokenizer(str(folder), "").save(target)


class _ReadingPlanner(DefaultSavePlanner):
    """Plans with meta tensors, and reads each from its file when its turn to be written comes."""

    def __init__(
        self, weights: HfWeights, shapes: Mapping[str, Shape], key_map: KeyMap, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._weights, self._shapes, self._dtype = weights, shapes, dtype
        self._places = key_map.places(shapes)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the tensor to write."""
        whole = tuple(slice(0, size) for size in self._shapes[index.fqn])
        place = self._places[index.fqn]
        return self._weights.read(place.stored, place.slices(whole)).to(self._dtype)
