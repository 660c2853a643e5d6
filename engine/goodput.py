"""Where the wall time of a process goes: training, or what keeps it from training."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

KINDS = (
    "starting",
    "compiling",
    "training",
    "waiting for data",
    "validating",
    "saving",
    "profiling",
)


def compile_seconds() -> float:
    """Return how long torch.compile has worked in this process."""
    # Looked up, not imported: that takes a second, and who compiles has imported it.
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0.0 if dynamo is None else dynamo.calculate_time_spent().get("total_wall_time", 0.0)


def seconds_since_process_start() -> float:
    """Return the age of this process, the import of packages included."""
    # The system's idea of when it was started may be behind its clock by a moment.
    return max(time.time() - psutil.Process().create_time(), 0.0)


class WallTime:
    """Divides the time since this process began among `KINDS`; the rest is "other".

    Goodput is the share of "training": optimizer steps, without the time that they compiled or
    waited for data. All of it is the host's clock; nothing waits for the device.
    """

    def __init__(
        self,
        *,
        seconds_before: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
        compile_clock: Callable[[], float] = compile_seconds,
    ) -> None:
        self._clock = clock
        self._compile_clock = compile_clock
        self._start = clock() - seconds_before
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._nested = 0.0

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Count the time inside as `kind`, but for what an inner `spent` counts as its own."""
        if not any(self._seconds.values()):
            self._seconds["starting"] = self._clock() - self._start
        start, compiled = self._clock(), self._compile_clock()
        outer, self._nested = self._nested, 0.0
        try:
            yield
        finally:
            whole, compiling = self._clock() - start, self._compile_clock() - compiled
            own = whole - self._nested
            # A loader's worker never compiles, so all of it is this kind's own time.
            self._seconds["compiling"] += min(compiling, own)
            self._seconds[kind] += max(own - compiling, 0.0)
            self._nested = outer + whole

    def goodput(self) -> float:
        """Return the share of training in the time until now, from 0 to 1."""
        return self._seconds["training"] / max(self._clock() - self._start, 1e-9)

    def describe(self) -> str:
        """Say how long the process has run, and the share of each kind."""
        total = max(self._clock() - self._start, 1e-9)
        kinds = {**self._seconds, "other": total - sum(self._seconds.values())}
        shares = ", ".join(f"{kind} {seconds / total:.1%}" for kind, seconds in kinds.items())
        return f"wall time {total:.1f} s: {shares}; goodput {self.goodput():.1%}"
