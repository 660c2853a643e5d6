"""One update is the same however its rows are dealt to ranks and microbatches."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.data.batch import IGNORED_LABEL, Batch
from engine.objectives import SequenceSum, combine
from engine.objectives.pretrain import Pretrain
from engine.optim import OptimizerConfig
from engine.step import (
    SourceReport,
    StepReport,
    TrainingConfig,
    accumulate_gradients,
    added_up,
    measure,
    sum_globally,
    train_step,
)
from tests.engine.training_cases import (
    ROWS_PER_STEP,
    RaggedRows,
    local_part,
    make_trainer,
    whole_parameters,
)
from tests.parity.cases import Case
from tests.ranks import RankPool

FP32_REORDERED_SUM = 1e-5  # another order of the same sums, through two updates of AdamW

Outcome = tuple[list[StepReport], dict[str, Tensor]]


def take_steps(rank: int, world_size: int, case: Case, local_batch_size: int) -> Outcome:
    trainer = make_trainer(case, local_batch_size=local_batch_size)
    reports = [train_step(trainer, step) for step in (1, 2)]
    return reports, whole_parameters(trainer)


EVEN = [Case(shard=2), Case(tp=2), Case(replicate=2, shard=2), Case(shard=2, tp=2)]
UNEVEN = [
    (Case(shard=3), 1),  # 3 microbatches of 1 row: the last rank's last one is a filler
    (Case(shard=3), 8),  # 1 microbatch of 3 rows, of which the last rank has 2
    (Case(shard=3, cp=2, context="ring"), 1),
]


@pytest.mark.parametrize(
    ("case", "local_batch_size"), [*((case, n) for case in EVEN for n in (1, 2)), *UNEVEN], ids=str
)
def test_an_update_is_the_same_for_any_ranks_and_microbatches(
    ranks: RankPool, case: Case, local_batch_size: int
) -> None:
    (expected, parameters), *_ = ranks(1, take_steps, Case(), ROWS_PER_STEP)
    for reports, found in ranks(case.world_size, take_steps, case, local_batch_size):
        for report, wanted in zip(reports, expected, strict=True):
            assert report.loss == pytest.approx(wanted.loss, rel=FP32_REORDERED_SUM)
            assert report.grad_norm == pytest.approx(wanted.grad_norm, rel=FP32_REORDERED_SUM)
            assert (report.tokens, report.trained_tokens) == (wanted.tokens, wanted.trained_tokens)
            assert report.squared_document_tokens == wanted.squared_document_tokens
        for name, value in parameters.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


ODD_ROWS = RaggedRows(seq_len=13)  # padded to 16 where two ranks share a row
ONE_DOCUMENT = RaggedRows(seq_len=13, one_document_per_row=True)


def take_a_step(rank: int, world_size: int, case: Case, rows: RaggedRows) -> Outcome:
    local_batch_size = ROWS_PER_STEP if case.world_size == 1 else 2
    trainer = make_trainer(case, local_batch_size=local_batch_size, rows=rows)
    return [train_step(trainer, 1)], whole_parameters(trainer)


@pytest.mark.parametrize("rows", [ODD_ROWS, ONE_DOCUMENT], ids=["documents", "one-document"])
@pytest.mark.parametrize(
    "case",
    [
        Case(tp=2),
        Case(cp=2),
        Case(cp=2, context="ulysses"),
        Case(cp=2, context="ring"),
        Case(shard=2, cp=2),
        Case(tp=2, cp=2, context="ring"),
    ],
    ids=str,
)
def test_an_update_is_the_same_where_ranks_share_rows_that_do_not_divide(
    ranks: RankPool, case: Case, rows: RaggedRows
) -> None:
    (((expected,), parameters),) = ranks(1, take_a_step, Case(), rows)
    assert expected.tokens < ROWS_PER_STEP * rows.seq_len, "some rows end in padding"
    for (report,), found in ranks(case.world_size, take_a_step, case, rows):
        assert report.loss == pytest.approx(expected.loss, rel=FP32_REORDERED_SUM)
        assert report.grad_norm == pytest.approx(expected.grad_norm, rel=FP32_REORDERED_SUM)
        assert (report.tokens, report.trained_tokens, report.squared_document_tokens) == (
            *(expected.tokens, expected.trained_tokens),
            expected.squared_document_tokens,
        )
        for name, value in parameters.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


OF_THREE = RaggedRows(source_names=("a", "b", "rare"))


@pytest.mark.parametrize("case", [Case(shard=2), Case(tp=2), Case(shard=2, cp=2)], ids=str)
def test_tokens_and_loss_of_each_source_are_the_same_on_any_ranks(
    ranks: RankPool, case: Case
) -> None:
    (((expected,), _),) = ranks(1, take_a_step, Case(), OF_THREE)
    trained = dict.fromkeys(OF_THREE.source_names, 0)
    for row in map(OF_THREE.row, range(ROWS_PER_STEP)):
        trained[OF_THREE.source_names[row.source]] += int((row.labels_T != IGNORED_LABEL).sum())
    losses = {name: one.loss for name, one in expected.sources.items()}
    assert None not in losses.values() and len({*losses.values()}) == 3
    total = sum(trained[name] * (loss or 0.0) for name, loss in losses.items())
    assert total / sum(trained.values()) == pytest.approx(expected.loss, rel=1e-12)
    assert sum(one.tokens for one in expected.sources.values()) == expected.tokens
    for (report,), _ in ranks(case.world_size, take_a_step, case, OF_THREE):
        for name, one in report.sources.items():
            assert one.tokens == expected.sources[name].tokens
            assert one.loss == pytest.approx(losses[name], rel=FP32_REORDERED_SUM)


def report_of_one_source(rank: int, world_size: int) -> tuple[StepReport, StepReport]:
    alone = make_trainer(Case(), local_batch_size=8)
    names = ("all", *map(str, range(8)), "absent")
    among = make_trainer(Case(), local_batch_size=8, rows=RaggedRows(source_names=names))
    return train_step(alone, 1), train_step(among, 1)


def test_a_source_without_a_trained_token_has_no_loss_and_a_single_one_no_report(
    ranks: RankPool,
) -> None:
    ((alone, among),) = ranks(1, report_of_one_source)
    assert alone.sources == {}
    assert (among.loss, among.grad_norm, among.tokens) == (
        *(alone.loss, alone.grad_norm),
        alone.tokens,
    )
    assert among.sources["absent"] == SourceReport(loss=None, tokens=0)
    assert among.sources["all"].tokens == RaggedRows().row(0).documents_T.count_nonzero()


class OfWholeSequences(Pretrain):
    """Nonlinear in a sequence's total, as preferences are; and a term that is not."""

    coefficients: Mapping[str, float] = {"squared": 1.0, "nll": 0.5}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"squared": torch.ones(len(batch.rows_B)), **Pretrain().counts(batch)}

    def sums(self, logps_BT: Tensor, batch: Batch, sequence_sum: SequenceSum) -> dict[str, Tensor]:
        total_B = sequence_sum(logps_BT.sum(dim=1))
        squared_B = (total_B / 10).square() / sequence_sum.num_ranks
        return {"squared": squared_B, **Pretrain().sums(logps_BT, batch, sequence_sum)}


def take_a_step_on_sequences(rank: int, world_size: int, case: Case) -> Outcome:
    trainer = make_trainer(case, local_batch_size=4)
    trainer.objective = OfWholeSequences()
    return [train_step(trainer, 1)], whole_parameters(trainer)


@pytest.mark.parametrize("case", [Case(cp=2), Case(shard=2, cp=2, context="ulysses")], ids=str)
def test_an_objective_of_whole_sequences_is_the_same_where_ranks_share_them(
    ranks: RankPool, case: Case
) -> None:
    (((expected,), parameters),) = ranks(1, take_a_step_on_sequences, Case())
    for (report,), found in ranks(case.world_size, take_a_step_on_sequences, case):
        assert report.loss == pytest.approx(expected.loss, rel=FP32_REORDERED_SUM)
        assert report.grad_norm == pytest.approx(expected.grad_norm, rel=FP32_REORDERED_SUM)
        for name, value in parameters.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


def take_ten_steps(rank: int, world_size: int, case: Case, local_batch_size: int) -> list[float]:
    trainer = make_trainer(case, local_batch_size=local_batch_size)
    return [train_step(trainer, step).loss for step in range(1, 11)]


def test_ten_compiled_and_checkpointed_steps_follow_one_process(ranks: RankPool) -> None:
    case = Case(shard=2, tp=2, backend="aot_eager", checkpointing="full")
    (expected,) = ranks(1, take_ten_steps, Case(), ROWS_PER_STEP)
    for found in ranks(case.world_size, take_ten_steps, case, 2):
        assert found == pytest.approx(expected, rel=FP32_REORDERED_SUM)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What ten steps touched, by name, and what that costs this rank."""

    names: set[str]
    changed: set[str]
    with_gradient: set[str]
    with_state: set[str]
    num_states: int
    moment_bytes: int
    changed_bytes: int


def train_frozen(rank: int, world_size: int, case: Case, frozen: tuple[str, ...]) -> Training:
    trainer = make_trainer(case, local_batch_size=2, frozen=frozen)
    named, optimizer = dict(trainer.model.named_parameters()), trainer.optimizer
    with_gradient: set[str] = set()
    optimizer.register_step_pre_hook(
        lambda *_: with_gradient.update(n for n, p in named.items() if p.grad is not None)
    )
    before = whole_parameters(trainer)
    for step in range(1, 11):
        train_step(trainer, step)
    after = whole_parameters(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    states = optimizer.state
    return Training(
        names=set(named),
        changed=changed,
        with_gradient=with_gradient,
        with_state={name for name, p in named.items() if p in states},
        num_states=len(states),
        moment_bytes=sum(local_part(s["exp_avg"]).nbytes for s in states.values()),
        changed_bytes=sum(local_part(named[name]).nbytes for name in changed),
    )


@pytest.mark.parametrize(
    ("case", "frozen", "expression"),
    [
        (Case(), ("blocks:bottom:2", "model.embed_tokens"), r"model\.(embed|layers\.[01]\.).*"),
        (Case(), ("blocks:top:1",), r"model\.layers\.2\..*"),
        (Case(tied=True), ("blocks:interweave:2", "lm_head"), r"model\.(embed|layers\.[02]\.).*"),
        (Case(shard=2), ("model.layers.*.self_attn",), r".*self_attn.*"),
        (Case(shard=2, tp=2), ("blocks:bottom:1", "regex:.*norm.*"), r".*(layers\.0\.|norm).*"),
    ],
    ids=str,
)
def test_frozen_parameters_keep_their_bits_without_gradient_and_optimizer_state(
    ranks: RankPool, case: Case, frozen: tuple[str, ...], expression: str
) -> None:
    for found in ranks(case.world_size, train_frozen, case, frozen):
        trained = {name for name in found.names if not re.fullmatch(expression, name)}
        assert found.changed == found.with_gradient == found.with_state == trained
        assert 0 < len(trained) == found.num_states < len(found.names)
        assert found.moment_bytes == found.changed_bytes


def number_formats(rank: int, world_size: int) -> set[str]:
    trainer = make_trainer(Case(shard=2, bfloat16=True), local_batch_size=2)
    train_step(trainer, 1)
    state = trainer.optimizer.state.values()
    kept = [t for slots in state for name, t in slots.items() if name != "step"]
    return {str(t.dtype) for t in (*kept, *trainer.model.parameters())}


def test_masters_and_moments_stay_in_fp32_while_compute_is_bf16(ranks: RankPool) -> None:
    assert ranks(2, number_formats) == [{"torch.float32"}] * 2


def loss_after_300_steps(rank: int, world_size: int, bfloat16: bool) -> float:
    case, usual = Case(bfloat16=bfloat16), OptimizerConfig(lr=3e-3)
    trainer = make_trainer(case, local_batch_size=8, optimizer=usual)
    reports = [train_step(trainer, step) for step in range(1, 301)]
    return sum(report.loss for report in reports[-50:]) / 50


@pytest.mark.slow
def test_bf16_compute_with_fp32_masters_learns_as_fp32_does(ranks: RankPool) -> None:
    (exact,) = ranks(1, loss_after_300_steps, False, timeout_seconds=240)
    (rounded,) = ranks(1, loss_after_300_steps, True, timeout_seconds=240)
    assert exact < 3.0, "from 4.2, what guessing gives"
    assert rounded == pytest.approx(exact, rel=0.01)


def gradients(rank: int, world_size: int, case: Case) -> tuple[float, dict[str, Tensor]]:
    trainer = make_trainer(case, local_batch_size=1 if world_size > 1 else ROWS_PER_STEP)
    batches = [next(trainer.batches) for _ in range(trainer.microbatches)]
    parts = [measure(b, trainer.objective, num_sources=1) for b in batches]
    counts = added_up(sum_globally(parts, trainer.dims, "batch"))
    parts = accumulate_gradients(trainer, batches, counts)
    sums = added_up(sum_globally(parts, trainer.dims, "loss"))
    loss = float(combine(sums, counts, trainer.objective.coefficients))
    named = trainer.model.named_parameters()
    found = {name: p.grad for name, p in named if p.grad is not None}
    return loss, {n: getattr(g, "full_tensor", lambda g=g: g)().clone() for n, g in found.items()}


def test_eight_rows_on_three_ranks_give_the_loss_and_every_gradient_of_one(
    ranks: RankPool,
) -> None:
    ((expected_loss, expected),) = ranks(1, gradients, Case())
    for loss, found in ranks(3, gradients, Case(shard=3)):
        assert loss == pytest.approx(expected_loss, rel=FP32_REORDERED_SUM)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            error = (found[name] - gradient).abs().max() / gradient.abs().max()
            assert error <= FP32_REORDERED_SUM, name


@pytest.mark.parametrize(
    ("rows", "ranks", "most", "microbatches", "size", "fillers"),
    [
        (8, 4, 2, 1, 2, 0),
        (16, 2, 2, 4, 2, 0),
        (8, 3, 1, 3, 1, 1),
        (8, 3, 4, 1, 3, 1),
        (16, 3, 4, 2, 3, 2),
        (4, 1, 8, 1, 4, 0),
        (40, 4, 8, 2, 5, 0),
        (5, 5, 8, 1, 1, 0),
        (10, 2, 4, 2, 3, 2),
    ],
)
def test_a_step_is_dealt_in_few_and_even_microbatches(
    rows: int, ranks: int, most: int, microbatches: int, size: int, fillers: int
) -> None:
    config = TrainingConfig(local_batch_size=most, global_batch_size=rows)
    dealing = config.dealing(ranks)
    assert (dealing.microbatches, dealing.rows_per_microbatch) == (microbatches, size)
    assert dealing.filler_share == pytest.approx(fillers / (rows + fillers))
    assert (ranks in config.even_degrees()) == (fillers == 0)


def test_a_step_has_a_row_for_every_rank() -> None:
    config = TrainingConfig(local_batch_size=2, global_batch_size=8)
    assert config.rows_per_step(3) == 8
    assert TrainingConfig(local_batch_size=3).rows_per_step(4) == 12
    with pytest.raises(ValueError, match=r"training\.global_batch_size = 8 .* ranks, 9; start at"):
        config.dealing(9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, r"training\.steps = 0"),
        ({"global_batch_size": 0}, r"training\.global_batch_size = 0"),
        ({"max_norm": 0.0}, r"training\.max_norm = 0\.0"),
        ({"max_norm": math.nan}, r"training\.max_norm = nan"),
        ({"neftune_noise_alpha": -5.0}, r"training\.neftune_noise_alpha = -5\.0"),
        ({"neftune_noise_alpha": math.nan}, r"training\.neftune_noise_alpha = nan"),
    ],
)
def test_training_settings_that_cannot_work_are_refused_by_name(
    values: dict[str, int | float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**values)  # pyright: ignore[reportArgumentType]
