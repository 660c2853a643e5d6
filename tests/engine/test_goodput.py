"""Every second of a process is counted once, as what it was spent on."""

from types import SimpleNamespace

import pytest

from engine.goodput import WallTime


def test_wall_time_is_divided_without_counting_a_second_twice() -> None:
    now = SimpleNamespace(clock=0.0, compiling=0.0)
    wall = WallTime(
        seconds_before=7.0, clock=lambda: now.clock, compile_clock=lambda: now.compiling
    )

    def work(seconds: float, *, compiling: float = 0.0) -> None:
        now.clock += seconds
        now.compiling += compiling

    work(3.0)
    with wall.spent("training"):
        with wall.spent("waiting for data"):
            work(2.0)
        work(30.0, compiling=20.0)
    work(5.0)
    with wall.spent("training"):
        work(40.0)
        with wall.spent("waiting for data"):
            work(1.0)
    with wall.spent("validating"):
        work(8.0)
    with pytest.raises(OSError), wall.spent("saving"):
        work(4.0)
        raise OSError
    assert wall.goodput() == pytest.approx(0.5)
    assert wall.describe() == (
        "wall time 100.0 s: starting 10.0%, compiling 20.0%, training 50.0%, "
        "waiting for data 3.0%, validating 8.0%, saving 4.0%, profiling 0.0%, other 5.0%; "
        "goodput 50.0%"
    )
