"""How a run ends early: signals, a dead rank, a mistake in the configuration."""

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Launcher
from tests.end_to_end.launch import DEBUG_MODEL, SHORT, complete_steps, rows, torchrun

END_SECONDS = 60.0
ENDLESS = (
    *SHORT,
    *("--training.steps", "100000", "--checkpoint.interval", "100000", "--validation.no_enable"),
)
pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(
    ("number", "ranks"),
    [(signal.SIGTERM, (0, 1)), (signal.SIGUSR1, (1,))],
    ids=["SIGTERM to every rank", "SIGUSR1 to one rank"],
)
def test_a_signal_saves_the_step_and_ends_every_rank_with_code_0(
    launch: Launcher, tmp_path: Path, number: signal.Signals, ranks: tuple[int, ...]
) -> None:
    folder = tmp_path / "run"
    run = launch([*torchrun("--nproc_per_node=2"), *ENDLESS, "--job.dump_folder", str(folder)])
    run.wait_for(lambda: len(rows(folder)) >= 2, "two steps")
    processes = run.ranks()
    for rank in ranks:
        processes[rank].send_signal(number)
    assert run.wait(END_SECONDS) == 0, run.text
    assert complete_steps(folder) == [rows(folder)[-1]["step"]]


def test_a_killed_rank_ends_the_whole_run_and_leaves_no_process(
    launch: Launcher, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run = launch([*torchrun("--nproc_per_node=2"), *ENDLESS, "--job.dump_folder", str(folder)])
    run.wait_for(lambda: len(rows(folder)) >= 2, "two steps")
    started = time.monotonic()
    run.ranks()[1].send_signal(signal.SIGKILL)
    assert run.wait(END_SECONDS) != 0
    while run.processes():
        assert time.monotonic() - started < END_SECONDS, f"left behind: {run.processes()}"
        time.sleep(0.2)


TYPO = ("--training.stepps", "3")
TOO_MANY = ("--parallelism.data_parallel_shard_degree", "3")


@pytest.mark.parametrize(
    ("command", "mistake", "code", "said"),
    [
        ([sys.executable, "train.py"], TYPO, 2, "training.steps"),
        (torchrun("--nproc_per_node=2"), TOO_MANY, 1, "parallelism.data_parallel_shard_degree"),
    ],
    ids=["typo, no launcher", "degrees against the world, torchrun"],
)
def test_a_mistake_ends_with_its_code_and_one_message(
    launch: Launcher,
    tmp_path: Path,
    command: list[str],
    mistake: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    folder = ("--job.dump_folder", str(tmp_path / "run"))
    run = launch([*command, *DEBUG_MODEL, *folder, *mistake])
    assert run.wait() == code, run.text
    assert run.text.count("error: ") == 1, run.text
    message = next(line for line in run.text.splitlines() if line.startswith("error: "))
    assert said in message
    assert "Traceback" not in run.text.split("error: ")[0]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (("--training.dataset", "jsonl", "--training.dataset_path", "none"), "dataset_path"),
        (("--objective.name", "tests.end_to_end.odd_objectives"), "does not define 'build'"),
    ],
    ids=["data that is not there", "a mistake that one rank alone meets"],
)
def test_a_mistake_met_when_all_ranks_are_up_ends_them_and_is_said_once(
    launch: Launcher, tmp_path: Path, mistake: tuple[str, ...], said: str
) -> None:
    options = ("--job.dump_folder", str(tmp_path / "run"), "--training.steps", "3")
    run = launch([*torchrun("--nproc_per_node=2"), *SHORT, *options, *mistake])
    assert run.wait(END_SECONDS) == 1, run.text
    said_lines = [line for line in run.text.splitlines() if line.startswith("error")]
    assert len(said_lines) == 1 and said in said_lines[0], run.text


def test_a_loss_that_is_not_a_number_stops_the_run_and_loses_nothing_saved(
    launch: Launcher, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = (*SHORT, "--job.dump_folder", str(folder), "--training.steps", "6")
    once = ("--training.local_batch_size", "4", "--checkpoint.interval", "2")
    poisoned = ("--objective.name", "tests.end_to_end.odd_objectives", "--validation.no_enable")
    run = launch([sys.executable, "train.py", *options, *once, *poisoned])
    assert run.wait() == 1, run.text
    assert run.text.count("error: step 4 is not finite") == 1, run.text
    assert complete_steps(folder) == [2]
    run = launch([sys.executable, "train.py", *options, *once])
    assert run.wait() == 0, run.text
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]
    assert complete_steps(folder)[-1] == 6
