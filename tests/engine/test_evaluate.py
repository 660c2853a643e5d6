"""Held-out loss is exact over uneven ranks, and leaves training as it was."""

import random
from itertools import chain

import pytest
import torch

from engine.data.loader import DataloaderConfig, validation_batches
from engine.data.mixture import numbered
from engine.evaluate import Validation, evaluate
from engine.step import train_step
from tests.engine.training_cases import RaggedRows, held_out, make_trainer
from tests.parity.cases import Case
from tests.ranks import RankPool

EXACT = 1e-7  # fp32 sums of each batch, added in float64


def validate(rank: int, world_size: int, case: Case, num_rows: int) -> Validation:
    trainer = make_trainer(case, local_batch_size=1)
    return evaluate(
        trainer.model,
        trainer.objective,
        lambda: held_out(trainer.dims, num_rows, case=case, seq_len=13),
        trainer.dims,
        trainer.device,
    )


@pytest.mark.parametrize("num_rows", [1, 13])
@pytest.mark.parametrize(
    "case",
    [Case(shard=4), Case(shard=2, tp=2), Case(shard=2, cp=2), Case(cp=2, context="ulysses")],
    ids=str,
)
def test_the_loss_over_uneven_ranks_is_that_of_one_process(
    ranks: RankPool, case: Case, num_rows: int
) -> None:
    (expected,) = ranks(1, validate, Case(), num_rows)
    for found in ranks(case.world_size, validate, case, num_rows):
        assert found.tokens == expected.tokens > 0
        # Where ranks share a row, they add in another order before the float64 sum.
        tolerance = EXACT if case.tp == case.cp == 1 else 20 * EXACT
        assert found.loss == pytest.approx(expected.loss, rel=tolerance)


def validate_two(rank: int, world_size: int, case: Case, sizes: tuple[int, ...]) -> Validation:
    trainer = make_trainer(case, local_batch_size=1)
    parts = numbered([RaggedRows(rows_per_epoch=size) for size in sizes])
    batches = chain.from_iterable(
        validation_batches(
            rows,
            local_batch_size=2,
            batch_rank=trainer.dims.batch_rank,
            batch_degree=trainer.dims.batch_degree,
            dataloader=DataloaderConfig(),
        )
        for rows in parts
    )
    names = tuple("abc"[: len(sizes)])
    return evaluate(
        trainer.model, trainer.objective, lambda: batches, trainer.dims, trainer.device, names
    )


@pytest.mark.parametrize("case", [Case(shard=4), Case(cp=2)], ids=str)
def test_the_loss_of_each_source_over_uneven_ranks_is_that_of_it_alone(
    ranks: RankPool, case: Case
) -> None:
    (first,), (second,) = (ranks(1, validate_two, Case(), (size,)) for size in (9, 2))
    assert first.losses == {}
    for found in ranks(case.world_size, validate_two, case, (9, 2)):
        tolerance = 20 * EXACT
        assert found.losses["a"] == pytest.approx(first.loss, rel=tolerance)
        assert found.losses["b"] == pytest.approx(second.loss, rel=tolerance)
        assert found.tokens == first.tokens + second.tokens
        whole = (first.loss * first.tokens + second.loss * second.tokens) / found.tokens
        assert found.loss == pytest.approx(whole, rel=tolerance)


def interrupted(rank: int, world_size: int, validates: bool) -> list[float]:
    trainer = make_trainer(Case(shard=2), local_batch_size=1)
    losses = [train_step(trainer, 1).loss]
    if validates:
        before = torch.get_rng_state(), random.getstate()
        evaluate(
            trainer.model,
            trainer.objective,
            lambda: held_out(trainer.dims, 5),
            trainer.dims,
            trainer.device,
        )
        assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
        assert trainer.model.training
    report = train_step(trainer, 2)
    return [*losses, report.loss, report.grad_norm]


def test_validation_between_two_steps_changes_neither(ranks: RankPool) -> None:
    assert ranks(2, interrupted, True) == ranks(2, interrupted, False)
