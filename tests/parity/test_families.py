"""`python -m engine.verify families`: the table of every family, and the faults it must notice."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from engine.verify import families_command
from engine.verify.__main__ import main
from engine.verify.families import COLUMNS, FAULTS, LAYOUTS, Cell, FamilyJob
from engine.verify.families_command import Table, choose, fill_alone, layout_job
from engine.verify.ranks import Row, check_plans
from engine.verify.variants import MODELS, family_of
from models.registry import FAMILIES, member_names
from tests.ranks import RankPool

IN_LAYOUTS = {
    "TP2": ("gemma3", "granite", "mistral_window", "olmo2", "qwen2_tied", "qwen3_window_bias"),
    "FSDP2 x TP2": ("gemma2", "llama_3_2", "phi3_longrope"),
}
"""One of each family here, for time; the command runs all of them in both layouts."""


def on_ranks(rank: int, world_size: int, job: FamilyJob) -> list[Row]:
    assert dist.group.WORLD is not None
    return list(check_plans(job, dist.group.WORLD))


def test_every_family_equals_transformers_alone_and_in_layouts(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def run_some(job: FamilyJob, size: int, on_row: Callable[[Row], None]) -> None:
        [column] = [name for name, layout in LAYOUTS.items() if layout.world_size == size]
        assert {family_of(case.variant) for case in job.cases} == {*member_names(FAMILIES)}
        some = [case for case in job.cases if case.variant in IN_LAYOUTS[column]]
        for row in ranks(size, on_ranks, replace(job, cases=tuple(some)))[0]:
            on_row(row)

    monkeypatch.setattr(families_command, "run_here", run_some)
    path = tmp_path / "families.json"
    main(["families", "--out", str(path)])
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    found = {row["model"]: row["columns"] for row in record["rows"]}
    assert found.keys() == MODELS.keys()
    wrong = [
        (model, column, cell)
        for model, columns in found.items()
        for column, cell in columns.items()
        if not cell["passed"]
    ]
    assert not wrong, printed
    for model, columns in found.items():
        assert columns.keys() >= {"logits", "gradients", "export"}, model
    for column, models in IN_LAYOUTS.items():
        assert all(0 < found[model][column]["error"] < 1e-5 for model in models)
    assert "does not divide the 1 key/value heads" in found_refusal(record, "qwen2", "TP2")


def found_refusal(record: dict, model: str, column: str) -> str:
    return next(row for row in record["rows"] if row["model"] == model)["refused"][column]


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_fails_in_its_columns_and_nowhere_else(
    fault: str, ranks: RankPool, tmp_path: Path
) -> None:
    table = choose("olmo2", fault)
    fill_alone(table, tmp_path)
    columns = {*FAULTS[fault].columns} - {"FSDP2 x TP2"}
    if "TP2" in columns:
        for row in ranks(2, on_ranks, layout_job(table, "TP2", tmp_path, 120.0))[0]:
            table.add_row("TP2", row)
    cells = table.cells["olmo2"]
    assert {name for name, cell in cells.items() if not cell.passed} == columns
    assert all(cells[name].error > 1e-4 or name == "export" for name in columns)


def table_of(fault: str | None = None, **cells: Cell) -> Table:
    table = choose("olmo2", fault)
    for column in COLUMNS:
        table.add("olmo2", column, cells.get(column, Cell(error=1e-6)))
    return table


@pytest.mark.parametrize(
    "bad",
    [
        Cell(error=1e-4),
        Cell(error=math.nan),
        Cell(error=0.0, problems=("config.json",)),
        Cell(error=math.inf, problems=("rank 1: died",), crashed=True),
    ],
    ids=["error", "nan", "problem", "lost rank"],
)
def test_one_bad_cell_fails_its_family_and_a_crash_is_no_notice_of_a_fault(bad: Cell) -> None:
    assert table_of().verdict() == ("1 of 1 families equal transformers", 0)
    failing = table_of(TP2=bad)
    assert failing.verdict() == ("0 of 1 families equal transformers; failed: olmo2", 1)
    assert any(" FAIL " in line for line in failing.lines())
    found = table_of("rounded_export", export=bad).verdict()[1]
    assert found == (3 if bad.crashed else 1)
    assert table_of("rounded_export").verdict()[1] == 3


def test_a_family_without_a_model_and_a_column_without_one_fail(monkeypatch) -> None:
    table = table_of()
    del table.cells["olmo2"]["TP2"]
    assert table.verdict()[1] == 1
    monkeypatch.delitem(MODELS, "olmo2")
    assert "olmo2 has no model in engine/verify/variants.py" in "".join(
        choose("olmo2", None).remarks()
    )
    assert choose("olmo2", None).verdict()[1] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--families", "qwen2,olmo"], "--families 'olmo' is not known; did you mean 'olmo2'"),
        (["--fault", "rounded"], "--fault 'rounded' is not known"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments: list[str], message: str, capsys) -> None:
    assert main(["families", *arguments]) == 2
    assert message in capsys.readouterr().err
