"""Save, resume and export on this machine's devices: `python -m scripts.bench.resume --out FILE`.

Trains a model without a stop; trains it again, saved half way in the background, and goes on in
the same layout and in another; compares the losses of the second half; then exports the end to a
Hugging Face folder and has `transformers` check it. Exits non-zero where losses drift apart.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.logging import machine_report
from scripts.bench.measure import ROOT

BF16_OTHER_LAYOUT = 2e-3  # relative, of the loss
STEPS, SAVED_STEP = 8, 4


def train(folder: Path, ranks: int, options: list[str], log: Path) -> dict[str, Any]:
    """Run train.py in its own processes; return its losses by step and its wall time."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={ranks}", "train.py", f"--job.dump_folder={folder}"),
        *("--metrics.log_freq=1", f"--lr_scheduler.total_steps={STEPS}"),
        *("--lr_scheduler.warmup_steps=2", "--checkpoint.enable"),
        *("--checkpoint.async_mode=async_with_pinned_mem", "--checkpoint.last_save_in_hf"),
        *("--checkpoint.no_last_save_model_only", "--checkpoint.export_dtype=bfloat16"),
        *options,
    ]
    started = time.perf_counter()
    with log.open("a") as output:
        subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "losses": {row["step"]: row["loss"] for row in map(json.loads, lines)},
    }


def drift(run: dict[str, Any], whole: dict[str, Any]) -> float:
    """Return the largest relative difference of the losses after the resumed step."""
    steps = range(SAVED_STEP + 1, STEPS + 1)
    return max(abs(run["losses"][s] / whole["losses"][s] - 1.0) for s in steps)


def main() -> int:
    """Run the comparison and write its record."""
    parser = argparse.ArgumentParser(prog="scripts.bench.resume", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="record to write")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("options", nargs="*", help="further options of train.py, after --")
    given = parser.parse_args()
    log = given.out.with_suffix(".log")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        first_half = [*given.options, f"--training.steps={SAVED_STEP}"]
        both_halves = [*given.options, f"--training.steps={STEPS}"]
        whole = train(root / "whole", given.ranks, both_halves, log)
        train(root / "same", given.ranks, first_half, log)
        shutil.copytree(root / "same", root / "other")
        same = train(root / "same", given.ranks, both_halves, log)
        other_layout = [*both_halves, "--parallelism.tensor_parallel_degree=2"]
        other = train(root / "other", given.ranks, other_layout, log)
        verified = subprocess.run(
            [
                *(sys.executable, "scripts/convert_dcp_to_hf.py"),
                *(f"{root}/same/checkpoint/step-{STEPS}", f"{root}/converted"),
                *("--dtype", "bfloat16", "--verify"),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())},
            capture_output=True,
            text=True,
        )
    drifts = {"same layout": drift(same, whole), "with tensor parallelism": drift(other, whole)}
    record = {
        "suite": "resume",
        "machine": machine_report(),
        "ranks": given.ranks,
        "options": given.options,
        "seconds": {"whole": whole["seconds"], "same": same["seconds"], "other": other["seconds"]},
        "losses_without_a_stop": whole["losses"],
        "largest_relative_loss_difference": drifts,
        "export_check": [line for line in verified.stdout.splitlines() if "against" in line],
        "passed": max(drifts.values()) <= BF16_OTHER_LAYOUT and verified.returncode == 0,
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1), verified.stderr[-2000:])
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
