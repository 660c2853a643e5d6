"""What slows steps without an error: graphs compiled anew, and waits of the host for the GPU.

Both are counted around the work of each step and written as metrics. Where they do not end with the
first steps, one line in the log says where they come from.
"""

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self, TextIO

import torch
from torch import Tensor

from engine.metrics import Row

log = logging.getLogger("tessera")

ROOT = Path(__file__).parents[1]
TORCH = str(Path(torch.__file__).parent)

# c10/cuda/CUDAFunctions.cpp and torch/csrc/cuda/Module.cpp, of torch 2.11 and 2.13.
SYNC_WARNING = "called a synchronizing CUDA operation"
PROTOTYPE_WARNING = "Synchronization debug mode is a prototype feature"


def start_reading(values: Tensor) -> Callable[[], list[float]]:
    """Start to copy a vector to the host; the function returned waits for that copy alone.

    What is queued between the two runs meanwhile, so that a GPU has work while the host goes on.
    """
    if values.device.type != "cuda":
        return values.tolist
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    is_there = torch.cuda.current_stream(values.device).record_event()

    def read() -> list[float]:
        is_there.synchronize()
        return copy.tolist()

    return read


def graphs_compiled() -> int:
    """Return how many graphs torch.compile has made in this process, recompilations included."""
    # Looked up, not imported: that takes a second, and who compiles has imported it.
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else dynamo.counters.get("stats", {}).get("unique_graphs", 0)


def latest_compilation() -> str:
    """Say what torch.compile made last, and why it had to, as far as it remembers."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    for found in reversed(dynamo.get_compilation_metrics() if dynamo is not None else []):
        if found.co_filename:  # the compilation of a backward pass has none
            place = f"{_shortened(found.co_filename)}:{found.co_firstlineno}"
            reason = getattr(found, "recompile_reason", None) or "compiled for the first time"
            return f"{found.co_name} ({place}): {reason.strip()}"
    return "unknown"


class HostSyncs:
    """Notes each time that an operation of CUDA makes the host wait, and where in the program.

    A context manager, to be entered once for a run and not for each step, since every change of the
    warning filters makes Python forget which warnings it has shown. torch warns of these operations
    when told to; inside, that warning is counted instead of shown, and others stay as they are.
    torch does not see waits of `torch.cuda.synchronize`, of events, and of collectives.
    """

    def __init__(self) -> None:
        self.places: list[str] = []
        """Where the host waited since the list was last emptied, oldest first."""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(warnings.catch_warnings())
        # Python shows a warning once for each line that causes it; all of these must arrive.
        warnings.filterwarnings("always", message=SYNC_WARNING, category=UserWarning)
        warnings.filterwarnings("ignore", message=PROTOTYPE_WARNING, category=UserWarning)
        show = warnings.showwarning

        def show_others(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, UserWarning) and str(message).startswith(SYNC_WARNING):
                # Also called by autograd's thread; appending to a list is atomic.
                self.places.append(_place(sys._getframe(1)))
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = show_others
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Note the waits inside."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _place(frame: FrameType | None) -> str:
    """Return file, line and function of the innermost code that is not torch's."""
    first: FrameType | None = None
    while frame is not None:
        name = frame.f_code.co_filename
        if name != warnings.__file__:
            first = first or frame
            if not name.startswith(TORCH):
                first = frame
                break
        frame = frame.f_back
    if first is None:
        return "unknown"
    code = first.f_code
    return f"{_shortened(code.co_filename)}:{first.f_lineno} ({code.co_name})"


def _shortened(path: str) -> str:
    return str(Path(path).relative_to(ROOT)) if Path(path).is_relative_to(ROOT) else path


class StallWatch:
    """Counts compilations and host syncs of the steps of this process.

    Enter it for the run, and `working` for what a step does once its rows are there: loading,
    logging, validation and saves are not counted. Each kind is warned of once, where `speaks`.
    """

    WARMUP_STEPS = 10
    """Steps that may compile: the first ones, and those that first meet another shape."""

    STEPS_IN_A_ROW = 5
    """Steps with syncs before that is warned of: a single one costs little."""

    def __init__(
        self,
        device: torch.device,
        *,
        speaks: bool = True,
        waits_by_design: bool = False,
    ) -> None:
        self._syncs = HostSyncs() if device.type == "cuda" else None
        self._speaks = speaks
        self._waits_by_design = waits_by_design
        self._steps_done = 0
        self._steps_in_a_row = 0
        self._told_of_compilations = False
        self._told_of_syncs = False
        self._reset()

    def _reset(self) -> None:
        self._num_steps = 0
        self._num_compilations = 0
        self._num_syncs = 0

    def __enter__(self) -> Self:
        if self._syncs is not None:
            self._syncs.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._syncs is not None:
            self._syncs.__exit__(kind, error, trace)

    @contextmanager
    def working(self, step: int) -> Iterator[None]:
        """Count what happens inside as done by `step`."""
        graphs_before = graphs_compiled()
        places: list[str] = []
        if self._syncs is None:
            yield
        else:
            self._syncs.places = places
            with self._syncs.counting():
                yield
        self._finish(step, graphs_compiled() - graphs_before, places)

    def _finish(self, step: int, compilations: int, places: list[str]) -> None:
        self._num_steps += 1
        self._num_compilations += compilations
        self._num_syncs += len(places)
        self._steps_done += 1
        if not self._speaks or self._steps_done <= self.WARMUP_STEPS:
            return
        if compilations and not self._told_of_compilations:
            self._told_of_compilations = True
            _warn_of_compilations(step, compilations)
        stalled = bool(places) and not self._waits_by_design
        # A step that compiles also waits for what it compiles.
        self._steps_in_a_row = self._steps_in_a_row + 1 if stalled and not compilations else 0
        if self._steps_in_a_row == self.STEPS_IN_A_ROW and not self._told_of_syncs:
            self._told_of_syncs = True
            _warn_of_syncs(step, places)

    def take(self) -> Row:
        """Return the counts of the steps since the last call, as metrics."""
        steps = max(self._num_steps, 1)
        row: Row = {
            "compilations": self._num_compilations,
            "host_syncs": None if self._syncs is None else self._num_syncs / steps,
        }
        self._reset()
        return row


def _warn_of_compilations(step: int, compilations: int) -> None:
    log.warning(
        "step %d compiled %d more graphs while all ranks waited, though shapes should have settled "
        "in the first %d steps. The last was %s. Look for rows of another shape, or for a number "
        "or flag that changes from step to step; TORCH_LOGS=recompiles shows each case. Said "
        "once; compilations in the metrics counts on",
        step,
        compilations,
        StallWatch.WARMUP_STEPS,
        latest_compilation(),
    )


def _warn_of_syncs(step: int, places: list[str]) -> None:
    counted = Counter(places).most_common(8)
    log.warning(
        "step %d, like the %d before it, made the host wait for the GPU, %d times; the GPU "
        "runs dry meanwhile. It waited at %s. Look there for .item(), .tolist(), "
        "bool(tensor), a mask as index, torch.tensor(..., device='cuda'). Said once; host_syncs in "
        "the metrics counts on",
        step,
        StallWatch.STEPS_IN_A_ROW - 1,
        len(places),
        ", ".join(f"{place} x {count}" for place, count in counted),
    )
