"""Adapters on every kind of plan have the gradients that one fp32 process gives them."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.adapters import fill_adapters
from engine.verify import parity
from engine.verify.adapted import AdapterJob
from engine.verify.case import Case
from engine.verify.parity import BF16_ARITHMETIC, FP32_REORDERED_SUM, Comparison
from engine.verify.subject import TINY, Subject, adapters_of
from models.adapters import adapt
from models.families.hf import FAMILY as HF
from models.initialise import initial_slice
from models.layers.lora import adapter_of
from models.registry import load_family
from models.wrapped.initial import initial_values
from parallelisms import ParallelConfig, ParallelDims, parallelize
from parallelisms.compile import CompileConfig
from parallelisms.fsdp import PrecisionConfig
from parallelisms.materialise import fill, materialise
from tests.parity.wrapped_cases import MODELS, SEED, SHAPE, packed_rows
from tests.ranks import RankPool

FUSED = {**SHAPE, "model_type": "phi3"}
"""Phi-3 as transformers has it: queries, keys and values are one linear."""

CASES = [
    Case(replicate=2, shard=2, adapter="lora", accumulate=2),
    Case(tp=2, adapter="dora", bias=True, tied=True, vocab=61),
    Case(tp=2, sequence=False, adapter="lora", bias=True, checkpointing="full"),
    Case(shard=2, tp=2, adapter="dora", checkpointing="op", offload=True, accumulate=2),
    Case(cp=2, adapter="dora"),
]
"""Every plan has a second adapter, which is LoRA."""


def run(rank: int, world_size: int, subject: Subject, case: Case) -> Comparison:
    dims = ParallelDims.of(parity.parallel_config(case), world_size).build("cpu")
    return AdapterJob(cases=(case,), device_type="cpu", subject=subject).compare(case, dims)


def compiled(rank: int, world_size: int, subject: Subject, case: Case) -> Comparison:
    """Compare one projection of each kind, since a compiler takes its time for every adapter."""
    ends = ("q_proj", "down_proj")
    few = [replace(spec, targets=ends) for spec in adapters_of(case)[:1]]
    with patch("engine.verify.parity.adapters_of", lambda case: few):
        return parity.run_case(case, subject=subject)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_new_adapters_and_merged_weights_in_each_layout(
    ranks: RankPool, case: Case
) -> None:
    for result in ranks(case.world_size, run, TINY, case):
        result.check()


def test_compiled_blocks_under_tensor_parallelism(ranks: RankPool) -> None:
    case = Case(tp=2, adapter="dora", backend="aot_eager")
    subject = replace(TINY, config=replace(TINY.config, num_layers=1))
    for result in ranks(2, compiled, subject, case, timeout_seconds=280):
        result.check()


def test_phi3_under_tensor_parallelism(ranks: RankPool) -> None:
    sizes = load_family("phi3").flavors["debugmodel"]
    config = replace(TINY.config, rope=sizes.rope)
    for result in ranks(
        2, run, replace(TINY, family_name="phi3", config=config), Case(tp=2, adapter="dora")
    ):
        result.check()


def held(rank: int, world_size: int) -> tuple[dict[str, set[torch.dtype]], Comparison]:
    """Return the dtypes that a step leaves of base and adapters, and of their gradients."""
    case = Case(shard=2, adapter="dora", bfloat16=True)
    model, dims = parity.build_case(case)
    loss = parity.train(model, dims, case)
    found: dict[str, set[torch.dtype]] = {}
    for name, parameter in model.named_parameters():
        owner = "base" if adapter_of(name) is None else "adapter"
        found.setdefault(owner, set()).add(parameter.dtype)
        if parameter.grad is not None:
            found.setdefault(f"{owner} gradient", set()).add(parameter.grad.dtype)
    return found, parity.compare(model, loss, case)


def test_the_base_is_kept_in_the_dtype_of_compute_and_has_no_gradient(ranks: RankPool) -> None:
    for found, comparison in ranks(2, held):
        assert found == {
            "base": {torch.bfloat16},
            "adapter": {torch.float32},
            "adapter gradient": {torch.float32},
        }
        comparison.check(BF16_ARITHMETIC)


def held_where_some_are_frozen(rank: int, world_size: int) -> set[torch.dtype]:
    """Return the dtypes of the adapters of a bf16 model that trains only some of them."""
    case = Case(adapter="lora", bfloat16=True)
    model, _ = parity.build_case(case, frozen=("regex:.*lora_A.*",), filled=False)
    return {p.dtype for name, p in model.named_parameters() if adapter_of(name) is not None}


def test_adapters_that_are_not_trained_keep_the_bits_of_their_file(ranks: RankPool) -> None:
    assert ranks(1, held_where_some_are_frozen) == [{torch.float32}]


def with_dropout(rank: int, world_size: int, case: Case) -> dict[str, Tensor]:
    """Return the gradients of an adapter whose every layer sees whole inputs under any plan."""
    spec = replace(adapters_of(case)[0], dropout=0.3, targets=("[qkv]_proj", "gate_proj"))
    with patch("engine.verify.parity.adapters_of", lambda case: [spec]):
        model, dims = parity.build_case(case)
        torch.manual_seed(11)
        parity.train(model, dims, case)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        name: grad.full_tensor() if isinstance(grad, DTensor) else grad
        for name, grad in gradients.items()
    }


def test_recomputed_blocks_and_tensor_parallel_ranks_drop_the_same_channels(
    ranks: RankPool,
) -> None:
    expected = ranks(1, with_dropout, Case(adapter="dora"))[0]
    cases = [Case(adapter="dora", checkpointing=mode) for mode in ("full", "op")]
    for case in (*cases, Case(tp=2, adapter="dora")):
        found = ranks(case.world_size, with_dropout, case)[0]
        assert found.keys() == expected.keys()
        for name, wanted in expected.items():
            error = (found[name] - wanted).abs().max() / wanted.abs().max()
            assert error < FP32_REORDERED_SUM, (case, name)


def initial_bits(rank: int, world_size: int, case: Case) -> dict[str, Tensor]:
    model, _ = parity.build_case(case)
    fill_adapters(model, seed=5)
    return {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
        if adapter_of(name) is not None
    }


def test_new_adapters_are_the_same_bits_in_every_layout(ranks: RankPool) -> None:
    one = ranks(1, initial_bits, Case(adapter="dora"))[0]
    for layout in (Case(tp=2, adapter="dora"), Case(shard=2, adapter="dora")):
        for found in ranks(2, initial_bits, layout):
            assert found.keys() == one.keys()
            assert not [name for name in one if not torch.equal(found[name], one[name])]


def wrapped(hf: dict[str, Any], dims: ParallelDims | None, layout: dict[str, Any]) -> nn.Module:
    """Return transformers' module with adapters that have an effect, laid out if `dims` say how."""
    sizes = HF.config_from_hf(hf)
    with torch.device("meta"):
        model = HF.build(sizes)
    plan = adapt(model, sizes.plan, adapters_of(Case(adapter="dora")))
    if dims is not None:
        parallelize(
            model,
            plan,
            dims,
            parallel=ParallelConfig(**layout),
            precision=PrecisionConfig(param_dtype=torch.float32),
            activation_checkpoint=parity.checkpoint_config("none"),
            compile=CompileConfig(),
        )
    materialise(model, "cpu")
    base = initial_values(model, sizes, seed=SEED)

    def draw(name: str, slices: tuple[slice, ...]) -> Tensor:
        if ".lora_B." not in name:
            return base(name, slices)
        shape = model.get_parameter(name).shape
        return initial_slice(name, shape, parity.ADAPTED, slices, SEED)

    fill(model, draw)
    return model


def wrapped_gradients(rank: int, world_size: int, hf: dict[str, Any]) -> Comparison:
    layout = {"tensor_parallel_degree": 2, "sequence_parallel": False}
    dims = ParallelDims.of(ParallelConfig(**layout), world_size).build("cpu")
    model, alone = wrapped(hf, dims, layout), wrapped(hf, None, {})

    def trained(model: nn.Module) -> float:
        rows = packed_rows()
        loss = -model(rows.pop("tokens_BT"), **rows).sum()
        loss.backward()
        return loss.item()

    loss, reference_loss = trained(model), trained(alone)
    expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    return parity.compare_with(model, loss, reference_loss, expected)


@pytest.mark.parametrize("hf", [FUSED, MODELS["granite"]], ids=["fused phi3", "granite"])
def test_wrapped_models_under_tensor_parallelism(ranks: RankPool, hf: dict[str, Any]) -> None:
    for result in ranks(2, wrapped_gradients, hf):
        result.check()
