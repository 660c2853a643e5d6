"""What the parity check prints and writes: rows with their verdict, a summary, a JSON record."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.logging import machine_report
from engine.verify.case import Case
from engine.verify.faults import FAULTS
from engine.verify.parity import (
    BF16_ARITHMETIC,
    BF16_ON_GPUS,
    FP32_OTHER_KERNELS,
    FP32_REORDERED_SUM,
)
from engine.verify.ranks import Row

EXIT_EQUAL, EXIT_DIFFERENT, EXIT_FAULT_NOT_NOTICED = 0, 1, 3


def tolerance(case: Case, device_type: str) -> float:
    """Return the largest relative error of the loss and of a gradient that a plan may have."""
    if device_type == "cuda":
        return BF16_ON_GPUS if case.bfloat16 else FP32_OTHER_KERNELS
    return BF16_ARITHMETIC if case.bfloat16 else FP32_REORDERED_SUM


@dataclass(kw_only=True)
class Report:
    """The rows so far, and the verdict over them."""

    cases: Sequence[Case]
    refused: dict[Case, str]
    device_type: str
    world_size: int
    model: str
    fault: str | None = None
    is_silent: bool = False
    suite: str = "parity"
    checks: Sequence[str] = ()
    """Columns of what is compared beside the loss and the gradients."""

    rows: list[Row] = field(default_factory=list[Row])

    def begin(self) -> None:
        """Print what is compared and the head of the table."""
        self._say(f"{self.world_size} ranks on {self.device_type}, {self.model}")
        if self.fault is not None:
            self._say(f"planted: {FAULTS[self.fault].sentence}")
        errors = ("loss error", "gradient error", "of", *self.checks)
        head = ("plan", *errors, "tolerance", "verdict", "seconds")
        self._line(head)
        self._line(("-" * self._width, *("---",) * (len(head) - 1)))

    def add(self, row: Row) -> None:
        """Take one row and print it."""
        self.rows.append(row)
        found = row.comparison
        errors = ("-", "-", "-", *("-" for _ in self.checks))
        if found is not None:
            errors = (f"{found.loss_error:.1e}", f"{found.worst_error:.1e}", found.worst_name)
            errors = (*errors, *(f"{found.checks[name]:.1e}" for name in self.checks))
        bound = f"{tolerance(row.case, self.device_type):g}"
        self._line((str(row.case), *errors, bound, self.verdict(row), f"{row.seconds:.1f}"))
        for line in (*row.error.splitlines(), *(found.problems if found else ())):
            self._say(f"    {line}")

    def passed(self, row: Row) -> bool:
        """Say whether a plan equals one process."""
        bound = tolerance(row.case, self.device_type)
        return row.comparison is not None and row.comparison.is_within(bound)

    def noticed(self, row: Row) -> bool:
        """Say whether the planted fault made this plan fail in the way that it should."""
        assert self.fault is not None, "asked only where a fault is planted"
        may_crash = FAULTS[self.fault].may_crash
        return not self.passed(row) and (row.comparison is not None or may_crash)

    def verdict(self, row: Row) -> str:
        """Return the word of the table."""
        if self.fault is not None:
            return "noticed" if self.noticed(row) else "NOT NOTICED"
        return "pass" if self.passed(row) else "FAIL"

    def end(self) -> int:
        """Print the refused plans and the summary; return the exit code."""
        for case, reason in self.refused.items():
            self._say(f"{case} refused: {reason}")
        if self.fault is not None:
            return self._end_with_fault(self.fault)
        failed = [row for row in self.rows if not self.passed(row)]
        counts = f"{len(self.rows) - len(failed)} of {len(self.rows)} plans equal one process"
        refused = f"; {len(self.refused)} refused" if self.refused else ""
        self._say(f"{counts}{refused}")
        if failed:
            self._say(f"failed: {', '.join(str(row.case) for row in failed)}")
        return EXIT_DIFFERENT if failed else EXIT_EQUAL

    def _end_with_fault(self, fault: str) -> int:
        missed = [row for row in self.rows if not self.noticed(row)]
        self._say(
            f"the fault {fault} was noticed in {len(self.rows) - len(missed)} of {len(self.rows)} "
            "plans" + ("; THE CHECK IS NOT TO BE TRUSTED HERE" if missed else ", as it must be")
        )
        return EXIT_FAULT_NOT_NOTICED if missed else EXIT_DIFFERENT

    def write(self, path: Path, command: str) -> None:
        """Write the record: command, versions, machine and a row for each plan."""
        record: dict[str, Any] = {
            "suite": self.suite,
            "command": command,
            "machine": machine_report(),
            "ranks": self.world_size,
            "device": self.device_type,
            "model": self.model,
            "fault": self.fault,
            "rows": [self._entry(row) for row in self.rows],
            "refused": [{"plan": str(c), "reason": reason} for c, reason in self.refused.items()],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")

    def _entry(self, row: Row) -> dict[str, Any]:
        found = row.comparison
        return {
            "plan": str(row.case),
            "loss_error": _finite(found.loss_error) if found else None,
            "worst_gradient_error": _finite(found.worst_error) if found else None,
            "of": found.worst_name if found else "",
            **{name: _finite(found.checks[name]) if found else None for name in self.checks},
            "tolerance": tolerance(row.case, self.device_type),
            "passed": self.passed(row),
            "seconds": row.seconds,
            "problems": [*(found.problems if found else ()), *([row.error] if row.error else [])],
        }

    @property
    def _width(self) -> int:
        return max((len(str(case)) for case in self.cases), default=4)

    def _line(self, cells: Sequence[str]) -> None:
        widths = (self._width, 10, 14, 48, *map(len, self.checks), 9, 11, 7)
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        self._say(f"| {' | '.join(padded)} |")

    def _say(self, text: str) -> None:
        if not self.is_silent:
            print(text, flush=True)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
