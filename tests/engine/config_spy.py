"""Which code reads which configuration key at run time, and what the calls it makes are given."""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from engine.config import JobConfig

ROOT = Path(__file__).parents[2]
PACKAGES = ("engine", "models", "parallelisms")

WALKERS = frozenset({"engine/schema.py", "engine/rules.py", "engine/combinations.py"})
"""Files that read every key alike, or only to refuse; so does what they call."""

CHECKS = frozenset(
    {
        "engine/cli.py:_mirror",
        "engine/run_folder.py:resolved",
        "engine/run_folder.py:RunFolder.finished_step",
        "parallelisms/apply.py:check",
    }
)
"""Functions that read a key only to compare, write down or refuse it; so does what they call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """One access to a key."""

    section: object
    name: str
    reader: str
    """`file:function`; what a section's own method reads counts as its caller's."""

    value: object


@dataclass(kw_only=True, slots=True)
class Spy:
    """Reads and calls of one run."""

    reads: list[Read] = field(default_factory=list[Read])
    calls: dict[str, list[dict[str, Any]]] = field(default_factory=dict[str, list[dict[str, Any]]])
    """Arguments by name, `thread` and `return` of each call of a recorded function, in order."""

    def readers(self, config: JobConfig, key: str) -> dict[str, object]:
        """Return who read `key` of `config`, with the value last seen."""
        path, _, name = key.rpartition(".")
        section: Any = config
        for part in path.split("."):
            section = getattr(section, part)
        return {r.reader: r.value for r in self.reads if r.section is section and r.name == name}

    def record(
        self,
        patch: pytest.MonkeyPatch,
        place: str,
        instead: Callable[..., Any] | None = None,
    ) -> None:
        """Note the arguments of every call of the function at `place`, and let it run.

        `instead` runs in its place where this machine cannot run it, or not in little time.
        """
        owner, _, name = place.rpartition(".")
        module = sys.modules[owner]
        original = getattr(module, name)
        signature = inspect.signature(original)
        calls = self.calls.setdefault(name, [])

        def recorded(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
            given |= given.get("kwargs", {})
            given["thread"] = threading.current_thread().name
            calls.append(given)
            given["return"] = (instead or original)(*args, **kwargs)
            return given["return"]

        patch.setattr(module, name, recorded)


def section_types(config: object) -> set[type]:
    """Return the class of every section below `config`."""
    found: set[type] = set()
    for one in fields(config):  # pyright: ignore[reportArgumentType]
        value = getattr(config, one.name)
        if is_dataclass(value):
            found |= {type(value)} | section_types(value)
    return found


@contextmanager
def spying(patch: pytest.MonkeyPatch) -> Iterator[Spy]:
    """Record every read of a section's key by our code; a section keeps its class and identity."""
    spy = Spy()

    def watch(cls: type) -> None:
        names = {one.name for one in fields(cls)}

        def read(section: object, name: str) -> object:
            value = object.__getattribute__(section, name)
            if name in names and (reader := _reader(section)):
                spy.reads.append(Read(section=section, name=name, reader=reader, value=value))
            return value

        patch.setattr(cls, "__getattribute__", read)

    for cls in section_types(JobConfig()):
        watch(cls)
    yield spy


def _reader(section: object) -> str | None:
    """Return who is behind the current read of `section`; none where that consumes nothing."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and _is_own_method(frame, section):
        frame = frame.f_back
    reader = None if frame is None else _place(frame)
    outer = frame if reader else None
    while outer is not None:
        place = _place(outer)
        if place and (place in CHECKS or place.partition(":")[0] in WALKERS):
            return None
        outer = outer.f_back
    return reader


def _is_own_method(frame: FrameType, section: object) -> bool:
    if frame.f_code.co_filename == __file__:  # a property is called by the spy's own read
        return True
    # A comprehension has a frame of its own before Python 3.12.
    if frame.f_code.co_name.startswith("<") and frame.f_back is not None:
        return _is_own_method(frame.f_back, section)
    is_check = frame.f_code.co_name == "__post_init__"
    return not is_check and frame.f_locals.get("self") is section


def _place(frame: FrameType) -> str | None:
    code = frame.f_code
    if code.co_name == "__post_init__" or not code.co_filename.startswith(str(ROOT)):
        return None
    path = Path(code.co_filename).relative_to(ROOT)
    if path.parts[0] not in PACKAGES:
        return None
    return f"{path.as_posix()}:{code.co_qualname.partition('.<locals>')[0]}"
