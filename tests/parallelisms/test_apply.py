"""What cannot be combined is refused with the reason, and names stay clean."""

from typing import Any

import pytest
import torch

from models.decoder import DecoderLM
from parallelisms import ParallelConfig, ParallelDims
from parallelisms.activation_checkpoint import ActivationCheckpointConfig
from parallelisms.apply import check
from parallelisms.compile import CompileConfig
from tests.parity.cases import Case, build_case, model_config
from tests.ranks import RankPool


def check_with(
    *, tp: int = 2, parallel: dict[str, Any] | None = None, mode: str = "none", **compile: Any
) -> None:
    dims = ParallelDims(dp_replicate=1, dp_shard=1, tp=tp)
    options: dict[str, Any] = parallel or {}
    checkpointing = ActivationCheckpointConfig(mode=mode)  # pyright: ignore[reportArgumentType]
    check(ParallelConfig(**options), checkpointing, CompileConfig(**compile), dims)


@pytest.mark.parametrize("compile", [{}, {"enable": True, "components": ["loss"]}])
def test_a_memory_budget_needs_compiled_blocks(compile: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"memory_budget.*compile\.enable = true"):
        check_with(mode="memory_budget", **compile)
    check_with(mode="memory_budget", enable=True, backend="aot_eager")


@pytest.mark.parametrize(
    ("parallel", "compile", "reason"),
    [
        ({"sequence_parallel": False}, {"enable": True}, "sequence_parallel, which is false"),
        ({}, {}, "the compiler does it"),
        ({}, {"enable": True, "backend": "aot_eager"}, "the compiler does it"),
    ],
)
def test_overlapped_tensor_parallelism_says_what_it_lacks(
    parallel: dict[str, Any], compile: dict[str, Any], reason: str
) -> None:
    asked = {"enable_async_tensor_parallel": True, **parallel}
    with pytest.raises(ValueError, match=rf"enable_async_tensor_parallel = true.*{reason}"):
        check_with(tp=2, parallel=asked, **compile)
    check_with(tp=1, parallel=asked, **compile)  # switched off, so it stands


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA devices")
def test_overlapped_tensor_parallelism_is_refused_without_cuda() -> None:
    with pytest.raises(ValueError, match="it needs CUDA devices"):
        check_with(parallel={"enable_async_tensor_parallel": True}, enable=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA devices")
def test_copy_engines_are_refused_without_cuda_where_there_is_something_to_gather() -> None:
    asked = ParallelConfig(fsdp_copy_engine=True)
    settings = (ActivationCheckpointConfig(), CompileConfig())
    with pytest.raises(ValueError, match=r"fsdp_copy_engine = true.*set it to false"):
        check(asked, *settings, ParallelDims.of(asked, 2))
    check(asked, *settings, ParallelDims.of(asked, 1))


def test_copy_engines_are_refused_without_the_nccl_that_has_them() -> None:
    asked = ParallelConfig(fsdp_copy_engine=True)
    whole = (asked, ActivationCheckpointConfig(), CompileConfig(), ParallelDims.of(asked, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr("torch.cuda.nccl.version", lambda: (2, 27, 5))
        with pytest.raises(ValueError, match=r"needs NCCL 2\.28, and torch has \(2, 27, 5\)"):
            check(*whole)
        patch.setattr("torch.cuda.nccl.version", lambda: (2, 28, 9))
        check(*whole)


def test_unknown_compile_settings_are_refused_by_name() -> None:
    wrong: Any = ["model", "optimizer"]
    with pytest.raises(ValueError, match=r"compile\.components.*'optimizer' is not a component"):
        CompileConfig(components=wrong)
    with pytest.raises(ValueError, match=r"compile\.backend = 'inductr' is not a backend"):
        CompileConfig(enable=True, backend="inductr")


def names_of(rank: int, world_size: int, case: Case) -> tuple[list[str], list[str]]:
    model, _ = build_case(case)
    return list(model.state_dict()), [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    "case",
    [
        Case(shard=2, checkpointing="full", backend="aot_eager"),
        Case(tp=2, checkpointing="op", backend="aot_eager"),
        Case(shard=2, tp=2, checkpointing="2", tied=True),
    ],
    ids=str,
)
def test_parameter_names_are_those_of_the_plain_model(ranks: RankPool, case: Case) -> None:
    with torch.device("meta"):
        model = DecoderLM(model_config(case))
    expected = (list(model.state_dict()), [name for name, _ in model.named_parameters()])
    assert ranks(case.world_size, names_of, case) == [expected] * case.world_size
