"""The memory of a step is told by part, once, from sizes and the allocator's counters."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from engine import memory
from engine.memory import MemoryWatch, bytes_on
from engine.metrics import GIB
from scripts.check_config import fake_process_group

CPU = torch.device("cpu")


def small_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].requires_grad_(False)
    return model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_second_step_is_measured_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = small_model()
    watch, rows = MemoryWatch(model, optimizer, CPU), []
    with caplog.at_level(logging.INFO, "tessera"):
        for _ in range(3):
            with watch.watching():
                step(model, optimizer)
            rows.append(watch.take())
    linear = (64 * 64 + 64) * 4
    assert rows == [
        {},
        {
            "memory/parameters_gib": 2 * linear / GIB,
            "memory/gradients_gib": linear / GIB,
            "memory/optimizer_gib": (2 * linear + 2 * 4) / GIB,  # a step's number for each tensor
            "memory/activations_gib": None,
            "memory/temporary_gib": None,
            "memory/peak_allocated_gib": None,
        },
        {},
    ]
    assert caplog.text.count("memory in GiB") == 1


def test_on_a_gpu_the_allocator_says_what_forward_keeps_and_what_else_the_peak_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer = small_model()
    counted = iter([10 * GIB, 14 * GIB, 11 * GIB, 12 * GIB])  # before and after two forward passes
    allocator = SimpleNamespace(
        memory_allocated=lambda device: next(counted),
        max_memory_allocated=lambda device: 20 * GIB,
        reset_peak_memory_stats=lambda device: None,
    )
    monkeypatch.setattr(memory.torch, "cuda", allocator)
    watch = MemoryWatch(model, optimizer, torch.device("cuda"))
    with watch.watching():
        pass
    with watch.watching():
        model(torch.ones(1, 64))
        model(torch.ones(1, 64))
    model(torch.ones(1, 64))  # the hooks are gone
    row = watch.take()
    assert row["memory/activations_gib"] == 4.0
    assert row["memory/temporary_gib"] == 16.0  # this test's tensors are not on the device
    assert row["memory/peak_allocated_gib"] == 20.0


def test_storages_that_tensors_share_count_once_and_a_shard_as_what_it_holds() -> None:
    weight = torch.zeros(256)
    with fake_process_group(world_size=4):
        shard = distribute_tensor(weight, init_device_mesh("cpu", (4,)), [Shard(0)])
    assert bytes_on([shard], CPU) == 256
    assert bytes_on([weight, weight[:8], weight.view(16, 16)], CPU) == 1024
    assert bytes_on([weight], torch.device("cuda")) == 0
