"""Rows by global number: the one thing training and validation read, whatever the data is.

Row `i` is a pure function of (seed, epoch, i), with epoch = i // rows_per_epoch; nothing here knows
of ranks. Dealing rows to ranks is `loader.py`'s, opening what a configuration names `sources.py`'s.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.data.batch import IGNORED_LABEL, PADDING_DOCUMENT, Row
from engine.data.cache import digest_of
from engine.data.length_batches import LengthBatches
from engine.data.packing import OneDocumentPacking, Packing, mix_words
from engine.data.slices import Slice
from engine.data.token_file import TokenFile


class RowSource(Protocol):
    """Endless rows; `row(i)` is the same on every rank, worker and run."""

    seq_len: int
    """Tokens of every row; of the longest where there are `batches`."""

    rows_per_epoch: int
    """More than any run reads, where the source is a stream whose length nobody knows."""

    vocab_size: int

    tokens_per_epoch: int
    """Tokens that the rows of an epoch hold, padding left out."""

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

    def attention_cost(self, index: int) -> int:
        """Return how much a row attends to, the squared tokens of its documents, without reading
        it; 0 for all where nobody knows."""
        ...


class Part(NamedTuple):
    """A stretch of one document in a row."""

    num_tokens: int
    tokens: npt.NDArray[np.integer]
    """Its tokens, and the one behind them where the document goes on: a label."""

    is_trained: npt.NDArray[np.bool_] | None
    """Which of `tokens` are labels; None: all."""


def assemble(parts: Iterable[Part], *, seq_len: int, num_counted_labels: int = 0) -> Row:
    """Return the row that holds parts of documents, which are numbered from 1, and then padding.

    The first `num_counted_labels` labels are left out, because an earlier row has them.
    """
    tokens = np.zeros(seq_len, dtype=np.int64)
    labels = np.full(seq_len, IGNORED_LABEL, dtype=np.int64)
    positions = np.zeros(seq_len, dtype=np.int64)
    documents = np.full(seq_len, PADDING_DOCUMENT, dtype=np.int64)
    begin = 0
    for number, (num_tokens, text, is_trained) in enumerate(parts, start=1):
        end = begin + num_tokens
        tokens[begin:end] = text[:num_tokens]
        followers = text[1:].astype(np.int64)
        if is_trained is not None:
            followers[~is_trained[1:]] = IGNORED_LABEL
        labels[begin : begin + len(followers)] = followers
        positions[begin:end] = np.arange(num_tokens)
        documents[begin:end] = number
        begin = end
    positions[begin:] = np.arange(seq_len - begin)
    labels[:num_counted_labels] = IGNORED_LABEL
    return _row(tokens, labels, positions, documents)


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
        one_each = isinstance(packing, OneDocumentPacking | LengthBatches)
        self.one_document_per_row = one_each and file.pairs is None
        self.reference_logps: npt.NDArray[np.float32] | None = None
        """Log-probabilities of the answers of each pair under a reference model, (documents, 2),
        where they were prepared."""
        self.seq_len = seq_len
        self.rows_per_epoch = packing.rows_per_epoch
        self.tokens_per_epoch = packing.tokens_per_epoch
        self.vocab_size = vocab_size
        self.source_names = (name,)
        self.fingerprint = fingerprint

    def row(self, index: int) -> Row:
        """Return a row: its documents numbered from 1, and padding up to `seq_len` behind them.

        Rows of `batches` have none: it is the batch that they are padded for.
        """
        plan = self._packing.plan(*divmod(index, self.rows_per_epoch))
        held = sum(part.stop - part.start for part in plan.slices)
        seq_len = held if self.batches else self.seq_len
        if self._file.pairs is not None:
            return self._row_of_pairs([one.document for one in plan.slices], seq_len)
        return assemble(
            [self._part(one) for one in plan.slices],
            seq_len=seq_len,
            num_counted_labels=plan.num_counted_labels,
        )

    def attention_cost(self, index: int) -> int:
        """Return the squared tokens of the documents of a row; a pair counts as one document."""
        return self._packing.attention_cost(*divmod(index, self.rows_per_epoch))

    def documents(self, index: int) -> list[int]:
        """Return the documents of the file that a row holds, in order."""
        plan = self._packing.plan(*divmod(index, self.rows_per_epoch))
        return [one.document for one in plan.slices]

    @property
    def file(self) -> TokenFile:
        """The tokens, in the order of the source."""
        return self._file

    @property
    def packing(self) -> Packing:
        """Which of them a row holds."""
        return self._packing

    def _row_of_pairs(self, pairs: list[int], seq_len: int) -> Row:
        """Return a row of whole pairs: pair p is its documents 2p + 1 and 2p + 2."""
        assert self._file.pairs is not None, "the rows are of pairs"
        parts: list[Part] = []
        for number in pairs:
            first, past = self._file.offsets[number : number + 2]
            border = int(first + self._file.pairs[number, 0])
            for start, stop in ((first, border), (border, past)):
                is_trained = self._file.is_trained
                labels = None if is_trained is None else is_trained[start:stop]
                parts.append(Part(stop - start, self._file.tokens[start:stop], labels))
        logps = None
        if self.reference_logps is not None:
            logps = torch.from_numpy(self.reference_logps[pairs])
        return replace(
            assemble(parts, seq_len=seq_len),
            desirable_P=torch.from_numpy(2 * self._file.pairs[pairs, 1] - 1),
            reference_logps_P2=logps,
        )

    def _part(self, one: Slice) -> Part:
        first, past = self._file.offsets[one.document : one.document + 2]
        here = slice(first + one.start, min(first + one.stop + 1, past))
        is_trained = self._file.is_trained
        return Part(
            one.stop - one.start,
            self._file.tokens[here],
            None if is_trained is None else is_trained[here],
        )


class DummyRows:
    """Random tokens, one document a row, a function of the seed and the row's number alone."""

    one_document_per_row = True
    batches = None

    def __init__(self, *, seq_len: int, vocab_size: int, num_tokens: int, seed: int) -> None:
        self.seq_len = seq_len
        self.rows_per_epoch = -(-num_tokens // seq_len)
        self.tokens_per_epoch = self.rows_per_epoch * seq_len
        self.vocab_size = vocab_size
        self.source_names: tuple[str, ...] = ("dummy",)
        self.fingerprint = digest_of("dummy", seq_len, vocab_size, num_tokens, seed)
        self._key = int(digest_of("dummy", seed)[:16], 16)

    def attention_cost(self, index: int) -> int:
        """Return the squared tokens of a row."""
        return self.seq_len**2

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
