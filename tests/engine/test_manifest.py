"""A folder is trusted only if every byte of it is what was written."""

import json
from pathlib import Path

import pytest

from engine.manifest import (
    CheckpointError,
    DamagedCheckpoint,
    Manifest,
    UnfinishedCheckpoint,
    changed_files,
    commit,
    delete_step,
    digest_file,
    leftovers_in,
    read_manifest,
    refuse_small_disk,
    set_aside,
    step_folder,
    steps_in,
    write_synced,
)


def committed(folder: Path, step: int = 3) -> Path:
    """Commit a step of two files, one in a sub-folder."""
    temporary = folder / f"step-{step}.tmp"
    records = {
        name: write_synced(temporary / name, name.encode() * 1000) for name in ("data", "hf/config")
    }
    final = step_folder(folder, step)
    commit(temporary, final, Manifest(step=step, contents="full", world_size=2, files=records))
    return final


def test_a_committed_folder_reads_back(tmp_path: Path) -> None:
    path = committed(tmp_path)
    manifest = read_manifest(path)
    assert (manifest.step, manifest.contents, manifest.world_size) == (3, "full", 2)
    assert manifest.files["data"] == digest_file(path / "data")
    assert not changed_files(path, manifest, manifest.files)
    assert steps_in(tmp_path) == [3] and not leftovers_in(tmp_path)


def test_the_digest_is_blake2b_so_that_other_tools_can_check_it(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert digest_file(tmp_path / "abc").digest == (
        "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319"  # b2sum -l 256
    )


def test_a_folder_without_marker_is_unfinished(tmp_path: Path) -> None:
    path = committed(tmp_path)
    (path / ".complete").unlink()
    with pytest.raises(UnfinishedCheckpoint, match="interrupted"):
        read_manifest(path)


@pytest.mark.parametrize("name", ["manifest.json", ".complete"])
def test_manifest_and_marker_vouch_for_each_other(tmp_path: Path, name: str) -> None:
    path = committed(tmp_path)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content.replace(b"4", b"5"))
    with pytest.raises(DamagedCheckpoint, match="does not match"):
        read_manifest(path)


def test_size_presence_and_content_are_told_apart(tmp_path: Path) -> None:
    path = committed(tmp_path)
    manifest = read_manifest(path)
    content = bytearray((path / "data").read_bytes())
    content[17] ^= 4
    (path / "data").write_bytes(content)
    assert changed_files(path, manifest, ["data", "hf/config"]) == [
        "the content of file data has changed"
    ]
    (path / "data").write_bytes(content[:-1])
    with pytest.raises(DamagedCheckpoint, match="data has 3999 bytes instead of 4000"):
        read_manifest(path)
    (path / "hf/config").rename(path / "elsewhere")
    (path / "data").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="hf/config is missing"):
        read_manifest(path)


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    fields = json.loads((committed(tmp_path) / "manifest.json").read_text())
    assert fields["step"] == 3 and set(fields["files"]) == {"data", "hf/config"}


def test_only_final_names_count_as_steps(tmp_path: Path) -> None:
    for name in ("step-10", "step-2", "step-5.tmp", "step-7.damaged", "step-x", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-4").touch()
    assert steps_in(tmp_path) == [2, 10]
    assert [path.name for path in leftovers_in(tmp_path)] == ["step-5.tmp"]
    assert steps_in(tmp_path / "nowhere") == [] and leftovers_in(tmp_path / "nowhere") == []


def test_setting_aside_never_overwrites_what_was_set_aside_before(tmp_path: Path) -> None:
    names = [set_aside(committed(tmp_path), "damaged").name for _ in range(3)]
    assert names == ["step-3.damaged", "step-3.damaged-2", "step-3.damaged-3"]


def test_deleting_leaves_nothing_under_the_steps_name_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = committed(tmp_path)

    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        delete_step(path)
    assert steps_in(tmp_path) == [] and len(leftovers_in(tmp_path)) == 1
    monkeypatch.undo()
    delete_step(committed(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_small_disk_is_refused_with_what_is_needed_and_what_is_free(tmp_path: Path) -> None:
    refuse_small_disk(tmp_path, 1, "save")
    with pytest.raises(CheckpointError, match=r"cannot save: it needs 1048576\.000 GiB.* free"):
        refuse_small_disk(tmp_path, 2**50, "save")
