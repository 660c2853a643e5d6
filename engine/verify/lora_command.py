"""`python -m engine.verify lora`: adapters on every plan: their gradients, their start, merging."""

import argparse
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from engine.cli import USER_MISTAKE_EXIT_CODE, is_first_rank
from engine.verify.adapted import CHECKS, AdapterJob
from engine.verify.case import ADAPTERS, Case, parse
from engine.verify.command import find_fault, find_place, run_launched
from engine.verify.faults import FAULTS
from engine.verify.plans import PlanList, list_plans
from engine.verify.ranks import run_here
from engine.verify.refusals import Rules
from engine.verify.report import Report
from engine.verify.subject import find_subject

CPU_RANKS = 4
KINDS = ADAPTERS[1:]


def parser() -> argparse.ArgumentParser:
    """Return the command line's description."""
    found = argparse.ArgumentParser(
        prog="python -m engine.verify lora",
        description="Train adapters beside a frozen model on plans of all kinds, and compare the "
        "loss and every gradient with one fp32 process, the logits of new adapters with those of "
        "the model without them, and the logits of merged weights, and of adapters that a folder "
        "of PEFT has held, with those of adapters. Exit code 0: all equal; 1: not equal, or a rank "
        "was lost; 2: a mistake in the command; 3: a planted fault was not noticed.",
        allow_abbrev=False,
    )
    plans = found.add_mutually_exclusive_group()
    plans.add_argument("--plan", help='short text of one plan, such as "fsdp2-tp2-cp2-ring"')
    plans.add_argument(
        "--all",
        action="store_true",
        help="every layout that divides the ranks, with and without the compiler, and bf16; "
        "without it a short list of eager plans",
    )
    found.add_argument("--kind", default=",".join(KINDS), help="kinds of adapters, with commas")
    found.add_argument("--model", default="", help="family, family:size or folder; shrunk")
    found.add_argument("--ranks", type=int, help=f"default: one a GPU, or {CPU_RANKS} on the CPU")
    found.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    found.add_argument("--fault", help='error to plant; "list" prints them')
    found.add_argument("--out", type=Path, help="JSON record to write")
    found.add_argument("--timeout_seconds", type=float, default=300.0, help="of one plan")
    return found


def main(arguments: list[str]) -> int:
    """Compare adapters on every plan: gradients, new ones with none, merged ones with theirs."""
    options = parser().parse_args(arguments)
    if options.fault == "list":
        for name, fault in FAULTS.items():
            print(f"{name}: {fault.sentence}")
        return 0
    try:
        job, report = _resolve(options)
    except ValueError as error:
        if is_first_rank():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_MISTAKE_EXIT_CODE
    report.begin()
    if "RANK" in os.environ:
        run_launched(job, report)
    else:
        run_here(job, report.world_size, report.add)
    code = report.end()
    if options.out is not None and is_first_rank():
        command = shlex.join(["python", "-m", "engine.verify", "lora", *arguments])
        report.write(options.out, command)
    return code


def _resolve(options: argparse.Namespace) -> tuple[AdapterJob, Report]:
    """Decide ranks, device, model and plans; ValueError for a mistake of the user."""
    kinds = options.kind.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"--kind {unknown[0]!r} is not known; use {' or '.join(KINDS)}, or both")
    case = parse(options.plan) if options.plan is not None else None
    if case is not None and case.adapter != "none":
        if case.adapter not in kinds:
            raise ValueError(
                f"--plan {options.plan!r} has {case.adapter}, which --kind {options.kind!r} leaves "
                "out; leave one of them away"
            )
        kinds = [case.adapter]
    fault = find_fault(options.fault)
    if case is None and options.fault is not None and not options.all:
        assert fault is not None, "its name was looked up"
        case = fault.example
    device_type, world_size = find_place(options, case, CPU_RANKS)
    subject, model = find_subject(options.model, device_type)
    subject = subject.for_ranks(world_size)
    rules = Rules.of(subject, device_type, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    plans = _plans(case, kinds, rules, world_size, options)
    cases = [one for one in plans.cases if fault is None or fault.applies(one)]
    if not cases:
        raise ValueError(
            f"--fault {options.fault!r} needs a plan in which there is something to break; try "
            f"--plan {fault.example if fault else ''}"
        )
    report = Report(
        cases=cases,
        refused=plans.refused,
        device_type=device_type,
        world_size=world_size,
        model=model,
        fault=options.fault,
        is_silent=not is_first_rank(),
        suite="lora",
        checks=tuple(CHECKS),
    )
    job = AdapterJob(
        cases=tuple(cases),
        subject=subject,
        device_type=device_type,
        fault=options.fault,
        timeout_seconds=options.timeout_seconds,
    )
    return job, report


def _plans(
    case: Case | None, kinds: list[str], rules: Rules, world_size: int, options: argparse.Namespace
) -> PlanList:
    """Return the one plan that was asked for, or all of them, with each kind of adapter."""
    found = PlanList()
    config = rules.subject.config
    given = {"tied": config.tie_word_embeddings, "bias": False} if options.model else {}
    for kind in kinds:
        if case is None:
            listed = list_plans(
                world_size,
                device_type=rules.device_type,
                refusal=rules.refusal,
                fixed={"adapter": kind, **given},
                is_short=not options.all,
            )
            found.cases.extend(listed.cases)
            found.refused.update(listed.refused)
            continue
        one = replace(case, adapter=kind)
        if (reason := rules.refusal(one)) is not None:
            raise ValueError(f"--plan {one} is refused: {reason}")
        found.cases.append(one)
    return found
