"""Keeping a long run healthy: signals that end it, garbage collection, and non-finite steps."""

import gc
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from types import FrameType, TracebackType
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

log = logging.getLogger("tessera")

WATCHED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class SignalWatcher:
    """Turns SIGTERM and SIGUSR1 into a flag that the loop asks for between steps.

    A context manager, to be entered in the main thread. While it is entered these signals never
    interrupt anything, so a second one cannot break a save that the first one caused.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The first signal that came to this rank."""
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in WATCHED_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Only a store: logging here could interrupt the logging of the same thread.
        if self.received is None:
            self.received = signal.Signals(number)

    @property
    def is_requested(self) -> bool:
        """Whether this rank was asked to save and leave."""
        return self.received is not None

    def should_stop(self, any_rank: Callable[[bool], bool]) -> bool:
        """Return the same answer on every rank: was any rank asked to save and leave?

        `any_rank` is a collective "or" over all ranks; every rank must call this at the same step.
        """
        should_stop = any_rank(self.is_requested)
        if should_stop:
            name = self.received.name if self.received else "a signal on another rank"
            log.info("received %s: leaving with code 0 after this step", name)
        return should_stop


class GarbageCollector:
    """Collects at the same steps on every rank, so that no rank makes the others wait.

    A context manager that switches automatic collection off while it is entered.
    """

    def __init__(self, every_steps: int, *, debug: bool = False) -> None:
        assert every_steps >= 1, "the training section checked training.gc_freq"
        self.every_steps = every_steps
        self.debug = debug

    def __enter__(self) -> Self:
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._was_enabled:
            gc.enable()

    def after_step(self, step: int) -> None:
        """Collect if it is time; with `debug`, collect everything at every step and say what."""
        if self.debug:
            start = time.perf_counter()
            num_objects = gc.collect()
            seconds = time.perf_counter() - start
            log.info("gc: step %d freed %d objects in %.3f s", step, num_objects, seconds)
        elif step % self.every_steps == 0:
            # Generation 1, as a full collection walks every object of the program.
            gc.collect(1)


class NonFiniteError(RuntimeError):
    """Raised on every rank when a step's loss or gradient is not a finite number."""


class NonFinitePolicy:
    """What happens to a step whose loss or gradient norm is not a finite number.

    "stop" raises `NonFiniteError` on every rank. "skip" leaves parameters and optimizer state
    untouched; the step still counts, so that data, step number and learning rate stay in line on
    every rank.
    """

    def __init__(
        self, action: Literal["stop", "skip"], *, gather: Callable[[str], Sequence[str]]
    ) -> None:
        self.action = action
        self.num_skipped_steps = 0
        """Steps skipped so far in this process."""
        self._gather = gather

    def allows_update(
        self,
        step: int,
        *,
        loss: Tensor | float,
        grad_norm: Tensor | float,
        named_parameters: Callable[[], Iterable[tuple[str, nn.Parameter]]],
    ) -> bool:
        """Return whether to update the parameters; the answer is the same on every rank.

        `loss` and `grad_norm` must be the global values, equal on all ranks. `gather` (given at
        construction) is a collective that returns every rank's text in rank order; it runs only
        after that shared answer. Call it before the gradients are scaled by a non-finite norm, or
        the report will name every parameter.
        """
        loss, grad_norm = float(loss), float(grad_norm)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return True
        reports = self._gather(_describe_gradients(named_parameters()))
        where = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(reports))
        message = f"step {step} is not finite: loss {loss}, grad_norm {grad_norm}; {where}"
        if self.action == "stop":
            raise NonFiniteError(
                f"{message}. Nothing of this step was applied; resume from the last checkpoint "
                "with a lower optimizer.lr, or set training.on_nonfinite = 'skip'"
            )
        self.num_skipped_steps += 1
        log.warning("%s; update skipped, %d so far", message, self.num_skipped_steps)
        return False


def nonfinite_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Return the names of parameters with a nan or inf in what this rank holds of the gradient."""
    names: list[str] = []
    for name, parameter in named_parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        if not bool(torch.isfinite(local).all()):
            names.append(name)
    return names


def _describe_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    names = nonfinite_gradients(named_parameters)
    if not names:
        return "all gradients finite"
    shown = ", ".join(names[:8])
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"gradients of {shown}{more}"
