"""`python -m engine.verify parity`: its command line, and the plans and ranks that it means."""

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.cli import USER_MISTAKE_EXIT_CODE, is_first_rank
from engine.distributed import launched_world_size
from engine.rules import usable_gpus
from engine.verify.case import OBJECTIVES, Case, parse
from engine.verify.faults import FAULTS, Fault
from engine.verify.plans import PlanList, list_plans
from engine.verify.ranks import Job, PlanJob, check_plans, joined, run_here
from engine.verify.refusals import Rules
from engine.verify.report import EXIT_DIFFERENT, Report
from engine.verify.subject import Subject, find_subject
from models.registry import suggestion

CPU_RANKS = 8


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a command line asks for, beside the list of plans."""

    case: Case | None
    """The one plan to run; None: a list of them."""

    fault: str | None
    world_size: int
    device_type: str
    subject: Subject
    model: str
    rules: Rules
    timeout_seconds: float
    """Of one plan."""

    def told(self, plans: PlanList) -> dict[str, Any]:
        """Return what a job over plans is made with."""
        return {
            "cases": tuple(plans.cases),
            "subject": self.subject,
            "device_type": self.device_type,
            "fault": self.fault,
            "timeout_seconds": self.timeout_seconds,
        }

    def report(self, plans: PlanList, **more: Any) -> Report:
        """Return the report of plans, before any has run."""
        return Report(
            cases=plans.cases,
            refused=plans.refused,
            device_type=self.device_type,
            world_size=self.world_size,
            model=self.model,
            fault=self.fault,
            is_silent=not is_first_rank(),
            **more,
        )

    def faulty(self, plans: PlanList) -> PlanList:
        """Return the plans in which the fault, if there is one, has something to break."""
        if self.fault is None:
            return plans
        fault = FAULTS[self.fault]
        cases = [case for case in plans.cases if fault.applies(case)]
        if not cases:
            raise ValueError(
                f"--fault {self.fault!r} needs a plan in which there is something to break; try "
                f"--plan {fault.example}"
            )
        return PlanList(cases=cases)


def parser() -> argparse.ArgumentParser:
    """Return the command line's description."""
    found = argparse.ArgumentParser(
        prog="python -m engine.verify parity",
        description="Compare plans with one fp32 process: the loss and every parameter's gradient. "
        "Starts its own ranks, or joins those of torchrun. Exit code 0: all equal; 1: not equal, "
        "or a rank was lost; 2: a mistake in the command; 3: a planted fault was not noticed.",
        allow_abbrev=False,
    )
    plans = found.add_mutually_exclusive_group()
    plans.add_argument("--plan", help='short text of one plan, such as "fsdp2-tp2-cp2-ring"')
    plans.add_argument(
        "--all", action="store_true", help="every layout that divides the ranks (the default)"
    )
    plans.add_argument(
        "--short",
        action="store_true",
        help="eager plans: every layout that keeps rows whole, each mode of context parallelism",
    )
    found.add_argument(
        "--objective",
        default=OBJECTIVES[0],
        help=f"what the plans train on, with commas: {', '.join(OBJECTIVES)}",
    )
    add_shared_options(found, CPU_RANKS)
    return found


def add_shared_options(found: argparse.ArgumentParser, cpu_ranks: int) -> None:
    """Add the options of every check of plans."""
    found.add_argument("--model", default="", help="family, family:size or folder; shrunk")
    found.add_argument("--ranks", type=int, help=f"default: one a GPU, or {cpu_ranks} on the CPU")
    found.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    found.add_argument("--fault", help='error to plant; "list" prints them')
    found.add_argument("--out", type=Path, help="JSON record to write")
    found.add_argument("--timeout_seconds", type=float, default=300.0, help="of one plan")


def main(arguments: list[str]) -> int:
    """Compare every plan with one process: loss and gradients."""
    return run_check("parity", arguments, parser(), prepare)


def run_check(
    name: str,
    arguments: list[str],
    parser: argparse.ArgumentParser,
    prepare: Callable[[argparse.Namespace], tuple[Job, Report]],
) -> int:
    """Run a check of plans as its command line says; return the exit code."""
    options = parser.parse_args(arguments)
    if options.fault == "list":
        for fault_name, fault in FAULTS.items():
            print(f"{fault_name}: {fault.sentence}")
        return 0
    try:
        job, report = prepare(options)
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
        report.write(options.out, shlex.join(["python", "-m", "engine.verify", name, *arguments]))
    return code


def prepare(options: argparse.Namespace) -> tuple[PlanJob, Report]:
    """Decide ranks, device, model and plans; ValueError for a mistake of the user."""
    objectives = _objectives(options.objective)
    setting = find_setting(options, CPU_RANKS)
    plans = PlanList()
    for objective in objectives:
        listed = _plans(setting, objective, options)
        plans.cases.extend(listed.cases)
        plans.refused.update(listed.refused)
    plans = setting.faulty(plans)
    return PlanJob(**setting.told(plans)), setting.report(plans)


def find_setting(options: argparse.Namespace, cpu_ranks: int) -> Setting:
    """Decide what all checks of plans share; ValueError for a mistake of the user."""
    case = parse(options.plan) if options.plan is not None else None
    fault = find_fault(options.fault)
    if case is None and fault is not None and not options.all:
        case = fault.example
    device_type, world_size = find_place(options, case, cpu_ranks)
    subject, model = find_subject(options.model, device_type)
    subject = subject.for_ranks(world_size)
    num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    return Setting(
        case=case,
        fault=options.fault,
        world_size=world_size,
        device_type=device_type,
        subject=subject,
        model=model,
        rules=Rules.of(subject, device_type, num_local_ranks),
        timeout_seconds=options.timeout_seconds,
    )


def find_fault(name: str | None) -> Fault | None:
    """Return the fault that `--fault` names; ValueError if there is none of that name."""
    if name is not None and name not in FAULTS:
        raise ValueError(
            f"--fault {name!r} is not known; {suggestion(name, FAULTS)}use list, or one of "
            f"{', '.join(FAULTS)}"
        )
    return None if name is None else FAULTS[name]


def find_place(options: argparse.Namespace, case: Case | None, cpu_ranks: int) -> tuple[str, int]:
    """Return the device type and the number of ranks; `cpu_ranks` where nothing says how many."""
    launched = launched_world_size() if "RANK" in os.environ else None
    gpus = usable_gpus()
    usual = gpus if gpus and options.device != "cpu" else cpu_ranks
    world_size = options.ranks or launched or (case.world_size if case else usual)
    if options.ranks is not None and options.ranks < 1:
        raise ValueError(f"--ranks {options.ranks}: give at least 1")
    if launched is not None and launched != world_size:
        raise ValueError(
            f"--ranks {world_size}, but the launcher started {launched}; leave --ranks out"
        )
    if case is not None and case.world_size != world_size:
        raise ValueError(
            f"--plan {case} needs {case.world_size} ranks, but there are {world_size}; use degrees "
            f"whose product is {world_size}, or {case.world_size} ranks"
        )
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    if options.device == "cuda" and gpus < needed:
        raise ValueError(
            f"--device cuda, but this machine has {gpus} usable GPUs for {needed} ranks; give "
            "fewer --ranks, or --device cpu"
        )
    on_cuda = options.device != "cpu" and gpus >= needed
    return ("cuda" if on_cuda else "cpu"), world_size


def _objectives(text: str) -> list[str]:
    """Return what `--objective` names; ValueError for a word that is none."""
    found = text.split(",")
    for name in found:
        if name not in OBJECTIVES:
            raise ValueError(
                f"--objective {name!r} is not known; {suggestion(name, OBJECTIVES)}use one or more "
                f"of {', '.join(OBJECTIVES)}, with commas"
            )
    return found


def _plans(setting: Setting, objective: str, options: argparse.Namespace) -> PlanList:
    """Return the one plan that was asked for, or all of them, with an objective."""
    case, rules = setting.case, setting.rules
    config = rules.subject.config
    fixed: dict[str, object] = {"objective": objective}
    if options.model:
        fixed |= {"tied": config.tie_word_embeddings, "bias": False}
    if case is None:
        return list_plans(
            setting.world_size,
            device_type=rules.device_type,
            refusal=rules.refusal,
            fixed=fixed,
            is_short=options.short,
        )
    if objective != OBJECTIVES[0]:
        case = replace(case, objective=objective)
    reason = rules.refusal(case)
    if reason is not None:
        raise ValueError(f"--plan {case} is refused: {reason}")
    return PlanList(cases=[case])


def run_launched(job: Job, report: Report) -> None:
    """Run the job on the ranks of a launcher, which ends the others when this one fails."""
    try:
        with joined(job) as host_group:
            for row in check_plans(job, host_group):
                report.add(row)
    except BaseException:
        plan = job.cases[len(report.rows)]
        print(f"rank {os.environ['RANK']}, plan {plan}:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        # Past everything that would wait for ranks that are still in a collective.
        os._exit(EXIT_DIFFERENT)
