import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.data import readers, token_writer
from engine.data.token_file import TokenFile
from engine.data.tokenizer import Tokenizer

OpenFile = Callable[..., TokenFile]


def test_data_that_changes_while_it_is_tokenised_is_refused_and_not_kept(
    open_file: OpenFile, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "growing.jsonl"
    path.write_text(jsonl.read_text())
    write = token_writer._append_mask

    def write_while_the_file_grows(*args: Any) -> None:
        write(*args)
        path.open("a").write('{"text": "one more"}\n')

    monkeypatch.setattr(token_writer, "_append_mask", write_while_the_file_grows)
    with pytest.raises(ValueError, match=r"growing\.jsonl was changed while it was tokenised"):
        open_file(path)
    assert not [found for found in (tmp_path / "tokens").iterdir() if found.is_dir()]
    monkeypatch.setattr(token_writer, "_append_mask", write)
    assert len(open_file(path).lengths()) == 301


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_full_disk_while_tokenising_is_named_with_the_folder_and_leaves_nothing(
    open_file: OpenFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_processes: int
):
    monkeypatch.setattr(readers, "PIECE_BYTES", 8000)
    monkeypatch.setattr(token_writer, "BATCH_CHARACTERS", 2000)

    def no_space(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    full = ("_append_mask", no_space) if num_processes == 1 else ("_encode_in_child", no_space_at)
    monkeypatch.setattr(token_writer, *full)
    message = (
        rf"data\.cache_folder: {tmp_path}/tokens cannot be written \(No space left.*free space"
    )
    with pytest.raises(ValueError, match=message):
        open_file(num_processes=num_processes)
    assert not [found for found in (tmp_path / "tokens").iterdir() if found.is_dir()]


def no_space_at(_piece: readers.Piece, file: Path) -> None:
    file.write_text("half a piece")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_data_that_cannot_be_read_is_named_and_not_the_cache_folder(
    open_file: OpenFile, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refused(path: Path) -> object:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(readers, "open_bytes", refused)
    with pytest.raises(ValueError, match=rf"^{jsonl} cannot be read \(Permission denied\)"):
        open_file()
    assert not [found for found in (tmp_path / "tokens").iterdir() if found.is_dir()]


SLOW = """
import sys, time
from pathlib import Path
from engine.data import readers
from engine.data.readers import JsonLines
from engine.data.token_file import Recipe, open_token_file
from engine.data.tokenizer import load_tokenizer
readers.PIECE_BYTES = 400
tokenizer = load_tokenizer(sys.argv[3], "")
slow = tokenizer.encode_batch
def encode_batch(texts):
    time.sleep(0.2)
    return slow(texts)
tokenizer.encode_batch = encode_batch
print("ready", flush=True)
open_token_file(
    JsonLines([Path(sys.argv[2])]), name="slow", tokenizer=tokenizer, root=Path(sys.argv[1]),
    recipe=Recipe(
        format="text", text_field="text", add_bos=True, add_eos=True, on_bad_record="raise"
    ),
    num_processes=2,
)
"""


def test_a_kill_while_tokenising_leaves_no_process_and_the_next_start_builds_it(
    open_file: OpenFile, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path
):
    tokenizer.save(tmp_path / "tokenizer")
    victim = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, (tmp_path, jsonl, tmp_path / "tokenizer"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert victim.stdout is not None
    victim.stdout.readline()
    wait_until(lambda: list((tmp_path / "tokens").glob("*.tmp")) and len(children(victim.pid)) == 2)
    workers = children(victim.pid)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))
    assert not [path for path in (tmp_path / "tokens").iterdir() if path.suffix == ""]
    whole = open_file(root=tmp_path / "elsewhere")
    assert open_file().digest == whole.digest


def test_a_tokenising_process_that_dies_is_an_error_and_not_a_hang(
    open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(readers, "PIECE_BYTES", 4000)
    monkeypatch.setattr(token_writer, "_encode_in_child", die)
    with pytest.raises(ValueError, match=r"data\.num_processes = 2: a tokenising process died"):
        open_file(num_processes=2)


def die(_piece: readers.Piece, _file: Path) -> None:
    os._exit(9)


def children(pid: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)
