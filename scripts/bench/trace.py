"""From a profiler trace of one step to what the GPU did in it, and how long it did nothing."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Span = tuple[float, float]
"""Begin and end in microseconds."""

DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
KINDS = (
    ("collectives", re.compile("nccl", re.IGNORECASE)),
    ("attention", re.compile("flash|fmha|sdpa|attention|attn", re.IGNORECASE)),
    # What the compiler fused beside a product is named after it too; its own products are "tem".
    ("other", re.compile("^triton_(?!tem)")),
    ("matrix products", re.compile("gemm|nvjet|xmma|cutlass|cublas|triton_tem|_mm", re.IGNORECASE)),
    # Casts and copies around gathering and reducing, those of copy engines between GPUs too.
    ("copies of shards", re.compile("chunk_cat|split_with_sizes|CopyFunctor|Memcpy")),
    ("gradient norm", re.compile("LpNormFunctor")),
    ("optimizer", re.compile("multi_tensor|adam", re.IGNORECASE)),
)
"""Kernels by words of their names, the first that fits; the rest is `other`."""

LONGEST_KERNELS = 12
KEPT_OF_A_NAME = 120


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Return the events of a trace that `engine/profiling.py` wrote."""
    return json.loads(path.read_text())["traceEvents"]


def kind_of(kernel: str) -> str:
    """Return which work a kernel belongs to."""
    return next((kind for kind, words in KINDS if words.search(kernel)), "other")


def covered(spans: Iterable[Span]) -> float:
    """Return how much of the time at least one of the spans covers."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def summarise_trace(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return shares and times of the traced step; nothing where no kernel was traced.

    `gpu_idle` is the share of the step in which no kernel ran, the launch gaps; in
    `gpu_only_communicates` none but collectives. The profiler slows the host, so the gaps of a
    step without it are at most these.
    """
    steps = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith("ProfilerStep")
    ]
    if not steps:
        return {}
    begin, end = min(steps)[0], max(steps)[1]
    kernels: list[tuple[str, Span]] = []
    for event in events:
        if event.get("cat") in DEVICE_CATEGORIES:
            # The last step's optimizer may still run when this one begins: a steady state.
            span = max(event["ts"], begin), min(event["ts"] + event["dur"], end)
            if span[0] < span[1]:
                kernels.append((event["name"], span))
    if not kernels:
        return {}
    length = end - begin
    busy = covered(span for _, span in kernels)
    computing = covered(span for name, span in kernels if kind_of(name) != "collectives")
    times: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for name, (start, stop) in kernels:
        times[name[:KEPT_OF_A_NAME]] += stop - start  # pyright: ignore[reportArgumentType]
        kinds[kind_of(name)] += stop - start  # pyright: ignore[reportArgumentType]
    return {
        "step_ms": round(length / 1e3, 2),
        "gpu_idle": round(1 - busy / length, 4),
        "gpu_only_communicates": round((busy - computing) / length, 4),
        "kernels": len(kernels),
        "ms_by_kind": {kind: round(us / 1e3, 2) for kind, us in kinds.most_common()},
        "longest_kernels_ms": {
            name: round(us / 1e3, 2) for name, us in times.most_common(LONGEST_KERNELS)
        },
    }
