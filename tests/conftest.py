"""What every test shares: one thread per process, and the pool of gloo ranks."""

import os

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what mostly waits, so that another process of the run works meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
