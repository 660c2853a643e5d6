"""A real SLURM on this machine: one controller and two node daemons, all in one folder."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2")

# The GPUs are empty files, so that the script's own --gpus-per-node is accepted.
CONFIGURATION = """\
ClusterName=tessera
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SchedulerType=sched/builtin
JobRequeue=1
MpiDefault=none
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=2 RealMemory=1000 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=2 RealMemory=1000 Gres=gpu:8
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing_daemons() -> list[str]:
    """Which of SLURM's daemons are not installed here."""
    return [name for name in DAEMONS if find_daemon(name) is None]


def find_daemon(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until(
    condition: Callable[[], object], *, seconds: float, what: str, report: Callable[[], str] = str
) -> None:
    """Poll `condition`; a timeout names `what` was waited for and adds `report()`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds:.0f} s still waiting for: {what}\n{report()}")
        time.sleep(0.2)


class Cluster:
    """Daemons with private ports, keys and folders; a context manager that ends each by its pid."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._write_configuration()
            self._start_munge()
            self._start("slurmctld", "-D", "-c")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            wait_until(self.is_idle, seconds=60, what="both nodes to be idle", report=self.logs)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def run(
        self, *command: str, environment: Mapping[str, str] | None = None, may_fail: bool = False
    ) -> str:
        """Output of one of SLURM's client commands."""
        merged = self.environment | dict(environment or {})
        result = subprocess.run(
            command, env=merged, capture_output=True, text=True, timeout=60, check=False
        )
        failure = f"{' '.join(command)}: {result.stderr}\n{self.logs()}"
        assert may_fail or result.returncode == 0, failure
        return result.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says, by key."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def logs(self) -> str:
        """The end of each daemon's log."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.folder.glob("*.log"))
        )

    def _write_configuration(self) -> None:
        (self.folder / "controller").mkdir()
        for node in NODES:
            (self.folder / node).mkdir()
        controller_port, port_1, port_2 = free_ports(3)
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            user=user.strip(),
            folder=self.folder,
            controller_port=controller_port,
            port_1=port_1,
            port_2=port_2,
        )
        (self.folder / "slurm.conf").write_text(text)
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        options = [f"--{name}={self.folder / file}" for name, file in MUNGE_FILES.items()]
        self._start("munged", "--foreground", "--force", *options)
        wait_until(
            (self.folder / "munge.socket").exists, seconds=15, what="munged", report=self.logs
        )

    def _start(self, name: str, *arguments: str) -> None:
        program = find_daemon(name)
        assert program is not None, f"{name} is not installed"
        command: Sequence[str] = (program, *arguments)
        with (self.folder / f"{name}-{len(self._daemons)}-output.log").open("wb") as output:
            daemon = subprocess.Popen(
                command,
                env=self.environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )
        self._daemons.append(daemon)

    def is_idle(self) -> bool:
        """Whether no node works for a job, or still clears up after one."""
        states = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return states.stdout.split() == ["idle"] * len(NODES)


MUNGE_FILES = {
    "socket": "munge.socket",
    "key-file": "munge.key",
    "log-file": "munge.log",
    "pid-file": "munge.pid",
    "seed-file": "munge.seed",
}
