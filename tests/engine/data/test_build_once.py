import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.data import cache
from engine.data.cache import build_once, cache_root, file_digest


def write(text: str):
    return lambda folder: (folder / "data.txt").write_text(text)


def never(_folder: Path) -> None:
    raise AssertionError("already built")


def test_a_folder_is_built_once_and_appears_whole(tmp_path: Path):
    folder = build_once(tmp_path / "key", "testing", write("one"))
    assert build_once(tmp_path / "key", "testing", never) == folder
    assert (folder / "data.txt").read_text() == "one"
    assert not (tmp_path / "key.tmp").exists()


def test_a_build_that_fails_leaves_nothing_and_can_be_repeated(tmp_path: Path):
    def fail(folder: Path) -> None:
        write("half")(folder)
        raise ValueError("bad line")

    with pytest.raises(ValueError, match="bad line"):
        build_once(tmp_path / "key", "testing", fail)
    assert {path.name for path in tmp_path.iterdir()} == {"key.lock"}
    assert (build_once(tmp_path / "key", "testing", write("two")) / "data.txt").read_text() == "two"


def test_a_folder_with_a_shortened_or_missing_file_is_built_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = build_once(tmp_path / "key", "testing", write("whole"))
    (folder / "data.txt").write_text("who")
    build_once(folder, "testing", write("whole"))
    assert (folder / "data.txt").read_text() == "whole"
    (folder / "data.txt").unlink()
    build_once(folder, "testing", write("whole"))
    assert (folder / "data.txt").read_text() == "whole"
    assert "damaged" in caplog.text


def test_a_full_disk_is_named_with_the_setting_and_leaves_nothing(tmp_path: Path):
    def fill(folder: Path) -> None:
        write("half")(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match=r"data\.cache_folder.*No space left.*free space"):
        build_once(tmp_path / "key", "testing", fill)
    assert not (tmp_path / "key.tmp").exists()


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_folder.*cannot be written"):
        cache_root(str(tmp_path / "file" / "below"))


def test_the_default_cache_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root("") == tmp_path / "tessera"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root("") == tmp_path / ".cache" / "tessera"


RACE = """
import sys, time, logging
from pathlib import Path
from engine.data import cache
from engine.data.cache import build_once
cache.PATIENCE_SECONDS = 60.0  # a machine under load starts the first rank late
logging.basicConfig(level=logging.INFO)
def build(folder):
    print("building", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "data.txt").write_text("done")
folder = build_once(Path(sys.argv[1]), "testing the race", build)
assert (folder / "data.txt").read_text() == "done"
"""


def start(folder: Path, seconds: float, local_rank: int = 0) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", RACE, str(folder), str(seconds)],
        env={**os.environ, "LOCAL_RANK": str(local_rank)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_of_four_racing_processes_one_builds_and_the_others_wait_and_say_so(tmp_path: Path):
    racers = [start(tmp_path / "key", 1.5) for _ in range(4)]
    outputs = [racer.communicate(timeout=60) for racer in racers]
    assert all(racer.returncode == 0 for racer in racers), outputs
    assert sum("building" in out for out, _ in outputs) == 1
    assert any("waiting while another process is testing the race" in err for _, err in outputs)


def test_the_first_rank_of_a_machine_builds_although_the_others_came_earlier(tmp_path: Path):
    others = [start(tmp_path / "key", 0.2, local_rank) for local_rank in (1, 2)]
    for other in others:
        assert other.stderr is not None
        assert "the first rank of this machine" in other.stderr.readline()
    first = start(tmp_path / "key", 0.2)
    assert first.communicate(timeout=60)[0] == "building\n"
    for other in others:
        assert other.communicate(timeout=60)[0] == ""
        assert other.returncode == first.returncode == 0


def test_a_first_rank_that_never_comes_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(cache, "PATIENCE_SECONDS", 0.2)
    started = time.monotonic()
    build_once(tmp_path / "key", "testing", write("done"))
    assert 0.2 <= time.monotonic() - started < 30
    assert (tmp_path / "key" / "data.txt").read_text() == "done"


def test_a_builder_killed_outright_leaves_no_lock_and_its_rest_is_replaced(tmp_path: Path):
    victim = start(tmp_path / "key", 60)
    assert victim.stdout is not None
    assert victim.stdout.readline() == "building\n"
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    assert (tmp_path / "key.tmp").exists(), "the kill came in the middle"
    assert not (tmp_path / "key").exists()
    started = time.monotonic()
    build_once(tmp_path / "key", "testing", write("done"))
    assert time.monotonic() - started < 30
    assert (tmp_path / "key" / "data.txt").read_text() == "done"


STAGES = ("mkdir", "write_text", "_sync", "rename")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_before_or_behind_each_change_of_the_disk_leaves_a_whole_folder_or_none(
    tmp_path: Path, stage: str, before: bool
):
    for moment in range(1, 4):
        root = tmp_path / f"moment {moment}"
        root.mkdir()
        child = multiprocessing.get_context("fork").Process(
            target=build_and_die, args=(root / "key", stage, moment, before)
        )
        child.start()
        child.join(30)
        if child.exitcode == 0:
            assert moment > 1, "the build passes every stage once"
            return
        assert child.exitcode == -signal.SIGKILL
        assert not (root / "key").exists() or cache.is_complete(root / "key")
        build_once(root / "key", "testing", write("built again"))
        assert cache.is_complete(root / "key") and not (root / "key.tmp").exists()
        assert (root / "key" / "data.txt").read_text() in ("whole", "built again")


def build_and_die(folder: Path, stage: str, moment: int, before: bool) -> None:
    """Build, and be killed at the `moment`-th call of a function that changes the disk."""
    owner = {"_sync": cache, "rename": os}.get(stage, Path)
    change, calls = getattr(owner, stage), []

    def change_and_die(*args: object, **settings: object) -> object:
        calls.append(stage)
        if before and len(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        result = change(*args, **settings)
        if len(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, stage, change_and_die)
    build_once(folder, "testing", write("whole"))


def test_the_digest_of_a_large_file_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache, "MEMO_THRESHOLD_BYTES", 4)
    monkeypatch.setattr(cache, "SETTLED_SECONDS", 0.0)
    path = tmp_path / "large.txt"
    path.write_text("hello world")
    time.sleep(0.05)
    first = file_digest(path, tmp_path)
    monkeypatch.setattr(cache, "_read_digest", lambda path: "read again")
    assert file_digest(path, tmp_path) == first
    stamps = path.stat()
    path.write_text("hellO world")
    os.utime(path, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    assert file_digest(path, tmp_path) == "read again", "same size and modification time"


def test_the_digest_of_a_file_written_a_moment_ago_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache, "MEMO_THRESHOLD_BYTES", 4)
    path = tmp_path / "large.txt"
    path.write_text("hello world")
    file_digest(path, tmp_path)
    assert not list((tmp_path / "digests").glob("*.json"))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"gone\.txt cannot be read"):
        file_digest(tmp_path / "gone.txt")


def test_the_manifest_is_written_last(tmp_path: Path):
    folder = build_once(tmp_path / "key", "testing", write("abc"))
    assert json.loads((folder / cache.MANIFEST).read_text()) == {"data.txt": 3}
