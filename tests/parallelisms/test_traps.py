"""Ways in which torch gives wrong numbers without an error; each has a guard, proved here."""

from unittest.mock import patch

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.parity.cases import Case, batch, build_case, compare, forward, run_case, train
from tests.ranks import RankFailure, RankPool

COMPILED = Case(shard=2, tp=2, backend="aot_eager", checkpointing="op", vocab=61)


def test_the_embedding_gradient_survives_compile_under_tensor_parallelism(ranks: RankPool) -> None:
    for result in ranks(4, run_case, COMPILED):
        result.check()


def without_the_wait(rank: int, world_size: int, case: Case) -> None:
    with patch("parallelisms.tensor.wait_differentiably", lambda x: x):
        run_case(rank, world_size, case)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="found in torch 2.13, not in 2.11")
def test_without_the_wait_the_embedding_gradient_is_lost(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"embed_tokens\.weight is zero|_local_tensor"):
        ranks(4, without_the_wait, COMPILED)


def detached_wait(rank: int, world_size: int) -> None:
    case = Case(tp=2)
    with patch("parallelisms.tensor.wait_differentiably", lambda x: x.wait()):
        run_case(rank, world_size, case)


def test_a_plain_wait_would_detach_the_embedding(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"embed_tokens\.weight has no gradient"):
        ranks(2, detached_wait)


def untied(rank: int, world_size: int) -> None:
    case = Case(tp=2, tied=True)
    with patch("parallelisms.apply.tie", lambda model, owner, other: None):
        model, dims = build_case(case)
    compare(model, train(model, dims, case), case)


def test_tensor_parallel_styles_untie_weights_unless_tied_again(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"lm_head\.weight"):
        ranks(2, untied)


FROZEN = (
    "model.layers.*.input_layernorm.weight",
    "model.embed_tokens.weight",
    "model.layers.1.*.*.*",
)


def trained_names(rank: int, world_size: int, case: Case) -> tuple[list[str], list[str]]:
    model, dims = build_case(case, frozen=FROZEN)
    train(model, dims, case)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with_gradient = [name for name, p in model.named_parameters() if p.grad is not None]
    return trained, with_gradient


@pytest.mark.parametrize(
    "case", [Case(tp=2), Case(tp=2, sequence=False), Case(shard=2, tp=2), Case(shard=2)], ids=str
)
def test_frozen_parameters_stay_frozen(ranks: RankPool, case: Case) -> None:
    trained, with_gradient = ranks(case.world_size, trained_names, case)[0]
    assert trained == with_gradient
    assert "model.embed_tokens.weight" not in trained
    assert "model.layers.0.self_attn.q_proj.weight" in trained
    assert "model.layers.0.post_attention_layernorm.weight" in trained
    assert not [n for n in trained if n.endswith("input_layernorm.weight")]
    assert not [n for n in trained if n.startswith("model.layers.1.") and n.endswith("proj.weight")]


def frozen_typo(rank: int, world_size: int) -> None:
    build_case(Case(), frozen=("model.embed.weight",))


def test_a_frozen_pattern_without_a_match_is_an_error(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match=r"freeze pattern 'model\.embed\.weight' matches nothing"):
        ranks(1, frozen_typo)


def global_generator_use(rank: int, world_size: int) -> bool:
    torch.manual_seed(rank)
    before = torch.get_rng_state()
    model, _ = build_case(Case(shard=2, tp=2))
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert isinstance(weight, DTensor)
    assert weight.to_local().std() > 0
    return torch.equal(torch.get_rng_state(), before)


def test_starting_a_model_leaves_the_global_generator_alone(ranks: RankPool) -> None:
    assert ranks(4, global_generator_use) == [True] * 4


def local_start(rank: int, world_size: int) -> torch.Tensor:
    model, _ = build_case(Case(shard=2, tp=2))
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert isinstance(weight, DTensor)
    return weight.to_local().detach().clone()


def test_no_two_shards_start_alike(ranks: RankPool) -> None:
    parts = ranks(4, local_start)
    assert all(not torch.equal(a, b) for i, a in enumerate(parts) for b in parts[i + 1 :])


def warned_views(rank: int, world_size: int) -> list[str]:
    import warnings

    case = Case(shard=2, chunks=True)
    model, _ = build_case(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        forward(model, {k: v[:4] for k, v in batch(case).items()}, case).sum().backward()
    return [str(w.message) for w in caught if "view" in str(w.message)]


def test_no_unit_hands_out_a_view_that_could_lose_its_hook(ranks: RankPool) -> None:
    assert ranks(2, warned_views) == [[], []]
