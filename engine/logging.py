"""Log lines, the live line at the foot of a terminal, a copy of all output per rank, versions.

Other files only do `logging.getLogger("tessera")`; `start_logging` decides where that goes.
"""

import logging
import os
import platform
import subprocess
import sys
import threading
import traceback
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TextIO

import torch
from torch.cuda import nccl

LOGGER_NAME = "tessera"

UNKNOWN = "unknown"
"""Stands for what could not be found out."""

ERASE_LINE = "\r\x1b[2K"
DIM, YELLOW, RED, RESET = "\x1b[2m", "\x1b[33m", "\x1b[31m", "\x1b[0m"

REPORTED_PACKAGES = (
    "torch",
    "torchdata",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "numpy",
    "flash-attn",
    "flash-attn-4",
    "liger-kernel",
    "torchao",
    "triton",
    "nvidia-cudnn-frontend",
)


class Output:
    """This rank's terminal and log file, as `start_logging` set them up."""

    def __init__(self, *, rank: int, log_file: TextIO | None, use_color: bool) -> None:
        self.rank = rank
        self._stdout, self._stderr = sys.stdout, sys.stderr
        self._log_file = log_file
        self._live_text = ""
        self._is_drawn = False
        self._is_at_line_start = True
        self._lock = threading.RLock()
        self.is_live = rank == 0 and self._stdout.isatty() and self._stderr.isatty()
        """Whether there is a terminal to keep a live line on."""
        self.use_color = use_color and self._stderr.isatty()
        self._handlers: list[logging.Handler] = []

    def show(self, text: str) -> None:
        """Make `text` the last line of the terminal, below whatever is printed; "" removes it.

        Does nothing where there is no terminal.
        """
        if not self.is_live:
            return
        with self._lock:
            self._erase()
            self._live_text = text
            self._draw()

    def write(self, stream: TextIO, text: str, *, to_file: bool = True) -> None:
        """Print `text` above the live line, and copy it to the log file."""
        with self._lock:
            self._erase()
            stream.write(text)
            if text:
                self._is_at_line_start = text.endswith("\n")
            if self._live_text:
                stream.flush()
            self._draw()
            if to_file and self._log_file is not None:
                self._log_file.write(text)

    def _erase(self) -> None:
        if self._is_drawn:
            self._stderr.write(ERASE_LINE)
            self._stderr.flush()
            self._is_drawn = False

    def _draw(self) -> None:
        # An unfinished line (a prompt, or print without an end) keeps the live line waiting.
        if self._live_text and self._is_at_line_start:
            self._stderr.write(self._live_text)
            self._stderr.flush()
            self._is_drawn = True

    def record(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the error that ends the run to the log file; printing it is the caller's part."""
        if error is not None and self._log_file is not None:
            self._log_file.writelines(traceback.format_exception(kind, error, trace))

    def close(self) -> None:
        """Remove the live line, give stdout and stderr back, and close the log file."""
        self.show("")
        logger = logging.getLogger(LOGGER_NAME)
        for handler in self._handlers:
            logger.removeHandler(handler)
        logger.propagate = True
        sys.stdout, sys.stderr = self._stdout, self._stderr
        if self._log_file is not None:
            self._log_file.close()
            self._log_file = None

    def _install(self) -> None:
        logger = logging.getLogger(LOGGER_NAME)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        terminal = _TerminalHandler(self, self._stderr)
        terminal.setFormatter(_Formatter(rank=self.rank, use_color=self.use_color))
        terminal.setLevel(logging.INFO if self.rank == 0 else logging.WARNING)
        self._handlers = [terminal]
        if self._log_file is not None:
            file = logging.StreamHandler(self._log_file)
            file.setFormatter(_Formatter(rank=self.rank, use_color=False))
            self._handlers.append(file)
        for handler in self._handlers:
            logger.addHandler(handler)
        sys.stdout = _Tee(self, self._stdout)
        sys.stderr = _Tee(self, self._stderr)
        os.register_at_fork(after_in_child=self._forget_parent)

    def _forget_parent(self) -> None:
        # A data worker inherits the lock, perhaps held by a thread that it does not have.
        self._lock = threading.RLock()
        self._live_text, self._is_drawn = "", False


class _Tee:
    """A text stream that prints and copies; everything else is the printed stream's."""

    def __init__(self, output: Output, stream: TextIO) -> None:
        self._output, self._stream = output, stream

    def write(self, text: str) -> int:
        self._output.write(self._stream, text)
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


class _TerminalHandler(logging.Handler):
    def __init__(self, output: Output, stream: TextIO) -> None:
        super().__init__()
        self._output, self._stream = output, stream

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._output.write(self._stream, self.format(record) + "\n", to_file=False)
            self._stream.flush()
        except Exception:
            self.handleError(record)


class _Formatter(logging.Formatter):
    def __init__(self, *, rank: int, use_color: bool) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._rank, self._use_color = rank, use_color

    def format(self, record: logging.LogRecord) -> str:
        clock = self.formatTime(record, self.datefmt)
        rank = f"rank {self._rank}: " if self._rank else ""
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        if not self._use_color:
            return f"{clock} {rank}{level}{text}"
        color = RED if record.levelno >= logging.ERROR else YELLOW
        return f"{DIM}{clock}{RESET} {rank}{color if level else ''}{level}{RESET}{text}"


def start_logging(*, rank: int, folder: Path | None = None, use_color: bool = True) -> Output:
    """Send log lines to stderr and everything this rank prints also to `folder/rank-N.log`.

    Rank 0 shows information, the other ranks warnings; the files hold both. The file is appended
    to, so a resumed run keeps the earlier output. Text that C++ libraries write past Python (such
    as NCCL_DEBUG) reaches the terminal only. Call `close` on the result to undo it all.
    """
    log_file = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        log_file = (folder / f"rank-{rank}.log").open("a", buffering=1, encoding="utf-8")
    output = Output(rank=rank, log_file=log_file, use_color=use_color)
    output._install()
    return output


def environment_report() -> dict[str, str]:
    """Return what this run runs on: versions, devices, and the commit of the source."""
    report = {
        "tessera": _package_version("tessera"),
        "commit": source_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    report |= {name: _package_version(name) for name in REPORTED_PACKAGES}
    report["cuda"] = torch.version.cuda or "none"
    if torch.cuda.is_available():
        report["nccl"] = ".".join(str(part) for part in nccl.version())
        report["cudnn"] = str(torch.backends.cudnn.version())
        report["driver"] = _first_line(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        report["gpus"] = ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names)))
    else:
        report["gpus"] = "none"
    return report


def machine_report() -> dict[str, str]:
    """Return the date and what a measurement ran on, for records that may be published."""
    report = environment_report()
    del report["platform"]
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d"), **report}


def source_commit() -> str:
    """Return the commit of the source tree, with `-dirty` if it was edited, or "unknown".

    Where there is no git, as on a machine that a copy was carried to, TESSERA_COMMIT says it.
    """
    root = str(Path(__file__).resolve().parent.parent)
    found = _first_line(
        "git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
    )
    if found == UNKNOWN and (given := os.environ.get("TESSERA_COMMIT")):
        return f"{given} (given by TESSERA_COMMIT)"
    return found


def _first_line(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return result.stdout.strip().partition("\n")[0] or UNKNOWN


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
