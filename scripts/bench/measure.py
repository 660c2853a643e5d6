"""Trains one row of a suite in processes of its own, and reads what is recorded of it."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from scripts.bench.clocks import sampled
from scripts.bench.suites import BenchRow
from scripts.bench.trace import read_trace, summarise_trace

ROOT = Path(__file__).parents[2]
TRACED_STEPS = 3
"""Steps after the measured ones: two in which the profiler warms up, and the one it records."""

FEWEST_STEPS_WITH_TRACE = 10
"""Rows of fewer steps have long ones, or are about something else than launch gaps."""

LAUNCHER_REPORT = "torch/distributed/elastic/multiprocessing/api.py"
OUT_OF_MEMORY = re.compile(
    r"^.*(?:OutOfMemoryError|[Oo]ut of memory|ALLOC_FAILED).*$", re.MULTILINE
)
"""A line of the allocator, the driver, NCCL or cuBLAS that says so."""

KEPT_CHARACTERS = 2000
SECONDS_TO_DIE = 30.0
"""How long a killed process may take to give back the memory of its GPU."""


def training_steps(row: BenchRow) -> int:
    """Return the steps of a row, as the last of its options says."""
    given = [o.partition("=")[2] for o in row.overrides if o.startswith("--training.steps=")]
    return int(given[-1])


def traces(row: BenchRow) -> bool:
    """Say whether a step after the measured ones is profiled."""
    return training_steps(row) >= FEWEST_STEPS_WITH_TRACE


def torchrun(num_processes: int, *program: str) -> list[str]:
    """Return the command line that starts a program on so many ranks of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={num_processes}", *program]


def command(row: BenchRow, run_folder: Path) -> list[str]:
    """Return the command line of a row."""
    traced: tuple[str, ...] = ()
    if traces(row):
        steps = training_steps(row) + TRACED_STEPS
        traced = (
            f"--training.steps={steps}",
            "--profiling.enable_profiling",
            f"--profiling.profile_freq={steps}",
            f"--profiling.profiler_warmup={TRACED_STEPS - 1}",
        )
    options = (f"--job.config_file={row.config_file}", f"--job.dump_folder={run_folder}")
    return torchrun(row.gpus, "train.py", *options, *row.overrides, *traced)


def run_logged(arguments: Sequence[str], log: Path, timeout_seconds: float, **more: str) -> int:
    """Run a command with its output in `log`; return its exit code, negative after a kill.

    `more` is added to its environment. What it started ends with it when time is up, and when an
    exception such as that of `end_on_signals` ends the wait.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **more},
            start_new_session=True,
        )
        try:
            return process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return kill(process)
        except BaseException:
            kill(process)
            raise


def kill(process: subprocess.Popen[bytes]) -> int:
    """End a command and all that it started, and wait until they are gone; return its exit code."""
    if process.poll() is not None:
        return process.returncode
    # One by one: torchrun gives each rank a session, so no group has them all, and they hold GPUs.
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for one in started:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    deadline = time.monotonic() + SECONDS_TO_DIE
    while any(map(_is_alive, started)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return process.wait()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP, as SIGINT does, raise in this process and so end what it runs."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)


def outcome(exit_code: int, log: Path) -> dict[str, Any]:
    """Say how a run ended: ok, out of memory, timeout or failed, with the end of its log.

    The first line about memory is kept too, wherever it is.
    """
    if exit_code == 0:
        return {"outcome": "ok"}
    text = log.read_text(errors="replace")
    ended = "timeout" if exit_code == -signal.SIGKILL else "failed"
    # The launcher's own report of the death is longer than that.
    error = text.partition(LAUNCHER_REPORT)[0][-KEPT_CHARACTERS:]
    if found := OUT_OF_MEMORY.search(text):
        ended = "out of memory"
        # Another rank may have said much after it, or the launcher before it.
        if (line := found[0][:KEPT_CHARACTERS]) not in error:
            error = f"{line}\n[...]\n{error}"
    return {"outcome": ended, "error": error}


def log_file(folder: Path, name: str) -> Path:
    """Return where the output of a row or of a peer on it goes."""
    return folder / (name.replace(" ", "-").replace(",", "") + ".log")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the tenth, fiftieth and ninetieth percentile."""
    if len(values) == 1:
        return dict.fromkeys(("p10", "p50", "p90"), values[0])
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"p10": tenths[0], "p50": tenths[4], "p90": tenths[8]}


def measured_lines(row: BenchRow, metrics_file: Path) -> list[dict[str, Any]]:
    """Return the metrics of a row's steps, those of the profiler left out; none where some lack."""
    if not metrics_file.is_file():
        return []
    whole = (line for line in metrics_file.read_text().splitlines(True) if line.endswith("\n"))
    lines = [line for line in map(json.loads, whole) if line["step"] <= training_steps(row)]
    return lines if lines and lines[-1]["step"] == training_steps(row) else []


def summarise(row: BenchRow, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over the steps after warm-up."""
    steady = [line for line in lines if line["step"] > row.warmup_steps and "loss" in line]
    speeds = [line["tokens_per_second_per_device"] for line in steady]
    median = statistics.median(speeds)
    before = max(line.get("tokens", 0) for line in lines if line["step"] <= row.warmup_steps)
    rows = sum(line["rows"] for line in steady)
    allocated = [line["peak_allocated_gib"] or 0.0 for line in lines]
    parts = [pair for line in lines for pair in line.items() if pair[0].startswith("memory/")]
    times = spread([line["step_seconds"] for line in steady])
    return {
        "steps_measured": len(steady),
        "tokens_per_second_per_gpu": round(median, 1),
        "slowest_and_fastest": [round(min(speeds), 1), round(max(speeds), 1)],
        "step_seconds": {name: round(seconds, 4) for name, seconds in times.items()},
        "mfu": statistics.median(line["mfu"] or 0.0 for line in steady),
        "mfu_documents": statistics.median(line["mfu_documents"] or 0.0 for line in steady),
        "tokens_per_row": round((steady[-1]["tokens"] - before) / rows),
        "data_seconds_per_step": round(statistics.median(x["data_seconds"] for x in steady), 5),
        "save_seconds": [round(x["saving_seconds"], 3) for x in lines if x["saving_seconds"]],
        "compilations": sum(line["compilations"] for line in steady),
        "host_syncs_per_step": max(line["host_syncs"] or 0 for line in steady),
        "peak_memory_gib": round(max(line["peak_memory_gib"] for line in lines), 1),
        "peak_allocated_gib": round(max(allocated), 1),
        "memory_gib": {
            name.removeprefix("memory/").removesuffix("_gib"): round(gib, 2)
            for name, gib in parts
            if gib is not None
        },
        "goodput": round(lines[-1]["goodput"], 3),
        "first_and_last_loss": [lines[0]["loss"], lines[-1]["loss"]],
        "floor_tokens_per_second_per_gpu": row.floor_tokens_per_second,
        "passed": row.floor_tokens_per_second is None or median >= row.floor_tokens_per_second,
    }


def run_row(row: BenchRow, log_folder: Path, timeout_seconds: float) -> dict[str, Any]:
    """Train one row in its own processes; a failure is recorded, not raised.

    One that ends badly after all its steps has their figures too, and has not passed.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = command(row, Path(folder) / "run")
        log = log_file(log_folder, row.name)
        started = time.perf_counter()
        with sampled() as clocks:
            code = run_logged(arguments, log, timeout_seconds)
        record: dict[str, Any] = {
            "row": row.name,
            "gpus": row.gpus,
            "command": " ".join(["torchrun", *arguments[3:]]).replace(folder, "RUN"),
            "seconds": round(time.perf_counter() - started, 1),
            "exit_code": code,
            **outcome(code, log),
            "passed": False,
        }
        if lines := measured_lines(row, Path(folder) / "run" / "metrics.jsonl"):
            record |= summarise(row, lines)
            record["passed"] = record["passed"] and code == 0
        if clocks:
            record["clocks"] = clocks
        if code == 0:
            for path in (Path(folder) / "run" / "profile").rglob("rank-0.json"):
                record["traced_step"] = summarise_trace(read_trace(path))
        return record
