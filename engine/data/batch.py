"""The data types that other packages see: one packed row, and one microbatch of rows."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORED_LABEL = -100
PADDING_DOCUMENT = 0


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One microbatch of one data-parallel rank."""

    tokens_BT: Tensor
    labels_BT: Tensor
    positions_BT: Tensor
    documents_BT: Tensor

    rows_B: Tensor
    """Global row numbers, int64, -1 for a filler row that trains nothing."""

    one_document_per_row: bool
    """No row holds a second document (trailing padding is allowed): causal attention suffices."""

    squared_document_tokens: int
    """Sum over documents of their squared length in this microbatch, for attention FLOPs."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on `device`, copied without blocking."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)
