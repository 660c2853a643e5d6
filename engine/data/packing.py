"""Cutting documents into rows: row number -> document slices, a pure function of order and lengths.

Packings hold nothing but the current epochs' document order, so any row can be asked for at any
time: one search, no replay. Best-fit packing is in `best_fit.py`.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from engine.data.slices import DocumentSlices, Slice

IntOrArray = TypeVar("IntOrArray", int, npt.NDArray[np.uint64])

NUM_ROUNDS = 6
BLOCK = 1 << 15
EPOCHS_KEPT = 2
WORD = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The slices of one row, and how many of its first labels an earlier row has trained."""

    slices: list[Slice]
    num_counted_labels: int = 0


class Packing(Protocol):
    """Which documents fill a row."""

    rows_per_epoch: int

    tokens_per_epoch: int
    """Tokens that the rows of an epoch hold; one that two of them hold counts twice."""

    def plan(self, epoch: int, row: int) -> RowPlan:
        """Return the content of a row of an epoch."""
        ...

    def attention_cost(self, epoch: int, row: int) -> int:
        """Return the sum of the squared tokens of a row's slices."""
        return sum((one.stop - one.start) ** 2 for one in self.plan(epoch, row).slices)


class Permutation:
    """A permutation of `range(size)` that answers for single places, a pure function of its key.

    A Feistel network on the next power of two, walked until it lands inside (Black and Rogaway
    2002, "Ciphers with arbitrary finite domains", method 2). Its own arithmetic keeps the order
    the same under every version of every library.
    """

    def __init__(self, size: int, *key: object) -> None:
        self._size = size
        bits = max(size - 1, 0).bit_length()
        self._low_bits = bits - bits // 2
        self._low_mask = (1 << self._low_bits) - 1
        self._high_mask = (1 << (bits // 2)) - 1
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * NUM_ROUNDS).digest()
        self._keys = [int(word) for word in np.frombuffer(digest, dtype="<u8")]

    def __call__(self, place: int) -> int:
        """Return the number at `place`."""
        place = self._walk(place)
        while place >= self._size:
            place = self._walk(place)
        return place

    def all(self) -> npt.NDArray[np.int64]:
        """Return the numbers at every place."""
        numbers = np.empty(self._size, dtype=np.int64)
        # Blocks that stay in a core's cache: three times as fast for millions.
        for start in range(0, self._size, BLOCK):
            stop = min(start + BLOCK, self._size)
            block = self._walk(np.arange(start, stop, dtype=np.uint64))
            outside = np.flatnonzero(block >= self._size)
            while outside.size:
                block[outside] = walked = self._walk(block[outside])
                outside = outside[walked >= self._size]
            numbers[start:stop] = block
        return numbers

    def _walk(self, place: IntOrArray) -> IntOrArray:
        low: IntOrArray = cast(IntOrArray, place & self._low_mask)
        high: IntOrArray = cast(IntOrArray, place >> self._low_bits)
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                low = cast(IntOrArray, low ^ (mix_words(high, key) & self._low_mask))
            else:
                high = cast(IntOrArray, high ^ (mix_words(low, key) & self._high_mask))
        return cast(IntOrArray, (high << self._low_bits) | low)


def deal_equals(
    places: npt.NDArray[np.integer],
    lengths: npt.NDArray[np.integer],
    ends: npt.NDArray[np.integer],
    seed: int,
    epoch: int,
) -> list[int]:
    """Return the places whose documents stand at `places` in an epoch, each of the same length.

    Places are numbered so that those of `lengths[k]` end at `ends[k]`.
    """
    kinds = np.searchsorted(ends, places, side="right").tolist()
    orders: dict[int, Permutation] = {}
    dealt: list[int] = []
    for place, kind in zip(places.tolist(), kinds, strict=True):
        first = int(ends[kind - 1]) if kind else 0
        if kind not in orders:
            size, length = int(ends[kind]) - first, int(lengths[kind])
            orders[kind] = Permutation(size, seed, epoch, "documents of length", length)
        dealt.append(first + orders[kind](place - first))
    return dealt


def mix_words(words: IntOrArray, key: int) -> IntOrArray:
    """Scramble 64-bit words under a key: the finaliser of MurmurHash3 (fmix64, public domain)."""
    # The mask only matters to Python's unbounded integers.
    x = words ^ key
    x = x ^ (x >> 33)
    x = (x * 0xFF51_AFD7_ED55_8CCD) & WORD
    x = x ^ (x >> 33)
    x = (x * 0xC4CE_B9FE_1A85_EC53) & WORD
    return cast(IntOrArray, x ^ (x >> 33))


class ConcatPacking(Packing):
    """Documents joined end to end and cut every `stride` tokens into windows of `seq_len`.

    With a stride below `seq_len` windows overlap, and a label is trained in the first window that
    has it. Shuffling permutes the documents before they are joined and the windows after, so
    neighbours in a batch come from different places. `keep_last` keeps the unfilled last window.
    """

    def __init__(
        self,
        offsets: npt.NDArray[np.int64],
        *,
        seq_len: int,
        stride: int,
        keep_last: bool,
        seed: int,
        shuffle: bool,
    ) -> None:
        self._offsets = offsets
        self._seq_len = seq_len
        self._stride = stride
        self._seed = seed
        self._shuffle = shuffle
        self._orders: OrderedDict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
        self._orders = OrderedDict()
        beyond_first = max(int(offsets[-1]) - seq_len, 0)
        full = int(int(offsets[-1]) >= seq_len) + beyond_first // stride
        covered = (full - 1) * stride + seq_len if full else 0
        self.num_tail_tokens = int(offsets[-1]) - covered
        """Tokens of the unfilled last window that no full window has."""
        self.rows_per_epoch = full + int(keep_last and self.num_tail_tokens > 0)
        self.tokens_per_epoch = full * seq_len
        if self.rows_per_epoch > full:
            self.tokens_per_epoch += int(offsets[-1]) - full * stride

    def plan(self, epoch: int, row: int) -> RowPlan:
        """Return the slices of a window; one search in the epoch's cumulative lengths."""
        if self._shuffle:
            row = Permutation(self.rows_per_epoch, self._seed, epoch, "rows")(row)
        order, ends = self._order(epoch)
        start = row * self._stride
        stop = min(start + self._seq_len, int(ends[-1]))
        place = int(np.searchsorted(ends, start, side="right"))
        slices: list[Slice] = []
        while start < stop:
            document, end = int(order[place]), int(ends[place])
            begin = end - int(self._offsets[document + 1] - self._offsets[document])
            slices.append(Slice(document, start - begin, min(stop, end) - begin))
            start, place = end, place + 1
        return RowPlan(slices, self._seq_len - self._stride if row > 0 else 0)

    def _order(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        if not self._shuffle:
            epoch = 0
        if epoch not in self._orders:
            num_documents = len(self._offsets) - 1
            if self._shuffle:
                order = Permutation(num_documents, self._seed, epoch, "documents").all()
                ends = np.cumsum(np.diff(self._offsets)[order])
            else:
                order, ends = np.arange(num_documents), self._offsets[1:]
            self._orders[epoch] = (order, ends)
            while len(self._orders) > EPOCHS_KEPT:
                self._orders.popitem(last=False)
        return self._orders[epoch]


class OneDocumentPacking(Packing):
    """One document a row, or one slice of a document longer than it."""

    def __init__(self, slices: DocumentSlices, *, seed: int, shuffle: bool) -> None:
        self._slices = slices
        self._seed = seed
        self._shuffle = shuffle
        self.rows_per_epoch = len(slices)
        self.tokens_per_epoch = slices.num_tokens

    def plan(self, epoch: int, row: int) -> RowPlan:
        """Return the one slice of a row."""
        if self._shuffle:
            row = Permutation(self.rows_per_epoch, self._seed, epoch, "rows")(row)
        return RowPlan([self._slices[row]])
