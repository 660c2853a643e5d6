"""`scripts/train_multinode.sbatch` under a real SLURM of two nodes on this machine."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from tests.end_to_end.launch import ROOT, SHORT, complete_steps, data_cache, losses, rows
from tests.slurm.cluster import NODES, Cluster, missing_daemons, wait_until

SCRIPT = ROOT / "scripts" / "train_multinode.sbatch"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
STEPS = 200

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        bool(missing_daemons()),
        reason=f"not installed: {', '.join(missing_daemons())} (Debian: slurm-wlm, munge)",
    ),
]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    # Near the root: the names of SLURM's sockets may have 108 characters.
    with (
        TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder,
        Cluster(Path(folder)) as cluster,
    ):
        yield cluster


def test_the_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def placement(cluster: Cluster) -> dict[str, str]:
    """Node of each training rank that is alive under `cluster`."""
    placed: dict[str, str] = {}
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        is_ours = environment.get("SLURM_CONF") == cluster.environment["SLURM_CONF"]
        if is_ours and "RANK" in environment:
            placed[environment["RANK"]] = environment["SLURMD_NODENAME"]
    return placed


def test_a_job_trains_on_both_nodes_and_goes_on_after_requeueing_itself(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, output = tmp_path / "run", tmp_path / "job.log"
    environment = {
        "RUN_FOLDER": str(folder),
        "CONFIG_FILE": SHORT[1],
        "NGPU": "1",
        "SETUP": f"export PATH={Path(sys.executable).parent}:$PATH",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(data_cache(tmp_path_factory)),
    }
    options = ("--parsable", f"--chdir={ROOT}", f"--output={output}", "--time=20")
    training = (*SHORT[2:], "--training.steps", str(STEPS), "--validation.no_enable")
    job = cluster.run("sbatch", *options, str(SCRIPT), *training, environment=environment).strip()

    def report() -> str:
        return (output.read_text() if output.exists() else "no output") + cluster.logs()

    def wait_for(condition: object, what: str) -> None:
        assert callable(condition)
        wait_until(condition, seconds=240, what=what, report=report)

    wait_for(lambda: len(rows(folder)) >= 3, "three steps")
    placed = placement(cluster)
    assert set(placed) == {"0", "1"}
    assert set(placed.values()) == set(NODES)

    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: cluster.job(job)["Restarts"] == "1", "the job to requeue itself")
    (saved,) = complete_steps(folder)
    assert 3 <= saved < STEPS
    assert f"saved step {saved} and requeues itself" in output.read_text()
    before = {step: loss for step, loss in losses(folder).items() if step <= saved}

    wait_for(lambda: waits_for_free_nodes(cluster, job), "the first start to leave the nodes")
    start_now(cluster, job)
    # The job's state would not tell: between requeueing and starting it shows ended ones, too.
    wait_for(lambda: f"job {job} (start 1)" in output.read_text(), "the requeued job to start")
    wait_for(lambda: cluster.job(job)["JobState"] in ENDED, "the second start to finish")
    assert cluster.job(job)["JobState"] == "COMPLETED", report()
    after = losses(folder)
    assert list(after) == list(range(1, STEPS + 1)), "the step axis has a gap or a repeat"
    assert {step: after[step] for step in before} == before
    assert f"from step {saved}" in output.read_text()
    shutil.rmtree(folder)


def waits_for_free_nodes(cluster: Cluster, job: str) -> bool:
    """Whether a requeued job is held back, with nothing of its first start left on the nodes."""
    return cluster.job(job)["JobState"] == "PENDING" and cluster.is_idle()


def start_now(cluster: Cluster, job: str) -> None:
    """Spare a requeued job the two minutes that SLURM holds it back."""
    # A node refuses a start in the second in which it withdrew the one before.
    time.sleep(2)
    # Refused if the job has started by itself.
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", may_fail=True)
