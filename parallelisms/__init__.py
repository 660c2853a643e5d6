"""Parallelisms that read one plan: data, sharded, tensor, sequence; checkpointing and compile."""

from typing import TYPE_CHECKING, Any

from parallelisms.mesh import ParallelConfig, ParallelDims

if TYPE_CHECKING:
    from parallelisms.apply import parallelize

__all__ = ["ParallelConfig", "ParallelDims", "parallelize"]


def __getattr__(name: str) -> Any:
    """Load `parallelize` when it is asked for: a wrong setting is told without its 2 seconds."""
    if name == "parallelize":
        from parallelisms.apply import parallelize

        return parallelize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
