"""Compilations and host syncs are counted where they happen, and told of once."""

import json
import logging
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.loop import fit
from engine.stalls import PROTOTYPE_WARNING, SYNC_WARNING, HostSyncs, StallWatch, start_reading
from engine.trackers import format_row
from tests.devices import SKIP_WITHOUT_GPU
from tests.engine.tiny_run import packed_documents, rows_of_run, tiny_config, tiny_folder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WARMUP, IN_A_ROW = StallWatch.WARMUP_STEPS, StallWatch.STEPS_IN_A_ROW
INTERNALLY = " (Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:282.)"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def take_steps(watch: StallWatch, *works: Any) -> None:
    for step, work in enumerate(works, start=1):
        with watch.working(step):
            work()


def compiled(backend: str) -> Any:
    def double(rows_BD: Tensor) -> Tensor:
        return (rows_BD * 2).sum()

    return torch.compile(double, backend=backend, fullgraph=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_changed_shape_counts_as_a_compilation_and_an_unchanged_one_does_not(backend: str):
    double, watch = compiled(backend), StallWatch(CPU)

    def on(num_rows: int) -> float | None:
        with watch.working(1):
            double(torch.ones(num_rows, 3, requires_grad=True)).backward()
        return watch.take()["compilations"]

    assert [on(4), on(4)] == [1, 0]
    assert on(5) == 1, "a recompilation, now for any number of rows"
    assert [on(6), on(4)] == [0, 0]


def test_what_is_compiled_between_steps_is_not_counted():
    double, watch = compiled("eager"), StallWatch(CPU)
    take_steps(watch, lambda: double(torch.ones(4, 3)))
    with torch.no_grad():
        double(torch.ones(5, 3))  # as validation does
    take_steps(watch, lambda: double(torch.ones(4, 3)))
    assert watch.take() == {"compilations": 1, "host_syncs": None}
    assert watch.take()["compilations"] == 0, "a window begins anew with each row"


def test_a_compilation_after_the_warm_up_is_told_once_with_its_reason(caplog):
    double, watch = compiled("eager"), StallWatch(CPU)
    sizes = [*[4] * (WARMUP - 1), 5, 5]  # the last shape of the warm-up is a new one
    with caplog.at_level(logging.WARNING, logger="tessera"):
        take_steps(watch, *(lambda n=n: double(torch.ones(n, 3)) for n in sizes))
        assert not caplog.records
        take_steps(watch, lambda: double(torch.ones(5, 7)), lambda: double(torch.ones(5, 7, 2)))
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("step 1 compiled 1 more graphs")
    assert "double (tests/engine/test_stalls.py:" in line
    assert "size mismatch at index 1. expected 3, actual 7" in line
    assert watch.take()["compilations"] == 4


class Cuda:
    """The part of torch.cuda that tells of syncs, and an operation that makes one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.modes = ["default"]
        patch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.modes[-1])
        patch.setattr(torch.cuda, "set_sync_debug_mode", self.set_mode)

    def set_mode(self, mode: str) -> None:
        warnings.warn(f"{PROTOTYPE_WARNING} and does not yet detect all", stacklevel=1)
        self.modes.append(mode)

    def wait(self, times: int = 1) -> None:
        if self.modes[-1] == "warn":
            for _ in range(times):
                warnings.warn(SYNC_WARNING + INTERNALLY, stacklevel=2)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_every_sync_of_a_step_is_counted_and_none_outside(cuda: Cuda, recwarn):
    with StallWatch(CUDA) as watch:
        take_steps(watch, cuda.wait, lambda: cuda.wait(5))
        cuda.wait(100)  # validation and saves
        assert watch.take()["host_syncs"] == 3.0, "a mean over steps"
        take_steps(watch, lambda: None)
        assert watch.take()["host_syncs"] == 0.0
    assert cuda.modes[-1] == "default"
    assert not recwarn.list, "neither the syncs nor the prototype are the user's to read"


def test_syncs_of_autograds_thread_are_counted(cuda: Cuda):
    with StallWatch(CUDA) as watch, watch.working(1):
        thread = threading.Thread(target=cuda.wait)
        thread.start()
        thread.join()
    assert watch.take()["host_syncs"] == 1.0


def test_a_step_that_fails_leaves_the_mode_and_the_filters_as_they_were(cuda: Cuda):
    filters, show = list(warnings.filters), warnings.showwarning
    with pytest.raises(KeyError), StallWatch(CUDA) as watch, watch.working(1):
        raise KeyError
    assert cuda.modes == ["default", "warn", "default"]
    assert list(warnings.filters) == filters and warnings.showwarning is show


def noisy() -> None:
    for _ in range(3):
        warnings.warn("of another kind", UserWarning, stacklevel=1)


def test_other_warnings_pass_through_once_for_each_place(cuda: Cuda, monkeypatch):
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *rest: shown.append(str(message)))
    with warnings.catch_warnings():
        warnings.resetwarnings()
        with StallWatch(CUDA) as watch:
            take_steps(watch, noisy, noisy, noisy)
        with warnings.catch_warnings(), pytest.raises(UserWarning), HostSyncs() as syncs:
            warnings.simplefilter("error")
            with syncs.counting():
                cuda.wait()
                noisy()
    assert shown == ["of another kind"]


def test_syncs_in_a_row_are_told_once_with_their_places(cuda: Cuda, caplog):
    operation = partial(warnings.warn, SYNC_WARNING + INTERNALLY)  # like torch's not in Python

    def work() -> None:
        operation()
        for _ in range(2):
            operation()

    with caplog.at_level(logging.WARNING, logger="tessera"), StallWatch(CUDA) as watch:
        take_steps(watch, *[work] * WARMUP, *[work] * (IN_A_ROW - 1), int, *[work] * (IN_A_ROW - 1))
        assert not caplog.records, "the warm-up, and fewer in a row, say nothing"
        take_steps(watch, *[work] * 3 * IN_A_ROW)
    [line] = [record.getMessage() for record in caplog.records]
    assert "made the host wait for the GPU, 3 times" in line
    first = work.__code__.co_firstlineno
    assert f"tests/engine/test_stalls.py:{first + 3} (work) x 2" in line
    assert f"tests/engine/test_stalls.py:{first + 1} (work) x 1" in line


@pytest.mark.parametrize("silence", [{"speaks": False}, {"waits_by_design": True}])
def test_syncs_are_not_told_of_by_other_ranks_nor_where_they_are_by_design(
    cuda: Cuda, caplog, silence: dict[str, Any]
):
    with caplog.at_level(logging.WARNING, logger="tessera"), StallWatch(CUDA, **silence) as watch:
        take_steps(watch, *[lambda: cuda.wait(9)] * (WARMUP + 2 * IN_A_ROW))
    assert not caplog.records
    assert watch.take()["host_syncs"] == 9.0


def test_the_console_shows_both_only_where_there_are_too_many():
    assert format_row(1, 2, {"loss": 1.0, "compilations": 0, "host_syncs": 0.0}) == (
        "step 1/2 | loss 1.0000"
    )
    assert format_row(1, 2, {"loss": 1.0, "compilations": 4, "host_syncs": 2.25}) == (
        "step 1/2 | loss 1.0000 | compilations 4 | host_syncs 2.2"
    )


def run_on_documents(folder: Path, *options: str) -> list[dict[str, Any]]:
    config = tiny_folder(folder / "hf") / "config.json"
    # 16 channels, since flex takes no fewer on a GPU.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"head_dim": 16}))
    documents = packed_documents(folder)
    fit(tiny_config(folder, *documents, *options, "--metrics.log_freq=1"))
    return rows_of_run(folder)


def test_a_compiled_run_on_the_cpu_writes_its_compilations(tmp_path: Path):
    options = ("--compile.enable", "--compile.backend=aot_eager", "--training.steps=6")
    rows = run_on_documents(tmp_path, *options, "--training.neftune_noise_alpha=5")
    assert rows[0]["compilations"] >= 2, "a block and the loss"
    assert [row["compilations"] for row in rows[1:]] == [0] * 5, "only the packing changes"
    assert {row["host_syncs"] for row in rows} == {None}


class WaitsInBackward(torch.autograd.Function):
    """Makes the host wait from Python in autograd's thread."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * grad.sum().item()


@pytest.mark.gpu
@SKIP_WITHOUT_GPU
def test_real_syncs_are_counted_forward_and_backward(recwarn):
    x = torch.ones(8, device="cuda", requires_grad=True)
    on_host = torch.ones(8)

    def counted(work: Any) -> float:
        take_steps(watch, work)
        return watch.take()["host_syncs"] or 0.0

    before = torch.cuda.get_sync_debug_mode()
    with StallWatch(CUDA) as watch:
        assert counted(lambda: (x * 2).sum().backward()) == 0
        assert counted(lambda: [x.sum().item() for _ in range(3)]) == 3
        assert counted(lambda: x.tolist()) == 1
        assert counted(lambda: start_reading(x.detach())()) == 0
        assert counted(lambda: torch.tensor(3, device="cuda")) == 1
        assert counted(lambda: on_host.to("cuda")) == 1
        assert counted(lambda: WaitsInBackward.apply(x).sum().backward()) == 1
        # In C++ of autograd's thread: the gradient of a masked selection.
        selected = x[x > 0]
        assert counted(lambda: selected.sum().backward()) >= 1
        x.sum().item()
    assert torch.cuda.get_sync_debug_mode() == before
    assert not [w for w in recwarn.list if "synchroniz" in str(w.message).lower()]


@pytest.mark.gpu
@SKIP_WITHOUT_GPU
@pytest.mark.parametrize(
    "options",
    [
        ("--model.attention=sdpa", "--training.neftune_noise_alpha=5"),
        ("--model.attention=flex", "--compile.enable"),
    ],
    ids=["eager, with noise", "compiled"],
)
def test_a_step_on_a_gpu_has_no_host_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
):
    monkeypatch.setattr(StallWatch, "WARMUP_STEPS", 2)
    monkeypatch.setattr(StallWatch, "STEPS_IN_A_ROW", 1)
    size = ("--training.steps=6", "--training.global_batch_size=2")
    rows = run_on_documents(tmp_path, *options, *size, "--job.device=cuda")
    told = (tmp_path / "run" / "logs" / "rank-0.log").read_text().splitlines()
    assert not [line for line in told if "host wait" in line or "more graphs" in line]
    assert [row["host_syncs"] for row in rows[2:]] == [0.0] * 4
    assert [row["compilations"] for row in rows[2:]] == [0] * 4
