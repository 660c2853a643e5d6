"""`python -m engine.verify parity`: verdicts, faults, ends."""

import json
import os
import re
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch.distributed as dist

from engine.verify import command
from engine.verify.__main__ import main
from engine.verify.case import DEFAULTS, Case
from engine.verify.faults import FAULTS
from engine.verify.parity import BF16_ARITHMETIC, FP32_REORDERED_SUM, Comparison, worst
from engine.verify.ranks import PlanJob, Row, check_plans
from engine.verify.report import Report, tolerance
from engine.verify.subject import SHRUNK, TINY, find_subject
from models.registry import load_family
from tests.ranks import RankPool, leave_process_group

ROOT = Path(__file__).parents[2]


def comparison(error: float = 1e-6, loss: float = 1.0, **changes: object) -> Comparison:
    values = {"loss": loss, "reference_loss": 1.0, "worst_error": error, "worst_name": "w"}
    return Comparison(**(values | changes))  # pyright: ignore[reportArgumentType]


def report(*rows: Row, fault: str | None = None) -> Report:
    found = Report(
        cases=[row.case for row in rows],
        refused={Case(tp=8): "because"},
        device_type="cpu",
        world_size=2,
        model="a model",
        fault=fault,
    )
    found.begin()
    for row in rows:
        found.add(row)
    return found


EQUAL = Row(case=Case(shard=2), seconds=0.5, comparison=comparison())


@pytest.mark.parametrize(
    "bad",
    [
        Row(case=Case(tp=2), seconds=0.5, comparison=comparison(1e-5)),
        Row(case=Case(tp=2), seconds=0.5, comparison=comparison(float("nan"))),
        Row(case=Case(tp=2), seconds=0.5, comparison=comparison(loss=1.1)),
        Row(case=Case(tp=2), seconds=0.5, comparison=comparison(loss=float("nan"))),
        Row(case=Case(tp=2), seconds=0.5, comparison=comparison(problems=("w has no gradient",))),
        Row(case=Case(tp=2), seconds=0.5, error="rank 1: died with exit code -9 (SIGKILL)"),
    ],
    ids=["gradient", "nan", "loss", "nan loss", "missing", "lost rank"],
)
def test_one_bad_plan_makes_the_exit_code_1_and_is_named(bad: Row, capsys) -> None:
    assert report(EQUAL).end() == 0
    capsys.readouterr()
    assert report(EQUAL, bad).end() == 1
    printed = capsys.readouterr().out
    assert "1 of 2 plans equal one process; 1 refused" in printed
    assert "failed: tp2\n" in printed
    assert "tp8 refused: because" in printed


def test_a_fault_that_is_not_noticed_has_an_exit_code_of_its_own(capsys) -> None:
    different = Row(case=Case(tp=2), seconds=0.5, comparison=comparison(1.0))
    lost = Row(case=Case(tp=2), seconds=0.5, error="rank 1: died")
    assert report(different, fault="dropped_reduce").end() == 1
    assert report(different, EQUAL, fault="dropped_reduce").end() == 3
    assert "THE CHECK IS NOT TO BE TRUSTED HERE" in capsys.readouterr().out
    assert report(lost, fault="dead_rank").end() == 1
    assert report(lost, fault="dropped_reduce").end() == 3, "another defect than the planted one"


def test_bf16_has_a_tolerance_of_its_own() -> None:
    assert tolerance(Case(), "cpu") == FP32_REORDERED_SUM
    assert tolerance(Case(bfloat16=True), "cpu") == BF16_ARITHMETIC
    assert FP32_REORDERED_SUM < tolerance(Case(), "cuda") < BF16_ARITHMETIC
    assert tolerance(Case(), "cuda") < tolerance(Case(bfloat16=True), "cuda") == 6e-2


def test_the_worst_of_all_ranks_counts() -> None:
    ranks = [
        comparison(2e-6),
        comparison(float("nan")),
        comparison(problems=("w is zero",), loss=3),
    ]
    found = worst(ranks)
    assert found.worst_error != found.worst_error
    assert found.problems == ("w is zero",)
    assert found.loss == 3


def test_the_record_holds_command_machine_and_every_row(tmp_path: Path) -> None:
    bad = Row(case=Case(tp=2), seconds=0.5, comparison=comparison(float("nan")))
    path = tmp_path / "new" / "parity.json"
    report(EQUAL, bad).write(path, "python -m engine.verify parity")
    record = json.loads(path.read_text())
    assert record["suite"] == "parity"
    assert record["command"] == "python -m engine.verify parity"
    assert record["machine"]["torch"] == version("torch")
    assert record["refused"] == [{"plan": "tp8", "reason": "because"}]
    assert record["rows"][0] == {
        "plan": "fsdp2",
        "loss_error": 0.0,
        "worst_gradient_error": 1e-6,
        "of": "w",
        "tolerance": FP32_REORDERED_SUM,
        "passed": True,
        "seconds": 0.5,
        "problems": [],
    }
    assert record["rows"][1]["worst_gradient_error"] is None
    assert not record["rows"][1]["passed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "fspd2"], "did you mean 'fsdpN'"),
        (["--plan", "fsdp2", "--ranks", "4"], "needs 2 ranks, but there are 4"),
        (["--plan", "tp8"], "is refused: .*key/value heads"),
        (["--plan", "fsdp2-ac-budget"], "is refused: .*memory_budget"),
        (["--plan", "fsdp2-liger"], "is refused: .*GPUs only.*model.kernels = 'auto'"),
        (["--ranks", "0"], "give at least 1"),
        (["--fault", "droped_reduce"], "did you mean 'dropped_reduce'.*ignored_documents"),
        (["--fault", "missing_context_hook", "--plan", "fsdp2"], "try --plan cp2-allgather"),
        (["--model", "lama3"], "neither a folder .* nor a family; use one of .*llama3"),
        (["--model", "llama3:9B"], "is not a size of llama3"),
        (["--objective", "dpo,kko"], "'kko' is not known; did you mean 'kto'.*pretrain, dpo"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments: list[str], message: str, capsys) -> None:
    assert main(["parity", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert len(error.splitlines()) == 1


def test_help_and_the_list_of_faults_are_printed(capsys) -> None:
    assert main(["--help"]) == 0
    assert "parity: Compare every plan" in capsys.readouterr().err
    assert main(["partiy"]) == 2
    assert main(["parity", "--fault", "list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(FAULTS)


def test_a_family_is_shrunk_but_keeps_its_heads_and_says_so(tmp_path: Path) -> None:
    subject, sentence = find_subject("llama3:70B", "cpu")
    config = load_family("llama3").flavor("70B")
    assert (subject.config.num_heads, subject.config.num_kv_heads) == (64, 8)
    assert (subject.config.rope, subject.config.norm_eps) == (config.rope, config.norm_eps)
    assert (subject.config.num_layers, subject.config.vocab_size) == (3, DEFAULTS["vocab"])
    assert all(f"{name} {getattr(config, name)} -> {SHRUNK[name]}" in sentence for name in SHRUNK)
    (tmp_path / "config.json").write_text(json.dumps(load_family("llama3").config_to_hf(config)))
    from_folder, _ = find_subject(str(tmp_path), "cpu")
    assert from_folder == subject
    assert subject.for_ranks(6).num_tokens % 12 == 0
    assert subject.for_ranks(6).num_rows % 12 == 0


# ---------------------------------------------------------------------- on gloo ranks


def planted(rank: int, world_size: int, job: PlanJob) -> list[Row]:
    assert dist.group.WORLD is not None
    return list(check_plans(job, dist.group.WORLD))


SILENT = [name for name, fault in FAULTS.items() if name not in ("dead_rank", "hung_rank")]
PLANTED = [(name, FAULTS[name].example) for name in SILENT] + [
    ("missing_context_hook", Case(cp=2, context=mode)) for mode in ("ring", "ulysses")
]


@pytest.mark.parametrize(("fault", "case"), PLANTED, ids=lambda value: str(value))
def test_each_fault_is_noticed(ranks: RankPool, fault: str, case: Case) -> None:
    job = PlanJob(cases=(case,), subject=TINY, device_type="cpu", fault=fault)
    for (row,) in ranks(case.world_size, planted, job):
        assert report(row, fault=fault).end() == 1
        assert row.comparison is not None
        assert row.comparison.worst_error > 0.05
        if fault in ("dropped_reduce", "wrong_norm_role", "averaged_gradients"):
            assert row.comparison.loss_error <= FP32_REORDERED_SUM, "the loss alone would not tell"


def test_several_plans_of_one_job_share_their_group(ranks: RankPool) -> None:
    cases = (Case(shard=2), Case(shard=2, tied=True), Case(tp=2), Case(shard=2, bfloat16=True))
    job = PlanJob(cases=cases, subject=find_subject("llama3", "cpu")[0], device_type="cpu")
    rows = ranks(2, planted, job)[0]
    assert tuple(row.case for row in rows) == cases
    assert report(*rows).end() == 0


def launched(rank: int, world_size: int, port: int, path: Path) -> tuple[int, int]:
    leave_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    arguments = ["--plan", "fsdp2", "--device", "cpu", "--out", str(path)]
    refused = command.main(["--plan", "fsdp4"])
    return refused, command.main(arguments)


def test_ranks_of_a_launcher_join_and_the_first_one_writes(ranks: RankPool, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    codes = ranks(2, launched, port, tmp_path / "parity.json")
    assert codes == [(2, 0), (2, 0)]
    assert json.loads((tmp_path / "parity.json").read_text())["rows"][0]["passed"]


# --------------------------------------------------------------- processes of its own


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_the_command_starts_its_ranks_prints_the_table_and_writes_the_record(
    tmp_path: Path,
) -> None:
    path = tmp_path / "parity.json"
    arguments = ("--plan", "fsdp2-tied", "--device", "cpu", "--out", str(path))
    result = run_python("-m", "engine.verify", "parity", *arguments)
    assert result.returncode == 0, result.stderr
    assert "2 ranks on cpu, a Llama of random weights" in result.stdout
    assert "| fsdp2-tied |" in result.stdout
    assert "1 of 1 plans equal one process" in result.stdout
    record = json.loads(path.read_text())
    assert record["command"] == f"python -m engine.verify parity {' '.join(arguments)}"
    assert 0 < record["rows"][0]["worst_gradient_error"] <= FP32_REORDERED_SUM


LOST_RANKS = """
import dataclasses, sys
from engine.verify import command
from engine.verify.faults import FAULTS, _nothing_patched
FAULTS["nothing"] = dataclasses.replace(FAULTS["ignored_documents"], planted=_nothing_patched)
for fault in ("dead_rank", "hung_rank", "nothing"):
    arguments = ["--device", "cpu", "--timeout_seconds", "8" if fault == "hung_rank" else "100"]
    print(fault, command.main([*arguments, "--fault", fault]), flush=True)
"""


def test_a_rank_that_dies_or_hangs_is_named_and_the_others_are_ended() -> None:
    result = run_python("-c", LOST_RANKS)
    assert result.returncode == 0, result.stderr
    dead, rest = result.stdout.split("\ndead_rank 1\n")
    hung, missed = rest.split("\nhung_rank 1\n")
    assert "rank 1: died with exit code -9 (SIGKILL)" in dead
    assert "rank 1: did not go on for 8 seconds" in hung
    assert "NOT NOTICED" in missed and missed.endswith("nothing 3\n")
