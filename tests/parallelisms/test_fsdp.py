"""Sharding units: what is gathered when, and in which dtype."""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _symmetric_memory
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallelisms.fsdp import PrecisionConfig
from tests.engine.training_cases import clip_gradients, local_part
from tests.parity.cases import Case, batch, build_case, compare, forward, train
from tests.ranks import RankPool


def units(rank: int, world_size: int, case: Case) -> list[str]:
    model, _ = build_case(case)
    return [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]


def test_units_are_first_each_block_last_together_and_the_model(ranks: RankPool) -> None:
    blocks = [f"model.layers.{i}" for i in range(3)]
    found = ranks(2, units, Case(shard=2))[0]
    assert found == ["", "model.embed_tokens", *blocks, "model.norm", "lm_head"]


def test_tied_modules_belong_to_the_models_own_unit(ranks: RankPool) -> None:
    found = ranks(2, units, Case(shard=2, tied=True))[0]
    assert found == ["", *(f"model.layers.{i}" for i in range(3))]


def gathered_after_forward(rank: int, world_size: int, case: Case) -> tuple[bool, ...]:
    model, dims = build_case(case)
    rows = batch(case)
    mine = {k: v.chunk(dims.batch_degree)[dims.batch_rank] for k, v in rows.items()}
    forward(model, mine, case).sum()
    names = ("model.embed_tokens", "model.layers.0.mlp.up_proj", "model.norm", "lm_head")
    return tuple(not isinstance(model.get_parameter(f"{n}.weight"), DTensor) for n in names)


@pytest.mark.parametrize(
    ("reshard", "expected"),
    [
        ("default", (False, False, True, True)),
        ("always", (False, False, False, False)),
        ("never", (True, True, True, True)),
    ],
)
def test_reshard_after_forward_decides_what_stays_gathered(
    ranks: RankPool, reshard: str, expected: tuple[bool, ...]
) -> None:
    assert ranks(2, gathered_after_forward, Case(shard=2, reshard=reshard)) == [expected] * 2


def offloaded(rank: int, world_size: int) -> None:
    case = Case(shard=2, offload=True)
    model, dims = build_case(case)
    train(model, dims, case)
    kept, _ = build_case(Case(shard=2))
    train(kept, dims, Case(shard=2))
    steps = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, kept)]
    for own, optimizer in zip((model, kept), steps, strict=True):
        clip_gradients(own.parameters(), 0.5)
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu"
        other = kept.get_parameter(name)
        assert isinstance(parameter, DTensor) and isinstance(other, DTensor)
        assert torch.equal(parameter.to_local(), other.to_local()), name


def test_offloading_trains_to_the_same_bits(ranks: RankPool) -> None:
    ranks(2, offloaded)


def gradient_of_equal_rows(rank: int, world_size: int, case: Case) -> None:
    model, dims = build_case(case)
    rows = {k: v[:2] for k, v in batch(case).items()}
    forward(model, rows, case).sum().backward()
    alone, _ = gradients_alone(case)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        expected = alone[name] * dims.batch_degree
        torch.testing.assert_close(parameter.grad.full_tensor(), expected, rtol=1e-5, atol=1e-5)


def gradients_alone(case: Case) -> tuple[dict[str, torch.Tensor], nn.Module]:
    from models.decoder import DecoderLM
    from parallelisms.materialise import fill
    from tests.parity.cases import model_config, start_values

    config = model_config(case)
    model = DecoderLM(config)
    fill(model, start_values(model, config))
    rows = {k: v[:2] for k, v in batch(case).items()}
    forward(model, rows, case).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, model


@pytest.mark.parametrize(
    "case", [Case(shard=2), Case(replicate=2), Case(replicate=2, shard=2), Case()], ids=str
)
def test_gradients_are_added_over_ranks_not_averaged(ranks: RankPool, case: Case) -> None:
    ranks(case.world_size, gradient_of_equal_rows, case)


def second_step(rank: int, world_size: int, case: Case) -> None:
    model, dims = build_case(case)
    train(model, dims, case)
    for parameter in model.parameters():
        parameter.grad = None
    compare(model, train(model, dims, case), case).check()


@pytest.mark.parametrize(
    "case",
    [
        Case(shard=2),
        Case(shard=2, tp=2, tied=True, checkpointing="op"),
        Case(replicate=2, tp=2, reshard="never"),
    ],
    ids=str,
)
def test_a_second_backward_gives_the_same_gradients(ranks: RankPool, case: Case) -> None:
    ranks(case.world_size, second_step, case)


def validation_between_steps(rank: int, world_size: int, case: Case) -> None:
    model, dims = build_case(case)
    rows = batch(case)
    mine = {k: v.chunk(dims.batch_degree)[dims.batch_rank] for k, v in rows.items()}
    train(model, dims, case)
    for parameter in model.parameters():
        parameter.grad = None
    with torch.no_grad():
        forward(model, mine, case)
    compare(model, train(model, dims, case), case).check()


@pytest.mark.parametrize("case", [Case(shard=2, tied=True), Case(shard=2, tp=2)], ids=str)
def test_a_forward_without_gradient_between_steps_changes_nothing(
    ranks: RankPool, case: Case
) -> None:
    ranks(case.world_size, validation_between_steps, case)


def kept_in_place(rank: int, world_size: int, case: Case) -> tuple[bool, bool]:
    """Say whether a frozen and a trained weight are read where the rank keeps them."""
    model, dims = build_case(case, frozen=("model.layers.0.mlp.up_proj",))
    found: dict[str, bool] = {}
    for name in ("up_proj", "gate_proj"):
        linear = model.get_submodule(f"model.layers.0.mlp.{name}")
        place = local_part(linear.weight).data_ptr()

        def note(module: nn.Module, args: tuple[torch.Tensor], name=name, place=place) -> None:
            found[name] = local_part(module.get_parameter("weight")).data_ptr() == place

        linear.register_forward_pre_hook(note)
    train(model, dims, case)
    return found["up_proj"], found["gate_proj"]


@pytest.mark.parametrize(
    ("case", "in_place"),
    [
        (Case(), True),
        (Case(replicate=2), True),
        (Case(tp=2), True),
        (Case(shard=2), False),
        (Case(bfloat16=True), False),
        (Case(offload=True), False),
    ],
    ids=lambda value: str(value),
)
def test_frozen_weights_that_are_whole_are_not_copied(
    ranks: RankPool, case: Case, in_place: bool
) -> None:
    assert set(ranks(case.world_size, kept_in_place, case)) == {(in_place, False)}


def test_the_dtypes_are_described_in_one_line() -> None:
    text = PrecisionConfig(cpu_offload=True).describe()
    assert text == "compute bfloat16, master float32, reduce float32, masters in host memory"


def gathered_through_symmetric_memory(rank: int, world_size: int, case: Case) -> None:
    # The CPU's memory stands in for the pool; each buffer must be made known before it is used.
    windows: list[tuple[int, str]] = []
    filled: list[int] = []

    def rendezvous(tensor: Tensor, group: str) -> None:
        windows.append((tensor.data_ptr(), group))

    def all_gather(output: Tensor, input: Tensor, **more: Any) -> Any:
        assert output.data_ptr() <= input.data_ptr() < output.data_ptr() + output.nbytes
        filled.append(output.data_ptr())
        return gather(output, input, **more)

    gather = dist.all_gather_into_tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr("torch.cuda.nccl.version", lambda: (2, 28, 9))
        patch.setattr(torch.cuda, "use_mem_pool", nullcontext)
        patch.setattr(torch.cuda, "current_device", lambda: None)
        patch.setattr(dist, "barrier", lambda **more: None)
        patch.setattr(dist, "all_gather_into_tensor", all_gather)
        for name, stand_in in (("get_mem_pool", str), ("set_backend", str)):
            patch.setattr(_symmetric_memory, name, stand_in)
        patch.setattr(_symmetric_memory, "rendezvous", rendezvous)
        patch.setenv("NCCL_CTA_POLICY", "")  # so that it is as it was in the end
        del os.environ["NCCL_CTA_POLICY"]
        model, dims = build_case(case)
        assert os.environ["NCCL_CTA_POLICY"] == "2"
        loss = train(model, dims, case)
    mesh = dims.mesh("fsdp")
    shards = mesh.get_group(mesh.ndim - 1).group_name
    assert {group for _, group in windows} == {shards}
    assert [pointer for pointer, _ in windows] == filled
    assert len(filled) > len(units(rank, world_size, replace(case, copy_engine=False)))
    compare(model, loss, case).check()


@pytest.mark.parametrize(
    "case",
    [Case(shard=2, copy_engine=True), Case(replicate=2, shard=2, copy_engine=True, accumulate=2)],
    ids=str,
)
def test_copy_engines_gather_every_unit_into_symmetric_memory(ranks: RankPool, case: Case) -> None:
    ranks(case.world_size, gathered_through_symmetric_memory, case)


@pytest.mark.gpu
@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_copy_engines_of_gpus_give_single_device_gradients() -> None:
    """The plan that users would check it with, in processes of its own."""
    command = [sys.executable, "-m", "engine.verify", "parity", "--device=cuda"]
    done = subprocess.run([*command, "--plan=fsdp2-copy-engine"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
