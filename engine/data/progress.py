"""One line of progress on standard error: live on a terminal, now and then in a log file."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

PLAIN_SECONDS = 10.0


class Progress:
    """Counts units of work; prints to standard error whatever this process's rank is."""

    def __init__(self, what: str, *, total: int) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._printed = time.monotonic()
        self._live: RichProgress | None = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            live = RichProgress(*columns, console=Console(stderr=True), transient=True)
            live.add_task(self._what, total=self._total)
            live.start()
            self._live = live
        else:
            print(self._what, file=sys.stderr, flush=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, note: str) -> None:
        """Say that one more unit is done; `note` is shown behind the figure."""
        self._done += 1
        if self._live is not None:
            self._live.update(self._live.task_ids[0], advance=1)
        self.say(note)

    def say(self, note: str) -> None:
        """Show another note, with no further unit done."""
        if self._live is not None:
            self._live.update(self._live.task_ids[0], description=f"{self._what} ({note})")
        elif time.monotonic() - self._printed > PLAIN_SECONDS:
            self._printed = time.monotonic()
            share = 100 * self._done // max(self._total, 1)
            print(f"{self._what}: {share}% ({note})", file=sys.stderr, flush=True)
