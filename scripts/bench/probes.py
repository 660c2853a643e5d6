"""What this machine's GPUs and links reach alone: `torchrun … -m scripts.bench.probes FILE`.

Rank 0 writes one JSON object: the speed of a bf16 matrix product on random data and, on several
ranks, the bus bandwidth of collectives. Records with the same probes can be compared.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from scripts.bench.measure import run_logged, torchrun

SIZE = 8192
MESSAGE_BYTES = 512 * 2**20
REPEATS = 10
TIMEOUT_SECONDS = 120.0


def seconds(work: Callable[[], object]) -> float:
    """Return the mean time of `work` on the device over `REPEATS` calls, after three."""
    for _ in range(3):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPEATS):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / REPEATS


def matmul_tflops() -> float:
    """Return the speed of a square bf16 product of random matrices."""
    left, right = (torch.randn(SIZE, SIZE, device="cuda").bfloat16() for _ in range(2))
    return 2 * SIZE**3 / seconds(lambda: left @ right) / 1e12


def bus_gib_per_second() -> dict[str, float]:
    """Return each collective's bus bandwidth at 512 MiB, by the convention of nccl-tests."""
    ranks = dist.get_world_size()
    whole = torch.empty(MESSAGE_BYTES, dtype=torch.uint8, device="cuda").view(torch.bfloat16)
    part, other = whole.chunk(ranks)[dist.get_rank()].clone(), torch.empty_like(whole)
    works: dict[str, tuple[Callable[[], object], float]] = {
        "all_gather": (lambda: dist.all_gather_into_tensor(whole, part), 1.0),
        "reduce_scatter": (lambda: dist.reduce_scatter_tensor(part, whole), 1.0),
        "all_reduce": (lambda: dist.all_reduce(whole), 2.0),
        "all_to_all": (lambda: dist.all_to_all_single(other, whole), 1.0),
    }
    moved = MESSAGE_BYTES / 2**30 * (ranks - 1) / ranks
    return {name: round(times * moved / seconds(work), 1) for name, (work, times) in works.items()}


def take_probes(gpus: int) -> dict[str, object]:
    """Run this file on so many GPUs in processes of their own; say so where that fails."""
    if torch.cuda.device_count() < gpus:
        return {"not taken": f"this machine has {torch.cuda.device_count()} of {gpus} GPUs"}
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "probes.json", Path(folder) / "log"
        program = torchrun(gpus, "-m", "scripts.bench.probes", str(out))
        code = run_logged(program, log, TIMEOUT_SECONDS)
        return json.loads(out.read_text()) if code == 0 else {"failed": log.read_text()[-1000:]}


def main() -> int:
    """Take the probes of this rank, and write those of rank 0 to the file that is given."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    found: dict[str, object] = {"matmul_8192_bf16_tflops": round(matmul_tflops(), 1)}
    if dist.get_world_size() > 1:
        found["bus_gib_per_second_at_512_mib"] = bus_gib_per_second()
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
