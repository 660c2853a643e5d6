"""`torch.compile` per block, and of the loss. How it nests with checkpointing is in `apply.py`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

Forward = Callable[..., Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileConfig:
    """What is compiled, and with what."""

    enable: bool = False
    """Compile the components below."""

    components: list[Literal["model", "loss"]] = field(default_factory=lambda: ["model", "loss"])
    """"model": each block; "loss": the log-probabilities of labels."""

    backend: str = "inductor"
    """Backend of torch.compile, such as "inductor", "aot_eager" or "eager"."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.components if name not in ("model", "loss")]
        if unknown:
            raise ValueError(
                f"compile.components = {self.components}: {unknown[0]!r} is not a component; "
                'use "model", "loss" or both'
            )
        if not self.enable:
            return
        known = torch.compiler.list_backends(exclude_tags=())
        if self.backend not in known:
            raise ValueError(
                f"compile.backend = {self.backend!r} is not a backend of this torch; "
                f"use one of {', '.join(sorted(known))}"
            )

    def compiles(self, component: Literal["model", "loss"]) -> bool:
        """Say whether a component is compiled."""
        return self.enable and component in self.components


def compiled(forward: Forward, config: CompileConfig) -> Forward:
    """Return `forward` compiled as one graph; a graph break is an error."""
    return torch.compile(forward, backend=config.backend, fullgraph=True)


def compile_loss(head: nn.Module, config: CompileConfig) -> None:
    """Compile the seam through which the head scores labels."""
    seam: Any = head
    seam.label_logps = compiled(seam.label_logps, config)


def overlap_tensor_parallel(mesh: DeviceMesh) -> None:
    """Let the compiler fuse the collectives of `mesh` with the matrix products beside them."""
    from torch._inductor import config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)
