"""Whole documents fitted into rows: best-fit-decreasing, which cuts none that fits.

The rows are made once, from the lengths alone, at the start. What an epoch changes is which
document of a length stands where one of that length fits. So all epochs have the same number of
rows and give a document other company, any row can be asked for at any time, and no epoch leaves
anything in memory.
"""

from bisect import bisect_left

import numpy as np
import numpy.typing as npt

from engine.data.packing import Packing, Permutation, RowPlan, deal_equals
from engine.data.slices import DocumentSlices


class BestFitPacking(Packing):
    """Whole slices in rows, as few rows as best-fit-decreasing needs.

    Shuffling permutes the rows, and the slices of each length among the places of that length.
    Without it rows come in the order of their longest document. Inside a row slices stand by
    falling length: each is by itself to the model, so their order means nothing.
    """

    def __init__(self, slices: DocumentSlices, *, seq_len: int, seed: int, shuffle: bool) -> None:
        self._slices = slices
        self._seed = seed
        self._shuffle = shuffle
        lengths = slices.lengths()
        index = np.int32 if len(lengths) < 1 << 31 else np.int64
        # numpy sorts 16 bits by radix: three times as fast for millions.
        free = (seq_len - lengths).astype(np.uint16 if seq_len < 1 << 16 else np.int32)
        self._by_length = np.argsort(free, kind="stable").astype(index)
        counts = np.bincount(lengths)
        self._lengths = np.flatnonzero(counts)[::-1]
        self._ends = np.cumsum(counts[self._lengths])
        rows = fit(counts, seq_len)
        self._places = np.argsort(rows, kind="stable").astype(index)
        """Places in `_by_length`, row after row."""
        self._begins = np.cumsum(np.concatenate([[0], np.bincount(rows)]))
        self.rows_per_epoch = len(self._begins) - 1
        self.tokens_per_epoch = slices.num_tokens
        # Which slice of a length stands in a row changes with the epoch, its length does not.
        squares = np.repeat(self._lengths.astype(np.float64) ** 2, counts[self._lengths])
        self._costs = np.bincount(rows, weights=squares).astype(np.int64)
        if not shuffle:
            longest = self._by_length[self._places[self._begins[:-1]]]
            self._in_order = np.argsort(longest).astype(index)

    def plan(self, epoch: int, row: int) -> RowPlan:
        """Return the slices of a row, the longest first."""
        row = self._made_as(epoch, row)
        places = self._places[self._begins[row] : self._begins[row + 1]]
        if self._shuffle:
            lengths = self._lengths, self._ends
            places = deal_equals(places, *lengths, self._seed, epoch)
        return RowPlan([self._slices[int(number)] for number in self._by_length[places]])

    def attention_cost(self, epoch: int, row: int) -> int:
        """Return the sum of the squared tokens of a row's slices, without dealing them."""
        return int(self._costs[self._made_as(epoch, row)])

    def _made_as(self, epoch: int, row: int) -> int:
        """Return the number that a row of an epoch has among the rows as they were made."""
        if self._shuffle:
            return Permutation(self.rows_per_epoch, self._seed, epoch, "rows")(row)
        return int(self._in_order[row])


def fit(counts: npt.NDArray[np.integer], seq_len: int) -> npt.NDArray[np.int32]:
    """Return the row of each slice, slices being numbered by falling length.

    `counts[n]` slices have n tokens, n from 1 to `seq_len`. Each goes to the row with the least
    space that is enough, or to a new one. All rows with the same space take slices of one length
    at once, so the number of steps depends on how many lengths there are, not on how many slices.
    Best-fit-decreasing as in Ding et al. 2024, "Fewer Truncations Improve Language Modeling",
    arXiv:2404.10830.
    """
    row_of_slice = np.empty(int(counts.sum()), dtype=np.int32)
    open_rows = _OpenRows()
    done = num_rows = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        end = done + int(counts[length])
        while done < end:
            free, rows = open_rows.take(length)
            if not len(rows):
                free, num_new = seq_len, -(-(end - done) // (seq_len // length))
                rows = np.arange(num_rows, num_rows + num_new, dtype=np.int32)
                num_rows += num_new
            # A row that has taken one of several is the one with the least space from then on.
            each = free // length
            num_full = min(len(rows), (end - done) // each)
            rest = 0 if num_full == len(rows) else end - done - num_full * each
            full, partly = rows[:num_full], rows[num_full : num_full + (rest > 0)]
            taken = np.concatenate([np.repeat(full, each), np.repeat(partly, rest)])
            row_of_slice[done : done + len(taken)] = taken
            done += len(taken)
            open_rows.put(free - each * length, full)
            open_rows.put(free - rest * length, partly)
            open_rows.put(free, rows[num_full + len(partly) :])
    return row_of_slice


class _OpenRows:
    """Rows by the tokens that they still have space for."""

    def __init__(self) -> None:
        self._rows: dict[int, list[npt.NDArray[np.int32]]] = {}
        self._spaces: list[int] = []

    def put(self, space: int, rows: npt.NDArray[np.int32]) -> None:
        """Add rows with this much space; those with none are full."""
        if not space or not len(rows):
            return
        if space not in self._rows:
            self._spaces.insert(bisect_left(self._spaces, space), space)
        self._rows.setdefault(space, []).append(rows)

    def take(self, length: int) -> tuple[int, npt.NDArray[np.int32]]:
        """Remove and return all rows with the least space that is enough; none if there is none."""
        place = bisect_left(self._spaces, length)
        if place == len(self._spaces):
            return 0, np.empty(0, dtype=np.int32)
        space = self._spaces.pop(place)
        return space, np.concatenate(self._rows.pop(space))
