"""Plans of `python -m engine.verify`: their text form, and which ones a list holds."""

from functools import lru_cache
from itertools import combinations

import pytest

from engine.verify import command
from engine.verify.case import CONTEXT_MODES, WORDS, Case, parse
from engine.verify.plans import (
    GPU_ATTENTION,
    SWITCHES,
    PlanList,
    effective,
    every_layout,
    list_plans,
    traits,
)
from engine.verify.refusals import Rules
from engine.verify.subject import SMALL, TINY

PLANS = {
    "one": Case(),
    "fsdp2-tp2-cp2-ring": Case(shard=2, tp=2, cp=2, context="ring"),
    "rep2-tp4-no-sp-whole-loss": Case(replicate=2, tp=4, sequence=False, loss_parallel=False),
    "fsdp8-ac-budget-inductor-bfloat16": Case(
        shard=8, checkpointing="budget", backend="inductor", bfloat16=True
    ),
    "cp4-allgather-contiguous-unpacked-v61": Case(cp=4, balanced=False, packed=False, vocab=61),
    "fsdp2-reshard-never-accumulate2": Case(shard=2, reshard="never", accumulate=2),
}


@pytest.mark.parametrize(("text", "case"), PLANS.items())
def test_a_plan_and_its_text_are_the_same(text: str, case: Case) -> None:
    assert str(case) == text
    assert parse(text) == case


def test_every_word_of_the_text_form_is_read_in_any_order() -> None:
    for word, (name, value) in WORDS.items():
        assert getattr(parse(f"{word}-tp2-cp2"), name) == value
    assert parse("tied-cp2-fsdp3") == Case(shard=3, cp=2, tied=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fspd2", r"'fspd2' does not begin with a known word; did you mean 'fsdpN'\? .*ulysses"),
        ("fsdp2-rnig", "'rnig' does not begin with a known word; did you mean 'ring'"),
        ("fsdp0", "'fsdp0' does not begin"),
        ("fsdp2-", "'' does not begin"),
        ("", "use words of one, repN"),
        ("tp2-tp4", "'tp4' sets tp a second time"),
        ("cp2-ring-ulysses", "'ulysses' sets context a second time"),
        ("one-tp2", "'one' is one rank"),
        ("tp2-ring", "context has no effect without cp; add cp2"),
        ("fsdp2-no-sp", "sequence has no effect without tp; add tp2"),
    ],
)
def test_a_text_that_means_nothing_is_refused_with_what_to_write(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


@lru_cache
def plans_of(world_size: int, device_type: str = "cpu") -> PlanList:
    subject = (TINY if device_type == "cpu" else SMALL).for_ranks(world_size)
    missing = frozenset[str]()
    rules = Rules(
        subject=subject,
        device_type=device_type,
        num_gpus=world_size,
        missing=missing,
        num_local_ranks=world_size,
    )
    return list_plans(world_size, device_type=device_type, refusal=rules.refusal, fixed={})


@pytest.mark.parametrize("world_size", [6, 8])
def test_all_plans_hold_every_layout_and_each_two_choices_together(world_size: int) -> None:
    found = plans_of(world_size)
    assert all(case.world_size == world_size for case in found.cases)
    assert len(set(map(str, found.cases))) == len(found.cases)
    strict = [c for c in found.cases if not c.bfloat16 and not c.backend]
    layouts = {c for c in every_layout(world_size) if c not in found.refused}
    names = ("replicate", "shard", "tp", "cp", "context", "sequence")
    seen = {Case(**{name: getattr(c, name) for name in names}) for c in strict}
    assert seen == layouts
    together = set()
    for case in strict:
        items = [*traits(case).items(), *((n, getattr(case, n)) for n in effective(case, SWITCHES))]
        together |= {frozenset(pair) for pair in combinations(items, 2)}
    for layout in layouts:
        choices = effective(layout, SWITCHES)
        for name, values in choices.items():
            pairs = {
                frozenset((trait, (name, v))) for trait in traits(layout).items() for v in values
            }
            assert pairs <= together
        for a, b in combinations(choices, 2):
            pairs = {frozenset(((a, x), (b, y))) for x in choices[a] for y in choices[b]}
            assert pairs <= together


def test_all_plans_hold_each_mode_compiled_and_each_choice_in_bf16() -> None:
    for device_type, backend in (("cpu", "aot_eager"), ("cuda", "inductor")):
        cases = plans_of(4, device_type).cases
        compiled = [c for c in cases if c.backend and not c.bfloat16]
        assert {c.backend for c in compiled} == {backend}
        assert {c.checkpointing for c in compiled} == {"none", "full", "op", "2", "budget"}
        assert all(c.backend for c in cases if c.checkpointing == "budget")
        for part in (compiled, [c for c in cases if c.bfloat16]):
            assert {c.context for c in part if c.cp > 1} == {"allgather", "ring", "ulysses"}
            assert {c.tied for c in part} == {c.offload for c in part} == {True, False}
    with_liger = [c for c in cases if c.kernels == "liger"]
    assert {c.bfloat16 for c in with_liger} == {True, False}
    assert {c.context for c in with_liger if c.cp > 1} == {"allgather", "ring", "ulysses"}
    assert not any(c.tp > 1 or c.backend for c in with_liger)
    assert {c.kernels for c in plans_of(4).cases} == {"torch"}
    assert {c.attention for c in cases if c.bfloat16} == set(GPU_ATTENTION)


def test_what_the_rules_refuse_is_listed_with_their_reason_and_not_run() -> None:
    found = plans_of(8)
    assert "does not divide the 4 key/value heads" in found.refused[Case(tp=8)]
    assert all(c.tp < 8 for c in found.cases)


def test_the_short_list_holds_every_layout_with_whole_rows_for_each_objective() -> None:
    arguments = ["--short", "--objective", "dpo,kto", "--ranks", "4", "--device", "cpu"]
    job, _ = command.prepare(command.parser().parse_args(arguments))
    whole = {str(layout) for layout in every_layout(4) if layout.cp == 1}
    for objective in ("dpo", "kto"):
        cases = [case for case in job.cases if case.objective == objective]
        layouts = {
            str(Case(**{n: getattr(c, n) for n in ("replicate", "shard", "tp", "sequence")}))
            for c in cases
            if c.cp == 1
        }
        assert layouts == whole
        assert {case.context for case in cases if case.cp > 1} == set(CONTEXT_MODES)
