"""Reads sizes, plan and limits off a wrapped model, once for each config.json.

A model on the meta device is looked at, so whatever is refused is refused before there is memory.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from models.decoder_config import FULL, SLIDING
from models.layers.liger import Kernels
from models.plan import ModelPlan, Role
from models.sizes import Feature, Weight
from models.wrapped.module import WrappedLM, build, causal_class, num_positions, read_config

ROLES: Mapping[str, Role] = {
    "colwise": "columns",
    "rowwise": "rows",
    "colwise_gather_output": "columns_whole",
    "colwise_rep": "columns_whole",
    "rowwise_split_input": "rows_whole",
    "rowwise_rep": "rows_whole",
    "replicated_with_grad_allreduce": "per_head",
}
"""Words of `base_model_tp_plan` in a configuration class of transformers 5, and ours for them.

Source: `ALL_PARALLEL_STYLES` in transformers 5, distributed/parallel_utils.py.
"""

DTYPE_OF_FILES = ("dtype", "torch_dtype")  # says nothing about the model
STREAMS = ("is_encoder_decoder", "vision_config", "audio_config")
LENGTH_DEPENDENT = {"dynamic", "longrope"}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, kw_only=True, slots=True)
class WrappedSizes:
    """Sizes of a wrapped model, with what else was read off it; fields as in `ModelSizes`."""

    hf: Mapping[str, Any]
    """Content of the config.json, but for the dtype of the files beside it."""

    plan: ModelPlan
    """Its parallel description."""

    weights: tuple[Weight, ...]
    """Its parameters, a tied head too."""

    limits: Mapping[Feature, str]
    """What it cannot do, and why."""

    ignorable: tuple[str, ...]
    """Regular expressions of stored names that carry no parameter."""

    base_name: str
    """Name of the base model, with which the names of its parameters begin."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int | None
    tie_word_embeddings: bool
    sliding_window: int | None
    attention_types: tuple[str, ...]
    attention: str
    attention_backends: tuple[str, ...]
    longest_row: int | None
    notes: tuple[str, ...]
    attention_softcap: None = None  # transformers' backends cap by themselves
    kernels: Kernels = "torch"
    angles_depend_on_length: bool = False
    waits_for_device: bool = True

    def has_window_in(self, num_tokens: int | None) -> bool:
        """Say no: transformers puts windows into the masks, which its backends all take."""
        return False

    def refusal(self, feature: Feature) -> str | None:
        """Say why the model cannot do this, or None if it can."""
        return self.limits.get(feature)


def describe(hf: Mapping[str, Any]) -> WrappedSizes:
    """Return what a config.json describes; ValueError for what cannot be wrapped."""
    ours = {key: value for key, value in hf.items() if key not in DTYPE_OF_FILES}
    return _describe(json.dumps(ours, sort_keys=True))


@lru_cache(maxsize=4)
def _describe(text: str) -> WrappedSizes:
    hf = json.loads(text)
    config = read_config(hf)
    _refuse_kinds(config, causal_class(config))
    backends = ("sdpa", "eager") if causal_class(config)._supports_sdpa else ("eager",)
    with torch.device("meta"):
        model = build(hf, backends[0])
    blocks = _block_list(model, config)
    embedding = _embedding_name(model)
    roles, no_tensor_parallelism = _roles(model, blocks, config)
    tied = _tied(model)
    heads, width = config.num_attention_heads, config.hidden_size
    hidden = getattr(config, "intermediate_size", None) or 4 * width
    window = getattr(config, "sliding_window", None)
    return WrappedSizes(
        hf=hf,
        plan=ModelPlan(
            first=(embedding,),
            blocks=(f"{blocks}.*",),
            last=(model.head_name,),
            tied=tied,
            tensor=roles,
        ),
        weights=tuple(_weights(model)),
        limits=_limits(model, config, no_tensor_parallelism),
        ignorable=_ignorable(causal_class(config)),
        base_name=model.base_name,
        vocab_size=model.get_submodule(embedding).num_embeddings,  # pyright: ignore
        hidden_size=width,
        num_layers=len(list(model.get_submodule(blocks).children())),
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or width // heads,
        intermediate_size=hidden,
        max_position_embeddings=getattr(config, "max_position_embeddings", None),
        tie_word_embeddings=bool(tied),
        sliding_window=window,
        attention_types=_attention_types(config, window),
        attention=backends[0],
        attention_backends=backends,
        longest_row=num_positions(model, model.get_submodule(embedding), config),
        notes=_notes(config),
    )


def _refuse_kinds(config: Any, causal: Any) -> None:
    """Refuse whole kinds of models that would train, but not as they are meant to."""
    name = causal.__name__
    reason = None
    if getattr(config, "quantization_config", None) is not None:
        reason = "its weights are quantised, and masters of training are not"
    elif config.get_text_config() is not config or any(getattr(config, k, None) for k in STREAMS):
        reason = "it reads more than one stream of tokens"
    elif not getattr(config, "is_causal", True) or getattr(
        config, "use_bidirectional_attention", False
    ):
        reason = "its tokens see those behind them, which are their labels"
    elif lengths := _rotary_types(config) & LENGTH_DEPENDENT:
        reason = (
            f"its rotary embedding of type {', '.join(sorted(lengths))} depends on the longest row "
            "of a batch, padding included"
        )
    elif any((getattr(config, key, None) or 0) > 1 for key in EXPERTS):
        reason = "it has experts, whose balance nothing here counts"
    elif causal._is_stateful or not hasattr(config, "num_attention_heads"):
        reason = "it keeps a recurrent state, which its documents would share"
    if reason is not None:
        raise ValueError(f"transformers' {name} cannot be wrapped: {reason}; use another model")


def _rotary_types(config: Any) -> set[str]:
    """Return the kinds of rotary embedding, which may differ between types of layers."""
    settings = getattr(config, "rope_parameters", None) or {}
    each = [s for s in settings.values() if isinstance(s, Mapping)] or [settings]
    return {str(s.get("rope_type", "default")) for s in each}


def _block_list(model: WrappedLM, config: Any) -> str:
    """Return the name of the list of blocks: as many as the configuration says, the heaviest."""
    lists = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    }
    if not lists:
        raise ValueError(
            f"the model of type {config.model_type} holds no list of its "
            f"{config.num_hidden_layers} blocks; it cannot be wrapped"
        )
    return max(lists, key=lambda name: lists[name])


def _embedding_name(model: WrappedLM) -> str:
    embedding = model.base.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return next(name for name, module in model.named_modules() if module is embedding)


def _tied(model: nn.Module) -> tuple[tuple[str, str], ...]:
    first: dict[int, str] = {}
    pairs = [
        (first.setdefault(id(parameter), name), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    ]
    return tuple((owner, name) for owner, name in pairs if owner != name)


def _roles(model: WrappedLM, blocks: str, config: Any) -> tuple[dict[str, Role], str | None]:
    """Return the role of each module, and why there is no tensor parallelism, if so."""
    holders = [
        name for name, module in model.named_modules() if list(module.parameters(recurse=False))
    ]
    if "" in holders or any(blocks.startswith(f"{name}.") for name in holders):
        raise ValueError(
            f"the model of type {config.model_type} holds parameters beside its blocks and "
            "layers; it cannot be wrapped"
        )
    within = re.compile(rf"^{re.escape(blocks)}\.\d+")
    patterns = {within.sub(f"{blocks}.*", name): name for name in holders}
    roles: dict[str, Role] = dict.fromkeys(patterns, "replicated")
    roles[model.head_name] = "vocab_columns"
    declared: Mapping[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    if not declared:
        return {"": "whole_output", **roles}, "transformers declares no plan for it"
    if getattr(config, "clip_qkv", None) is not None:
        reason = "it clips its projections in place (clip_qkv), which split ones forbid"
        return {"": "whole_output", **roles}, reason
    roles[_embedding_name(model)] = "vocab_rows"
    for pattern, word in declared.items():
        name = f"{model.base_name}.{pattern}"
        if name not in patterns:  # a variant of the model that this one is not
            continue
        module = model.get_submodule(patterns[name])
        if word not in ROLES or ("wise" in word and not isinstance(module, nn.Linear)):
            reason = f"transformers' plan says {word!r} of {name}, which is not known here"
            return {"": "whole_output", **roles}, reason
        roles[name] = ROLES[word]
    return {"": "whole_output", **roles}, None


def _weights(model: WrappedLM) -> Iterator[Weight]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = model.get_submodule(name.rpartition(".")[0])
        is_matrix = parameter.dim() == 2 and not isinstance(owner, nn.Embedding)
        yield Weight(name, parameter.numel(), is_matrix)


def _attention_types(config: Any, window: int | None) -> tuple[str, ...]:
    types = getattr(config, "layer_types", None)
    if types is None:
        types = [FULL if window is None else SLIDING] * config.num_hidden_layers
    return tuple(SLIDING if kind == SLIDING and window is not None else FULL for kind in types)


def _limits(model: WrappedLM, config: Any, no_tensor_parallelism: str | None) -> dict[Feature, str]:
    limits: dict[Feature, str] = {
        "sequence_parallel": "transformers' modules need all tokens of a row between their layers",
        "context_parallel": "transformers' attention needs all keys of a row",
        "embedding_noise": "transformers' modules add nothing to their embeddings",
        "adapter_dropout": "transformers' modules stay in evaluation mode, as does all within them",
        "liger_kernels": "its layers are transformers' own",
    }
    if no_tensor_parallelism is not None:
        limits["tensor_parallel"] = no_tensor_parallelism
    # Said of models whose masks come from transformers' common functions, which tell documents
    # apart by positions that begin anew.
    kinds = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if kinds:
        limits["packed_documents"] = f"its layers of type {', '.join(kinds)} see whole rows"
    elif not (model.takes_positions and causal_class(config)._supports_attention_backend):
        limits["packed_documents"] = "its attention makes masks of its own, of whole rows"
    return limits


def _ignorable(causal: Any) -> tuple[str, ...]:
    """Return what a checkpoint may hold beside parameters, such as the tables of older versions."""
    known = getattr(causal, "_keys_to_ignore_on_load_unexpected", None) or ()
    return (r".*rotary_emb\.inv_freq", *(rf".*(?:{pattern}).*" for pattern in known))


def _notes(config: Any) -> tuple[str, ...]:
    """Return that dropout is left out, if the configuration asks for some."""
    asked = [
        f"{key} = {value}"
        for key, value in config.to_dict().items()
        if key.endswith(("dropout", "pdrop")) and isinstance(value, float) and value > 0
    ]
    return (f"trained without its dropout ({', '.join(asked)})",) if asked else ()
