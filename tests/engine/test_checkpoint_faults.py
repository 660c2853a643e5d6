"""Whatever happens to a save or to its files, nothing that was saved before is lost."""

import errno
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from engine.checkpoint import Checkpointer
from engine.checkpoint_storage import HostCopies, RankGroup
from engine.manifest import CheckpointError, steps_in
from tests.engine.checkpoint_cases import (
    FILES,
    TP2,
    assert_same,
    config,
    cut_short,
    flip_bit,
    gathered,
    load_case,
    loaded_toy,
    save_case,
    saved_toy,
    start,
    step,
    toy,
    toy_checkpointer,
    toy_step,
)
from tests.ranks import RankFailure


def said(caplog: pytest.LogCaptureFixture) -> str:
    """What our own logger said; torch's tells every path at debug level."""
    return "\n".join(r.getMessage() for r in caplog.records if r.name == "tessera")


DAMAGES = {"cut short": cut_short, "one flipped bit": flip_bit, "missing": Path.unlink}
STATE_FILES = ["__0_0.distcp", ".metadata", "manifest.json", "counters.json", "config.toml"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", STATE_FILES)
def test_a_damaged_step_is_named_set_aside_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    good = saved_toy(tmp_path, 1)
    saved_toy(tmp_path, 2)
    DAMAGES[damage](tmp_path / "step-2" / file)
    found, state = loaded_toy(tmp_path)
    assert found == 1
    assert_same(gathered(state), good)
    assert "step-2" in said(caplog) and file in said(caplog)
    assert (tmp_path / "step-2.damaged").is_dir() and steps_in(tmp_path) == [1]


def test_a_bit_flipped_in_the_tensor_data_itself_is_caught(tmp_path: Path) -> None:
    """Trap S5: torch loads such a file without an error."""
    good = saved_toy(tmp_path, 1, 2)
    data = good["0.weight"].numpy().tobytes()
    [file] = [f for f in (tmp_path / "step-2").glob("*.distcp") if data in f.read_bytes()]
    flip_bit(file, file.read_bytes().index(data))
    assert loaded_toy(tmp_path)[0] == 1


def test_a_step_without_its_marker_is_unfinished_and_never_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved_toy(tmp_path, 1, 2)
    (tmp_path / "step-2" / ".complete").unlink()
    assert loaded_toy(tmp_path)[0] == 1
    assert "interrupted" in said(caplog)
    assert (tmp_path / "step-2.unfinished").is_dir()


def test_a_run_whose_only_step_is_unfinished_starts_anew(tmp_path: Path) -> None:
    saved_toy(tmp_path, 1)
    (tmp_path / "step-1" / ".complete").unlink()
    assert loaded_toy(tmp_path)[0] is None


def test_a_run_whose_every_step_is_damaged_does_not_start_anew_in_silence(tmp_path: Path) -> None:
    saved_toy(tmp_path, 1)
    flip_bit(tmp_path / "step-1" / "__0_0.distcp")
    for _ in range(2):  # also when the damaged step was set aside by an earlier attempt
        with pytest.raises(ValueError, match=r"step-1.*damaged"):
            loaded_toy(tmp_path)


def test_loading_only_leaves_a_damaged_step_where_it_is(tmp_path: Path) -> None:
    saved_toy(tmp_path, 1, 2)
    flip_bit(tmp_path / "step-2" / "__0_0.distcp")
    assert loaded_toy(tmp_path, load_only=True)[0] == 1
    assert steps_in(tmp_path) == [1, 2]


def _crash(rank: int, world_size: int, folder: Path, point: str, count: int) -> None:
    """Save step 1, then die at the `count`-th time that a save of step 2 passes `point`."""
    seen = 0

    def hook(here: str, path: Path) -> None:
        nonlocal seen
        if here == point and "step-2" in str(path) and rank == 0:
            seen += 1
            if seen == count:
                os._exit(9)

    state, dims = start(TP2) if world_size > 1 else (toy(), None)
    checkpointer = Checkpointer(config(), folder, files=FILES, hook=hook)
    if dims is not None:
        step(state, dims, TP2)
    checkpointer.save(1, state)
    toy_step(state) if dims is None else step(state, dims, TP2)
    checkpointer.save(2, state)


@pytest.mark.parametrize(
    ("point", "count"), [("write", 1), ("write", 9), ("write", 40), ("manifest", 1), ("renamed", 1)]
)
def test_a_process_that_dies_during_a_save_leaves_the_step_before(
    ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture, point: str, count: int
) -> None:
    with pytest.raises(RankFailure, match="exit"):
        ranks(1, _crash, tmp_path, point, count)
    assert loaded_toy(tmp_path)[0] == 1
    assert "step-2" in said(caplog) and "interrupted" in said(caplog)
    good = saved_toy(tmp_path, 2)  # the run goes on and saves the same step again
    found, state = loaded_toy(tmp_path)
    assert found == 2
    assert_same(gathered(state), good)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_rank_that_dies_during_a_save_leaves_the_step_before_to_any_layout(
    ranks, tmp_path: Path
) -> None:
    with pytest.raises(RankFailure):
        ranks(2, _crash, tmp_path, "write", 9)
    assert ranks(2, load_case, TP2, tmp_path, {})[0][0] == 1


def test_a_process_that_dies_right_after_the_marker_has_saved(ranks, tmp_path: Path) -> None:
    with pytest.raises(RankFailure):
        ranks(1, _crash, tmp_path, "committed", 1)
    assert loaded_toy(tmp_path)[0] == 2


def _full_disk(rank: int, world_size: int, folder: Path, mode: str, failing: int) -> str:
    """Save step 1, meet a full disk on one rank in step 2, save step 3; return the complaint."""
    broken = False

    def hook(point: str, path: Path) -> None:
        if broken and point == "write" and rank == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    state, dims = start(TP2)
    checkpointer = Checkpointer(config(async_mode=mode), folder, files=FILES, hook=hook)
    step(state, dims, TP2)
    checkpointer.save(1, state)
    checkpointer.wait()
    broken = True
    step(state, dims, TP2)
    complaint = ""
    try:
        checkpointer.save(2, state)
        step(state, dims, TP2)
        checkpointer.wait()
    except CheckpointError as error:
        complaint = str(error)
    broken = False
    checkpointer.save(3, state)
    checkpointer.close()
    return complaint


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_disk_that_fills_up_on_one_rank_is_reported_on_all_and_loses_nothing(
    ranks, tmp_path: Path, mode: str, failing: int
) -> None:
    for complaint in ranks(2, _full_disk, tmp_path, mode, failing):
        assert "saving step 2" in complaint and "No space left" in complaint
        assert "Earlier checkpoints are untouched" in complaint
    assert steps_in(tmp_path) == [1, 3] and not list(tmp_path.glob("*.tmp"))


def test_a_failed_background_save_is_logged_at_once_and_raised_by_the_next_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def hook(point: str, path: Path) -> None:
        if point == "manifest":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    state = toy()
    checkpointer = toy_checkpointer(tmp_path, hook, async_mode="async")
    checkpointer.save(1, state)
    with pytest.raises(CheckpointError, match=r"saving step 1.*Input/output error"):
        checkpointer.save(2, state)
    assert "saving step 1 failed" in said(caplog)
    checkpointer.close()


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_toy(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 2**20))
    checkpointer = toy_checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match=r"save step 2 to .*needs 0\.06\d GiB.*0\.001 GiB"):
        checkpointer.save(2, toy())
    checkpointer.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-1"]


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_k_steps_are_kept(tmp_path: Path, keep: int) -> None:
    saved_toy(tmp_path, 1, 2, 3, 4, keep_latest_k=keep)
    assert steps_in(tmp_path) == [1, 2, 3, 4][-keep:]
    assert loaded_toy(tmp_path)[0] == 4


def test_no_step_is_deleted_while_the_newest_one_reads_back_wrong(tmp_path: Path) -> None:
    def hook(point: str, path: Path) -> None:
        if point == "committed" and path.name == "step-3":
            flip_bit(path / "__0_0.distcp")

    state = toy()
    checkpointer = toy_checkpointer(tmp_path, hook, keep_latest_k=1)
    saved_toy(tmp_path, 2)
    with pytest.raises(CheckpointError, match="step-3 was written but reads back wrong"):
        checkpointer.save(3, state)
    checkpointer.close()
    assert steps_in(tmp_path) == [2, 3]
    assert loaded_toy(tmp_path)[0] == 2


def test_a_step_saved_again_never_overwrites_files_of_the_old_one(tmp_path: Path) -> None:
    """Trap S4: a save over an existing folder can leave a mixture that loads without an error."""
    saved_toy(tmp_path, 1, 2, 3)
    _, state = loaded_toy(tmp_path, load_step=1)
    checkpointer = toy_checkpointer(tmp_path)
    checkpointer.save(2, state)
    checkpointer.close()
    assert steps_in(tmp_path) == [1, 2]  # the later future is aside, not lost
    assert {entry.name for entry in tmp_path.glob("*.superseded")} == {
        "step-2.superseded",
        "step-3.superseded",
    }
    found, reloaded = loaded_toy(tmp_path)
    assert found == 2
    assert_same(gathered(reloaded), gathered(state))


def test_background_saves_hold_the_values_of_their_step(ranks, tmp_path: Path) -> None:
    for mode in ("async", "async_with_pinned_mem"):
        folder = tmp_path / mode
        saved = ranks(2, save_case, TP2, folder, {"async_mode": mode})
        for _, state, _, _ in ranks(2, load_case, TP2, folder, {}):
            assert_same(saved[0][0], state)


@pytest.mark.parametrize("enable", [True, False])
def test_memory_is_pinned_before_the_first_background_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enable: bool
) -> None:
    allocated: list[torch.Size] = []

    def allocate(self: HostCopies, tensor: torch.Tensor) -> torch.Tensor:
        allocated.append(tensor.shape)
        return torch.empty_like(tensor)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(HostCopies, "_allocate", allocate)
    state = toy()
    checkpointer = toy_checkpointer(tmp_path, async_mode="async_with_pinned_mem", enable=enable)
    checkpointer._copies.pinned = True
    checkpointer.reserve(state)
    assert bool(allocated) == enable
    reserved = len(allocated)
    toy_step(state)
    checkpointer.save(1, state)
    checkpointer.close()
    assert len(allocated) == reserved
    if enable:
        assert_same(gathered(loaded_toy(tmp_path)[1]), gathered(state))


def test_a_slow_background_save_does_not_hold_up_training(tmp_path: Path) -> None:
    go_on = threading.Event()

    def hook(point: str, path: Path) -> None:
        go_on.wait(30)

    state = toy()
    checkpointer = toy_checkpointer(tmp_path, hook, async_mode="async")
    checkpointer.save(1, state)
    expected = gathered(state)
    toy_step(state)
    assert steps_in(tmp_path) == []
    go_on.set()
    checkpointer.close()
    found, loaded = loaded_toy(tmp_path)
    assert found == 1
    assert_same(gathered(loaded), expected)


def test_an_error_is_raised_in_a_group_of_one_too() -> None:
    def fail() -> None:
        raise ValueError("no")

    group = RankGroup()
    with pytest.raises(ValueError, match="no"):
        group.on_first(fail)
    with pytest.raises(ValueError, match="no"):
        group.together(fail)
