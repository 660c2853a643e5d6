"""Figures of a source: its documents, the rows they fill, what was left out, what it took."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from engine.data.rows import TokenRows

BAR_WIDTH = 40
LABEL_WIDTH = 34
PAGE_WIDTH = 110


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFigures:
    """What one source holds, under the packing of a run. Lengths are in tokens, marks included."""

    name: str
    num_documents: int
    num_tokens: int

    num_trained: int
    """Tokens that are labels, if rows cut nothing off; a document's first token never is one."""

    mean_length: float
    median_length: float
    length_95: float
    """95 of 100 documents are no longer than this."""

    max_length: int
    num_rows: int
    """Rows of an epoch."""

    row_tokens: int
    """Tokens that the rows of an epoch hold."""

    row_places: int
    """Tokens that they have places for, padding included."""

    num_empty: int
    num_untrained: int
    num_bad: int
    seconds: float | None
    """Time that tokenising took, None if the tokens were in the cache."""

    num_processes: int
    num_bytes: int
    """On disk."""

    folder: Path

    @property
    def fill(self) -> float:
        """Share of the rows that holds tokens rather than padding."""
        return self.row_tokens / self.row_places

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second of each process that tokenised; None if none did."""
        return self.seconds and self.num_tokens / self.seconds / self.num_processes


def report_of(rows: TokenRows) -> SourceFigures:
    """Return the figures of a source; reads the lengths of all documents."""
    file, packing = rows.file, rows.packing
    lengths, facts = file.lengths(), file.facts
    assert file.folder is not None, "rows come from a file on disk"
    return SourceFigures(
        name=rows.source_names[0],
        num_documents=len(lengths),
        num_tokens=len(file.tokens),
        num_trained=file.num_trained(),
        mean_length=float(lengths.mean()),
        median_length=float(np.median(lengths)),
        length_95=float(np.percentile(lengths, 95)),
        max_length=int(lengths.max()),
        num_rows=packing.rows_per_epoch,
        row_tokens=packing.tokens_per_epoch,
        row_places=(
            rows.batches.padded_tokens_per_epoch
            if rows.batches
            else packing.rows_per_epoch * rows.seq_len
        ),
        num_empty=facts.num_empty,
        num_untrained=facts.num_untrained,
        num_bad=facts.num_bad,
        seconds=facts.seconds if file.is_new else None,
        num_processes=facts.num_processes,
        num_bytes=sum(path.stat().st_size for path in file.folder.iterdir()),
        folder=file.folder,
    )


def tables(reports: Sequence[SourceFigures]) -> Group:
    """Return the figures of several sources and their totals, to print with rich."""
    held = _table("source", "documents", "tokens", "trained", "mean", "median", "95%", "longest")
    packed = _table("source", "rows", "fill", "empty", "untrained", "bad", "MB on disk")
    cost = _table("source", "seconds", "processes", "tokens/s per process")
    for report in reports:
        counts = (report.num_documents, report.num_tokens, report.num_trained)
        lengths = (report.mean_length, report.median_length, report.length_95, report.max_length)
        held.add_row(label(report.name), *_whole(*counts), *_whole(*lengths))
        left_out = (report.num_empty, report.num_untrained, report.num_bad)
        size = f"{report.num_bytes / 1e6:,.1f}"
        share, left_out = f"{report.fill:.4f}", _whole(*left_out)
        packed.add_row(label(report.name), *_whole(report.num_rows), share, *left_out, size)
        if report.seconds is None or report.tokens_per_second is None:
            cost.add_row(label(report.name), "cached", "", "")
        else:
            figures = _whole(report.num_processes, report.tokens_per_second)
            cost.add_row(label(report.name), f"{report.seconds:,.1f}", *figures)
    if len(reports) > 1:
        _add_totals(reports, held, packed)
    folders = [Text(f"{report.name}: {report.folder}", overflow="fold") for report in reports]
    return Group(held, packed, cost, *folders)


def label(name: str) -> str:
    """Return what stands for a source in tables: its name, the middle left out if it is long."""
    if len(name) <= LABEL_WIDTH:
        return name
    return f"{name[: LABEL_WIDTH // 3]}…{name[1 - LABEL_WIDTH + LABEL_WIDTH // 3 :]}"


def histogram(lengths: npt.NDArray[np.int64]) -> Table:
    """Return how many documents there are of which length, in powers of two."""
    kinds = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    counts = np.bincount(kinds)
    table = _table("tokens", "documents")
    table.add_column("", justify="left")
    for kind in range(int(kinds.min()), len(counts)):
        bar = "#" * round(BAR_WIDTH * int(counts[kind]) / int(counts.max()))
        first = (1 << (kind - 1)) + 1 if kind else 1
        table.add_row(f"{first:,} - {1 << kind:,}", *_whole(counts[kind]), bar)
    return table


def report_console() -> Console:
    """Return standard output for tables: as wide as the terminal, or as a page of a log."""
    width = None if sys.stdout.isatty() else PAGE_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False)


def _add_totals(reports: Sequence[SourceFigures], held: Table, packed: Table) -> None:
    names = {field.name for field in fields(SourceFigures)}
    total = {
        name: sum(getattr(report, name) for report in reports)
        for name in names
        if name.startswith(("num_", "row_"))
    }
    fill = total["row_tokens"] / total["row_places"]
    mean = total["num_tokens"] / total["num_documents"]
    longest = max(report.max_length for report in reports)
    counts = _whole(total["num_documents"], total["num_tokens"], total["num_trained"], mean)
    held.add_section()
    held.add_row("all", *counts, "", "", *_whole(longest))
    left_out = _whole(total["num_empty"], total["num_untrained"], total["num_bad"])
    packed.add_section()
    packed.add_row(
        *("all", *_whole(total["num_rows"]), f"{fill:.4f}", *left_out),
        f"{total['num_bytes'] / 1e6:,.1f}",
    )


def _table(*columns: str) -> Table:
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _whole(*figures: float) -> list[str]:
    return [f"{figure:,.0f}" for figure in figures]
