"""Where a run's weights come from and where its checkpoints go.

Both are decided before its model is laid out; reading and writing are `checkpoint.py`'s.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.adapters import fill_adapters
from engine.checkpoint import CheckpointConfig, Checkpointer, TrainingState
from engine.checkpoint_search import Source
from engine.checkpoint_state import saved_identity
from engine.cli import to_toml
from engine.config import JobConfig
from engine.data.chat_templates import template_text
from engine.data.config import CHAT_FORMATS
from engine.data.tokenizer import Tokenizer
from engine.hf_io import AdapterAssets, HfAssets, read_generation_config
from engine.model import Architecture
from engine.origin import Origin, find_origin, start_folder, start_source
from engine.peft_io import fill_from
from engine.provenance import checkpoint_files
from engine.reference import Policy, refuse_other_reference
from engine.run_folder import RunFolder
from parallelisms.materialise import fill
from parallelisms.mesh import ParallelDims

log = logging.getLogger("tessera")


def build_checkpointer(
    config: JobConfig,
    dims: ParallelDims,
    architecture: Architecture,
    tokenizer: Tokenizer,
    folder: RunFolder,
    data_fingerprint: str,
) -> Checkpointer:
    """Return what saves and loads this run's checkpoints, with the files that lie in each."""
    family, sizes = architecture.family, architecture.config
    hf_config = family.config_to_hf(sizes)
    assets = HfAssets(
        key_map=family.key_map(sizes),
        config=hf_config,
        save_tokenizer=partial(
            tokenizer.save, chat_template=template_text(config.data.chat_template)
        ),
        generation_config=_generation_config(config, tokenizer, hf_config),
        adapters=_adapter_assets(config),
    )
    facts = {"data_fingerprint": data_fingerprint, "ranks": dims.describe()}
    dtype = getattr(torch, config.checkpoint.export_dtype)
    files = checkpoint_files(config_toml=to_toml(config), hf=assets, dtype=dtype, facts=facts)
    return Checkpointer(
        _checkpoint_section(config), folder.checkpoints, files=files, hf=assets, hf_folder=folder.hf
    )


def _adapter_assets(config: JobConfig) -> AdapterAssets | None:
    if not config.adapter.specs:
        return None
    if config.adapter.merge_export and not config.checkpoint.last_save_in_hf:
        log.warning("adapter.merge_export has no effect: checkpoint.last_save_in_hf = false")
    folder = start_folder(config) if config.checkpoint.initial_load_in_hf else None
    base = str(Path(folder).expanduser().absolute()) if folder else ""
    if config.checkpoint.last_save_in_hf and not (base or config.adapter.merge_export):
        log.warning(
            "the exported adapters will name no base, since the run begins with no Hugging Face "
            "folder: adapter.merge_export = true exports a whole model"
        )
    return AdapterAssets(specs=config.adapter.specs, base=base, merge=config.adapter.merge_export)


def _checkpoint_section(config: JobConfig) -> CheckpointConfig:
    """Fill in where Hugging Face weights come from if no path says so, as torchtitan 0.2 does."""
    section = config.checkpoint
    if section.initial_load_in_hf and not section.initial_load_path:
        return replace(section, initial_load_path=config.model.hf_assets_path)
    return section


def _generation_config(
    config: JobConfig, tokenizer: Tokenizer, hf_config: Mapping[str, object]
) -> Mapping[str, object]:
    """Return that of the model's folder; after chats, generation stops at ends of turns too."""
    folder = config.model.hf_assets_path
    found = read_generation_config(Path(folder)) if folder else {}
    trained = config.data.read(config.training.dataset)
    if not any(dataset != "dummy" and form in CHAT_FORMATS for dataset, form in trained):
        return found
    from engine.data.chat_template import ChatTemplate  # slow to import, and only for chats

    text = template_text(config.data.chat_template) or tokenizer.chat_template
    end_of_turn = ChatTemplate(text, tokenizer).end_of_turn_id()
    if end_of_turn is None:
        return found
    special = {key: hf_config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    found = found or {key: value for key, value in special.items() if value is not None}
    ends = found.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    ends = [*ends, *({end_of_turn} - {*ends})]
    return {**found, "eos_token_id": ends if len(ends) > 1 else ends[0]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Where a run's values come from, before any is loaded."""

    found: Source | None
    """A step of this run, or what it starts from; None: initial values."""

    base: Origin | None
    """What adapters stand beside; None where the model itself is trained."""

    @property
    def step(self) -> Source | None:
        """The step of this run that it goes on from."""
        return self.found if self.found is not None and self.found.kind == "resume" else None

    @property
    def weights(self) -> Source | None:
        """Where all parameters but adapters are; None: they have initial values."""
        return self.found if self.base is None else self.base.source


def find_start(config: JobConfig, checkpointer: Checkpointer) -> Start:
    """Return what a run starts from. Every rank must call this.

    A step of adapters whose base is another one is a ValueError.
    """
    section = config.checkpoint
    for key in ("initial_load_path", "initial_load_in_hf"):
        if getattr(section, key) and not section.enable:
            log.warning("checkpoint.%s has no effect: checkpoint.enable = false", key)
    found = checkpointer.find(only_model=config.validation.only)
    if not config.adapter.specs:
        return Start(found=found, base=None)
    is_step = found is not None and found.kind == "resume"
    base = find_origin(config, start_source(config) if is_step else found)
    log.info("adapters beside: %s", base.name)
    start = Start(found=found, base=base)
    if start.step is not None:
        _refuse_other_base(base, start.step)
    return start


def _refuse_other_base(base: Origin, step: Source) -> None:
    saved = saved_identity(step.path, "base")
    if not saved or saved["weights"] == base.weights:
        return
    raise ValueError(
        f"checkpoint.initial_load_path, or model.hf_assets_path without it: the adapters in "
        f"{step.path} stand beside {saved['name']} with weights {saved['weights'][:12]}, and this "
        f"run would put them beside {base.name}, {base.weights[:12]}; give the weights that they "
        "were trained beside (initial values: the settings that the run started with), or start "
        "anew in another job.dump_folder"
    )


def fill_weights(
    policy: Policy,
    state: TrainingState,
    start: Start,
    reference: Origin | None,
    adapters: Mapping[str, Tensor],
) -> None:
    """Give the parameters their values: from a checkpoint where there is one, else initial ones.

    `adapters` are those that a new run starts from, whole, by our names.
    """
    state.reference = reference.identity if reference else {}
    state.base = start.base.identity if start.base else {}
    config, checkpointer, section = policy.config, policy.checkpointer, policy.config.checkpoint
    seed, weights = config.debug.effective_seed, start.weights
    if weights is None or section.initial_load_allow:
        log.info("starting from initial values, seed %d", seed)
        fill(state.model, policy.architecture.initial_values(state.model, seed=seed))
    if start.step is not None:
        refuse_other_reference(reference, config, start.step)
    if weights is not None:
        if weights.kind == "hf" and not section.initial_load_path:
            log.info("no checkpoint.initial_load_path: the weights are model.hf_assets_path's")
        checkpointer.load(state, weights)
    if start.base is not None:
        fill_adapters(state.model, seed=seed)
        fill_from(state.model, adapters)
        if start.step is not None:
            checkpointer.load(state, start.step)
