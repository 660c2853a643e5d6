"""What the memory of a device holds in training, part by part, measured in one step."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from engine.metrics import GIB, Row

log = logging.getLogger("tessera")

MEASURED_STEP = 2
"""The first step of a process compiles, tunes kernels and has no optimizer state yet."""


def bytes_on(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Return the memory on `device` behind this rank's part of `tensors`, each storage once."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        for part in _parts(tensor):
            if part.device.type == device.type:
                storage = part.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that hold the values of one that is sharded or quantised."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        if isinstance(part := getattr(tensor, name), Tensor):  # a DTensor names its mesh too
            yield from _parts(part)


class MemoryWatch:
    """Measures the second step of this process, logs its parts, and gives them as metrics once.

    Each part is given at its largest: gradients come while activations go, so the parts may add up
    to more than the peak. What another model holds, a reference, is part of "temporary".
    The allocator's counters are the host's, so nothing waits for the device. Where there is no
    CUDA device they do not exist, and activations, temporary buffers and the peak are not known.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
        self._model = model
        self._optimizer = optimizer
        self._device = device
        self._steps = 0
        self._activations: int | None = None
        self._row: Row = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note a step, and measure it if it is the one; every step goes inside."""
        self._steps += 1
        if self._steps != MEASURED_STEP:
            yield
            return
        with self._activations_noted():
            yield
        self._row = self._measure()
        known = {name: value for name, value in self._row.items() if value is not None}
        shares = ", ".join(
            f"{name.removeprefix('memory/').removesuffix('_gib')} {value:.2f}"
            for name, value in known.items()
        )
        log.info("memory in GiB, of one rank in a step, each part at its largest: %s", shares)

    def take(self) -> Row:
        """Return the parts in the row after they were measured; in others nothing."""
        row, self._row = self._row, {}
        return row

    @contextmanager
    def _activations_noted(self) -> Iterator[None]:
        """Note by how much the largest forward pass inside made the allocator grow."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        before = 0

        def enter(module: nn.Module, arguments: object) -> None:
            nonlocal before
            before = torch.cuda.memory_allocated(self._device)

        def leave(module: nn.Module, arguments: object, result: object) -> None:
            grown = torch.cuda.memory_allocated(self._device) - before
            self._activations = max(self._activations or 0, grown)

        with ExitStack() as stack:
            # Prepended: FSDP2 gathers the first parameters in a hook of its own.
            hook = self._model.register_forward_pre_hook(enter, prepend=True)
            stack.callback(hook.remove)
            stack.callback(self._model.register_forward_hook(leave).remove)
            yield

    def _measure(self) -> Row:
        parameters = list(self._model.parameters())
        held = [*parameters, *self._model.buffers()]
        state = (
            value
            for one in self._optimizer.state.values()
            for value in one.values()
            if isinstance(value, Tensor)
        )
        parts: dict[str, int | None] = {
            "parameters": bytes_on(held, self._device),
            # They are freed by now, and have the sizes and the type of what is trained.
            "gradients": bytes_on((p for p in parameters if p.requires_grad), self._device),
            "optimizer": bytes_on(state, self._device),
            "activations": self._activations,
            "temporary": None,
            "peak_allocated": None,
        }
        if self._activations is not None:
            peak = torch.cuda.max_memory_allocated(self._device)
            parts["temporary"] = max(peak - sum(size or 0 for size in parts.values()), 0)
            parts["peak_allocated"] = peak
        return {
            f"memory/{name}_gib": None if size is None else size / GIB
            for name, size in parts.items()
        }
