"""Measure training speed: `python -m scripts.bench run SUITE --out FILE.json`.

Each row is its own `torchrun train.py`; the figures are medians over the steps after warm-up,
read from the run's metrics.jsonl. The record names versions, device and command of every row, and
the commit: where the measuring machine has no git, put TESSERA_COMMIT=$(git rev-parse HEAD) of the
machine that has it in front of the command.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.logging import machine_report
from scripts.bench.suites import SUITES, BenchRow

ROOT = Path(__file__).parents[2]


def command(row: BenchRow, run_folder: Path) -> list[str]:
    """Return the command line of a row."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={row.gpus}",
        "train.py",
        f"--job.config_file={row.config_file}",
        f"--job.dump_folder={run_folder}",
        *row.overrides,
    ]


def summarise(row: BenchRow, metrics_file: Path) -> dict[str, Any]:
    """Return the medians over the steps after warm-up."""
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    steady = [line for line in lines if line["step"] > row.warmup_steps and "loss" in line]
    speeds = [line["tokens_per_second_per_device"] for line in steady]
    median = statistics.median(speeds)
    before = max(line.get("tokens", 0) for line in lines if line["step"] <= row.warmup_steps)
    return {
        "steps_measured": len(steady),
        "tokens_per_second_per_gpu": round(median, 1),
        "slowest_and_fastest": [round(min(speeds), 1), round(max(speeds), 1)],
        "mfu": statistics.median(line["mfu"] or 0.0 for line in steady),
        "tokens_per_row": round(
            (steady[-1]["tokens"] - before) / sum(line["rows"] for line in steady)
        ),
        "compilations": sum(line["compilations"] for line in steady),
        "host_syncs_per_step": max(line["host_syncs"] or 0 for line in steady),
        "peak_memory_gib": round(max(line["peak_memory_gib"] for line in lines), 1),
        "first_and_last_loss": [lines[0]["loss"], lines[-1]["loss"]],
        "floor_tokens_per_second_per_gpu": row.floor_tokens_per_second,
        "passed": row.floor_tokens_per_second is None or median >= row.floor_tokens_per_second,
    }


def run_row(row: BenchRow, log_folder: Path, timeout_seconds: float) -> dict[str, Any]:
    """Train one row in its own processes; a failure is recorded, not raised."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = command(row, Path(folder) / "run")
        log = log_folder / (row.name.replace(" ", "-").replace(",", "") + ".log")
        started = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
            try:
                code = process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the ranks too: they hold GPUs
                code = process.wait()
        record: dict[str, Any] = {
            "row": row.name,
            "gpus": row.gpus,
            "command": " ".join(["torchrun", *arguments[3:]]).replace(folder, "RUN"),
            "seconds": round(time.perf_counter() - started, 1),
            "exit_code": code,
        }
        metrics_file = Path(folder) / "run" / "metrics.jsonl"
        if code == 0:
            record |= summarise(row, metrics_file)
        else:
            record["passed"] = False
            record["error"] = log.read_text()[-2000:]
        return record


def main() -> int:
    """Run a suite; exit non-zero where a row fails or is below its floor."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description=__doc__)
    parser.add_argument("action", choices=["run"])
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("--out", type=Path, required=True, help="record to write")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--timeout_seconds", type=float, default=300.0, help="of one row")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"suite": options.suite, "machine": machine_report(), "rows": []}
    chosen = [row for row in SUITES[options.suite] if options.only in row.name]
    if not chosen:
        parser.error(f"--only {options.only!r} is in no row of {options.suite}")
    for row in chosen:
        record["rows"].append(run_row(row, options.out.parent, options.timeout_seconds))
        print(json.dumps(record["rows"][-1], indent=1), flush=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(row["passed"] for row in record["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
