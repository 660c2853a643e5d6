"""The process group, this rank's device, seeds and determinism; nothing is set on import."""

import contextlib
import logging
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy
import torch
import torch.distributed as dist

log = logging.getLogger("tessera")

DEFAULT_SEED = 42

ALONE = "met by this rank alone"
"""Note on an error that the first rank did not meet, so that this rank must print it."""

SECONDS_TO_MEET_AN_ERROR = 5.0

STORAGE_GROUP = "storage"
"""Description of groups in which ranks wait for each other's files, however long that takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommConfig:
    """Collective communication."""

    init_timeout_seconds: int = 300
    """Longest wait for a collective until the first step is done (compilation included)."""

    train_timeout_seconds: int = 100
    """Longest wait for a collective after the first step."""

    trace_buf_size: int = 20000
    """Collectives that NCCL's flight recorder remembers on each rank; 0 switches it off."""

    save_traces_folder: str = "comm_traces"
    """Folder under the run folder for the flight recorder's dumps on a timeout."""

    save_traces_file_prefix: str = "rank_"
    """File name of a dump before the rank's number."""

    mode: Literal["default", "fake_backend", "local_tensor"] = "default"
    """Only default trains; scripts/check_config.py takes the place of the others."""

    def __post_init__(self) -> None:
        for key in ("init_timeout_seconds", "train_timeout_seconds"):
            if getattr(self, key) < 1:
                raise ValueError(f"comm.{key} = {getattr(self, key)}; give at least 1 second")
        if self.mode != "default":
            raise ValueError(
                f"comm.mode = {self.mode!r} does not train; use scripts/check_config.py to see a "
                "plan without GPUs, and leave comm.mode at 'default'"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DebugConfig:
    """Reproducibility."""

    seed: int | None = None
    """Seed of initial values, data order and random numbers; None takes 42. All ranks share it."""

    deterministic: bool = False
    """Only deterministic kernels: the same layout gives the same bits."""

    deterministic_warn_only: bool = False
    """Warn instead of failing where no deterministic kernel exists."""

    moe_force_load_balance: bool = False
    """Mixture-of-experts debugging; dense models ignore it."""

    @property
    def effective_seed(self) -> int:
        """The seed in force."""
        return DEFAULT_SEED if self.seed is None else self.seed


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process among all of the run's."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    host_group: dist.ProcessGroup
    """Gloo group of all ranks, for small agreements on the host that must not touch the GPU."""

    def any_rank(self, answer: bool) -> bool:
        """Return whether any rank's answer is yes. Every rank must call this."""
        flag = torch.tensor([answer], dtype=torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool(flag.item())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any_rank(False)

    def gather_texts(self, text: str) -> list[str]:
        """Return every rank's text in rank order. Every rank must call this."""
        texts: list[str] = [""] * self.size
        dist.all_gather_object(texts, text, group=self.host_group)
        return texts


def launched_world_size() -> int:
    """Return how many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """Return this process's rank from the launcher; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def cores_of_rank() -> int:
    """Return this rank's share of the CPU cores that may be used on its machine; at least 1."""
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def choose_device(requested: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return this rank's device; `auto` takes CUDA where every local rank has a GPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "cpu":
        return torch.device("cpu")
    if gpus >= local_ranks:
        return torch.device("cuda", local_rank)
    if requested == "cuda":
        raise ValueError(
            f"job.device = 'cuda', but this machine has {gpus} GPUs for {local_ranks} ranks; start "
            f"at most {gpus} ranks a node, or set job.device = 'cpu'"
            if gpus
            else "job.device = 'cuda', but this machine has no usable GPU; set job.device = 'auto' "
            "or 'cpu'"
        )
    if gpus:
        log.warning("%d GPUs for %d ranks: training on the CPU instead", gpus, local_ranks)
    return torch.device("cpu")


def _record_collectives(config: CommConfig, run_folder: Path) -> None:
    if config.trace_buf_size > 0:
        folder = run_folder / config.save_traces_folder
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["TORCH_FR_BUFFER_SIZE"] = str(config.trace_buf_size)
        os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
        prefix = str(folder / config.save_traces_file_prefix)
        os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] = prefix


@contextlib.contextmanager
def process_group(config: CommConfig, device: torch.device, run_folder: Path) -> Iterator[World]:
    """Join the run's processes for the duration of the context.

    Every rank must enter. Without a launcher it is a group of one and opens no port.
    """
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        _record_collectives(config, run_folder)
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=config.init_timeout_seconds)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    try:
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        yield World(
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            device=device,
            host_group=group,
        )
    except ValueError as error:
        if _met_it_alone(dist.get_rank()):
            error.add_note(ALONE)
        raise
    finally:
        # While other ranks wait in a collective, taking NCCL down would wait for them.
        if device.type == "cpu" or sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _met_it_alone(rank: int) -> bool:
    """Say whether this rank has an error that the first one, which speaks for all, does not."""
    store = dist.distributed_c10d._get_default_store()
    key = "the first rank met an error"
    if rank == 0:
        store.set(key, "")
        return False
    try:
        store.wait([key], timedelta(seconds=SECONDS_TO_MEET_AN_ERROR))
    except dist.DistStoreError:
        return True
    except RuntimeError:  # the store is gone, and with it the first rank
        return False
    return False


def shorten_timeouts(config: CommConfig) -> None:
    """Apply the training timeout to the groups of training, once the slow first step is over."""
    timeout = timedelta(seconds=config.train_timeout_seconds)
    for group in list(dist.distributed_c10d._world.pg_map):
        if group.group_desc != STORAGE_GROUP:
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def seed_everything(config: DebugConfig) -> None:
    """Seed every generator with the run's seed and switch deterministic kernels as asked."""
    seed = config.effective_seed
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=config.deterministic_warn_only)
        torch.backends.cudnn.benchmark = False
