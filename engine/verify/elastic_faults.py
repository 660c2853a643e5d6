"""Errors to plant in the dealing of rows, to see that the check notices them: `--fault NAME`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from engine.batches import Counters, open_training_rows
from engine.build import open_tokenizer
from engine.config import JobConfig
from engine.data import loader
from engine.data.batch import Batch
from engine.data.rows import RowSource
from engine.verify import elastic
from engine.verify.elastic import Part


@dataclass(frozen=True, kw_only=True)
class StreamFault:
    """One error, and the plans that it makes wrong."""

    sentence: str
    """What is wrong, for `--fault list`."""

    applies: Callable[[Sequence[int]], bool]
    """Whether a plan, given as its sizes, has the part that the fault breaks."""

    needs: str
    """What such a plan has."""

    planted: Callable[[], AbstractContextManager[Any]]
    """Context in which the parts are read with the error."""


def _cursor(change: Callable[[Counters, int], None]) -> Callable[[], AbstractContextManager[Any]]:
    """Return a fault that changes the counters behind a part; it is given the rows of a step."""

    def planted() -> AbstractContextManager[Any]:
        count_part = elastic.count_part

        def wrong(counters: Counters, part: Part, rows_per_step: int) -> None:
            count_part(counters, part, rows_per_step)
            change(counters, rows_per_step)

        return patch.object(elastic, "count_part", wrong)

    return planted


def _moved(num_steps: int, num_rows: int) -> Callable[[Counters, int], None]:
    def change(counters: Counters, rows_per_step: int) -> None:
        counters["rows_consumed"] += num_steps * rows_per_step + num_rows

    return change


def _forget(counters: Counters, rows_per_step: int) -> None:
    counters["rows_consumed"] = 0


def _dealt_twice() -> AbstractContextManager[Any]:
    deal = loader._Deal.__iter__

    def wrong(self: Any) -> Iterator[list[int]]:
        for numbers in deal(self):
            yield numbers
            yield numbers

    return patch.object(loader._Deal, "__iter__", wrong)


def _one_rank() -> AbstractContextManager[Any]:
    open_batches = elastic.open_training_batches

    def wrong(
        config: JobConfig, rows: RowSource, *, batch_rank: int, **others: Any
    ) -> Iterator[Batch]:
        return open_batches(config, rows, batch_rank=0, **others)

    return patch.object(elastic, "open_training_batches", wrong)


def _order_by_rank() -> AbstractContextManager[Any]:
    open_batches = elastic.open_training_batches

    def wrong(
        config: JobConfig, rows: RowSource, *, batch_rank: int, **others: Any
    ) -> Iterator[Batch]:
        debug = replace(config.debug, seed=config.debug.effective_seed + batch_rank)
        own = open_training_rows(replace(config, debug=debug), open_tokenizer(config))
        return open_batches(config, own, batch_rank=batch_rank, **others)

    return patch.object(elastic, "open_training_batches", wrong)


def _several_parts(sizes: Sequence[int]) -> bool:
    return len(sizes) > 1


def _several_ranks(sizes: Sequence[int]) -> bool:
    return max(sizes) > 1


PARTS, RANKS = "two parts, such as --plan 2,3", "a part of two ranks, such as --plan 2"

FAULTS = {
    "late_cursor": StreamFault(
        sentence="a part of the run begins one row late",
        applies=_several_parts,
        needs=PARTS,
        planted=_cursor(_moved(0, 1)),
    ),
    "counted_prefetch": StreamFault(
        sentence="the step that was being read ahead when the run was killed counts as done",
        applies=_several_parts,
        needs=PARTS,
        planted=_cursor(_moved(1, 0)),
    ),
    "repeated_step": StreamFault(
        sentence="the last step before the kill is read once more",
        applies=_several_parts,
        needs=PARTS,
        planted=_cursor(_moved(-1, 0)),
    ),
    "forgotten_cursor": StreamFault(
        sentence="every part of the run begins with the first row",
        applies=_several_parts,
        needs=PARTS,
        planted=_cursor(_forget),
    ),
    "dealt_twice": StreamFault(
        sentence="each microbatch is dealt twice, as by workers that do not share the list",
        applies=lambda sizes: True,
        needs="nothing",
        planted=_dealt_twice,
    ),
    "one_rank": StreamFault(
        sentence="each rank takes itself for the first",
        applies=_several_ranks,
        needs=RANKS,
        planted=_one_rank,
    ),
    "order_by_rank": StreamFault(
        sentence="each rank shuffles the data in an order of its own",
        applies=_several_ranks,
        needs=RANKS,
        planted=_order_by_rank,
    ),
}
"""What `--fault` may name."""
