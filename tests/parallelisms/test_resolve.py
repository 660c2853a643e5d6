"""A plan is checked against the model: nothing unmatched, uncovered, untied or indivisible."""

import dataclasses

import pytest
import torch

from models.decoder import DECODER_PLAN, DecoderLM, decoder_plan
from models.plan import ModelPlan, match
from parallelisms import ParallelDims
from parallelisms.resolve import resolve
from tests.parity.cases import Case, model_config


def meta_model(case: Case = Case()) -> DecoderLM:  # noqa: B008  frozen
    with torch.device("meta"):
        return DecoderLM(model_config(case))


def dims(replicate: int = 1, shard: int = 1, tp: int = 1) -> ParallelDims:
    return ParallelDims(dp_replicate=replicate, dp_shard=shard, tp=tp)


def test_a_wildcard_stays_within_one_part_of_a_name() -> None:
    names = ["a.0.q_proj", "a.0.b.q_proj", "a.1.k_proj", "a.1.o_proj"]
    assert match(names, "a.*.[qk]_proj") == ["a.0.q_proj", "a.1.k_proj"]


def test_patterns_expand_in_model_order() -> None:
    resolved = resolve(meta_model(), DECODER_PLAN, dims())
    assert resolved.blocks == tuple(f"model.layers.{i}" for i in range(3))
    assert resolved.last == ("model.norm", "lm_head")
    assert resolved.attention[2] == "model.layers.2.self_attn.core"
    assert resolved.masks == ("masks.full_attention",)
    assert resolved.roles["model.layers.2.self_attn.v_proj"] == "columns"


@pytest.mark.parametrize(
    "wrong",
    [
        ModelPlan(tensor={"model.layers.*.self_atn.o_proj": "rows"}),
        ModelPlan(blocks=("model.leyers.*",)),
        ModelPlan(first=("model.embed",)),
        ModelPlan(last=("model.norms",)),
        ModelPlan(attention=("model.layers.*.core",)),
        ModelPlan(masks=("model.masks",)),
    ],
)
def test_a_pattern_without_a_match_is_an_error_with_the_nearest_names(wrong: ModelPlan) -> None:
    with pytest.raises(ValueError, match=r"plan pattern '.*' matches nothing.*nearest names"):
        resolve(meta_model(), DECODER_PLAN | wrong, dims())


def test_a_parameter_without_a_role_is_an_error_that_names_it() -> None:
    roles = {k: v for k, v in DECODER_PLAN.tensor.items() if not k.endswith("down_proj")}
    plan = dataclasses.replace(DECODER_PLAN, tensor=roles)
    with pytest.raises(ValueError, match=r"no tensor role .*layers\.0\.mlp\.down_proj\.weight"):
        resolve(meta_model(), plan, dims())


def test_shared_parameters_that_are_not_listed_as_tied_are_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"lm_head\.weight and model\.embed_tokens\.weight are one"
    ):
        resolve(meta_model(Case(tied=True)), DECODER_PLAN, dims())


def test_a_tie_that_the_model_does_not_have_is_an_error() -> None:
    plan = decoder_plan(model_config(Case(tied=True)))
    with pytest.raises(ValueError, match="holds two tensors"):
        resolve(meta_model(), plan, dims())
    missing = ModelPlan(tied=(("model.embed_tokens.weight", "lm_head.weights"),))
    with pytest.raises(ValueError, match=r"has no lm_head\.weights"):
        resolve(meta_model(), DECODER_PLAN | missing, dims())


def test_key_value_heads_that_tp_does_not_divide_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError) as error:
        resolve(meta_model(), DECODER_PLAN, dims(tp=8))
    text = str(error.value)
    assert "parallelism.tensor_parallel_degree = 8" in text
    assert "4 key/value heads of model.layers.0.self_attn.k_proj" in text
    assert "use one of 1, 2, 4" in text


def test_channels_that_tp_does_not_divide_are_refused() -> None:
    config = dataclasses.replace(model_config(Case()), intermediate_size=50)
    with torch.device("meta"):
        model = DecoderLM(config)
    with pytest.raises(ValueError, match=r"does not divide the 50 channels of model\.layers\.0"):
        resolve(model, DECODER_PLAN, dims(tp=4))


def test_an_uneven_vocabulary_is_allowed_unless_a_rank_would_hold_none() -> None:
    resolve(meta_model(Case(vocab=61)), DECODER_PLAN, dims(tp=4))
    with pytest.raises(ValueError, match=r"5 rows of model\.embed_tokens over 4 ranks"):
        resolve(meta_model(Case(vocab=5)), DECODER_PLAN, dims(tp=4))


def test_the_table_adds_up_to_the_bytes_of_one_rank() -> None:
    model = meta_model()
    whole = sum(p.numel() * 4 for p in model.parameters())
    assert sum(r.bytes_per_rank for r in resolve(model, DECODER_PLAN, dims()).rows) == whole
    rows = resolve(model, DECODER_PLAN, dims(shard=2, tp=2)).rows
    split = sum(r.bytes_per_rank for r in rows)
    norms = sum(r.bytes_per_rank for r in rows if r.role == "per_token")
    assert split == (whole - 2 * norms) // 4 + norms


def test_a_tied_weight_counts_once() -> None:
    case = Case(tied=True)
    resolved = resolve(meta_model(case), decoder_plan(model_config(case)), dims())
    sizes = {row.pattern: row.bytes_per_rank for row in resolved.rows}
    assert sizes["lm_head"] == 0
    assert sizes["model.embed_tokens"] == 64 * 32 * 4


def test_the_table_shows_pattern_modules_and_placement() -> None:
    text = resolve(meta_model(), DECODER_PLAN, dims(replicate=2, shard=2, tp=2)).table()
    line = next(row for row in text.splitlines() if "[qkv]_proj" in row)
    assert "columns" in line and " 9 " in line
    assert "tp: dim 0 / 2, fsdp: dim 0 / 2, copies: 2" in line
