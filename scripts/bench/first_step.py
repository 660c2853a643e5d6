"""Time from the start of a process to the end of its first step: how it grows with the data.

    python -m scripts.bench.first_step --out FILE.json

Trains the debug model for three steps on prepared tokens of 20 million documents, under each
packing, and on a few thousand documents for comparison. The tokens are random and the lengths
log-normal: only how many documents and rows there are matters here. Memory is what the ranks'
processes hold by themselves (RssAnon); pages of mapped files are shared and can be given back at
any time, and are recorded beside it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from engine.batches import open_sources, token_rows
from engine.build import open_tokenizer
from engine.cli import load_config
from engine.data.cache import MANIFEST
from engine.logging import machine_report
from scripts.bench.measure import ROOT

PACKINGS = ("concat", "best_fit", "none")
FEW_DOCUMENTS = 2000
SEQ_LEN = 32
"""Short, so that 20 million documents fill more than 20 million rows of joined ones too."""

LOG_MEAN, LOG_SIGMA, LONGEST = 3.4, 0.6, 4096
TOKENS_AT_ONCE = 1 << 24
POLL_SECONDS = 0.02
SECONDS_ALLOWED, GROWTH_ALLOWED_GB = 60.0, 2.0


def replace_tokens(folder: Path, num_documents: int, vocab_size: int) -> int:
    """Put random documents in the place of those of a prepared token file; return their tokens.

    The key of the folder stays that of the text it was made from.
    """
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(LOG_MEAN, LOG_SIGMA, num_documents).astype(np.int64)
    offsets = np.zeros(num_documents + 1, dtype=np.int64)
    np.cumsum(np.clip(lengths, 2, LONGEST), out=offsets[1:])
    np.save(folder / "offsets.npy", offsets)
    num_tokens = int(offsets[-1])
    with (folder / "tokens.bin").open("wb") as file:
        for start in range(0, num_tokens, TOKENS_AT_ONCE):
            size = min(TOKENS_AT_ONCE, num_tokens - start)
            file.write(generator.integers(vocab_size, size=size, dtype=np.uint16).data)
    stored = json.loads((folder / "facts.json").read_text())
    stored |= {"digest": f"{num_documents} random", "num_trained": num_tokens, "facts": {}}
    (folder / "facts.json").write_text(json.dumps(stored))
    sizes = {f.name: f.stat().st_size for f in folder.iterdir() if f.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(sizes))
    return num_tokens


def options_for(scratch: Path, packing: str) -> list[str]:
    """Return the options of a run on the text and the cache in `scratch`."""
    return [
        "--job.config_file=train_configs/debug_model.toml",
        f"--data.cache_folder={scratch / 'cache'}",
        f"--data.packing={packing}",
        "--training.dataset=jsonl",
        f"--training.dataset_path={scratch / 'text.jsonl'}",
        f"--training.seq_len={SEQ_LEN}",
        *("--training.steps=3", "--metrics.log_freq=1", "--metrics.no_enable_tensorboard"),
        *("--checkpoint.no_enable", "--validation.no_enable"),
    ]


def prepare(scratch: Path, num_documents: int) -> int:
    """Prepare one line of text, then stretch its token file; return the tokens in it."""
    scratch.mkdir(parents=True)
    (scratch / "text.jsonl").write_text('{"text": "stands for many documents"}\n')
    config = load_config(options_for(scratch, "concat"))
    tokenizer = open_tokenizer(config)
    (rows,) = token_rows(open_sources(config, tokenizer))
    assert rows.file.folder is not None
    return replace_tokens(rows.file.folder, num_documents, tokenizer.vocab_size)


@dataclass(kw_only=True, slots=True)
class Usage:
    """What the ranks of a run were seen to use; the largest of all ranks."""

    seconds: float = float("nan")
    """From the start of the launcher to the end of step 1."""

    private_bytes: int = 0
    file_bytes: int = 0
    cpu_seconds: float = 0.0
    """Of one process, its start and all three steps."""

    pids: set[int] = field(default_factory=set[int])

    def look(self, launcher: psutil.Process) -> None:
        """Note what each rank holds now."""
        for process in launcher.children(recursive=True):
            try:
                if not any(word.endswith("train.py") for word in process.cmdline()[1:3]):
                    continue
                cpu = process.cpu_times()
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except (OSError, psutil.Error):  # it has just ended
                continue
            held = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
            if "RssAnon" in held:
                self.pids.add(process.pid)
                self.cpu_seconds = max(self.cpu_seconds, cpu.user + cpu.system)
                self.private_bytes = max(self.private_bytes, 1024 * int(held["RssAnon"][0]))
                self.file_bytes = max(self.file_bytes, 1024 * int(held["RssFile"][0]))


def run(scratch: Path, packing: str, ranks: int, log: Path) -> Usage:
    """Train three steps in processes of their own, and watch them."""
    folder = scratch / f"run-{packing}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", "train.py", f"--job.dump_folder={folder}"]
    command += options_for(scratch, packing)
    usage, metrics = Usage(), folder / "metrics.jsonl"
    started = time.perf_counter()
    with log.open("a") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        launcher = psutil.Process(process.pid)
        while process.poll() is None:
            usage.look(launcher)
            if np.isnan(usage.seconds) and metrics.is_file() and metrics.stat().st_size:
                usage.seconds = time.perf_counter() - started
            time.sleep(POLL_SECONDS)
    if process.returncode or np.isnan(usage.seconds) or len(usage.pids) != ranks:
        raise RuntimeError(f"train.py ended with {process.returncode}: {log.read_text()[-2000:]}")
    shutil.rmtree(folder)
    return usage


def measure(scratch: Path, num_documents: int, ranks: int, log: Path) -> list[dict[str, Any]]:
    """Return one row of figures for few documents, and one for each packing of many."""
    few, many = scratch / "few", scratch / "many"
    prepare(few, FEW_DOCUMENTS)
    num_tokens = prepare(many, num_documents)
    small = run(few, "concat", ranks, log)
    found = [figures(small, small, packing="concat", documents=FEW_DOCUMENTS)]
    for packing in PACKINGS:
        config = load_config(options_for(many, packing))
        (rows,) = token_rows(open_sources(config, open_tokenizer(config)))
        facts = {"packing": packing, "documents": num_documents, "tokens": num_tokens}
        facts["rows_per_epoch"] = rows.rows_per_epoch
        found.append(figures(run(many, packing, ranks, log), small, **facts))
        print(json.dumps(found[-1], indent=1), flush=True)
    return found


def figures(usage: Usage, small: Usage, **facts: object) -> dict[str, Any]:
    """Return what a run used, and whether it kept within the bounds."""
    growth = (usage.private_bytes - small.private_bytes) / 1e9
    return {
        **facts,
        "seconds_to_end_of_step_1": round(usage.seconds, 1),
        "cpu_seconds_of_a_rank": round(usage.cpu_seconds, 1),
        "load_average": round(os.getloadavg()[0], 1),
        "private_memory_gb": round(usage.private_bytes / 1e9, 3),
        "private_memory_growth_gb": round(growth, 3),
        "mapped_file_memory_gb": round(usage.file_bytes / 1e9, 3),
        "passed": usage.seconds <= SECONDS_ALLOWED and growth <= GROWTH_ALLOWED_GB,
    }


def main(arguments: Sequence[str]) -> int:
    """Measure and write the record; exit non-zero where a bound is broken."""
    parser = argparse.ArgumentParser(prog="scripts.bench.first_step", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="record to write")
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--ranks", type=int, default=1)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        log = given.out.with_suffix(".log")
        rows = measure(Path(scratch), given.documents, given.ranks, log)
    record = {
        "suite": "first-step",
        "machine": {**machine_report(), "cpus": f"{os.cpu_count()} CPU cores"},
        "command": f"python -m scripts.bench.first_step --documents {given.documents} "
        f"--ranks {given.ranks}",
        "bounds": {"seconds": SECONDS_ALLOWED, "private_memory_growth_gb": GROWTH_ALLOWED_GB},
        "rows": rows,
        "passed": all(row["passed"] for row in rows),
    }
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
