"""Rotary position embedding: angles from integer positions, and their Hugging Face spelling.

Nothing is stored in buffers, so a model built on the meta device needs no repair; angles are fp32
whatever the dtype of the model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from models.layers import liger

RopeKind = Literal["default", "linear", "llama3"]
Rotary = tuple[Tensor, Tensor]
"""fp32 cosines and sines of shape (B, T, C/2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Angles per position."""

    theta: float
    """Base of the geometric series of wavelengths."""

    kind: RopeKind = "default"
    """How wavelengths are stretched for contexts longer than the pretrained one."""

    factor: float = 1.0
    """Stretch of the wavelengths; of the long ones only when `kind` is llama3."""

    low_freq_factor: float = 1.0
    """llama3: wavelengths above the original context divided by this are stretched fully."""

    high_freq_factor: float = 4.0
    """llama3: wavelengths below the original context divided by this are not stretched."""

    original_max_position_embeddings: int = 8192
    """llama3: tokens of the original context."""


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Return the angle per position of each pair of channels, fp32 on the CPU, shape (C/2,).

    Source of default: Su et al. 2021, arXiv:2104.09864, eq. 15. Linear: Chen et al. 2023,
    arXiv:2306.15595, eq. 4. llama3: `apply_scaling` in meta-llama/llama-models,
    models/llama3/reference_impl/model.py. The order of operations is that of transformers, so
    the fp32 values are the same bits.
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / (config.theta ** (channels / head_dim))
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind == "llama3":
        return _stretch_long_wavelengths(frequencies, config)
    return frequencies


def _stretch_long_wavelengths(frequencies: Tensor, config: RopeConfig) -> Tensor:
    context = config.original_max_position_embeddings
    low, high = config.low_freq_factor, config.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    is_long, is_short = wavelengths > context / low, wavelengths < context / high
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / config.factor + smooth * frequencies
    stretched = torch.where(is_long, frequencies / config.factor, frequencies)
    return torch.where(~is_short & ~is_long, between, stretched)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of every position, computed once per forward pass for all blocks."""

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        # Not a buffer: those are emptied by the meta start and cast by `model.to(dtype)`.
        self._frequencies: dict[torch.device, Tensor] = {}

    def forward(self, positions_BT: Tensor) -> Rotary:
        """Return the fp32 cosines and sines of integer positions."""
        device = positions_BT.device
        if device not in self._frequencies:
            frequencies = inverse_frequencies(self.config, self.head_dim)
            self._frequencies[device] = frequencies.to(device)
        angles = positions_BT[..., None].float() * self._frequencies[device]
        return angles.cos(), angles.sin()


def rotate(x_BTHC: Tensor, rotary: Rotary) -> Tensor:
    """Rotate each head by its token's angles, pairing channel i with channel i + C/2.

    The arithmetic is fp32, the result has the dtype of the input.
    """
    cos, sin = (part[:, :, None] for part in rotary)
    first, second = x_BTHC.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.type_as(x_BTHC)


def rotate_both(
    q_BTHC: Tensor, k_BTKC: Tensor, rotary: Rotary, *, kernels: liger.Kernels
) -> tuple[Tensor, Tensor]:
    """Rotate the queries and the keys of the same tokens, each as `rotate` does."""
    if kernels == "liger":
        return liger.rotate(q_BTHC, k_BTKC, rotary)
    return rotate(q_BTHC, rotary), rotate(k_BTKC, rotary)


def rope_from_hf(hf_config: Mapping[str, Any]) -> RopeConfig:
    """Read the rotary settings of a config.json, in the spelling of transformers 4 or 5.

    Version 4 writes `rope_theta` and `rope_scaling`, version 5 `rope_parameters`. ValueError if
    there is neither, if they contradict each other, or if a setting is not one we know.
    """
    old = hf_config.get("rope_scaling")
    new = hf_config.get("rope_parameters")
    if not {"rope_theta", "rope_scaling", "rope_parameters"} & hf_config.keys():
        raise ValueError(
            "config.json holds no rotary settings, neither rope_theta nor rope_parameters; add "
            '"rope_theta": 10000.0 if it is a Llama 1 or 2 model, 500000.0 if it is a Llama 3'
        )
    theta = float(hf_config.get("rope_theta") or (new or {}).get("rope_theta") or 10_000.0)
    configs = [_from_parameters(part, theta) for part in (new, old) if part]
    if (len(configs) == 2 and configs[0] != configs[1]) or any(c.theta != theta for c in configs):
        raise ValueError(
            f"config.json contradicts itself: rope_theta = {hf_config.get('rope_theta')}, "
            f"rope_scaling = {old}, rope_parameters = {new}; remove the wrong ones"
        )
    return configs[0] if configs else RopeConfig(theta=theta)


def _from_parameters(parameters: Mapping[str, Any], theta: float) -> RopeConfig:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    needed: dict[str, tuple[str, ...]] = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    if kind not in needed:
        raise ValueError(
            f"config.json asks for rotary embedding of type {kind!r}; "
            f"use a model with one of {', '.join(get_args(RopeKind))}"
        )
    known = {"rope_type", "type", "rope_theta", *needed[kind]}
    if missing := [key for key in needed[kind] if parameters.get(key) is None]:
        raise ValueError(f"rotary embedding of type {kind} needs {missing} in config.json")
    if unknown := [key for key, value in parameters.items() if key not in known and value]:
        raise ValueError(
            f"rotary embedding of type {kind} has settings that are not known here: "
            f"{ {key: parameters[key] for key in unknown} }; remove them if they have no effect"
        )
    return RopeConfig(
        theta=float(parameters.get("rope_theta") or theta),
        kind=kind,
        **{key: parameters[key] for key in needed[kind]},
    )


def rope_to_hf(config: RopeConfig) -> dict[str, object]:
    """Return the rotary keys of a config.json, in the spelling of both versions."""
    scaling: dict[str, object] = {"rope_type": config.kind}
    if config.kind != "default":
        scaling["factor"] = config.factor
    if config.kind == "llama3":
        scaling["low_freq_factor"] = config.low_freq_factor
        scaling["high_freq_factor"] = config.high_freq_factor
        scaling["original_max_position_embeddings"] = config.original_max_position_embeddings
    return {
        "rope_theta": config.theta,
        "rope_scaling": None if config.kind == "default" else scaling,
        "rope_parameters": {**scaling, "rope_theta": config.theta},
    }
