import gc
import logging
import math
import os
import signal
import threading
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from engine.health import (
    GarbageCollector,
    NonFiniteError,
    NonFinitePolicy,
    SignalWatcher,
    nonfinite_gradients,
)
from tests.engine.training_cases import clip_gradients


def alone(text: str) -> list[str]:
    return [text]


def is_same(answer: bool) -> bool:
    return answer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_becomes_a_flag_and_the_old_handler_comes_back(number: signal.Signals):
    before = signal.getsignal(number)
    with SignalWatcher() as watcher:
        assert not watcher.should_stop(is_same)
        os.kill(os.getpid(), number)
        assert watcher.received is number
        assert watcher.should_stop(is_same)
    assert signal.getsignal(number) is before


def test_more_signals_do_not_break_the_save_that_the_first_one_caused():
    finished = False
    with SignalWatcher() as watcher:
        os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        finished = True
        assert watcher.received is signal.SIGUSR1
    assert finished


def any_rank(answer: bool) -> bool:
    flag = torch.tensor([answer], dtype=torch.int32)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def steps_until_stop(rank: int, world_size: int) -> int:
    """Rank 1 alone gets the signal, in its third step."""
    with SignalWatcher() as watcher:
        for step in range(1, 10):
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            if watcher.should_stop(any_rank):
                return step
    return 0


def test_a_signal_on_one_rank_stops_all_ranks_at_the_same_step(ranks):
    assert ranks(2, steps_until_stop) == [3, 3]


def cycle() -> None:
    a: list[object] = []
    a.append(a)


def test_garbage_is_collected_at_the_scheduled_steps_alone(monkeypatch):
    collections: list[tuple[int, ...]] = []
    monkeypatch.setattr(gc, "collect", lambda *args: collections.append(args) or 0)
    was_enabled = gc.isenabled()
    with GarbageCollector(3) as collector:
        assert not gc.isenabled()
        assert collections == [()]
        for step in range(1, 8):
            collector.after_step(step)
    assert collections == [(), (1,), (1,)]
    assert gc.isenabled() is was_enabled


def test_garbage_debugging_says_at_every_step_what_was_freed(caplog):
    with (
        GarbageCollector(50, debug=True) as collector,
        caplog.at_level(logging.INFO, logger="tessera"),
    ):
        for _ in range(5):
            cycle()
        collector.after_step(1)
        collector.after_step(2)
    freed = [int(record.getMessage().split()[4]) for record in caplog.records]
    assert len(freed) == 2
    assert freed[0] >= 5


def parameters_with_gradients() -> dict[str, nn.Parameter]:
    parameters = {name: nn.Parameter(torch.ones(4)) for name in ("good", "nan", "inf", "none")}
    parameters["good"].grad = torch.ones(4)
    parameters["nan"].grad = torch.tensor([1.0, math.nan, 1.0, 1.0])
    parameters["inf"].grad = torch.tensor([1.0, 1.0, -math.inf, 1.0])
    return parameters


def test_non_finite_gradients_are_found_by_name():
    assert nonfinite_gradients(parameters_with_gradients().items()) == ["nan", "inf"]


def test_a_finite_step_is_applied_and_costs_no_collective():
    def forbidden(text: str) -> Sequence[str]:
        raise AssertionError("no rank asks the others about a finite step")

    policy = NonFinitePolicy("stop", gather=forbidden)
    assert policy.allows_update(1, loss=1.0, grad_norm=torch.tensor(2.0), named_parameters=dict)
    assert policy.num_skipped_steps == 0


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_stopping_names_the_step_and_the_parameters_and_the_way_on(loss: float, grad_norm: float):
    policy = NonFinitePolicy("stop", gather=alone)
    parameters = parameters_with_gradients()
    with pytest.raises(NonFiniteError) as caught:
        policy.allows_update(
            17, loss=loss, grad_norm=grad_norm, named_parameters=lambda: parameters.items()
        )
    message = str(caught.value)
    assert message.startswith(f"step 17 is not finite: loss {loss}, grad_norm {grad_norm}")
    assert "rank 0: gradients of nan, inf" in message
    assert "training.on_nonfinite = 'skip'" in message


def test_skipping_is_counted_and_said(caplog):
    policy = NonFinitePolicy("skip", gather=alone)
    for step in (3, 5):
        assert not policy.allows_update(
            step, loss=math.nan, grad_norm=1.0, named_parameters=lambda: ()
        )
    assert policy.num_skipped_steps == 2
    assert "step 5 is not finite" in caplog.text
    assert "all gradients finite; update skipped, 2 so far" in caplog.text


def test_a_long_list_of_parameters_is_cut():
    parameters = [(f"p{i}", nn.Parameter(torch.ones(1))) for i in range(20)]
    for _, parameter in parameters:
        parameter.grad = torch.tensor([math.nan])
    policy = NonFinitePolicy("stop", gather=alone)
    with pytest.raises(NonFiniteError, match="p7 and 12 more"):
        policy.allows_update(1, loss=1.0, grad_norm=math.nan, named_parameters=lambda: parameters)


def test_clipping_leaves_the_report_the_one_parameter_that_is_not_finite():
    parameters = parameters_with_gradients()
    norm = clip_gradients(parameters.values(), 1.0)
    assert not norm.isfinite()
    assert nonfinite_gradients(parameters.items()) == ["nan", "inf"]


def skip_on_every_rank(rank: int, world_size: int) -> tuple[bool, int, str]:
    mesh = init_device_mesh("cpu", (world_size,))
    full = torch.ones(4)
    gradient = torch.tensor([1.0, 1.0, 1.0, math.nan])  # the last shard alone
    parameter = nn.Parameter(distribute_tensor(full, mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(gradient, mesh, [Shard(0)])
    texts: list[str] = []

    def gather(text: str) -> list[str]:
        parts: list[str] = [""] * world_size
        dist.all_gather_object(parts, text)
        texts.extend(parts)
        return parts

    policy = NonFinitePolicy("skip", gather=gather)
    allowed = policy.allows_update(
        1, loss=1.0, grad_norm=math.nan, named_parameters=lambda: [("w", parameter)]
    )
    return allowed, policy.num_skipped_steps, "; ".join(texts)


def test_every_rank_skips_and_the_report_says_which_rank_holds_the_nan(ranks):
    expected = (False, 1, "all gradients finite; gradients of w")
    assert ranks(2, skip_on_every_rank) == [expected, expected]


def test_signals_are_watched_from_the_main_thread_only():
    errors: list[Exception] = []

    def enter() -> None:
        try:
            with SignalWatcher():
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert errors
