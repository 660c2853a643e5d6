"""`python -m engine.verify families`: its command line, its table and its record."""

import argparse
import json
import logging
import math
import shlex
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.cli import USER_MISTAKE_EXIT_CODE
from engine.logging import machine_report
from engine.verify.families import (
    COLUMNS,
    FAULTS,
    LAYOUTS,
    Cell,
    FamilyCase,
    FamilyJob,
    case_of,
    cell_of,
    check_alone,
    subject_of,
)
from engine.verify.ranks import Job, Row, run_here
from engine.verify.refusals import Rules
from engine.verify.report import EXIT_DIFFERENT, EXIT_EQUAL, EXIT_FAULT_NOT_NOTICED
from engine.verify.variants import MODELS, family_of
from models.registry import FAMILIES, load_family, member_names, suggestion

WIDTHS = (9, 18, *(max(len(name), 12) for name in COLUMNS), 7)


@dataclass(kw_only=True)
class Table:
    """The cells so far, and the verdict over them."""

    families: Sequence[str]
    fault: str | None = None
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict[str, dict[str, Cell]])
    """Model -> column -> what was found."""

    refused: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    """Model -> layout that the engine refuses for it -> reason."""

    @property
    def variants(self) -> list[str]:
        """Names of the models, family by family."""
        return [name for family in self.families for name in MODELS if family_of(name) == family]

    def add(self, variant: str, column: str, cell: Cell) -> None:
        """Take the cell of one model."""
        self.cells.setdefault(variant, {})[column] = cell

    def add_row(self, column: str, row: Row) -> None:
        """Take what the ranks of a layout found for one model."""
        assert isinstance(row.case, FamilyCase), "the rows are of a job of families"
        found = row.comparison
        lost = Cell(error=math.inf, problems=(row.error,), crashed=True)
        self.add(row.case.variant, column, lost if found is None else cell_of(found))

    def worst(self, family: str, column: str) -> Cell | None:
        """Return the cell of a family: the first of its models that fails, else the largest."""
        found = self._of_family(family, column)
        failed = [cell for cell in found if not cell.passed]
        return failed[0] if failed else max(found, key=lambda cell: cell.error, default=None)

    def passed(self, family: str) -> bool:
        """Say whether every column has a model of the family, and all of them equal."""
        return all(
            (cell := self.worst(family, column)) is not None and cell.passed for column in COLUMNS
        )

    def noticed(self, family: str) -> bool:
        """Say whether the planted fault made every model fail in the columns that it must."""
        assert self.fault is not None, "asked only where a fault is planted"
        return all(
            (found := self._of_family(family, column))
            and all(not cell.passed and not cell.crashed for cell in found)
            for column in FAULTS[self.fault].columns
        )

    def _of_family(self, family: str, column: str) -> list[Cell]:
        rows = [cells for name, cells in self.cells.items() if family_of(name) == family]
        return [cells[column] for cells in rows if column in cells]

    def lines(self) -> Iterator[str]:
        """Yield the table: each model, then each family with the worst of its models."""
        yield _line(("family", "model", *COLUMNS, ""))
        yield _line(("---",) * len(WIDTHS))
        for name in self.variants:
            texts = [_text(self.cells.get(name, {}).get(column)) for column in COLUMNS]
            texts = [
                "refused" if column in self.refused.get(name, {}) else text
                for column, text in zip(COLUMNS, texts, strict=True)
            ]
            yield _line((family_of(name), name, *texts, ""))
        yield ""
        yield _line(("family", "models", *COLUMNS, "verdict"))
        yield _line(("---",) * len(WIDTHS))
        for family in self.families:
            number = sum(family_of(name) == family for name in MODELS)
            texts = (_text(self.worst(family, column)) for column in COLUMNS)
            yield _line((family, str(number), *texts, self._verdict(family)))

    def _verdict(self, family: str) -> str:
        if self.fault is not None:
            return "noticed" if self.noticed(family) else "MISSED"
        return "pass" if self.passed(family) else "FAIL"

    def remarks(self) -> Iterator[str]:
        """Yield what the table has no room for: problems, refusals, families without a model."""
        for name, cells in self.cells.items():
            for column, cell in cells.items():
                yield from (f"{name}, {column}: {problem}" for problem in cell.problems)
        for name, reasons in self.refused.items():
            yield from (f"{name}, {column} is refused: {why}" for column, why in reasons.items())
        for family in self.families:
            if not any(family_of(name) == family for name in MODELS):
                yield f"{family} has no model in engine/verify/variants.py; add one to MODELS"

    def verdict(self) -> tuple[str, int]:
        """Return the last line and the exit code."""
        judge = self.passed if self.fault is None else self.noticed
        bad = [family for family in self.families if not judge(family)]
        counts = f"{len(self.families) - len(bad)} of {len(self.families)} families"
        if self.fault is None:
            failed = f"; failed: {', '.join(bad)}" if bad else ""
            return f"{counts} equal transformers{failed}", EXIT_DIFFERENT if bad else EXIT_EQUAL
        missed = "; THE CHECK IS NOT TO BE TRUSTED HERE" if bad else ", as it must be"
        text = f"the fault {self.fault} was noticed in {counts}{missed}"
        return text, EXIT_FAULT_NOT_NOTICED if bad else EXIT_DIFFERENT

    def record(self, command: str) -> dict[str, Any]:
        """Return the record: command, versions, machine, and a row for each model."""
        rows = [
            {
                "family": family_of(name),
                "model": name,
                "columns": {column: _entry(cell) for column, cell in cells.items()},
                "refused": self.refused.get(name, {}),
            }
            for name, cells in self.cells.items()
        ]
        return {
            "suite": "families",
            "command": command,
            "machine": machine_report(),
            "fault": self.fault,
            "families": {family: self._verdict(family) for family in self.families},
            "rows": rows,
        }


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    error = "equal" if cell.error == 0.0 else f"{cell.error:.1e}"
    return ("lost" if cell.crashed else error) + ("" if cell.passed else " FAIL")


def _entry(cell: Cell) -> dict[str, Any]:
    return {
        "error": cell.error if math.isfinite(cell.error) else None,
        "tolerance": cell.tolerance,
        "passed": cell.passed,
        "problems": list(cell.problems),
    }


def _line(cells: Iterable[str]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)]
    return f"| {' | '.join(padded)} |"


def fill_alone(table: Table, folder: Path) -> None:
    """Compare every model in this process; a model that cannot be compared has failed."""
    for name in table.variants:
        try:
            cells = check_alone(name, folder / name, table.fault)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            cells = {
                column: Cell(error=math.inf, problems=(problem,), crashed=True)
                for column in COLUMNS
            }
        for column, cell in cells.items():
            table.add(name, column, cell)


def layout_job(table: Table, column: str, folder: Path, timeout_seconds: float) -> FamilyJob:
    """Return the job of one layout, after the models that can have it were compared alone."""
    cases: list[FamilyCase] = []
    for name in table.variants:
        if column in table.cells[name]:
            continue  # it failed alone already
        case = case_of(folder / name, LAYOUTS[column], name)
        subject = subject_of(folder / name)
        reason = Rules.of(subject, "cpu", case.world_size).refusal(case)
        if reason is None:
            cases.append(case)
        else:
            table.refused.setdefault(name, {})[column] = reason
    return FamilyJob(
        cases=tuple(cases), folder=folder, fault=table.fault, timeout_seconds=timeout_seconds
    )


def parser() -> argparse.ArgumentParser:
    """Return the command line's description."""
    found = argparse.ArgumentParser(
        prog="python -m engine.verify families",
        description="Compare random tiny models of each family with transformers, in fp32 on the "
        "CPU: logits, the loss with every gradient, import and export, and the same gradients on "
        "2 and 4 ranks. Exit code 0: all equal; 1: not equal, or a rank was lost; 2: a mistake in "
        "the command; 3: a planted fault was not noticed.",
        allow_abbrev=False,
    )
    found.add_argument("--families", default="", help='such as "qwen2,phi3"; default: all')
    found.add_argument("--fault", help='error to plant; "list" prints them')
    found.add_argument("--out", type=Path, help="JSON record to write")
    found.add_argument("--timeout_seconds", type=float, default=120.0, help="of one model")
    return found


def choose(families: str, fault: str | None) -> Table:
    """Return an empty table of what is asked for; ValueError for a name that is not known."""
    known = member_names(FAMILIES)
    # Faults are planted in our own decoder.
    usual = [name for name in known if fault is None or load_family(name).hf_model_types]
    chosen = [name.strip() for name in families.split(",")] if families else usual
    for name, names, option in [
        *((one, known, "--families") for one in chosen),
        *([(fault, tuple(FAULTS), "--fault")] if fault is not None else []),
    ]:
        if name not in names:
            raise ValueError(
                f"{option} {name!r} is not known; {suggestion(name, names)}use one of "
                f"{', '.join(names)}"
            )
    return Table(families=chosen, fault=fault)


def main(arguments: list[str]) -> int:
    """Compare every family with transformers: logits, gradients, export, two layouts."""
    options = parser().parse_args(arguments)
    if options.fault == "list":
        for name, fault in FAULTS.items():
            print(f"{name}: {fault.sentence}")
        return EXIT_EQUAL
    try:
        table = choose(options.families, options.fault)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_MISTAKE_EXIT_CODE
    from transformers.utils import logging as their_logging

    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()
    logging.getLogger("tessera").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # before ranks are forked, which could not use more threads
    with tempfile.TemporaryDirectory(prefix="families-") as scratch:
        fill_alone(table, Path(scratch))
        columns = COLUMNS if table.fault is None else FAULTS[table.fault].columns
        for column, layout in LAYOUTS.items():
            if column not in columns:
                continue
            job: Job = layout_job(table, column, Path(scratch), options.timeout_seconds)
            run_here(job, layout.world_size, lambda row, column=column: table.add_row(column, row))
    sentence, code = table.verdict()
    print("\n".join([*table.lines(), *table.remarks(), sentence]), flush=True)
    if options.out is not None:
        command = shlex.join(["python", "-m", "engine.verify", "families", *arguments])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = json.dumps(table.record(command), indent=1, allow_nan=False)
        options.out.write_text(record + "\n")
    return code
