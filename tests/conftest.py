"""What every test shares: one thread per process, and the pool of gloo ranks."""

import os
from pathlib import Path

import pytest

# Before torch loads: forked workers hang at their first matmul if the parent used more threads.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A failed compilation would name every native frame of its stack, for minutes.
os.environ.setdefault("TORCH_DISABLE_ADDR2LINE", "1")
# Each rank would start a pool of compilers, and they would compile the same kernels.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

pytest_plugins = ["tests.ranks"]

ROOT = Path(__file__).parent


LONGEST_FIRST = (
    "slurm/test_multinode.py",  # it mostly waits, so that another process works meanwhile
    "parity/test_inductor.py",
    "parity/test_context_plans.py",
    "parity/test_plans.py",
    "end_to_end/test_endings.py",
    "engine/test_step.py",
    "end_to_end/test_quick_start.py",
    "parity/test_resume.py",
    "engine/test_config_titan_runs.py",
    "engine/test_hf_io.py",
    "engine/test_verify.py",
    "parallelisms/test_traps.py",
    "engine/test_checkpoint.py",
)
"""Files by the time they take; the rest, half a minute at most each, fills what is left."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that the processes of a run end together."""
    order = {ROOT / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
