"""How fast a GPU was clocked, and what it drew, while a row trained: read from nvidia-smi.

Under its power limit a GPU lowers its clock, by as much as its kernels draw; so two machines, or
one kernel alone and among others, may differ by that alone.
"""

import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

EVERY_MILLISECONDS = 500
FIELDS = ("utilization.gpu", "clocks.sm", "power.draw", "clocks_event_reasons.sw_power_cap")
BUSY_PERCENT = 95.0
SECONDS_TO_END = 10.0


@contextmanager
def sampled() -> Iterator[dict[str, Any]]:
    """Watch the first GPU that CUDA may see; when the block is left, its dictionary is filled.

    It stays empty where there is no nvidia-smi, or no sample at full load.
    """
    found: dict[str, Any] = {}
    if (program := shutil.which("nvidia-smi")) is None:
        yield found
        return
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    wanted = (f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits", f"--id={first}")
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [program, *wanted, f"--loop-ms={EVERY_MILLISECONDS}"],
            stdout=output,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield found
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_END)
            output.seek(0)
            found |= summarise(output.read())


def summarise(lines: str) -> dict[str, Any]:
    """Return the medians of the samples at full load, and in what share power was the limit."""
    samples = [[cell.strip() for cell in line.split(",")] for line in lines.splitlines()]
    busy = [
        sample
        for sample in samples
        if len(sample) == len(FIELDS) and _known(sample[:1]) >= [BUSY_PERCENT]
    ]
    if not busy:
        return {}
    clocks, watts = (_known(sample[column] for sample in busy) for column in (1, 2))
    return {
        "samples": len(busy),
        "sm_mhz": statistics.median(clocks) if clocks else None,
        "watts": round(statistics.median(watts)) if watts else None,
        "limited_by_power": round(sum(sample[3] == "Active" for sample in busy) / len(busy), 3),
    }


def _known(cells: Iterable[str]) -> list[float]:
    """Return the figures; a driver says [N/A] for what it does not tell."""
    return [float(cell) for cell in cells if not cell.startswith("[")]
