"""A model wide enough for low precision, and what the tests of it do on each rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.checkpoint_state import TrainingState, collect, restore
from engine.checkpoint_storage import RankGroup, write_tensors
from engine.optim import OptimizerConfig, build_optimizer
from engine.verify.case import parse
from engine.verify.parity import Comparison, batch, build_case, compare_with, local_rows, train
from engine.verify.subject import TINY
from parallelisms.low_precision import Float8, follow_weights
from parallelisms.mesh import ParallelDims
from parallelisms.nf4 import NF4Weight, local_part, num_bytes
from parallelisms.stored import full_precision

WIDE = replace(
    TINY,
    config=replace(TINY.config, num_layers=2, hidden_size=64, head_dim=8, intermediate_size=256),
)
LINEARS = "regex:.*_proj.weight"

Gradients = dict[str, Tensor]


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of all of a tensor; every rank calls this."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def gradients(model: nn.Module) -> Gradients:
    """Return the whole gradient of every parameter that has one; every rank calls this."""
    named = model.named_parameters()
    return {name: whole(p.grad) for name, p in named if p.grad is not None}


def float8_steps(
    rank: int, world_size: int, plan: str, float8: Float8, steps: int
) -> tuple[list[float], Gradients]:
    """Train with float8 layers; return the losses and the first step's gradients."""
    case = parse(plan)
    model, dims = build_case(case, subject=WIDE, float8=float8)
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(lr=1e-3))
    if float8.precomputes_scales:
        follow_weights(model, optimizer)
    losses: list[float] = []
    first: Gradients = {}
    for _ in range(steps):
        losses.append(train(model, dims, case, WIDE))
        first = first or gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return losses, first


def packed_step(
    rank: int, world_size: int, plan: str, expected: tuple[float, Gradients] | None
) -> tuple[Comparison | None, float, Gradients, float]:
    """Train one step on packed weights; with `expected` compare.

    Returns the comparison, the loss, the gradients and the bytes a packed weight takes.
    """
    case = parse(plan)
    frozen = (LINEARS,) if case.adapter == "none" else ()
    model, dims = build_case(case, subject=WIDE, frozen=frozen, packs_frozen=True)
    loss = train(model, dims, case, WIDE)
    packed = [p for p in model.parameters() if isinstance(local_part(p), NF4Weight)]
    size = sum(map(num_bytes, packed)) / sum(local_part(p).numel() for p in packed)
    found = gradients(model)
    if expected is None:
        return None, loss, found, size
    trained = nn.Module()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained.register_parameter(name.replace(".", "/"), parameter)
    renamed = {name.replace(".", "/"): value for name, value in expected[1].items()}
    return compare_with(trained, loss, expected[0], renamed), loss, found, size


def plain_step(rank: int, world_size: int) -> tuple[float, Gradients, int]:
    """Train one step on the values that packed weights stand for, frozen; one process.

    Also returns how many dequantised weights the packed model's backward would find in memory.
    """
    case = parse("one")
    packed, dims = build_case(case, subject=WIDE, frozen=(LINEARS,), packs_frozen=True)
    plain, _ = build_case(case, subject=WIDE, frozen=(LINEARS,))
    with torch.no_grad():
        for target, source in zip(plain.parameters(), packed.parameters(), strict=True):
            local_part(target).copy_(local_part(full_precision(source)))
    alive = _kept_weights(packed, dims)
    return train(plain, dims, case, WIDE), gradients(plain), alive


def _kept_weights(model: nn.Module, dims: ParallelDims) -> int:
    """Count the matrices of a block's shape whose memory is held between forward and backward."""
    shapes = {tuple(p.shape) for n, p in model.named_parameters() if n.endswith("_proj.weight")}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) in shapes or tuple(reversed(tensor.shape)) in shapes:
            saved.append(tensor)
        return tensor

    rows = local_rows(batch(parse("one"), WIDE), dims, parse("one"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps_BT = model(rows.pop("tokens_BT"), **rows)
    assert len(saved) >= len(shapes), "the products save their weights"
    head = model.get_parameter("lm_head.weight").data_ptr()  # is trained, and stays gathered
    held = sum(t.untyped_storage().size() > 0 and t.data_ptr() != head for t in saved)
    logps_BT.sum().backward()
    model.zero_grad()
    return held


def save_steps(
    rank: int, world_size: int, kind: str, folder: Path, last: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Train to step 2 and save it, or read it, and go on to step `last`; return what both hold.

    `kind` is float8 or nf4, both with 8-bit state.
    """
    case = parse(f"fsdp{world_size}" if world_size > 1 else "one")
    choice: dict[str, Any] = {"packs_frozen": True, "frozen": ("regex:.*[qkvo]_proj.weight",)}
    if kind == "float8":
        choice = {"float8": Float8(emulates=True, gathers_float8=True)}
    model, dims = build_case(case, subject=WIDE, filled=not folder.exists(), **choice)
    config = OptimizerConfig(name="AdamW8bit", lr=1e-2)
    state = TrainingState(model=model, optimizer=build_optimizer(model.named_parameters(), config))
    ranks = RankGroup()

    def train_steps(num_steps: int) -> list[Tensor]:
        assert state.optimizer is not None
        for _ in range(num_steps):
            train(model, dims, case, WIDE)
            state.optimizer.step()
            state.optimizer.zero_grad()
        slots = [v for one in state.optimizer.state.values() for _, v in sorted(one.items())]
        values = [full_precision(p.detach()) for p in model.parameters()]
        return [whole(tensor) for tensor in (*values, *slots)]

    if folder.exists():
        restore(state, folder, ranks, parts=("model", "optimizer"), widen=False)
        saved = train_steps(0)
    else:
        saved = train_steps(2)
        tensors = {n: t for n, t in collect(state, rank).items() if not n.startswith("rng.")}
        assert all(type(local_part(t)) is Tensor for t in tensors.values())
        if rank == 0:
            folder.mkdir()
        ranks.gather(None)
        write_tensors(tensors, folder, ranks)
    ranks.close()
    return saved, train_steps(last - 2)
