"""Rows dealt to data-parallel ranks as microbatches, read ahead by worker processes.

Nothing of a loader is worth saving: which rows a step owns follows from its number, so a run
resumes by starting at the number of rows that its finished steps consumed, on any number of ranks
and workers. Where ranks cannot share a step's rows evenly, fillers make up what is missing.
"""

import atexit
import itertools
import math
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from engine.data.balance import deal_evenly
from engine.data.batch import IGNORED_LABEL, PADDING_DOCUMENT, Batch, Row, collate
from engine.data.mixture import MixedRows
from engine.data.rows import RowSource
from engine.data.streaming import StreamedRows

FILLER = -1
NEVER = 1 << 62


@dataclass(frozen=True, kw_only=True, slots=True)
class DataloaderConfig:
    """How microbatches are read ahead of the training process."""

    num_workers: int = 0
    """Processes that read ahead on each rank; 0 reads in the training process. Any number gives
    the same rows in the same order."""

    persistent_workers: bool = False
    """Accepted for files of torchtitan 0.2: workers live as long as the endless stream anyway."""

    pin_memory: bool = False
    """Put batches in page-locked memory where there is a GPU, so that copies to it overlap."""

    prefetch_factor: int | None = None
    """Microbatches that each worker reads ahead; none is 2. Needs num_workers above 0."""

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(f"dataloader.num_workers = {self.num_workers}; give 0 or more")
        if self.prefetch_factor is not None and self.prefetch_factor < 1:
            raise ValueError(
                f"dataloader.prefetch_factor = {self.prefetch_factor}; give 1 or more, or leave "
                "it out"
            )
        if self.num_workers == 0 and (self.prefetch_factor or self.persistent_workers):
            raise ValueError(
                "dataloader.prefetch_factor and dataloader.persistent_workers need worker "
                "processes, and dataloader.num_workers = 0; set it to 1 or more, or leave them out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Dealing:
    """How one optimizer step deals its rows: every rank has as many microbatches of one size.

    Which rows of the step a rank gets, `balance.py` says; where they do not fill its places, the
    last ones are fillers.
    """

    rows_per_step: int
    batch_degree: int
    """Data-parallel ranks."""

    microbatches: int
    """Microbatches of each rank."""

    rows_per_microbatch: int
    """Rows of one microbatch of one rank."""

    @classmethod
    def of(cls, *, local_batch_size: int, global_batch_size: int, batch_degree: int) -> "Dealing":
        """Deal `global_batch_size` rows in the fewest microbatches of at most `local_batch_size`.

        The microbatches are as small as that number of them allows, so that few rows are fillers:
        none where the ranks and microbatches divide the rows.
        """
        if batch_degree > global_batch_size:
            raise ValueError(
                f"training.global_batch_size = {global_batch_size} has fewer rows than the run has "
                f"data-parallel ranks, {batch_degree}; start at most {global_batch_size}, raise it "
                "(which changes the training), or raise a tensor- or context-parallel degree"
            )
        microbatches = -(-global_batch_size // (local_batch_size * batch_degree))
        return cls(
            rows_per_step=global_batch_size,
            batch_degree=batch_degree,
            microbatches=microbatches,
            rows_per_microbatch=-(-global_batch_size // (microbatches * batch_degree)),
        )

    @property
    def filler_share(self) -> float:
        """Fillers among the places of a step, from 0 to 1."""
        places = self.microbatches * self.batch_degree * self.rows_per_microbatch
        return 1 - self.rows_per_step / places

    def deal(self, costs: Sequence[int]) -> list[list[list[int]]]:
        """Return the places of each rank's microbatches in a step whose rows have these costs."""
        return deal_evenly(
            costs,
            microbatches=self.microbatches,
            ranks=self.batch_degree,
            size=self.rows_per_microbatch,
        )

    def places(self, batch_rank: int) -> list[int]:
        """Return the places of a step, from 0, whose rows a rank has if all cost the same."""
        mine = self.deal([0] * self.rows_per_step)[batch_rank]
        return [n for places in mine for n in places if n < self.rows_per_step]


def train_batches(
    rows: RowSource,
    *,
    local_batch_size: int,
    global_batch_size: int,
    batch_rank: int,
    batch_degree: int,
    start_row: int,
    dataloader: DataloaderConfig,
    pad_to_multiple: int = 1,
) -> Iterator[Batch]:
    """Yield one rank's microbatches without end, from the step that begins at `start_row`.

    Each step owns the next G global rows, G being `global_batch_size`; `balance.py` says which rank
    has which of them. Where the rows come in batches, all of these count batches.
    """
    dealing = Dealing.of(
        local_batch_size=local_batch_size,
        global_batch_size=global_batch_size,
        batch_degree=batch_degree,
    )
    if isinstance(rows, StreamedRows):
        rows = rows.sharing(dealing.places(batch_rank))
    deal = _Deal(
        start=start_row,
        num_rows=global_batch_size,
        num_passes=None,
        num_batches=dealing.microbatches,
        size=dealing.rows_per_microbatch,
        batch_rank=batch_rank,
        batch_degree=batch_degree,
        cost=cost_of(rows),
    )
    return _batches(rows, deal, dataloader, pad_to_multiple)


def cost_of(rows: RowSource) -> Callable[[int], int] | None:
    """Return the costs that rows are dealt by; None where these decide nothing."""
    # Rows of one document are padded to one length, and batches have one budget.
    return None if rows.one_document_per_row or rows.batches else rows.attention_cost


def validation_batches(
    rows: RowSource,
    *,
    local_batch_size: int,
    batch_rank: int,
    batch_degree: int,
    steps: int = -1,
    dataloader: DataloaderConfig,
    pad_to_multiple: int = 1,
) -> Iterator[Batch]:
    """Yield one rank's share of one pass in which every row appears once, over all ranks.

    Every rank gets the same number of batches, at most `steps` unless that is -1; what is missing
    at the end are filler rows with number -1, which have no label.
    """
    num_units = rows.batches.batches_per_epoch if rows.batches else rows.rows_per_epoch
    num_batches = -(-num_units // (local_batch_size * batch_degree))
    deal = _Deal(
        start=0,
        num_rows=num_units,
        num_passes=1,
        num_batches=num_batches if steps < 0 else min(steps, num_batches),
        size=local_batch_size,
        batch_rank=batch_rank,
        batch_degree=batch_degree,
    )
    return _batches(rows, deal, dataloader, pad_to_multiple)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Deal:
    """Lists of global row numbers, one list a microbatch of one rank.

    Rows are dealt in passes of `num_rows`; places of a pass beyond its rows are fillers.
    """

    start: int
    num_rows: int
    num_passes: int | None
    """None: without end."""

    num_batches: int
    """Microbatches of each rank in a pass."""

    size: int
    batch_rank: int
    batch_degree: int
    cost: Callable[[int], int] | None = None
    """Of a row by its global number; None: all cost the same."""

    def __iter__(self) -> Iterator[list[int]]:
        passes = itertools.count() if self.num_passes is None else range(self.num_passes)
        for number in passes:
            begin = self.start + number * self.num_rows
            for batch in self._dealt(begin):
                yield [begin + n if n < self.num_rows else FILLER for n in batch]

    def _dealt(self, begin: int) -> Iterable[Sequence[int]]:
        """Return the places of each microbatch of a pass."""
        each = self.batch_degree * self.size
        if self.cost is None or self.batch_degree == 1 or self.num_batches * self.size == 1:
            firsts = range(self.batch_rank * self.size, self.num_batches * each, each)
            return (range(first, first + self.size) for first in firsts)
        costs = [self.cost(begin + n) for n in range(self.num_rows)]
        counts = {"microbatches": self.num_batches, "ranks": self.batch_degree, "size": self.size}
        return deal_evenly(costs, **counts)[self.batch_rank]


_Unit = list[tuple[int, Row]] | ValueError


class _Units(Dataset[_Unit]):
    """What loaders count: single rows, or batches of them, each row with its global number.

    Or why a stream cannot go on: raised in a worker, it would come out as an error of torch's.
    """

    def __init__(self, rows: RowSource) -> None:
        self._rows = rows

    def __getitem__(self, index: int) -> _Unit:
        batches = self._rows.batches
        if index == FILLER:
            return [(FILLER, _filler(1 if batches else self._rows.seq_len))]
        numbers = batches.rows(index) if batches else [index]
        try:
            return [(number, self._rows.row(number)) for number in numbers]
        except ValueError as error:
            if not isinstance(self._rows, StreamedRows):
                raise
            return error


def _collate_units(
    units: Sequence[_Unit], *, one_document_per_row: bool, pad_to_multiple: int
) -> Batch | ValueError:
    numbered_rows: list[tuple[int, Row]] = []
    for unit in units:
        if isinstance(unit, ValueError):
            return unit
        numbered_rows += unit
    return collate(
        numbered_rows,
        one_document_per_row=one_document_per_row,
        pad_to_multiple=pad_to_multiple,
    )


def _batches(
    rows: RowSource, deal: _Deal, dataloader: DataloaderConfig, pad_to_multiple: int
) -> Iterator[Batch]:
    workers = dataloader.num_workers
    units = _Units(rows)
    # Before the fork, so that workers share the epoch's order. A stream is for its worker to open.
    if workers and isinstance(rows, MixedRows):
        rows.warm(deal.start)
    elif workers and not isinstance(rows, StreamedRows):
        units[next(iter(deal), [FILLER])[0]]
    if rows.batches:
        pad_to_multiple = math.lcm(pad_to_multiple, rows.batches.pad_to_multiple)
    with warnings.catch_warnings():
        # torchdata 0.11 calls torch.set_vital, which torch 2.13 deprecates.
        warnings.filterwarnings("ignore", message=".*set_vital")
        loader = StatefulDataLoader(
            units,
            batch_sampler=deal,
            collate_fn=partial(
                _collate_units,
                one_document_per_row=rows.one_document_per_row,
                pad_to_multiple=pad_to_multiple,
            ),
            num_workers=workers,
            prefetch_factor=(dataloader.prefetch_factor or 2) if workers else None,
            pin_memory=dataloader.pin_memory and torch.cuda.is_available(),
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_ignore_signals if workers else None,
            # A generator of its own: otherwise each new iterator draws from the global one.
            generator=torch.Generator(),
            snapshot_every_n_steps=NEVER,
        )
    iterator = iter(loader)
    # After an uncaught error multiprocessing asks the workers, which ignore SIGTERM, to end, and
    # waits for them without a limit. This runs before it.
    end_workers = partial(_kill_living, getattr(iterator, "_workers", ()))
    atexit.register(end_workers)
    for found in iterator:
        if isinstance(found, ValueError):
            raise ValueError(str(found)) from found
        yield found
    atexit.unregister(end_workers)


def _kill_living(workers: Iterable[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _ignore_signals(_worker: int) -> None:
    # A signal to the whole process group must not take workers from under a rank that wants to
    # save; they end when the rank closes the loader or dies.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _filler(seq_len: int) -> Row:
    return Row(
        tokens_T=torch.zeros(seq_len, dtype=torch.int64),
        labels_T=torch.full((seq_len,), IGNORED_LABEL),
        positions_T=torch.arange(seq_len),
        documents_T=torch.full((seq_len,), PADDING_DOCUMENT),
        desirable_P=torch.zeros(0, dtype=torch.int64),
        reference_logps_P2=torch.zeros(0, 2),
    )
