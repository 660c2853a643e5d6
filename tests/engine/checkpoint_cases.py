"""A tiny run on several ranks, and what the checkpoint tests do with it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from engine.checkpoint import CheckpointConfig, Checkpointer
from engine.checkpoint_state import TrainingState, model_tensors
from engine.hf_io import HfAssets
from engine.manifest import FaultHook, no_fault
from models.registry import load_family
from parallelisms.mesh import ParallelDims
from tests.parity.cases import Case, build_case, model_config, train

ONE = Case()
FSDP4 = Case(shard=4)
TP2 = Case(tp=2)
FSDP2_TP2 = Case(shard=2, tp=2)
HSDP = Case(replicate=2, shard=2)

FILES = {"config.toml": b"[job]\n", "provenance.json": b"{}"}


def config(**values: Any) -> CheckpointConfig:
    return CheckpointConfig(**{"enable": True, "last_save_model_only": False, **values})


def assets(case: Case) -> HfAssets:
    """The Hugging Face side of a case's model, without a tokenizer."""
    family, sizes = load_family("llama3"), model_config(case)
    return HfAssets(
        key_map=family.key_map(sizes),
        config=family.config_to_hf(sizes),
        save_tokenizer=lambda folder: None,
    )


def start(case: Case, **counters: int | float) -> tuple[TrainingState, ParallelDims]:
    """Build a run at its initial values."""
    model, dims = build_case(case)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    state = TrainingState(
        model=model,
        optimizer=optimizer,
        counters={"step": 0, "rows_consumed": 0, **counters},
        data_fingerprint="rows",
    )
    return state, dims


def step(state: TrainingState, dims: ParallelDims, case: Case) -> float:
    """Train one step and return its loss."""
    assert state.optimizer is not None
    loss = train(state.model, dims, case)
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.counters["step"] += 1
    state.counters["rows_consumed"] += 8
    return loss


def gathered(state: TrainingState) -> dict[str, Tensor]:
    """Return whole parameters and optimizer state by name; all ranks call it."""
    whole: dict[str, Tensor] = {}
    names = {id(tensor): name for name, tensor in model_tensors(state.model).items()}
    for name, tensor in model_tensors(state.model).items():
        whole[name] = tensor.detach()
    assert state.optimizer is not None
    for parameter, slots in state.optimizer.state.items():
        for slot, tensor in slots.items():
            whole[f"{names[id(parameter)]}.{slot}"] = tensor
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in whole.items()}
    return {n: t.clone() for n, t in whole.items()}


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def save_case(
    rank: int, world_size: int, case: Case, folder: Path, values: dict[str, Any], steps: int = 2
) -> tuple[dict[str, Tensor], float]:
    """Train `steps` steps, save, and return the whole state and the next step's loss."""
    state, dims = start(case)
    checkpointer = Checkpointer(config(**values), folder, files=FILES, hf=assets(case))
    for _ in range(steps):
        step(state, dims, case)
    checkpointer.save(steps, state)
    saved = gathered(state)
    loss = step(state, dims, case)  # also disturbs the parameters under a background save
    checkpointer.close()
    return saved, loss


def load_case(
    rank: int, world_size: int, case: Case, folder: Path, values: dict[str, Any]
) -> tuple[int | None, dict[str, Tensor], dict[str, int | float], float]:
    """Load into a fresh run; return step, whole state, counters, and the next step's loss."""
    state, dims = start(case)
    checkpointer = Checkpointer(config(**values), folder, files=FILES, hf=assets(case))
    found = checkpointer.load(state)
    loaded, counters = gathered(state), dict(state.counters)
    checkpointer.close()
    return found, loaded, counters, step(state, dims, case)


def flip_bit(path: Path, position: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def toy(seed: int = 0, *, width: int = 8, dtype: torch.dtype = torch.float32) -> TrainingState:
    """A run of two small layers in this process alone, one step old."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Linear(width, 2)).to(dtype)
    state = TrainingState(
        model=model,
        optimizer=AdamW(model.parameters(), lr=1e-2),
        counters={"step": 0, "rows_consumed": 0},
        data_fingerprint="rows",
    )
    toy_step(state)
    return state


def toy_step(state: TrainingState) -> None:
    assert state.optimizer is not None
    rows = torch.ones(3, 4, dtype=next(state.model.parameters()).dtype)
    state.model(rows).sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.counters["step"] += 1
    state.counters["rows_consumed"] += 3


def toy_checkpointer(folder: Path, hook: FaultHook = no_fault, **values: Any) -> Checkpointer:
    return Checkpointer(config(**values), folder, files=FILES, hook=hook)


def saved_toy(folder: Path, *steps: int, **values: Any) -> dict[str, Tensor]:
    """Save a toy run at each of `steps`; return the state at the last one."""
    state = toy()
    checkpointer = toy_checkpointer(folder, **values)
    for step in steps:
        while state.counters["step"] < step:
            toy_step(state)
        checkpointer.save(step, state)
    checkpointer.close()
    return gathered(state)


def loaded_toy(folder: Path, **values: Any) -> tuple[int | None, TrainingState]:
    """Load into a toy run with other values; return what the load returned, and the run."""
    state = toy(seed=1)
    checkpointer = toy_checkpointer(folder, **values)
    step = checkpointer.load(state)
    checkpointer.close()
    return step, state
