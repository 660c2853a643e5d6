"""Devices are chosen as asked, and ranks agree."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.distributed import (
    STORAGE_GROUP,
    CommConfig,
    DebugConfig,
    World,
    choose_device,
    process_group,
    seed_everything,
    shorten_timeouts,
)
from tests.ranks import RankPool


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_auto_takes_cuda_only_with_a_gpu_for_each_rank(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with caplog.at_level("WARNING", logger="tessera"):
        assert choose_device("auto") == torch.device("cpu")
    assert "2 GPUs for 4 ranks" in caplog.text


def test_cuda_is_refused_where_ranks_outnumber_gpus(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"job\.device = 'cuda'.* 2 GPUs for 4 ranks"):
        choose_device("cuda")


def agree(rank: int, world_size: int) -> tuple[list[bool], list[str]]:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    world = World(
        rank=rank,
        size=world_size,
        local_rank=rank,
        device=torch.device("cpu"),
        host_group=group,
    )
    answers = [world.any_rank(rank == 1), world.any_rank(False)]
    return answers, world.gather_texts(f"from {rank}")


def test_any_rank_is_heard_by_all(ranks: RankPool) -> None:
    for answers, texts in ranks(2, agree):
        assert answers == [True, False] and texts == ["from 0", "from 1"]


def test_one_process_needs_no_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with process_group(CommConfig(), torch.device("cpu"), tmp_path) as world:
        assert (world.rank, world.size) == (0, 1) and world.any_rank(True)
    assert not dist.is_initialized() and not list(tmp_path.iterdir())


def test_the_seed_decides_every_generator() -> None:
    drawn = []
    for _ in range(2):
        seed_everything(DebugConfig(seed=3))
        drawn.append(torch.rand(2).tolist())
    assert drawn[0] == drawn[1]
    assert DebugConfig().effective_seed == 42


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "fake_backend"}, r"comm\.mode = 'fake_backend'.*check_config"),
        ({"train_timeout_seconds": 0}, r"comm\.train_timeout_seconds = 0"),
    ],
)
def test_communication_settings_that_cannot_work_are_refused(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CommConfig(**values)  # pyright: ignore[reportArgumentType]


def timeouts(rank: int, world_size: int) -> list[float]:
    trained = dist.new_group(backend="gloo")
    stored = dist.new_group(backend="gloo", group_desc=STORAGE_GROUP)
    shorten_timeouts(CommConfig(train_timeout_seconds=7))
    found = []
    for group in (trained, stored):
        assert isinstance(group, dist.ProcessGroup)
        backend = group._get_backend(torch.device("cpu"))
        found.append(backend.options._timeout.total_seconds())
    return found


def test_training_waits_shorter_after_the_first_step_and_storage_does_not(ranks: RankPool) -> None:
    for trained, stored in ranks(2, timeouts):
        assert trained == 7 and stored > 100
