"""A run that is killed and goes on with other ranks reads the rows that one rank would have."""

import json
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from engine.data.rows import TokenRows
from engine.verify.__main__ import main
from engine.verify.elastic import cut_steps, not_once
from engine.verify.elastic_faults import FAULTS

Verify = Callable[..., int]


@pytest.fixture
def verify(cache_folder: str, jsonl: Path) -> Verify:
    """Runs the command on 300 short documents, of rows of 64 tokens: `verify(*words)`."""

    def verify(*words: str, path: Path = jsonl) -> int:
        data = ("--training.dataset=jsonl", f"--training.dataset_path={path}")
        sizes = ("--training.seq_len=64", f"--data.cache_folder={cache_folder}")
        return main(["data-elastic", *data, *sizes, *words])

    return verify


CHAT = ("--data.format=chat", "--data.chat_template=tulu", "--data.packing=best_fit")
KINDS = {
    "concat": (),
    "best_fit": ("--data.packing=best_fit",),
    "none": ("--data.packing=none", "--data.long_document=split"),
    "chat": CHAT,
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_two_four_and_three_ranks_read_what_one_rank_reads(
    verify: Verify, kind: str, chats: Path, jsonl: Path, tmp_path: Path, capsys
):
    path, out = chats if kind == "chat" else jsonl, tmp_path / "new" / "elastic.json"
    words = ("--plan=1,2,4,3", "--steps=9", "--workers=0", f"--out={out}", *KINDS[kind])
    assert verify(*words, path=path) == 0
    printed = capsys.readouterr().out
    whole, parts = re.findall(r": +([0-9a-f]{32})", printed)
    assert whole == parts
    assert "equal, each row exactly once" in printed
    record = json.loads(out.read_text())
    assert (record["suite"], record["plan"], record["steps"]) == ("data-elastic", [1, 2, 4, 3], 9)
    assert record["global_batch_size"] == 2 * 12
    assert record["digest_of_one_rank"] == whole
    (run,) = record["runs"]
    assert not run["problems"] and all(part["equal"] for part in run["parts"])
    assert [part["rows"] for part in run["parts"]] == [48, 48, 48, 72]
    assert f"--out={out}" in record["command"]


def test_workers_and_a_batch_that_the_ranks_do_not_divide_change_nothing(verify: Verify, capsys):
    before = children()
    words = ("--plan=4,3", "--steps=6", "--workers=2,1", "--training.global_batch_size=8")
    assert verify(*words) == 0
    printed = capsys.readouterr().out
    assert "3 ranks cannot share a step evenly: 33.3% fillers" in printed
    assert printed.count("equal, each row exactly once") == 2
    assert len(set(re.findall(r": +([0-9a-f]{32})", printed))) == 1
    assert children() == before, "no rank or worker is left behind"


def children() -> set[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return {int(number) for number in path.read_text().split()}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_noticed(verify: Verify, fault: str, capsys):
    assert verify("--plan=2,3", "--steps=4", "--workers=0", f"--fault={fault}") == 1
    printed = capsys.readouterr().out
    assert f"planted: {FAULTS[fault].sentence}" in printed
    assert "was noticed in 1 of 1 runs, as it must be" in printed
    assert "DIFFERENT" in printed


def test_a_fault_that_is_not_noticed_has_an_exit_code_of_its_own(
    verify: Verify, monkeypatch: pytest.MonkeyPatch, capsys
):
    harmless = replace(FAULTS["dealt_twice"], planted=nullcontext)
    monkeypatch.setitem(FAULTS, "dealt_twice", harmless)
    assert verify("--plan=2", "--steps=2", "--workers=0", "--fault=dealt_twice") == 3
    assert "THE CHECK IS NOT TO BE TRUSTED HERE" in capsys.readouterr().out


def test_a_rank_that_cannot_go_on_is_named(verify: Verify, monkeypatch: pytest.MonkeyPatch, capsys):
    row = TokenRows.row
    monkeypatch.setattr(TokenRows, "row", lambda self, i: row(self, i) if i != 13 else 1 / 0)
    assert verify("--plan=2", "--steps=4", "--workers=0") == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan=8,zero"], r"--plan '8,zero': give whole numbers from 1 up, such as 8,4,6"),
        (["--plan=2,3", "--steps=1"], "--steps 1 gives no step to some of the 2 parts"),
        (["--fault=late_curser"], "did you mean 'late_cursor'.*order_by_rank"),
        (["--fault=late_cursor", "--plan=4"], "needs two parts, such as --plan 2,3"),
        (["--plan=4", "--training.global_batch_size=3"], "ranks, 4; start at most 3"),
        (["--data.streaming", "--workers=2"], "one worker or none; give --workers 0,1"),
        (["--training.sequence_len=3"], "did you mean training.seq_len"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(verify: Verify, words: list[str], message: str, capsys):
    assert verify(*words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.splitlines()) == 1


def test_the_faults_are_listed(capsys):
    assert main(["data-elastic", "--fault", "list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(FAULTS)


def test_parts_are_nearly_equally_long_and_hold_every_step():
    parts = cut_steps(10, [8, 4, 6], 2)
    assert [(part.ranks, part.first_step, part.num_steps) for part in parts] == [
        *((8, 1, 3), (4, 4, 3), (6, 7, 4)),
    ]


def test_rows_that_are_not_read_exactly_once_are_named():
    def read(*numbers: int) -> list[tuple[int, bytes]]:
        return [(number, b"") for number in numbers]

    assert not_once(read(0, 1, 2), 3) == ""
    assert not_once(read(0, 2, 2, 5), 4) == (
        "2 rows missing, the first is row 1; 1 rows more than once, the first is row 2; "
        "1 rows of later steps, the first is row 5"
    )
