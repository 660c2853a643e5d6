"""From what a step did to the numbers that are written down: speed, utilisation, memory, time left.

Where the numbers go is decided in `trackers.py`; FLOPs per token come from `models/flops.py`.
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from engine.goodput import WallTime, seconds_since_process_start

GIB = 2**30

Row = dict[str, float | None]
"""The numbers of one step by name; none where one is not known. Speeds say their unit."""

PEAK_FLOPS: tuple[tuple[tuple[str, ...], float], ...] = (
    # Words of the device's name, and its dense bf16 FLOP/s with fp32 accumulation. NVIDIA's
    # product pages and data sheets, where most figures are given with sparsity (half is dense).
    (("GB300",), 2.5e15),  # nvidia.com/en-us/data-center/gb300-nvl72: 360 PFLOP/s sparse for 72
    (("B300",), 2.25e15),  # nvidia.com/en-us/data-center/hgx: 36 PFLOP/s sparse for 8
    (("GB200",), 2.5e15),  # nvidia.com/en-us/data-center/gb200-nvl72: 360 PFLOP/s sparse for 72
    (("B200",), 2.25e15),  # nvidia.com/en-us/data-center/hgx: 36 PFLOP/s sparse for 8
    (("GH200",), 989e12),  # GH200 data sheet: an H100 SXM or H200 die
    (("H200",), 989e12),  # H200 data sheet
    (("H100", "NVL"), 835e12),  # H100 data sheet, H100 NVL
    (("H100", "PCIe"), 756e12),  # H100 data sheet, H100 PCIe
    (("H100",), 989e12),  # H100 data sheet, H100 SXM
    (("H800",), 989e12),  # an H100 with narrower links
    (("H20",), 148e12),  # reported by the press; no public data sheet
    (("A100",), 312e12),  # A100 data sheet
    (("A800",), 312e12),  # an A100 with narrower links
    (("L40S",), 362e12),  # L40S data sheet
    (("A10",), 125e12),  # A10 data sheet
    (("MI300X",), 1307.4e12),  # amd.com/en/products/accelerators/instinct/mi300
    (("MI325X",), 1307.4e12),  # amd.com/en/products/accelerators/instinct/mi300
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """Section `metrics`: how often numbers are written, and where to besides `metrics.jsonl`."""

    log_freq: int = 10
    """Optimizer steps from one row of numbers to the next; the first and last step have one too."""

    enable_tensorboard: bool = False
    """Write TensorBoard files too."""

    disable_color_printing: bool = False
    """Print without colour; a stream that is no terminal never gets colour."""

    save_tb_folder: str = "tb"
    """Folder of the TensorBoard files, inside the run folder."""

    save_for_all_ranks: bool = False
    """Every rank writes, into files and folders named after it; else rank 0 alone."""

    enable_wandb: bool = False
    """Write to Weights & Biases too; offline unless WANDB_MODE says otherwise."""

    def __post_init__(self) -> None:
        if self.log_freq < 1:
            raise ValueError(
                f"metrics.log_freq = {self.log_freq} is no number of steps; give 1 or more"
            )

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether step `step`, counted from 1, gets a row of numbers."""
        return step in (1, last_step) or step % self.log_freq == 0


def perplexity(nll: float) -> float:
    """Return the exponential of a mean negative log-probability; infinite past what floats hold."""
    return math.exp(nll) if nll < 700.0 else math.inf


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device by its name, or none if it is not in the table."""
    words = set(re.split(r"[^A-Za-z0-9]+", device_name))
    return next((flops for needed, flops in PEAK_FLOPS if words.issuperset(needed)), None)


def device_peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 FLOP/s of `device`, also for float8 layers; none for CPUs and devices
    not in the table."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCosts:
    """Training FLOPs of the whole model, forward and backward, recomputation excluded."""

    flops_per_token: float
    """By the usual convention: every token attends to a whole row (`train_flops_per_token`)."""

    linear_flops_per_token: float
    """The same without attention."""

    attention_flops: Callable[[float], float]
    """Attention alone, from the sum of squared document lengths (`attention_train_flops`)."""


class TimeLeft:
    """Predicts the seconds until the last step from the steps of this process.

    Counts wall time, so what comes between steps (validation, saves) is part of the rate. The
    first step compiles and the next two warm up: they leave the rate as soon as others are there.
    """

    WARMUP_STEPS = 3

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total_steps = total_steps
        self._start_step = start_step
        self._clock = clock
        self._base: tuple[int, float] | None = None
        self._latest: tuple[int, float] | None = None

    def finish_step(self, step: int) -> None:
        """Note that `step` is done."""
        if step - self._start_step <= self.WARMUP_STEPS + 1:
            # Until the warm-up is over, the rate is that of the latest step alone.
            self._base = self._latest
        self._latest = (step, self._clock())

    def seconds(self) -> float | None:
        """Return the prediction; none before the second step."""
        if self._base is None or self._latest is None:
            return None
        (base_step, base_time), (step, now) = self._base, self._latest
        return (now - base_time) / (step - base_step) * (self._total_steps - step)


class Meter:
    """Adds up what the steps since the last report did, and reports it as a row of numbers.

    A step lasts from the end of the one before it, or from `start`, to its `finish_step`, less what
    `apart` took; so work that the device still does when a step ends is counted in the next. All
    amounts are global, over every rank. Times are the host's, so the caller must have read a
    number back from the device (the loss, say) by the end of a step.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        num_devices: int,
        costs: StepCosts,
        peak_device_flops: float | None,
        total_steps: int,
        start_step: int = 0,
        tokens_so_far: float = 0,
        trained_tokens_so_far: float = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.wall = WallTime(seconds_before=seconds_since_process_start(), clock=clock)
        self._device = device
        self._num_devices = num_devices
        self._costs = costs
        self._peak_device_flops = peak_device_flops
        self._clock = clock
        self._time_left = TimeLeft(total_steps, start_step=start_step, clock=clock)
        self._process = psutil.Process()
        self._step_start = clock()
        self._tokens_so_far = tokens_so_far
        self._trained_tokens_so_far = trained_tokens_so_far
        self._reset()

    def _reset(self) -> None:
        self._num_steps = 0
        self._step_seconds = 0.0
        self._data_seconds = 0.0
        self._saving_seconds = 0.0
        self._tokens = 0.0
        self._squared_document_tokens = 0.0
        self._rows = 0
        self._peak_resident_bytes = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def start(self) -> None:
        """Start the clock of the first step."""
        self._step_start = self._clock()

    @contextmanager
    def apart(self, kind: str) -> Iterator[None]:
        """Count the time inside as `kind`, one of `goodput.KINDS`, and as no part of a step."""
        start = self._clock()
        with self.wall.spent(kind):
            yield
        seconds = self._clock() - start
        self._step_start += seconds
        self._saving_seconds += seconds if kind == "saving" else 0.0

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = self._clock()
        with self.wall.spent("waiting for data"):
            yield
        self._data_seconds += self._clock() - start

    def finish_step(
        self,
        step: int,
        *,
        tokens: float,
        trained_tokens: float,
        squared_document_tokens: float,
        rows: int,
    ) -> None:
        """Stop the clock and add what the step did, over all ranks.

        `tokens` are those the model read, padding left out; `trained_tokens` have a label.
        """
        now = self._clock()
        self._step_seconds += now - self._step_start
        self._step_start = now
        self._num_steps += 1
        self._tokens += tokens
        self._tokens_so_far += tokens
        self._trained_tokens_so_far += trained_tokens
        self._squared_document_tokens += squared_document_tokens
        self._rows += rows
        if self._device.type == "cpu":
            resident_bytes = self._process.memory_info().rss
            self._peak_resident_bytes = max(self._peak_resident_bytes, resident_bytes)
        self._time_left.finish_step(step)

    def report(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        extra: Mapping[str, float | None] | None = None,
    ) -> Row:
        """Return the row of `step`, and start the next window.

        `loss`, `grad_norm` and `lr` are those of this step; speeds and times are means over the
        window, memory is this rank's peak in it. `extra`, such as `validation_loss`, comes last.
        """
        assert self._num_steps > 0, "a report covers at least one finished step"
        seconds = max(self._step_seconds, 1e-9)
        linear_flops = self._costs.linear_flops_per_token * self._tokens
        attention_flops = self._costs.attention_flops(self._squared_document_tokens)
        row: Row = {
            "step": step,
            "loss": loss,
            "perplexity": perplexity(loss),
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": int(self._tokens_so_far),
            "trained_tokens": int(self._trained_tokens_so_far),
            "rows": self._rows,
            "tokens_per_second_per_device": self._tokens / seconds / self._num_devices,
            "mfu": self._utilisation(self._costs.flops_per_token * self._tokens, seconds),
            "mfu_documents": self._utilisation(linear_flops + attention_flops, seconds),
            "peak_memory_gib": self._peak_memory_bytes() / GIB,
            "peak_allocated_gib": self._peak_allocated_gib(),
            "step_seconds": seconds / self._num_steps,
            "data_seconds": self._data_seconds / self._num_steps,
            "saving_seconds": self._saving_seconds,
            "goodput": self.wall.goodput(),
            "seconds_left": self._time_left.seconds(),
            **(extra or {}),
        }
        self._reset()
        return row

    def _peak_allocated_gib(self) -> float | None:
        """What tensors took of the reserved memory; the rest is lost to fragmentation."""
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device) / GIB

    def _utilisation(self, flops: float, seconds: float) -> float | None:
        """Return model FLOPs over peak FLOPs, from 0 to 1 (PaLM, arXiv:2204.02311, appendix B)."""
        if self._peak_device_flops is None:
            return None
        return flops / seconds / self._num_devices / self._peak_device_flops

    def _peak_memory_bytes(self) -> int:
        """Reserved by the allocator on CUDA, since that is what runs out; resident on CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device)
        return self._peak_resident_bytes
