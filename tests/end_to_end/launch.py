"""Starting the real program from tests: followed by its log, signalled by rank, never left over."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
LAUNCH_SECONDS = 400.0  # far above what a launch takes, for machines that do other work as well
MARK = "TESSERA_TEST_LAUNCH"

# The quick start's TOML with a few rows a step; everything else is what a newcomer runs.
DEBUG_MODEL = ("--job.config_file", "train_configs/debug_model.toml")
SHORT = (
    *DEBUG_MODEL,
    *("--training.seq_len", "64", "--training.global_batch_size", "4"),
    *("--training.local_batch_size", "2", "--validation.local_batch_size", "2"),
    *("--validation.seq_len", "64", "--validation.steps", "2", "--metrics.log_freq", "1"),
)


class Launch:
    """One started program and everything below it."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        self._mark = uuid.uuid4().hex
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """What all its processes have printed so far."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = LAUNCH_SECONDS) -> int:
        """Return the exit code; running longer than `seconds` is a failed test."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:.0f} s:\n{self.text}") from None

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Poll until `condition` holds; the program ending first is a failed test."""
        deadline = time.monotonic() + LAUNCH_SECONDS
        while not condition():
            ended = self.process.poll()
            assert ended is None, f"ended with {ended} before {what}:\n{self.text}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.text}"
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """All living processes that descend from the launch, orphans too."""
        return [p for p in psutil.process_iter() if _environment(p).get(MARK) == self._mark]

    def ranks(self) -> dict[int, psutil.Process]:
        """Training processes by rank."""
        environments = {process: _environment(process) for process in self.processes()}
        return {int(e["RANK"]): p for p, e in environments.items() if "RANK" in e}

    def end(self) -> None:
        """Kill whatever is left."""
        for process in self.processes():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except (psutil.Error, OSError):
        return {}


def torchrun(*options: str) -> list[str]:
    """The command line of torchrun from this interpreter, up to the program's arguments."""
    return [sys.executable, "-m", "torch.distributed.run", *options, "train.py"]


def free_port() -> int:
    """A TCP port on the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def data_cache(factory: pytest.TempPathFactory) -> Path:
    """The one cache folder of a test session, so that its tokenizer is trained once."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own in the session's
        folder = folder.parent
    return folder / "data-cache"


def rows(run_folder: Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`."""
    path = run_folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run_folder: Path) -> dict[int, float]:
    """Training loss by step."""
    return {int(row["step"]): row["loss"] for row in rows(run_folder)}


def complete_steps(run_folder: Path) -> list[int]:
    """Steps whose checkpoint carries the completion marker, oldest first."""
    markers = run_folder.glob("checkpoint/step-*/.complete")
    return sorted(int(marker.parent.name.removeprefix("step-")) for marker in markers)
