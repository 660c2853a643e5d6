"""Where a run's weights come from and where its checkpoints go.

Both are decided once its model is laid out; reading and writing are `checkpoint.py`'s.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from engine.adapters import fill_adapters
from engine.checkpoint import CheckpointConfig, Checkpointer, TrainingState
from engine.checkpoint_state import holds_adapters
from engine.cli import to_toml
from engine.config import JobConfig
from engine.data.chat_templates import template_text
from engine.data.config import CHAT_FORMATS
from engine.data.tokenizer import Tokenizer
from engine.hf_io import HfAssets, read_generation_config
from engine.model import Architecture
from engine.provenance import checkpoint_files
from engine.reference import FoundReference, Policy, refuse_other_reference
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
    )
    facts = {"data_fingerprint": data_fingerprint, "ranks": dims.describe()}
    dtype = getattr(torch, config.checkpoint.export_dtype)
    files = checkpoint_files(config_toml=to_toml(config), hf=assets, dtype=dtype, facts=facts)
    return Checkpointer(
        _checkpoint_section(config), folder.checkpoints, files=files, hf=assets, hf_folder=folder.hf
    )


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


def fill_weights(policy: Policy, state: TrainingState, reference: FoundReference | None) -> None:
    """Give the parameters their values: from a checkpoint where there is one, else initial ones."""
    state.reference = reference.identity if reference else {}
    config, checkpointer, section = policy.config, policy.checkpointer, policy.config.checkpoint
    for key in ("initial_load_path", "initial_load_in_hf"):
        if getattr(section, key) and not section.enable:
            log.warning("checkpoint.%s has no effect: checkpoint.enable = false", key)
    source = checkpointer.find(only_model=config.validation.only)
    if source is None or section.initial_load_allow:
        log.info("starting from initial values, seed %d", config.debug.effective_seed)
        draw = policy.architecture.initial_values(state.model, seed=config.debug.effective_seed)
        fill(state.model, draw)
    if source is not None:
        if source.kind == "resume":
            refuse_other_reference(reference, config, source)
        if source.kind == "hf" and not section.initial_load_path:
            log.info("no checkpoint.initial_load_path: the weights are model.hf_assets_path's")
        checkpointer.load(state, source)
    are_new = source is None or source.kind == "hf" or not holds_adapters(source.path)
    if config.adapter.specs and are_new:
        fill_adapters(state.model, seed=config.debug.effective_seed)
