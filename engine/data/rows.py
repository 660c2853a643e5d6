"""Rows by global number: the one thing training and validation read, whatever the data is.

Row `i` is a pure function of (seed, epoch, i), with epoch = i // rows_per_epoch; nothing here knows
of ranks. Dealing rows to ranks is `loader.py`'s, opening what a configuration names `sources.py`'s.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.data.batch import IGNORED_LABEL, PADDING_DOCUMENT, Row
from engine.data.cache import digest_of
from engine.data.length_batches import LengthBatches
from engine.data.packing import OneDocumentPacking, Packing, mix_words
from engine.data.token_file import TokenFile


class RowSource(Protocol):
    """Endless rows; `row(i)` is the same on every rank, worker and run."""

    seq_len: int
    """Tokens of every row; of the longest where there are `batches`."""

    rows_per_epoch: int
    vocab_size: int

    source_names: tuple[str, ...]
    """What `Row.source` counts in: names for metrics and messages."""

    one_document_per_row: bool
    """No row ever holds a second document. A property of the source, not of a batch, so that the
    compiled model sees one kind of mask for the whole run."""

    fingerprint: str
    """Digest of everything that decides the rows, for a run's provenance."""

    @property
    def batches(self) -> LengthBatches | None:
        """Which rows make a batch, where their lengths decide that: loaders then deal batches
        instead of rows. None where all rows have the same length."""
        ...

    def row(self, index: int) -> Row:
        """Return the row with a global number, counted over all epochs."""
        ...


class TokenRows:
    """Rows packed from a token file."""

    def __init__(
        self,
        file: TokenFile,
        packing: Packing,
        *,
        name: str,
        seq_len: int,
        vocab_size: int,
        fingerprint: str,
    ) -> None:
        self._file = file
        self._packing = packing
        self.batches = packing if isinstance(packing, LengthBatches) else None
        self.one_document_per_row = isinstance(packing, OneDocumentPacking | LengthBatches)
        self.seq_len = seq_len
        self.rows_per_epoch = packing.rows_per_epoch
        self.vocab_size = vocab_size
        self.source_names = (name,)
        self.fingerprint = fingerprint

    def row(self, index: int) -> Row:
        """Return a row: its documents numbered from 1, and padding up to `seq_len` behind them.

        Rows of `batches` have none: it is the batch that they are padded for.
        """
        plan = self._packing.plan(*divmod(index, self.rows_per_epoch))
        held = sum(part.stop - part.start for part in plan.slices)
        length = held if self.batches else self.seq_len
        tokens = np.zeros(length, dtype=np.int64)
        labels = np.full(length, IGNORED_LABEL, dtype=np.int64)
        positions = np.zeros(length, dtype=np.int64)
        documents = np.full(length, PADDING_DOCUMENT, dtype=np.int64)
        begin = 0
        for number, part in enumerate(plan.slices, start=1):
            end = begin + part.stop - part.start
            first, past = self._file.offsets[part.document : part.document + 2]
            here = slice(first + part.start, min(first + part.stop + 1, past))
            text = self._file.tokens[here]
            tokens[begin:end] = text[: end - begin]
            labels[begin : begin + len(text) - 1] = self._labels(here)[1:]
            positions[begin:end] = np.arange(end - begin)
            documents[begin:end] = number
            begin = end
        positions[begin:] = np.arange(length - begin)
        labels[: plan.num_counted_labels] = IGNORED_LABEL
        return _row(tokens, labels, positions, documents)

    def _labels(self, here: slice) -> npt.NDArray[np.int64]:
        """Return the tokens of a part of the file, those that are not trained masked."""
        labels = self._file.tokens[here].astype(np.int64)
        if self._file.is_trained is not None:
            labels[~self._file.is_trained[here]] = IGNORED_LABEL
        return labels


class DummyRows:
    """Random tokens, one document a row, a function of the seed and the row's number alone."""

    one_document_per_row = True
    batches = None

    def __init__(self, *, seq_len: int, vocab_size: int, num_tokens: int, seed: int) -> None:
        self.seq_len = seq_len
        self.rows_per_epoch = -(-num_tokens // seq_len)
        self.vocab_size = vocab_size
        self.source_names: tuple[str, ...] = ("dummy",)
        self.fingerprint = digest_of("dummy", seq_len, vocab_size, num_tokens, seed)
        self._key = int(digest_of("dummy", seed)[:16], 16)

    def row(self, index: int) -> Row:
        """Return a row; the label of its last token is drawn like the others."""
        first = index * (self.seq_len + 1)
        places = np.arange(first, first + self.seq_len + 1, dtype=np.uint64)
        tokens = (mix_words(places, self._key) % self.vocab_size).astype(np.int64)
        positions = np.arange(self.seq_len, dtype=np.int64)
        return _row(tokens[:-1], tokens[1:], positions, np.ones(self.seq_len, dtype=np.int64))


def _row(
    tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray, documents: np.ndarray
) -> Row:
    return Row(
        tokens_T=torch.from_numpy(tokens),
        labels_T=torch.from_numpy(labels),
        positions_T=torch.from_numpy(positions),
        documents_T=torch.from_numpy(documents),
    )
