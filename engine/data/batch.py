"""The data types that other packages see: one packed row, and one microbatch of rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED_LABEL = -100
PADDING_DOCUMENT = 0
FEWEST_DOCUMENTS = 16
SHORTEST_BOUND_TOKENS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One training row of T tokens, holding whole or cut documents and padding at the end.

    All four tensors are int64 of shape (T,). Labels are already shifted: `labels_T[t]` is the
    token that follows `tokens_T[t]` in its own document, or `IGNORED_LABEL`. Documents are
    numbered from 1 in row order, padding is `PADDING_DOCUMENT`; positions restart at 0 with
    each document.
    """

    tokens_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    documents_T: Tensor

    source: int = 0
    """Number of the source that the row comes from, among those of the run."""

    desirable_P: Tensor | None = None
    """For rows of pairs: 1 where the first sequence of pair p is an answer that is wanted, else -1;
    int64. Its sequences are the documents 2p + 1 and 2p + 2."""

    reference_logps_P2: Tensor | None = None
    """Log-probabilities of the answers of both under a reference model, fp32; None: not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One microbatch of one data-parallel rank."""

    tokens_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    documents_BT: Tensor

    document_offsets: Tensor
    """Where each document of the rows, joined, begins; see `document_offsets`."""

    longest_document_tokens: int
    """No document is longer; see `longest_document_tokens`."""

    rows_B: Tensor
    """Global row numbers, int64, each once; -1 for a filler row that trains nothing."""

    sources_B: Tensor
    """Number of the source of each row, int64."""

    one_document_per_row: bool
    """No row of the source holds a second document (trailing padding is allowed): causal attention
    suffices."""

    squared_document_tokens: int
    """Sum over documents of their squared length in this microbatch, for attention FLOPs."""

    desirable_BP: Tensor | None = None
    """For rows of pairs: that of each row, and 0 where it has no pair p; P is at least 1."""

    reference_logps_BP2: Tensor | None = None
    """For rows of pairs: what a reference model gives their answers, summed over tokens."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on `device`, copied without blocking."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from which copies to a GPU do not block."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {
            f.name: change(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **changed)


def collate(
    numbered_rows: Sequence[tuple[int, Row]],
    *,
    one_document_per_row: bool,
    pad_to_multiple: int = 1,
) -> Batch:
    """Stack rows with their global numbers, padded to the longest, rounded up to a multiple."""
    rows = [row for _, row in numbered_rows]
    stack = partial(_stack, pad_to_multiple=pad_to_multiple)
    documents_BT = stack([row.documents_T for row in rows], PADDING_DOCUMENT)
    lengths = [row.documents_T.bincount()[1:] for row in rows]
    offsets = document_offsets(documents_BT)
    return Batch(
        tokens_BT=stack([row.tokens_T for row in rows], 0),
        labels_BT=stack([row.labels_T for row in rows], IGNORED_LABEL),
        positions_BT=stack([row.positions_T for row in rows], 0),
        documents_BT=documents_BT,
        document_offsets=offsets,
        longest_document_tokens=longest_document_tokens(offsets),
        rows_B=torch.tensor([number for number, _ in numbered_rows]),
        sources_B=torch.tensor([row.source for row in rows]),
        one_document_per_row=one_document_per_row,
        squared_document_tokens=sum(int(length.square().sum()) for length in lengths),
        desirable_BP=_stack_pairs([row.desirable_P for row in rows]),
        reference_logps_BP2=_stack_pairs([row.reference_logps_P2 for row in rows]),
    )


def document_offsets(documents_BT: Tensor) -> Tensor:
    """Return where each document begins in the joined rows, then all their tokens: int32 (N + 1,).

    No document goes on in the next row, and a row's padding is one. N is a power of two, at least
    `FEWEST_DOCUMENTS`, so that few lengths occur; documents beyond those there are empty.
    """
    is_first_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    begins = is_first_BT.flatten().nonzero().squeeze(1)
    size = max(FEWEST_DOCUMENTS, 1 << (len(begins) - 1).bit_length())
    offsets = begins.new_full((size + 1,), documents_BT.numel(), dtype=torch.int32)
    offsets[: len(begins)] = begins
    return offsets


def longest_document_tokens(offsets: Tensor) -> int:
    """Return a bound of the length of the documents that begin at `offsets`, padding included.

    A power of two, at least `SHORTEST_BOUND_TOKENS`, so that few values occur.
    """
    return max(SHORTEST_BOUND_TOKENS, 1 << (int(offsets.diff().max()) - 1).bit_length())


def _stack_pairs(values_P: Sequence[Tensor | None]) -> Tensor | None:
    """Stack what rows have for each pair, padded with 0; None where some row has no such thing."""
    found = [value for value in values_P if value is not None]
    if len(found) < len(values_P):
        return None
    stacked = pad_sequence(found, batch_first=True)
    return stacked if stacked.shape[1] else F.pad(stacked.movedim(1, -1), (0, 1)).movedim(-1, 1)


def _stack(values_T: Sequence[Tensor], value: int, *, pad_to_multiple: int) -> Tensor:
    stacked_BT = pad_sequence(list(values_T), batch_first=True, padding_value=value)
    return F.pad(stacked_BT, (0, -stacked_BT.shape[1] % pad_to_multiple), value=value)
