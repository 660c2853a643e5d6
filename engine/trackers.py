"""Where the numbers of a step go: console, `metrics.jsonl`, TensorBoard, Weights & Biases."""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from engine.metrics import MetricsConfig

log = logging.getLogger("tessera")

Values = Mapping[str, float | None]


class Tracker(Protocol):
    """Somewhere to write rows of numbers."""

    def write(self, step: int, values: Values) -> None:
        """Write the one row of `step`; none means not known."""
        ...

    def close(self) -> None:
        """Finish writing."""
        ...


class JsonLines:
    """One JSON object a row, flushed at once; numbers that are not finite become null."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step == 0 and path.exists():
            path.replace(path.with_name(f"{path.name}.old"))
        keep_rows_until(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Values) -> None:
        """Append the row."""
        row = {"step": step, **values}
        finite = {key: _finite(value) for key, value in row.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def keep_rows_until(path: Path, last_step: int) -> None:
    """Drop the rows after `last_step`, which a resumed run takes again, and a row cut by a kill.

    The file is replaced by rename, so a kill during this leaves the old one or the new one.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if (step := _step_of(line)) is not None and step <= last_step]
    if kept == lines:
        return
    fresh = path.with_name(path.name + ".tmp")
    with fresh.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _step_of(line: str) -> int | None:
    if not line.endswith("\n"):
        return None
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


class TensorBoard:
    """Scalars for TensorBoard; rows after the resumed step are hidden by the new file."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        # Imported here, since it takes about a second and is off by default.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, step: int, values: Values) -> None:
        """Add one scalar for each known value."""
        for key, value in values.items():
            if value is not None and key != "step":
                self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run whose id stays in the run folder, so a resumed run goes on in it."""

    def __init__(self, folder: Path, *, settings: Mapping[str, object], name: str) -> None:
        import wandb  # type: ignore[import-not-found]

        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb-id"
        if not id_file.exists():
            id_file.write_text(os.urandom(4).hex())
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tessera"),
            name=os.environ.get("WANDB_NAME", name),
            id=id_file.read_text().strip(),
            mode=None if "WANDB_MODE" in os.environ else "offline",
            resume="allow",
            dir=str(folder),
            config=dict(settings),
        )

    def write(self, step: int, values: Values) -> None:
        """Log the known values."""
        self._run.log({k: v for k, v in values.items() if v is not None}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def unsupported_reason(config: MetricsConfig) -> str | None:
    """Return why what `config` asks for cannot be written here, or none if it can."""
    if config.enable_wandb and find_spec("wandb") is None:
        return (
            "metrics.enable_wandb = true, but package wandb is not installed; "
            "pip install wandb, or set it to false (metrics.jsonl is always written)"
        )
    return None


class Console:
    """A log line for each row, and a live progress line where there is a terminal."""

    def __init__(self, *, total_steps: int, show: Callable[[str], None]) -> None:
        self._total_steps = total_steps
        self._show = show
        self._status = "starting"

    def write(self, step: int, values: Values) -> None:
        """Log the row, and put its numbers on the live line."""
        log.info("%s", format_row(step, self._total_steps, values))
        self._status = _live_status(values)
        self.advance(step)

    def advance(self, step: int) -> None:
        """Move the live line to `step`, with the numbers of the latest row."""
        width = shutil.get_terminal_size().columns - 1
        self._show(progress_line(step, self._total_steps, self._status)[:width])

    def close(self) -> None:
        """Remove the live line."""
        self._show("")


def format_row(step: int, total_steps: int, values: Values) -> str:
    """Return the log line of a row: the same keys in the same order, with their units.

    `compilations` and `host_syncs` are there only if there were more than a step is built to make.
    """
    parts = [f"step {step}/{total_steps}"]
    parts += [
        text.format(value)
        for key, text in (
            ("loss", "loss {:.4f}"),
            ("validation_loss", "validation_loss {:.4f}"),
            ("grad_norm", "grad_norm {:.3f}"),
            ("lr", "lr {:.3g}"),
            ("tokens_per_second_per_device", "tokens/s/device {:,.0f}"),
            ("mfu", "mfu {:.1%}"),
            ("peak_memory_gib", "memory_gib {:.1f}"),
        )
        if (value := values.get(key)) is not None
    ]
    if compilations := values.get("compilations"):
        parts.append(f"compilations {compilations:.0f}")
    if syncs := values.get("host_syncs"):
        parts.append(f"host_syncs {syncs:.1f}")
    if (seconds := values.get("seconds_left")) is not None:
        parts.append(f"left {format_duration(seconds)}")
    return " | ".join(parts)


def progress_line(step: int, total_steps: int, status: str) -> str:
    """Return the live line: a bar of the steps done, then `status`."""
    width = 20
    done = round(width * min(step / max(total_steps, 1), 1.0))
    return f"{'━' * done}{'─' * (width - done)} {step}/{total_steps}  {status}"


def _live_status(values: Values) -> str:
    parts = [
        text.format(value)
        for key, text in (
            ("loss", "loss {:.3f}"),
            ("tokens_per_second_per_device", "{:,.0f} tokens/s/device"),
            ("mfu", "mfu {:.0%}"),
            ("peak_memory_gib", "{:.1f} GiB"),
        )
        if (value := values.get(key)) is not None
    ]
    if (seconds := values.get("seconds_left")) is not None:
        parts.append(f"{format_duration(seconds)} left")
    return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """Return a duration as people say it: 42s, 3m20s, 5h07m, 2d03h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class Trackers:
    """All trackers of this rank behind one; empty on ranks that write nothing."""

    def __init__(self, trackers: Sequence[Tracker], *, console: Console | None = None) -> None:
        self._console = console
        self._trackers = [*trackers, *([console] if console else [])]

    def write(self, step: int, values: Values) -> None:
        """Write the one row of `step` everywhere."""
        for tracker in self._trackers:
            tracker.write(step, values)

    def advance(self, step: int) -> None:
        """Move the live line; for steps without a row."""
        if self._console is not None:
            self._console.advance(step)

    def close(self) -> None:
        """Finish writing everywhere."""
        for tracker in self._trackers:
            tracker.close()


def build_trackers(
    config: MetricsConfig,
    run_folder: Path,
    *,
    rank: int,
    total_steps: int,
    resume_step: int = 0,
    settings: Mapping[str, object] | None = None,
    show: Callable[[str], None] = lambda text: None,
) -> Trackers:
    """Open what `config` asks for; only rank 0 writes unless `metrics.save_for_all_ranks`.

    `resume_step` is the last step of the loaded checkpoint, 0 for a new run: rows after it are
    dropped, since they come again. `settings` is the resolved configuration. `show` draws the
    live line (`Output.show` of `logging.py`).
    """
    if reason := unsupported_reason(config):
        raise ValueError(reason)
    if rank != 0 and not config.save_for_all_ranks:
        return Trackers([])
    suffix = f"rank-{rank}" if rank != 0 else ""
    file_name = f"metrics-{suffix}.jsonl" if suffix else "metrics.jsonl"
    trackers: list[Tracker] = [JsonLines(run_folder / file_name, resume_step=resume_step)]
    if config.enable_tensorboard:
        folder = run_folder / config.save_tb_folder / suffix
        trackers.append(TensorBoard(folder, resume_step=resume_step))
    if config.enable_wandb:
        name = f"{run_folder.name} {suffix}".strip()
        trackers.append(WeightsAndBiases(run_folder / suffix, settings=settings or {}, name=name))
    console = Console(total_steps=total_steps, show=show) if rank == 0 else None
    return Trackers(trackers, console=console)
