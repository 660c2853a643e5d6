"""Rotary settings of a config.json, in the spelling of transformers 4 and 5."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from models.layers.rope import RopeConfig, RopeKind

_ORIGINAL = "original_max_position_embeddings"
_FULL, _SLIDING = "full_attention", "sliding_attention"
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "longrope": ("factor", _ORIGINAL, "attention_factor"),
}
_READ_ONLY = {"yarn": ("mscale", "mscale_all_dim")}
"""Settings that come back as another: these two decide attention_factor."""


def rope_from_hf(hf_config: Mapping[str, Any], *, is_partial: bool = False) -> RopeConfig:
    """Read the rotary settings of a config.json for a model that rotates all layers alike.

    `is_partial`: the family can rotate a part of each head's channels. ValueError as from
    `ropes_from_hf`, and if layers differ.
    """
    ropes = ropes_from_hf(hf_config, is_partial=is_partial)
    if len(set(ropes.values())) > 1:
        raise ValueError(
            f"config.json has rope_parameters that differ by type of layer: {', '.join(ropes)}; "
            "this family rotates all layers alike"
        )
    return next(iter(ropes.values()))


def ropes_from_hf(
    hf_config: Mapping[str, Any], *, is_partial: bool = False
) -> dict[str, RopeConfig]:
    """Read the rotary settings of each type of layer; the type is "" where all are alike.

    Version 4 writes `rope_theta` and `rope_scaling`, version 5 `rope_parameters`. Where there is
    also version 4's `rope_local_base_freq`, that is the theta of sliding_attention, and the first
    two are of full_attention. ValueError if there is neither, if they contradict each other, or if
    a setting is not one we know.
    """
    if not {"rope_theta", "rope_scaling", "rope_parameters"} & hf_config.keys():
        raise ValueError(
            "config.json holds no rotary settings, neither rope_theta nor rope_parameters; add "
            '"rope_theta" as the model was trained: 10000.0 for Llama 1 and 2, 500000.0 for Llama 3'
        )
    new = hf_config.get("rope_parameters") or {}
    by_type = {name: part for name, part in new.items() if isinstance(part, Mapping)}
    if (local := hf_config.get("rope_local_base_freq")) is not None:
        sliding = {**hf_config, "rope_theta": local, "rope_scaling": None}
        full_part = by_type.get(_FULL, {}) if by_type else new
        return {
            _FULL: _one_rope(hf_config, full_part, is_partial=is_partial),
            _SLIDING: _one_rope(sliding, by_type.get(_SLIDING, {}), is_partial=is_partial),
        }
    return {
        name: _one_rope(hf_config, part, is_partial=is_partial)
        for name, part in (by_type or {"": new}).items()
    }


def _one_rope(
    hf_config: Mapping[str, Any], new: Mapping[str, Any], *, is_partial: bool
) -> RopeConfig:
    old = hf_config.get("rope_scaling")
    theta = float(hf_config.get("rope_theta") or new.get("rope_theta") or 10_000.0)
    spellings = {"rope_parameters": new, "rope_scaling": old}
    configs = [
        _from_parameters(key, part, theta, hf_config, is_partial=is_partial)
        for key, part in spellings.items()
        if part
    ]
    if (len(configs) == 2 and configs[0] != configs[1]) or any(c.theta != theta for c in configs):
        raise ValueError(
            f"config.json contradicts itself: rope_theta = {hf_config.get('rope_theta')}, "
            f"rope_scaling = {old}, rope_parameters = {new}; remove the wrong ones"
        )
    if configs:
        return configs[0]
    return _from_parameters("rope_theta", {}, theta, hf_config, is_partial=is_partial)


def _from_parameters(
    source: str,
    parameters: Mapping[str, Any],
    theta: float,
    hf_config: Mapping[str, Any],
    *,
    is_partial: bool,
) -> RopeConfig:
    name = "rope_type" if "rope_type" in parameters else "type"
    kind = parameters.get(name, "default")
    if kind not in _NEEDED:
        raise ValueError(
            f"config.json has {source}.{name} = {kind!r}, a rotary embedding that is not known; "
            f"use a model with one of {', '.join(get_args(RopeKind))}"
        )
    keys = (*_NEEDED[kind], *_OPTIONAL.get(kind, ()))
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *keys}
    known |= set(_READ_ONLY.get(kind, ()))
    if missing := [key for key in _NEEDED[kind] if parameters.get(key) is None]:
        raise ValueError(
            f"config.json has {source} of type {kind} without {', '.join(missing)}; add them"
        )
    if unknown := [key for key, value in parameters.items() if key not in known and value]:
        raise ValueError(
            f"config.json has {source} of type {kind} with settings that are not known here: "
            f"{ {key: parameters[key] for key in unknown} }; remove them if they have no effect"
        )
    values = {key: parameters[key] for key in keys if parameters.get(key) is not None}
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    config = RopeConfig(
        theta=float(parameters.get("rope_theta") or theta),
        kind=kind,
        partial_rotary_factor=_fraction(parameters, hf_config, is_partial=is_partial),
        **fields,
    )
    return _with_context(config, parameters, values, hf_config)


def _fraction(
    parameters: Mapping[str, Any], hf_config: Mapping[str, Any], *, is_partial: bool
) -> float:
    fraction = parameters.get("partial_rotary_factor", hf_config.get("partial_rotary_factor"))
    if fraction not in (None, 1.0) and not is_partial:
        raise ValueError(
            f"config.json has partial_rotary_factor = {fraction}, but models of type "
            f"{hf_config.get('model_type')} rotate whole heads; remove it"
        )
    return 1.0 if fraction is None else float(fraction)


def _with_context(
    config: RopeConfig,
    parameters: Mapping[str, Any],
    values: Mapping[str, Any],
    hf_config: Mapping[str, Any],
) -> RopeConfig:
    """Return it with what transformers takes from the length of the context if it is not said."""
    if config.kind not in ("dynamic", "yarn", "longrope"):
        return config
    context = hf_config.get("max_position_embeddings")
    if config.kind == "dynamic":
        original = context
    else:  # Phi-3 has it outside, which comes first as in transformers
        original = hf_config.get(_ORIGINAL) or values.get(_ORIGINAL) or context
    if original is None or (context is None and not values.get("factor")):
        raise ValueError(
            f"config.json has rotary embedding of type {config.kind}, whose stretch depends on "
            "max_position_embeddings, which is not there; add it"
        )
    factor = float(values.get("factor") or context / original)
    config = replace(config, factor=factor, original_max_position_embeddings=original)
    if "attention_factor" in values or config.kind == "dynamic":
        return config
    if config.kind == "longrope":
        growth = math.log(factor) / math.log(original) if factor > 1 else 0.0
        return replace(config, attention_factor=math.sqrt(1 + growth))
    return replace(config, attention_factor=_yarn_attention_factor(factor, parameters))


def _yarn_attention_factor(factor: float, parameters: Mapping[str, Any]) -> float:
    """Source: Peng et al. 2023, arXiv:2309.00071, eq. 22; DeepSeek's models scale its parts."""

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return growth(above) / growth(below) if above and below else growth(1.0)


def rope_to_hf(config: RopeConfig, *, sliding: RopeConfig | None = None) -> dict[str, object]:
    """Return the rotary keys of a config.json, in the spelling of both versions.

    With `sliding`, which version 4 reads as of type default, it is that of sliding_attention, and
    the other one of full_attention.
    """
    parameters = rope_parameters(config)
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    is_default = config.kind == "default" and config.partial_rotary_factor == 1.0
    written: dict[str, object] = {
        "rope_theta": config.theta,
        "rope_scaling": None if is_default else scaling,
        "rope_parameters": parameters,
    }
    if sliding is None:
        return written
    by_type = {_FULL: parameters, _SLIDING: rope_parameters(sliding)}
    return {**written, "rope_local_base_freq": sliding.theta, "rope_parameters": by_type}


def rope_parameters(config: RopeConfig) -> dict[str, object]:
    """Return the settings of one type of layer in the spelling of version 5."""
    names = (*_NEEDED[config.kind], *_OPTIONAL.get(config.kind, ()))
    values = {name: getattr(config, name) for name in names}
    parameters: dict[str, object] = {"rope_type": config.kind, "rope_theta": config.theta}
    parameters |= {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    if config.partial_rotary_factor != 1.0:
        parameters["partial_rotary_factor"] = config.partial_rotary_factor
    return parameters
