"""Rotary position embedding: angles from integer positions.

Nothing is stored in buffers, so a model built on the meta device needs no repair; angles are fp32
whatever the dtype of the model. How a config.json spells the settings is in `rope_settings.py`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from models.layers import liger

RopeKind = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
Rotary = tuple[Tensor, Tensor]
"""fp32 cosines and sines of shape (B, T, C/2), or fewer channels than C/2: the rest is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Angles per position."""

    theta: float
    """Base of the geometric series of wavelengths."""

    kind: RopeKind = "default"
    """How wavelengths are stretched for contexts longer than the pretrained one."""

    factor: float = 1.0
    """Stretch of the wavelengths: of all (linear), of the long ones (llama3, yarn), or the growth
    of the context (dynamic); longrope only passes it on."""

    original_max_position_embeddings: int = 8192
    """Tokens of the original context, from which all kinds but linear tell what to stretch."""

    partial_rotary_factor: float = 1.0
    """Fraction of a head's channels that is rotated, the first ones."""

    attention_factor: float = 1.0
    """yarn, longrope: cosines and sines are multiplied by this."""

    low_freq_factor: float = 1.0
    """llama3: wavelengths above the original context divided by this are stretched fully."""

    high_freq_factor: float = 4.0
    """llama3: wavelengths below the original context divided by this are not stretched."""

    beta_fast: float = 32.0
    """yarn: what turns more often than this in the original context is not stretched."""

    beta_slow: float = 1.0
    """yarn: what turns less often than this in the original context is stretched fully."""

    truncate: bool = True
    """yarn: these two bounds are widened to whole channels."""

    short_factor: tuple[float, ...] = ()
    """longrope: stretch of each wavelength in documents within the original context."""

    long_factor: tuple[float, ...] = ()
    """longrope: stretch of each wavelength in longer documents."""

    @property
    def depends_on_length(self) -> bool:
        """Whether the angles at a position depend on how long its document is."""
        return self.kind in ("dynamic", "longrope")

    def rotary_dim(self, head_dim: int) -> int:
        """Return how many channels of a head are rotated; ValueError for what cannot be paired."""
        rotated = int(head_dim * self.partial_rotary_factor)
        if rotated < 2 or rotated % 2 or (self.kind == "dynamic" and rotated == 2):
            raise ValueError(
                f"model has head_dim = {head_dim}, of which partial_rotary_factor = "
                f"{self.partial_rotary_factor} rotates {rotated} channels; rotary embedding needs "
                "an even number, at least 2, and of type dynamic at least 4"
            )
        for name in ("short_factor", "long_factor"):
            found = len(getattr(self, name))
            if self.kind == "longrope" and found != rotated // 2:
                raise ValueError(
                    f"rotary embedding of type longrope has {found} numbers in {name}, but rotates "
                    f"{rotated // 2} pairs of channels; give one for each pair"
                )
        return rotated


def inverse_frequencies(config: RopeConfig, head_dim: int, *, is_long: bool = False) -> Tensor:
    """Return the angle per position of each pair of channels, fp32 on the CPU, shape (C/2,).

    Those of dynamic are of documents within the original context, as those of longrope are unless
    `is_long`. Source of default: Su et al. 2021, arXiv:2104.09864, eq. 15. Linear: Chen et al.
    2023, arXiv:2306.15595, eq. 4. yarn: Peng et al. 2023, arXiv:2309.00071, section 3.2. longrope:
    Ding et al. 2024, arXiv:2402.13753, eq. 2. llama3: `apply_scaling` in meta-llama/llama-models,
    models/llama3/reference_impl/model.py. The order of operations is that of transformers, so
    the fp32 values are the same bits.
    """
    dim = config.rotary_dim(head_dim)
    wavelengths = config.theta ** (_channels(dim) / dim)
    if config.kind == "yarn":
        return _stretch_slow_turns(wavelengths, dim, config)
    if config.kind == "longrope":
        factors = config.long_factor if is_long else config.short_factor
        return 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * wavelengths)
    frequencies = 1.0 / wavelengths
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind == "llama3":
        return _stretch_long_wavelengths(frequencies, config)
    return frequencies


def _channels(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")


def _stretch_long_wavelengths(frequencies: Tensor, config: RopeConfig) -> Tensor:
    context = config.original_max_position_embeddings
    low, high = config.low_freq_factor, config.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    is_long, is_short = wavelengths > context / low, wavelengths < context / high
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / config.factor + smooth * frequencies
    stretched = torch.where(is_long, frequencies / config.factor, frequencies)
    return torch.where(~is_short & ~is_long, between, stretched)


def _stretch_slow_turns(wavelengths: Tensor, dim: int, config: RopeConfig) -> Tensor:
    """Stretch what turns seldom in the original context, with a ramp over the channels between."""

    def channel_that_turns(turns: float) -> float:
        context = config.original_max_position_embeddings
        return (dim * math.log(context / (turns * 2 * math.pi))) / (2 * math.log(config.theta))

    low, high = channel_that_turns(config.beta_fast), channel_that_turns(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    ramp = torch.clamp(
        (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width, 0, 1
    )
    kept = 1 - ramp
    return 1.0 / (config.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def document_lengths(positions_BT: Tensor) -> Tensor:
    """Return how many tokens the document of each token has (B, T), up to its last one here.

    Positions count from 0 in each document, whose tokens lie side by side. Only the first document
    of a row may have begun before the row, as with a cache.
    """
    places_T = torch.arange(positions_BT.shape[1], device=positions_BT.device)
    starts_BT = (places_T - positions_BT).clamp(min=0)
    last_BT = torch.zeros_like(positions_BT).scatter_reduce(1, starts_BT, positions_BT, "amax")
    return last_BT.gather(1, starts_BT) + 1


class RotaryEmbedding(nn.Module):
    """Cosines and sines of every position, computed once per forward pass for all blocks."""

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        # Not a buffer: those are emptied by the meta start and cast by `model.to(dtype)`.
        self._frequencies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def forward(self, positions_BT: Tensor) -> Rotary:
        """Return the fp32 cosines and sines of integer positions, which count up in a document.

        Where the angles depend on the length of a document, so do these: packed or alone, it is
        rotated alike. transformers takes the longest of a batch instead.
        """
        device, config = positions_BT.device, self.config
        if device not in self._frequencies:
            usual, long = (
                inverse_frequencies(config, self.head_dim, is_long=is_long).to(device)
                for is_long in (False, True)
            )
            self._frequencies[device] = usual, long
        frequencies, long = self._frequencies[device]
        if config.depends_on_length:
            lengths_BT1 = document_lengths(positions_BT)[..., None]
            if config.kind == "dynamic":
                long = self._dynamic_frequencies(lengths_BT1)
            is_long_BT1 = lengths_BT1 > config.original_max_position_embeddings
            frequencies = torch.where(is_long_BT1, long, frequencies)
        angles = positions_BT[..., None].float() * frequencies
        return angles.cos() * config.attention_factor, angles.sin() * config.attention_factor

    def _dynamic_frequencies(self, lengths_BT1: Tensor) -> Tensor:
        """Return the frequencies of documents beyond the original context (B, T, C/2).

        Source: `LlamaDynamicNTKScalingRotaryEmbedding` in transformers 4.31, modeling_llama.py.
        """
        config, dim = self.config, self.config.rotary_dim(self.head_dim)
        context = config.original_max_position_embeddings
        growth_BT1 = (config.factor * lengths_BT1 / context) - (config.factor - 1)
        theta_BT1 = config.theta * growth_BT1.clamp(min=1) ** (dim / (dim - 2))
        return 1.0 / (theta_BT1 ** (_channels(dim).to(lengths_BT1.device) / dim))


def rotate(x_BTHC: Tensor, rotary: Rotary) -> Tensor:
    """Rotate each head by its token's angles, pairing channel i with channel i + C/2.

    Where there are angles for fewer channels, the last ones are kept. The arithmetic is fp32, the
    result has the dtype of the input.
    """
    cos, sin = (part[:, :, None] for part in rotary)
    width = 2 * cos.shape[-1]
    first, second = x_BTHC[..., :width].float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    rotated = rotated.type_as(x_BTHC)
    is_whole = width == x_BTHC.shape[-1]
    return rotated if is_whole else torch.cat((rotated, x_BTHC[..., width:]), dim=-1)


def rotate_both(
    q_BTHC: Tensor, k_BTKC: Tensor, rotary: Rotary, *, kernels: liger.Kernels
) -> tuple[Tensor, Tensor]:
    """Rotate the queries and the keys of the same tokens, each as `rotate` does."""
    if kernels == "liger" and 2 * rotary[0].shape[-1] == q_BTHC.shape[-1]:
        return liger.rotate(q_BTHC, k_BTKC, rotary)
    return rotate(q_BTHC, rotary), rotate(k_BTKC, rotary)
