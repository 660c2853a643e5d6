"""Batches of documents of similar length under a budget of tokens: `data.batch_tokens`.

Each document is a row of its own length. Which rows share a batch follows from the lengths alone,
so all epochs have the same number of batches, and any batch can be asked for at any time.
"""

import numpy as np
import numpy.typing as npt

from engine.data.packing import Packing, Permutation, RowPlan, deal_equals
from engine.data.slices import DocumentSlices

Integers = npt.NDArray[np.integer]


class LengthBatches(Packing):
    """Rows of one slice each, and which of them are a batch.

    Rows of an epoch are numbered by falling length, rounded up to `pad_to_multiple`. A batch is as
    many neighbours as `batch_tokens` holds where all are padded to the first one's rounded length,
    of which it must hold one. Shuffling permutes the batches, and the slices of each rounded length
    among the rows of that length. In any case the first `num_largest_first` batches of epoch 0 are
    those with most tokens, padding included; among equals those of longer rows.

    Memory: four bytes for each slice, eight for each batch, as much again with largest first.
    """

    def __init__(
        self,
        slices: DocumentSlices,
        *,
        batch_tokens: int,
        pad_to_multiple: int,
        seed: int,
        shuffle: bool,
        num_largest_first: int = 0,
    ) -> None:
        self._slices = slices
        self._seed = seed
        self._shuffle = shuffle
        self.pad_to_multiple = pad_to_multiple
        multiples = -(-slices.lengths() // pad_to_multiple)
        counts = np.bincount(multiples)
        # numpy sorts 16 bits by radix: three times as fast for millions.
        falling = len(counts) - 1 - multiples
        falling = falling.astype(np.uint16 if len(counts) < 1 << 16 else np.int32)
        index = np.int32 if len(multiples) < 1 << 31 else np.int64
        self._by_length = np.argsort(falling, kind="stable").astype(index)
        kinds = np.flatnonzero(counts)[::-1]
        self._lengths = kinds * pad_to_multiple
        self._ends = np.cumsum(counts[kinds])
        self._begins = cut_into_batches(self._lengths, self._ends, batch_tokens)
        self.rows_per_epoch = len(multiples)
        self.tokens_per_epoch = slices.num_tokens
        self.batches_per_epoch = len(self._begins) - 1
        sizes = np.diff(self._begins) * self._batch_lengths()
        self.padded_tokens_per_epoch = int(sizes.sum())
        """Tokens of an epoch's batches, padding included."""
        # The sort keeps the order of equals, in which longer rows come first.
        by_size = np.argsort(-sizes, kind="stable")
        self._largest = by_size[:num_largest_first]
        self._others = np.sort(by_size[num_largest_first:]) if num_largest_first else None

    def plan(self, epoch: int, row: int) -> RowPlan:
        """Return the one slice of a row."""
        if self._shuffle:
            lengths = self._lengths, self._ends
            (row,) = deal_equals(np.array([row]), *lengths, self._seed, epoch)
        return RowPlan([self._slices[int(self._by_length[row])]])

    def rows(self, batch: int) -> range:
        """Return the rows of a batch; batches and rows are numbered over all epochs."""
        epoch, place = divmod(batch, self.batches_per_epoch)
        number, first = self._number(epoch, place), epoch * self.rows_per_epoch
        return range(first + int(self._begins[number]), first + int(self._begins[number + 1]))

    @property
    def largest_shape(self) -> tuple[int, int]:
        """Rows and padded length of the batch with most tokens."""
        num_rows, lengths = np.diff(self._begins), self._batch_lengths()
        number = int(np.argmax(num_rows * lengths))
        return int(num_rows[number]), int(lengths[number])

    @property
    def summary(self) -> str:
        """How many batches there are, how full and how large, for the log."""
        num_rows, length = self.largest_shape
        padded_share = 1 - self.tokens_per_epoch / self.padded_tokens_per_epoch
        return (
            f"in {self.batches_per_epoch:,} batches, padded share {padded_share:.4f}, the largest "
            f"{num_rows:,} rows of {length:,} tokens"
        )

    def _number(self, epoch: int, place: int) -> int:
        """Return which batch, by falling length, stands at a place of an epoch."""
        num_fixed = len(self._largest) if epoch == 0 else 0
        if place < num_fixed:
            return int(self._largest[place])
        place -= num_fixed
        if self._shuffle:
            size = self.batches_per_epoch - num_fixed
            place = Permutation(size, self._seed, epoch, "batches")(place)
        return place if self._others is None or epoch else int(self._others[place])

    def _batch_lengths(self) -> Integers:
        """Return the padded length of each batch, which is that of its first row."""
        kinds = np.searchsorted(self._ends, self._begins[:-1], side="right")
        return self._lengths[kinds]


def cut_into_batches(lengths: Integers, ends: Integers, batch_tokens: int) -> Integers:
    """Return where each batch begins among rows by falling length, then the number of rows.

    The rows up to `ends[k]` that are not among those up to `ends[k - 1]` have `lengths[k]` tokens.
    A batch takes as many rows as the budget holds at the length of its first. One step for each
    length that there is, not for each batch.
    """
    begins: list[Integers] = []
    done = 0
    for length, end in zip(lengths.tolist(), ends.tolist(), strict=True):
        if done >= end:  # the last batch of longer rows has taken all of this length
            continue
        num_rows = batch_tokens // length
        assert num_rows, "the budget holds the longest row, see the rules"
        starts = np.arange(done, end, num_rows)
        begins.append(starts)
        done = int(starts[-1]) + num_rows
    return np.concatenate([*begins, ends[-1:] if len(ends) else [0]]).astype(np.int64)
