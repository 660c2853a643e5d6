"""Fixtures of the end-to-end tests: a shared data cache, a launcher that cleans up, a short run."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.launch import SHORT, Launch, data_cache, free_port, torchrun

Launcher = Callable[..., Launch]


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """`launch(command)` starts a program on CPU with one thread a process and a shared cache."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(data_cache(tmp_path_factory)),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    started: list[Launch] = []

    def start(command: list[str]) -> Launch:
        # Tests run in pairs, and torchrun of torch 2.11 has the same port for all it starts.
        own = {**environment, "PET_MASTER_PORT": str(free_port())}
        started.append(Launch(command, home / f"launch-{len(started)}.log", own))
        return started[-1]

    yield start
    for one in started:
        one.end()


@pytest.fixture(scope="session")
def short_run(launch: Launcher, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run folder and output of the quick start on two ranks, cut to six steps."""
    folder = tmp_path_factory.mktemp("short") / "run"
    options = ("--job.dump_folder", str(folder), "--training.steps", "6")
    run = launch([*torchrun("--nproc_per_node=2"), *SHORT, *options])
    assert run.wait() == 0, run.text
    return folder, run.text
