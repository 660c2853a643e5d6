"""`python -m engine.verify lora`: adapters on every plan: their gradients, their start, merging."""

import argparse
from dataclasses import replace

from engine.verify.adapted import CHECKS, AdapterJob
from engine.verify.case import ADAPTERS, parse
from engine.verify.command import Setting, add_shared_options, find_setting, run_check
from engine.verify.plans import PlanList, list_plans
from engine.verify.report import Report

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
    add_shared_options(found, CPU_RANKS)
    return found


def main(arguments: list[str]) -> int:
    """Compare adapters on every plan: gradients, new ones with none, merged ones with theirs."""
    return run_check("lora", arguments, parser(), _prepare)


def _prepare(options: argparse.Namespace) -> tuple[AdapterJob, Report]:
    """Decide ranks, device, model and plans; ValueError for a mistake of the user."""
    kinds = options.kind.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"--kind {unknown[0]!r} is not known; use {' or '.join(KINDS)}, or both")
    named = parse(options.plan) if options.plan is not None else None
    if named is not None and named.adapter != "none":
        if named.adapter not in kinds:
            raise ValueError(
                f"--plan {options.plan!r} has {named.adapter}, which --kind {options.kind!r} "
                "leaves out; leave one of them away"
            )
        kinds = [named.adapter]
    setting = find_setting(options, CPU_RANKS)
    plans = setting.faulty(_plans(setting, kinds, options))
    report = setting.report(plans, suite="lora", checks=tuple(CHECKS))
    return AdapterJob(**setting.told(plans)), report


def _plans(setting: Setting, kinds: list[str], options: argparse.Namespace) -> PlanList:
    """Return the one plan that was asked for, or all of them, with each kind of adapter."""
    case, rules = setting.case, setting.rules
    found = PlanList()
    config = rules.subject.config
    given = {"tied": config.tie_word_embeddings, "bias": False} if options.model else {}
    for kind in kinds:
        if case is None:
            listed = list_plans(
                setting.world_size,
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
