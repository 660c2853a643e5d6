"""Several sources as one: row i of the mixture -> (source, that source's own row), in O(log i).

The source of row i is that whose interval holds x(i) = (a i + b) mod M. With a / M near the golden
section the points x(0), x(1), ... fall so evenly that any window of rows has of each source its
share to within a few rows (Knuth, The Art of Computer Programming, volume 3, section 6.4, theorem
S). How many earlier rows a source had is the number of earlier points in its interval, which
Euclid's algorithm finds without visiting them. So nothing is drawn and nothing is kept: a run
resumes anywhere.
"""

import logging
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, pairwise

from engine.data.batch import Row
from engine.data.cache import digest_of
from engine.data.config import MixedSourceConfig, weight_at
from engine.data.rows import RowSource

log = logging.getLogger("tessera")

POINTS = 1 << 64
GOLDEN_MULTIPLIER = 0x9E37_79B9_7F4A_7C15
"""Odd, and nearest to `POINTS` divided by the golden ratio 1.618..."""

MANY_EPOCHS = 4.0


def floor_sum(count: int, divisor: int, factor: int, offset: int) -> int:
    """Return the sum of (factor * i + offset) // divisor over i in range(count).

    In as many steps as Euclid's algorithm takes for `factor` and `divisor`, by counting the points
    under the line along the other axis. Source: Graham, Knuth and Patashnik, Concrete Mathematics,
    section 3.5.
    """
    total = 0
    while count:
        slope, factor = divmod(factor, divisor)
        whole, offset = divmod(offset, divisor)
        total += slope * (count * (count - 1) // 2) + whole * count
        count, offset = divmod(factor * count + offset, divisor)
        factor, divisor = divisor, factor
    return total


@dataclass(frozen=True, slots=True)
class _Segment:
    """Rows between two changes of the weights."""

    first_row: int
    edges: tuple[int, ...]
    """Source k owns the points from edges[k] to edges[k + 1]."""

    bases: tuple[int, ...]
    """What to add to the points in a source's interval for the number of its rows."""


class MixtureOrder:
    """Which source each row of a mixture comes from, and which of that source's rows it is."""

    def __init__(
        self,
        edges: Sequence[tuple[int, Sequence[int]]],
        *,
        num_points: int,
        multiplier: int,
        offset: int,
    ) -> None:
        """Take the edges of the sources' intervals from each of some rows on, the first one 0."""
        self._num_points = num_points
        self._multiplier = multiplier
        self._offset = offset
        self._segments: list[_Segment] = []
        self._first_rows: list[int] = []
        for first_row, inner in edges:
            bases = [
                (self.num_rows(number, first_row) if self._segments else 0)
                - self._points(first_row, low, high)
                for number, (low, high) in enumerate(pairwise(inner))
            ]
            self._segments.append(_Segment(first_row, tuple(inner), tuple(bases)))
            self._first_rows.append(first_row)
        self.fingerprint = digest_of(
            "mixture", num_points, multiplier, offset, [(f, tuple(e)) for f, e in edges]
        )

    @classmethod
    def by_weight(
        cls,
        schedules: Sequence[Sequence[tuple[int, float]]],
        tokens_per_row: Sequence[Fraction],
        *,
        rows_per_step: int,
        seed: int,
    ) -> "MixtureOrder":
        """Return the order in which sources give tokens in proportion to their weights.

        A schedule holds pairs of a number of finished steps and the weight from there on.
        """
        edges: list[tuple[int, list[int]]] = []
        for step in sorted({step for schedule in schedules for step, _ in schedule}):
            rates = [
                Fraction(repr(weight_at(schedule, step))) / tokens
                for schedule, tokens in zip(schedules, tokens_per_row, strict=True)
            ]
            sums = list(accumulate(rates, initial=Fraction(0)))
            inner = [round(POINTS * part / sums[-1]) for part in sums]
            edges.append((step * rows_per_step, inner))
        return cls(
            edges,
            num_points=POINTS,
            multiplier=GOLDEN_MULTIPLIER,
            offset=_draw(seed) % POINTS,
        )

    @classmethod
    def by_count(cls, counts: Sequence[int], *, seed: int) -> "MixtureOrder":
        """Return the order in which each window of sum(counts) rows holds these of each source.

        There are as many points as rows in the window, and all of them are met in it.
        """
        size = sum(counts)
        wanted = round(size * Fraction(GOLDEN_MULTIPLIER, POINTS))
        multiplier = next(
            near
            for distance in range(size + 1)
            for near in (wanted + distance, wanted - distance)
            if near > 0 and math.gcd(near, size) == 1
        )
        edges = list(accumulate(counts, initial=0))
        return cls([(0, edges)], num_points=size, multiplier=multiplier, offset=_draw(seed) % size)

    def source_of(self, row: int) -> int:
        """Return the number of the source that a row of the mixture comes from."""
        point = (self._multiplier * row + self._offset) % self._num_points
        return bisect_right(self._segment_of(row).edges, point) - 1

    def num_rows(self, source: int, row: int) -> int:
        """Return how many of the mixture's rows before `row` come from a source."""
        segment = self._segment_of(row)
        low, high = segment.edges[source : source + 2]
        return segment.bases[source] + self._points(row, low, high)

    def _segment_of(self, row: int) -> _Segment:
        return self._segments[bisect_right(self._first_rows, row) - 1]

    def _points(self, count: int, low: int, high: int) -> int:
        """Return how many of the first `count` points lie from `low` to below `high`."""
        size, factor = self._num_points, self._multiplier
        at_least_low, at_least_high = (
            floor_sum(count, size, factor, self._offset + size - edge) for edge in (low, high)
        )
        return at_least_low - at_least_high


def _draw(seed: int) -> int:
    return int(digest_of("mixture", seed)[:16], 16)


class MixedRows:
    """Rows of several sources in a `MixtureOrder`; no row holds text of two.

    Each source's own rows come in its own order, epoch after epoch.
    """

    batches = None

    def __init__(
        self,
        sources: Sequence[RowSource],
        names: Sequence[str],
        order: MixtureOrder,
        *,
        rows_in_epoch: Sequence[int],
    ) -> None:
        """Take the rows that an epoch of the mixture has of each source."""
        self._sources = list(sources)
        self._order = order
        self.source_names = tuple(names)
        self.seq_len = sources[0].seq_len
        self.vocab_size = sources[0].vocab_size
        self.rows_per_epoch = sum(rows_in_epoch)
        self.tokens_per_epoch = sum(
            rows * source.tokens_per_epoch // source.rows_per_epoch
            for rows, source in zip(rows_in_epoch, sources, strict=True)
        )
        self.one_document_per_row = all(source.one_document_per_row for source in sources)
        self.fingerprint = digest_of(order.fingerprint, [s.fingerprint for s in sources])

    def row(self, index: int) -> Row:
        """Return a row with the number of its source."""
        number = self._order.source_of(index)
        own = self._order.num_rows(number, index)
        return replace(self._sources[number].row(own), source=number)

    def attention_cost(self, index: int) -> int:
        """Return that of the row in its source."""
        number = self._order.source_of(index)
        return self._sources[number].attention_cost(self._order.num_rows(number, index))

    @property
    def sources(self) -> Sequence[RowSource]:
        """The rows of each source."""
        return self._sources

    def warm(self, index: int) -> None:
        """Read a row of each source, so that processes forked later share the orders near a row."""
        for number, source in enumerate(self._sources):
            source.row(self._order.num_rows(number, index))

    def epochs_read(self, rows: int) -> dict[str, float]:
        """Return the passes over each source, by name, in the first `rows` rows of the mixture."""
        return {
            name: self._order.num_rows(number, rows) / source.rows_per_epoch
            for number, (name, source) in enumerate(
                zip(self.source_names, self._sources, strict=True)
            )
        }

    def log_plan(self, num_rows: int) -> None:
        """Say what a run of `num_rows` rows takes of each source; warn where it repeats too often.

        Up to 4 epochs of the same text are worth nearly as much as new text, and soon after that
        more of it is worth nothing: Muennighoff et al. 2023, arXiv:2305.16264, section 5.
        """
        taken = self.epochs_read(num_rows)
        tokens = [
            taken[name] * source.tokens_per_epoch
            for name, source in zip(self.source_names, self._sources, strict=True)
        ]
        for name, source, amount in zip(self.source_names, self._sources, tokens, strict=True):
            log.info(
                "source %s: %.4g%% of the run's tokens, %s rows an epoch, %.3g epochs in this run",
                *(name, 100 * amount / sum(tokens), f"{source.rows_per_epoch:,}", taken[name]),
            )
            if taken[name] > MANY_EPOCHS:
                log.warning(
                    "source %s is read %.3g times: beyond about 4 times the same text teaches "
                    "little more (arXiv:2305.16264); lower its weight, or add text",
                    *(name, taken[name]),
                )


class NumberedRows:
    """The rows of one of several sources that are read one after the other."""

    def __init__(
        self,
        rows: RowSource,
        number: int,
        *,
        source_names: tuple[str, ...],
        one_document_per_row: bool,
    ) -> None:
        self._rows = rows
        self._number = number
        self.source_names = source_names
        self.seq_len = rows.seq_len
        self.vocab_size = rows.vocab_size
        self.rows_per_epoch = rows.rows_per_epoch
        self.tokens_per_epoch = rows.tokens_per_epoch
        self.batches = rows.batches
        self.one_document_per_row = one_document_per_row
        self.fingerprint = rows.fingerprint

    def row(self, index: int) -> Row:
        """Return a row with the number of its source."""
        return replace(self._rows.row(index), source=self._number)

    def attention_cost(self, index: int) -> int:
        """Return that of the row in its source."""
        return self._rows.attention_cost(index)


def numbered(rows: Sequence[RowSource]) -> list[NumberedRows]:
    """Number several sources that are read one after the other, as rows of one kind."""
    one_document = all(one.one_document_per_row for one in rows)
    names = tuple(name for one in rows for name in one.source_names)
    return [
        NumberedRows(one, number, source_names=names, one_document_per_row=one_document)
        for number, one in enumerate(rows)
    ]


def mix(
    rows: Sequence[RowSource],
    sources: Sequence[MixedSourceConfig],
    *,
    rows_per_step: int,
    seed: int,
) -> MixedRows:
    """Mix the rows of sources as their configuration says, with `rows_per_step` rows in a step.

    Under weights an epoch of the mixture is as many rows as the sources hold together.
    """
    counts = [one.rows_per_epoch for one in rows]
    if sources[0].epochs is None:
        order = MixtureOrder.by_weight(
            [source.schedule for source in sources],
            [Fraction(one.tokens_per_epoch, one.rows_per_epoch) for one in rows],
            rows_per_step=rows_per_step,
            seed=seed,
        )
    else:
        pairs = zip(sources, counts, strict=True)
        counts = [_rows_of_epochs(source, num_rows) for source, num_rows in pairs]
        order = MixtureOrder.by_count(counts, seed=seed)
    names = [source.name for source in sources]
    return MixedRows(rows, names, order, rows_in_epoch=counts)


def _rows_of_epochs(source: MixedSourceConfig, num_rows: int) -> int:
    # Of the number as it was written: 0.3 of ten rows is three, though the float is below 0.3.
    rows = math.floor(Fraction(repr(source.epochs)) * num_rows)
    if rows == 0:
        raise ValueError(
            f"data.sources.{source.name}.epochs = {source.epochs} of {num_rows} rows is less than "
            "one; give more, or remove the source"
        )
    return rows
