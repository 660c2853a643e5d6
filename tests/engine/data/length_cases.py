"""Rows of unequal length in batches under a budget, from documents made up here."""

import numpy as np
import numpy.typing as npt

from engine.data.length_batches import LengthBatches
from engine.data.rows import TokenRows
from engine.data.slices import DocumentSlices
from engine.data.token_file import TokenFile


def log_normal_lengths(
    num_documents: int, *, median: float = 300.0, longest: int = 4096, seed: int = 0
) -> npt.NDArray[np.int64]:
    """Return lengths of which the logarithm has a standard deviation of 1, clipped."""
    drawn = np.random.default_rng(seed).lognormal(np.log(median), 1.0, num_documents)
    return np.clip(drawn.astype(np.int64), 1, longest)


def slices_of(lengths: npt.NDArray[np.int64], seq_len: int) -> DocumentSlices:
    """Return documents of these lengths, cut at `seq_len`."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return DocumentSlices(offsets, seq_len=seq_len, long_document="truncate")


def budget_rows(
    lengths: npt.NDArray[np.int64],
    *,
    seq_len: int,
    batch_tokens: int,
    pad_to_multiple: int = 8,
    vocab_size: int = 64,
    num_largest_first: int = 0,
) -> TokenRows:
    """Return rows of random documents with these lengths, in batches."""
    slices = slices_of(lengths, seq_len)
    packing = LengthBatches(
        slices,
        batch_tokens=batch_tokens,
        pad_to_multiple=pad_to_multiple,
        seed=5,
        shuffle=True,
        num_largest_first=num_largest_first,
    )
    generator = np.random.default_rng(1)
    tokens = generator.integers(vocab_size, size=int(lengths.sum())).astype(np.uint16)
    file = TokenFile(
        tokens=tokens, offsets=np.concatenate([[0], np.cumsum(lengths)]), digest="made up"
    )
    return TokenRows(
        file,
        packing,
        name="made up",
        seq_len=seq_len,
        vocab_size=vocab_size,
        fingerprint="made up",
    )
