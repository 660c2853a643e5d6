"""`python -m engine.verify lora`: its plans, its columns, its mistakes. What it compares is tested
in tests/parity/test_adapter_plans.py."""

from collections.abc import Callable

import pytest

from engine.verify import command
from engine.verify.__main__ import main
from engine.verify.adapted import CHECKS, AdapterJob
from engine.verify.parity import Comparison
from engine.verify.ranks import Row


def stand_in(checks: dict[str, float]) -> Callable[[AdapterJob, int, Callable[[Row], None]], None]:
    """Return a job's run in which every plan comes to these errors."""
    found = Comparison(
        loss=1.0, reference_loss=1.0, worst_error=1e-7, worst_name="w", checks=checks
    )

    def run(job: AdapterJob, size: int, on_row: Callable[[Row], None]) -> None:
        for case in job.cases:
            on_row(Row(case=case, seconds=0.1, comparison=found))

    return run


@pytest.mark.parametrize(("error", "code", "word"), [(1e-7, 0, "pass"), (0.1, 1, "FAIL")])
def test_each_kind_runs_on_each_layout_and_every_check_counts(
    error: float,
    code: int,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checks = dict.fromkeys(CHECKS, 1e-7) | {"merge parity": error}
    monkeypatch.setattr(command, "run_here", stand_in(checks))
    assert main(["lora", "--device=cpu", "--ranks=4"]) == code
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if f"| {word} " in line]
    plans = [row[1] for row in rows]
    for kind in ("lora", "dora"):
        of_kind = [plan for plan in plans if kind in plan.split("-")]
        for layout in ("fsdp2-tp2-", "fsdp2-tp2-no-sp", "rep2-fsdp2", "cp2-ring", "cp2-ulysses"):
            assert any(layout in plan for plan in of_kind), (kind, layout)
    assert all(f"{error:.1e}" in row for row in rows)
    assert " | ".join(CHECKS) in lines[1]


def test_a_plan_that_names_its_kind_runs_with_that_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run_here", stand_in(dict.fromkeys(CHECKS, 1e-7)))
    assert main(["lora", "--device=cpu", "--plan=tp2-dora"]) == 0
    assert "1 of 1 plans equal one process" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind=qlora"], "--kind 'qlora' is not known; use lora or dora"),
        (["--kind=lora", "--plan=tp2-dora"], "has dora, which --kind 'lora' leaves out"),
        (["--fault=length_of_a_part", "--plan=fsdp2"], "try --plan tp2-dora"),
        (["--fault=lenght_of_a_part"], "did you mean 'length_of_a_part'"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lora", "--device=cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
