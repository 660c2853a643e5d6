"""`python -m engine.verify data-elastic`: its command line, its table and its record."""

import argparse
import contextlib
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.batches import open_training_rows
from engine.build import open_tokenizer
from engine.cli import CONFIG_FILE_KEY, USER_MISTAKE_EXIT_CODE, load_config, split_options
from engine.combinations import check_data
from engine.config import JobConfig
from engine.logging import machine_report
from engine.verify.elastic import (
    Part,
    PartRead,
    Read,
    cut_steps,
    digest_stream,
    not_once,
    read_parts,
)
from engine.verify.elastic_faults import FAULTS
from engine.verify.report import EXIT_DIFFERENT, EXIT_EQUAL, EXIT_FAULT_NOT_NOTICED
from models.registry import suggestion

SMALL = {"training.seq_len": 128, "training.local_batch_size": 2}
"""Rows of the check where no configuration is named."""

WORKERS = (0, 2)
STREAM_WORKERS = (0, 1)
HEAD = ("workers", "ranks", "steps", "rows", "digest", "verdict", "seconds")
WIDTHS = (7, 5, 9, 9, 32, 9, 7)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a command line asks for, with everything decided."""

    config: JobConfig
    """With `training.global_batch_size` as a number."""

    sizes: list[int]
    """Data-parallel ranks of each part."""

    steps: int
    workers: list[int]
    fault: str | None
    timeout_seconds: float

    @property
    def num_rows(self) -> int:
        """Rows of all steps."""
        return self.steps * self.config.training.global_batch_size


@dataclass(kw_only=True)
class StreamReport:
    """The parts so far, and the verdict over them."""

    request: Request
    reference: tuple[Read, ...]
    """The rows of one rank that was never stopped."""

    runs: dict[int, list[PartRead]] = field(default_factory=dict[int, list[PartRead]])
    """Number of workers -> the parts that were read."""

    def add(self, found: PartRead) -> None:
        """Take one part and print it."""
        part = found.part
        self.runs.setdefault(part.workers, []).append(found)
        steps = f"{part.first_step}-{part.first_step + part.num_steps - 1}"
        rows = f"{len(found.rows):,}"
        verdict = "equal" if self._equal(found) else "DIFFERENT"
        digest = digest_stream(found.rows)
        line((part.workers, part.ranks, steps, rows, digest, verdict, f"{found.seconds:.1f}"))
        if found.error:
            print(f"    {found.error}", flush=True)

    def _equal(self, found: PartRead) -> bool:
        per_step = self.request.config.training.global_batch_size
        begin = (found.part.first_step - 1) * per_step
        expected = self.reference[begin : begin + found.part.num_steps * per_step]
        return not found.error and found.rows == expected

    def differences(self, workers: int) -> list[str]:
        """Say how the rows that were read with so many workers differ from those of one rank."""
        parts = self.runs[workers]
        rows = [row for found in parts for row in found.rows]
        wrong = [found.error for found in parts if found.error]
        wrong += [once] if (once := not_once(rows, self.request.num_rows)) else []
        if not wrong and tuple(rows) != self.reference:
            wrong = ["the same rows in another order, or with another content"]
        return wrong

    def end(self) -> int:
        """Print the verdicts; return the exit code."""
        print(f"one rank, uninterrupted: {digest_stream(self.reference)}")
        missed: list[int] = []
        different: list[int] = []
        for workers, parts in self.runs.items():
            rows = [row for found in parts for row in found.rows]
            wrong = self.differences(workers)
            # A rank that could not go on is another defect than the planted one.
            crashed = self.request.fault is not None and any(found.error for found in parts)
            (different if wrong and not crashed else missed).append(workers)
            verdict = "DIFFERENT" if wrong else "equal, each row exactly once"
            sizes = ", ".join(map(str, self.request.sizes))
            print(f"{sizes} ranks, {workers} workers:  {digest_stream(rows)}  {verdict}")
            for one in wrong:
                print(f"    {one}")
        if self.request.fault is None:
            return EXIT_DIFFERENT if different else EXIT_EQUAL
        noticed = "; THE CHECK IS NOT TO BE TRUSTED HERE" if missed else ", as it must be"
        print(
            f"the fault {self.request.fault} was noticed in {len(different)} of {len(self.runs)} "
            f"runs{noticed}"
        )
        return EXIT_FAULT_NOT_NOTICED if missed else EXIT_DIFFERENT

    def write(self, path: Path, command: str) -> None:
        """Write the record: command, versions, machine, and a row for each part."""
        request = self.request
        record: dict[str, Any] = {
            "suite": "data-elastic",
            "command": command,
            "machine": machine_report(),
            "data": describe(request.config),
            "plan": request.sizes,
            "steps": request.steps,
            "global_batch_size": request.config.training.global_batch_size,
            "fault": request.fault,
            "digest_of_one_rank": digest_stream(self.reference),
            "runs": [self._entry(workers) for workers in self.runs],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")

    def _entry(self, workers: int) -> dict[str, Any]:
        parts = self.runs[workers]
        return {
            "workers": workers,
            "digest": digest_stream([row for found in parts for row in found.rows]),
            "problems": self.differences(workers),
            "parts": [
                {
                    "ranks": found.part.ranks,
                    "first_step": found.part.first_step,
                    "steps": found.part.num_steps,
                    "rows": len(found.rows),
                    "digest": digest_stream(found.rows),
                    "equal": self._equal(found),
                    "seconds": found.seconds,
                }
                for found in parts
            ],
        }


def parser() -> argparse.ArgumentParser:
    """Return the command line's description; what it does not know are keys of a configuration."""
    found = argparse.ArgumentParser(
        prog="python -m engine.verify data-elastic",
        description="Read the training rows of a run that is killed and goes on with other numbers "
        "of data-parallel ranks and workers, and compare them with those of one rank. Options "
        "like --training.dataset are those of train.py. Exit code 0: equal; 1: not equal, or a "
        "rank was lost; 2: a mistake in the command; 3: a planted fault was not noticed.",
        allow_abbrev=False,
    )
    found.add_argument("--plan", default="8,4,6", help="data-parallel ranks of each part (8,4,6)")
    found.add_argument("--steps", type=int, default=60, help="optimizer steps of all parts (60)")
    found.add_argument(
        "--workers",
        default="",
        help="worker processes of each rank; several numbers are tried in turn (the "
        f"configuration's, or {','.join(map(str, WORKERS))})",
    )
    found.add_argument("--fault", help='error to plant; "list" prints them')
    found.add_argument("--out", type=Path, help="JSON record to write")
    found.add_argument("--timeout_seconds", type=float, default=300.0, help="of one microbatch")
    return found


def main(arguments: list[str]) -> int:
    """Compare the rows of a run that is stopped and goes on with other ranks with one rank's."""
    options, words = parser().parse_known_args(arguments)
    if options.fault == "list":
        for name, fault in FAULTS.items():
            print(f"{name}: {fault.sentence}")
        return 0
    try:
        request = resolve(options, words)
        rows = open_training_rows(request.config, open_tokenizer(request.config))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_MISTAKE_EXIT_CODE
    begin(request)
    whole = Part(ranks=1, workers=0, first_step=1, num_steps=request.steps)
    (reference,) = read_parts(request.config, rows, [whole], request.timeout_seconds)
    if reference.error:
        print(f"one rank, uninterrupted: {reference.error}", file=sys.stderr, flush=True)
        return EXIT_DIFFERENT
    report = StreamReport(request=request, reference=reference.rows)
    planted = FAULTS[request.fault].planted() if request.fault else contextlib.nullcontext()
    with planted:
        for workers in request.workers:
            parts = cut_steps(request.steps, request.sizes, workers)
            for found in read_parts(request.config, rows, parts, request.timeout_seconds):
                report.add(found)
    code = report.end()
    if options.out is not None:
        command = shlex.join(["python", "-m", "engine.verify", "data-elastic", *arguments])
        report.write(options.out, command)
    return code


def resolve(options: argparse.Namespace, words: Sequence[str]) -> Request:
    """Decide data, parts, workers and global batch; ValueError for a mistake of the user."""
    sizes = numbers("--plan", options.plan, least=1)
    if options.steps < len(sizes):
        raise ValueError(
            f"--steps {options.steps} gives no step to some of the {len(sizes)} parts of --plan "
            f"{options.plan}; give at least {len(sizes)}"
        )
    fault = options.fault
    if fault is not None and fault not in FAULTS:
        raise ValueError(
            f"--fault {fault!r} is not known; {suggestion(fault, FAULTS)}use list, or one of "
            f"{', '.join(FAULTS)}"
        )
    if fault is not None and not FAULTS[fault].applies(sizes):
        raise ValueError(f"--fault {fault!r} needs {FAULTS[fault].needs}")
    given = {option.name for option in split_options(words)}
    if CONFIG_FILE_KEY not in given:
        words = [*words, *(f"--{key}={value}" for key, value in SMALL.items() if key not in given)]
    config = load_config(words, prog="python -m engine.verify data-elastic")
    check_data(config)
    if config.data.batch_tokens:
        raise ValueError(
            f"data.batch_tokens = {config.data.batch_tokens}: a step then counts batches, and this "
            "check counts rows; set it to 0"
        )
    training = config.training
    if training.global_batch_size == -1:
        rows = training.local_batch_size * math.lcm(*sizes)
        training = replace(training, global_batch_size=rows)
    for size in sizes:
        training.dealing(size)
    is_stream = config.data.streaming
    own = training.dataloader.num_workers
    usual = [own] if own else [*(STREAM_WORKERS if is_stream else WORKERS)]
    workers = numbers("--workers", options.workers, least=0) if options.workers else usual
    if is_stream and max(workers) > 1:
        raise ValueError(
            f"--workers {max(workers)}, but with data.streaming = true a rank has one worker or "
            "none; give --workers 0,1"
        )
    return Request(
        config=replace(config, training=training),
        sizes=sizes,
        steps=options.steps,
        workers=workers,
        fault=fault,
        timeout_seconds=options.timeout_seconds,
    )


def numbers(option: str, text: str, *, least: int) -> list[int]:
    """Return the whole numbers of a list such as "8,4,6"."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = [least - 1]
    if min(found) < least:
        raise ValueError(f"{option} {text!r}: give whole numbers from {least} up, such as 8,4,6")
    return list(dict.fromkeys(found)) if option == "--workers" else found


def describe(config: JobConfig) -> str:
    """Return what is read, in a few words."""
    training, data = config.training, config.data
    named = " + ".join(source.name for source in data.sources)
    named = named or " ".join(filter(None, (training.dataset, training.dataset_path)))
    formats = "/".join(sorted({form for _, form in data.read(training.dataset)}))
    made = f"format {formats}, packing {data.packing}{', streamed' * data.streaming}"
    return f"{named}, {made}, rows of {training.seq_len} tokens"


def begin(request: Request) -> None:
    """Print what is read and the head of the table."""
    training = request.config.training
    print(describe(request.config))
    print(f"{request.steps} steps of {training.global_batch_size:,} rows; killed between the parts")
    if request.fault is not None:
        print(f"planted: {FAULTS[request.fault].sentence}")
    for size in dict.fromkeys(request.sizes):
        if share := training.dealing(size).filler_share:
            print(f"{size} ranks cannot share a step evenly: {100 * share:.1f}% fillers")
    line(HEAD)
    line(("---",) * len(HEAD))


def line(cells: Sequence[object]) -> None:
    """Print one line of the table."""
    padded = [str(cell).ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)]
    print(f"| {' | '.join(padded)} |", flush=True)
