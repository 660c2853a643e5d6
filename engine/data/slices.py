"""Documents as slices that fit a row: what `data.long_document` makes of those that do not.

A document that fits is one whole slice. Which slices share a row is for `packing.py` and
`best_fit.py`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

DONE = {"truncate": "cut", "drop": "left out", "split": "split"}


@dataclass(frozen=True, slots=True)
class Slice:
    """Tokens `start` to `stop` of one document."""

    document: int
    start: int
    stop: int


class DocumentSlices:
    """Slices of at most `seq_len` tokens by number, in the order of the documents.

    A longer document gives one slice that ends at `seq_len` ("truncate"), none ("drop"), or
    slices of `seq_len` tokens and a rest ("split"). The label of a slice's last token is the token
    behind it, so a split leaves no rest of a single token: it is a label already, and by itself
    would be a row without one.

    `is_trained` tells which tokens of the file are labels, where not all are. Slices of long
    documents in which no label is left, such as the beginning of a long prompt, are left out, so
    that no cut makes a row without labels. Memory grows with the long documents alone.
    """

    def __init__(
        self,
        offsets: Integers,
        *,
        seq_len: int,
        long_document: Literal["truncate", "drop", "split"],
        is_trained: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        self._offsets = offsets
        self._seq_len = seq_len
        self._done = DONE[long_document]
        lengths = np.diff(offsets)
        self._long = np.flatnonzero(lengths > seq_len)
        lengths = lengths[self._long]
        owners, starts = _cut(lengths, seq_len, long_document)
        self.num_unlabelled = 0
        """Slices of long documents left out because they have no label."""
        if is_trained is not None:
            kept = self._have_labels(owners, starts, is_trained)
            self.num_unlabelled = len(kept) - int(kept.sum())
            owners, starts = owners[kept], starts[kept]
        self._starts = starts
        held = np.minimum(lengths[owners] - starts, seq_len)
        self._held = held.astype(np.int32)
        counts = np.bincount(owners, minlength=len(self._long))
        self._ends = np.cumsum(counts)
        # The number of each long document's first slice, or of what follows if it has none.
        self._firsts = self._long + self._ends - counts - np.arange(len(self._long))
        only_labels = int((starts + seq_len == lengths[owners] - 1).sum())
        num_missing = int(lengths.sum() - held.sum())
        self.num_tokens = int(offsets[-1]) - num_missing
        """Tokens of all slices."""
        self.num_lost_tokens = num_missing - only_labels * (long_document == "split")
        """Tokens of long documents that are left out; a split loses none."""

    @property
    def num_documents(self) -> int:
        """Documents there are, with and without slices."""
        return len(self._offsets) - 1

    @property
    def num_long(self) -> int:
        """Documents longer than a row."""
        return len(self._long)

    @property
    def summary(self) -> str:
        """What became of the documents longer than a row, for the log."""
        text = (
            f"{self.num_long:,} documents longer than a row are {self._done} "
            f"({self.num_lost_tokens:,} tokens lost)"
        )
        if self.num_unlabelled:
            text += f", {self.num_unlabelled:,} pieces of them without a label are left out"
        return text

    def __len__(self) -> int:
        return self.num_documents - self.num_long + len(self._starts)

    def __getitem__(self, number: int) -> Slice:
        place = int(np.searchsorted(self._firsts, number, side="right")) - 1
        if place < 0:
            return self._slice(number, 0)
        begin = int(self._ends[place - 1]) if place else 0
        end = int(self._ends[place])
        within = begin + number - int(self._firsts[place])
        if within < end:
            return self._slice(int(self._long[place]), int(self._starts[within]))
        return self._slice(number - end + place + 1, 0)

    def lengths(self) -> npt.NDArray[np.int32]:
        """Return the number of tokens of each slice."""
        begins = self._ends - np.diff(self._ends, prepend=0)
        numbers = np.repeat(self._firsts - begins, np.diff(self._ends, prepend=0))
        numbers += np.arange(len(numbers))
        found = np.empty(len(self), dtype=np.int32)
        is_whole = np.ones(len(self), dtype=bool)
        is_whole[numbers] = False
        whole = np.diff(self._offsets)
        found[is_whole] = whole[whole <= self._seq_len]
        found[numbers] = self._held
        return found

    def _slice(self, document: int, start: int) -> Slice:
        length = int(self._offsets[document + 1] - self._offsets[document])
        return Slice(document, start, min(start + self._seq_len, length))

    def _have_labels(
        self, owners: Integers, starts: Integers, is_trained: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        begins, pasts = self._offsets[self._long[owners]], self._offsets[self._long[owners] + 1]
        firsts = begins + starts + 1
        behind = np.minimum(firsts + self._seq_len, pasts)
        pairs = zip(firsts.tolist(), behind.tolist(), strict=True)
        return np.array([is_trained[first:past].any() for first, past in pairs], dtype=bool)


def cut_documents(
    offsets: Integers,
    name: str,
    *,
    seq_len: int,
    long_document: Literal["truncate", "drop", "split", "error"],
    is_trained: npt.NDArray[np.bool_] | None,
) -> DocumentSlices:
    """Return the slices of a source's documents, or refuse longer ones ("error")."""
    if long_document == "error":
        lengths = np.diff(offsets)
        if num_long := np.count_nonzero(lengths > seq_len):
            raise ValueError(
                f"{name}: {num_long:,} documents are longer than a row of {seq_len:,} tokens (the "
                f"longest has {lengths.max():,}); raise training.seq_len, use data.packing "
                "= 'concat', or set data.long_document to 'truncate', 'drop' or 'split'"
            )
        long_document = "drop"
    return DocumentSlices(
        offsets, seq_len=seq_len, long_document=long_document, is_trained=is_trained
    )


def _cut(lengths: Integers, seq_len: int, long_document: str) -> tuple[Integers, Integers]:
    """Return for each slice of long documents whose it is (a place in `lengths`) and its start."""
    if long_document == "split":
        counts = -(-(lengths - 1) // seq_len)
    else:
        counts = np.full_like(lengths, long_document == "truncate")
    owners = np.repeat(np.arange(len(lengths)), counts)
    within = np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]
    return owners, within * seq_len
