"""Measure training speed: `python -m scripts.bench run SUITE --out FILE.json`.

    run SUITE        train each row of a suite by itself, and record speed, memory and launch gaps
    peers SUITE      the same, and after each row torchtitan and transformers' Trainer on it
    floor SUITE|ROW  time the matrix products and the attention of a row alone
    compare A B      what became of each row from one record to another; exit 1 where one lost 2 %
    table RECORD ... a Markdown table; with --write FILE.md make the tables of that file anew

Each row is its own `torchrun train.py`; the figures are medians over the steps after warm-up,
read from the run's metrics.jsonl. The record names versions, device and command of every row, and
the commit: where the measuring machine has no git, put TESSERA_COMMIT=$(git rev-parse HEAD) of the
machine that has it in front of the command.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from engine.logging import machine_report
from scripts.bench.floor import against_record, floor_of
from scripts.bench.measure import end_on_signals, run_row
from scripts.bench.peers import run_peers
from scripts.bench.probes import take_probes
from scripts.bench.suites import SUITES, BenchRow
from scripts.bench.tables import compare, load_record, rewritten, table


def chosen_rows(name: str, only: str = "") -> list[BenchRow]:
    """Return the rows of a suite, or all rows of that name; of them those whose name holds `only`.

    ValueError where there is none.
    """
    every = [row for suite in SUITES.values() for row in suite]
    found = list(SUITES.get(name) or dict.fromkeys(row for row in every if row.name == name))
    if not found:
        raise ValueError(f"{name!r} is no suite and no row; the suites are {', '.join(SUITES)}")
    if not (chosen := [row for row in found if only in row.name]):
        raise ValueError(f"--only {only!r} is in no row of {name}: {[r.name for r in found]}")
    return chosen


def measure(options: argparse.Namespace, *, with_peers: bool) -> int:
    """Train the rows, each followed by its peers; exit non-zero where a row of ours fails."""
    rows = chosen_rows(options.suite, options.only)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "suite": options.suite,
        "machine": machine_report(),
        "probes": take_probes(max(row.gpus for row in rows)),
        "rows": [],
    }
    if with_peers:
        record["peers"] = []
    for row in rows:
        record["rows"].append(run_row(row, options.out.parent, options.timeout_seconds))
        _keep(record, options.out, record["rows"][-1])
        if with_peers:
            named = options.peer
            for found in run_peers(row, options.out.parent, options.timeout_seconds, named):
                record["peers"].append(found)
                _keep(record, options.out, found)
    print(table([record]))
    return 0 if all(row["passed"] for row in record["rows"]) else 1


def floor(options: argparse.Namespace) -> int:
    """Time the floors of rows on this machine's first GPU; with a record, say what it reached."""
    rows = chosen_rows(options.suite, options.only)
    if not torch.cuda.is_available():
        raise ValueError("this machine has no usable GPU, and a floor is timed on one")
    record: dict[str, Any] = {"suite": "floor", "machine": machine_report(), "floors": []}
    measured = load_record(options.record).get("rows", []) if options.record else []
    for row in rows:
        name = torch.cuda.get_device_name(0)
        record["floors"].append(against_record(floor_of(row, device_name=name), measured))
        _keep(record, options.out, record["floors"][-1])
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return 0


def _keep(record: dict[str, Any], out: Path | None, latest: dict[str, Any]) -> None:
    print(json.dumps(latest, indent=1), flush=True)
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")


def compared(options: argparse.Namespace) -> int:
    """Print what became of each row."""
    lines, is_good = compare(load_record(options.before), load_record(options.after))
    print("\n".join(lines))
    return 0 if is_good else 1


def tables(options: argparse.Namespace) -> int:
    """Print a table of the records, or make those of a file anew."""
    if options.write is not None:
        options.write.write_text(rewritten(options.write.read_text()))
    if options.records:
        print(table([load_record(path) for path in options.records]), end="")
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser; `options.act` is what to do."""
    root = argparse.ArgumentParser(
        prog="python -m scripts.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = root.add_subparsers(required=True, metavar="ACTION")
    for name, with_peers in (("run", False), ("peers", True)):
        action = actions.add_parser(name)
        action.add_argument("suite", help=f"a suite ({', '.join(SUITES)}) or a row's name")
        action.add_argument("--out", type=Path, required=True, help="record to write")
        action.add_argument("--only", default="", help="rows whose name holds this text")
        action.add_argument("--timeout_seconds", type=float, default=300.0, help="of one run")
        action.set_defaults(act=lambda given, peers=with_peers: measure(given, with_peers=peers))
        if with_peers:
            action.add_argument("--peer", default="", help="peers whose name begins with this text")
    action = actions.add_parser("floor")
    action.add_argument("suite", help="a suite or a row's name")
    action.add_argument("--only", default="", help="rows whose name holds this text")
    action.add_argument("--record", type=Path, help="record whose rows are compared with it")
    action.add_argument("--out", type=Path, help="record to write")
    action.set_defaults(act=floor)
    action = actions.add_parser("compare")
    action.add_argument("before", type=Path)
    action.add_argument("after", type=Path)
    action.set_defaults(act=compared)
    action = actions.add_parser("table")
    action.add_argument("records", type=Path, nargs="*")
    action.add_argument("--write", type=Path, help="Markdown file whose tables are made anew")
    action.set_defaults(act=tables)
    return root


def main() -> int:
    """Do what the command line says; a mistake of the user ends with 2."""
    options = parser().parse_args()
    end_on_signals()
    try:
        return options.act(options)
    except ValueError as error:
        print(f"python -m scripts.bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
