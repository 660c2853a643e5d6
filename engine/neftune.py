"""NEFTune's noise for a microbatch: how much, and which values. The model adds it to embeddings."""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.data.batch import PADDING_DOCUMENT
from engine.data.cache import digest_of
from parallelisms.context import split_tokens
from parallelisms.mesh import ParallelDims

VALUES_AT_ONCE = 2**22  # 64-bit words held while noise is drawn: 32 MiB, a few times
LOW_31 = 2**31 - 1  # torch shifts signed words arithmetically; this drops the copies of the sign
MULTIPLIERS = (0xFF51_AFD7_ED55_8CCD - 2**64, 0xC4CE_B9FE_1A85_EC53 - 2**64)
STEPS_OF_UNIFORM = 2.0**-24


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingNoise:
    """Uniform noise on the embeddings of a document's tokens, of RMS alpha / sqrt(3 L D).

    L is the length of the token's own document in its row and D the width, so a document has the
    noise that it would have alone. Hugging Face's trainers take the length of the padded batch for
    L, and add noise to padding too. Padding has none here.
    Source: Jain et al. 2023, arXiv:2310.05914, algorithm 1.

    Each value is a function of the seed, the global row number, the place in the row and the
    channel alone: the same for every layout of ranks and microbatches, after a resume, and on CPUs
    and GPUs. No generator is touched, and the host does not wait for the device.
    """

    alpha: float
    seed: int
    width: int
    """Channels of an embedding, D."""

    dtype: torch.dtype
    """Type of the embeddings, and so of the noise."""

    def __call__(
        self,
        documents_BT: Tensor,
        *,
        document_offsets: Tensor,
        rows_B: Tensor,
        dims: ParallelDims,
    ) -> Tensor:
        """Return the noise (B, T / cp, D) of this rank's tokens of whole rows.

        `documents_BT`, `document_offsets` and the row numbers `rows_B` are those of the `Batch`.
        """
        places_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
        keys_BT = _mixed(_mixed(rows_B ^ self._key)[:, None] ^ places_T)
        lengths_N = document_offsets.diff()
        # Without the size of the output the host would wait for it.
        lengths = lengths_N.repeat_interleave(lengths_N, output_size=documents_BT.numel())
        # float64, whose root and quotient are rounded alike on all devices.
        amplitude_BT = self.alpha / (lengths.view_as(documents_BT).double() * self.width).sqrt()
        amplitude_BT = amplitude_BT.masked_fill(documents_BT == PADDING_DOCUMENT, 0.0).float()
        mine = split_tokens({"keys_BT": keys_BT, "amplitude_BT": amplitude_BT}, dims)
        return self._draw(**mine)

    @property
    def _key(self) -> int:
        return int(digest_of("neftune", self.seed)[:15], 16)

    def _draw(self, keys_BT: Tensor, amplitude_BT: Tensor) -> Tensor:
        noise_BTD = torch.empty(
            (*keys_BT.shape, self.width), dtype=self.dtype, device=keys_BT.device
        )
        channels_D = torch.arange(self.width, device=keys_BT.device)
        tokens_at_once = max(1, VALUES_AT_ONCE // self.width)
        parts = (noise_BTD.flatten(0, 1), keys_BT.flatten(), amplitude_BT.flatten())
        for noise_ND, keys_N, amplitude_N in zip(
            *(part.split(tokens_at_once) for part in parts), strict=True
        ):
            words_ND = _mixed(keys_N[:, None] ^ channels_D)
            # The upper 24 bits as odd numbers: none is 0, their mean is, and all are exact in fp32.
            uniform_ND = (2 * (words_ND >> 40) + 1).float() * STEPS_OF_UNIFORM
            noise_ND.copy_(uniform_ND * amplitude_N[:, None])
        return noise_BTD


def _mixed(words: Tensor) -> Tensor:
    """Scramble int64 words: the finaliser of MurmurHash3 (fmix64, public domain)."""
    for multiplier in MULTIPLIERS:
        words = (words ^ ((words >> 33) & LOW_31)) * multiplier
    return words ^ ((words >> 33) & LOW_31)
