"""Import of a Hugging Face folder on several ranks: seconds, bytes read, memory.

    python -m scripts.bench.import_folder --out FILE.json --layers 8

Writes a folder of Llama 8B's shape (random weights in bf16, `--layers` blocks), drops it from the
page cache, and imports it into each layout, once as the engine does and once with each rank reading
what it holds, for comparison. Every rank then compares its part with what the files say.

`requested` are the bytes of the slices that a rank asked for, `from_disk` what the kernel had to
fetch for it (read_bytes of /proc/self/io), `private` its memory without mapped files (RssAnon).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from engine.hf_io import FolderWriter, HfAssets, asset_files, read_hf_config
from engine.hf_weights import HfWeights, load_into
from engine.logging import machine_report
from models.registry import family_for_hf, load_family
from parallelisms import ParallelConfig, ParallelDims, parallelize
from parallelisms.activation_checkpoint import ActivationCheckpointConfig
from parallelisms.compile import CompileConfig
from parallelisms.fsdp import PrecisionConfig
from parallelisms.materialise import fill, local_slices, materialise
from scripts.bench.measure import ROOT

LAYOUTS = {
    "FSDP4": ParallelConfig(data_parallel_shard_degree=4),
    "FSDP2 x TP2": ParallelConfig(data_parallel_shard_degree=2, tensor_parallel_degree=2),
    "TP4": ParallelConfig(data_parallel_shard_degree=1, tensor_parallel_degree=4),
    "HSDP 2 x 2": ParallelConfig(data_parallel_replicate_degree=2, data_parallel_shard_degree=2),
}
WAYS = ("engine", "own slices")
AS_ON_TWO_NODES = "as on 2 nodes"
"""What the engine does where a node has two of the four ranks, for replicas."""

DTYPE = torch.bfloat16
POLL_SECONDS = 0.02
SECONDS_ALLOWED = 60.0
REPEATED = 1 << 20  # random numbers; a tensor holds them over and over


def write_folder(folder: Path, num_layers: int) -> int:
    """Write a complete folder of Llama 8B's widths; return the bytes of its weights."""
    family = load_family("llama3")
    sizes = replace(family.flavor("8B"), num_layers=num_layers)
    with torch.device("meta"):
        model = family.build(sizes)
    key_map = family.key_map(sizes)
    shapes = key_map.shapes({name: tuple(p.shape) for name, p in model.named_parameters()})
    writer = FolderWriter(folder, shapes, DTYPE)
    block = (torch.randn(REPEATED) * 0.02).to(DTYPE)
    writer.open()
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        writer.add(name, block.repeat(-(-size // REPEATED))[:size].view(shape))
    assets = HfAssets(
        key_map=key_map, config=family.config_to_hf(sizes), save_tokenizer=lambda folder: None
    )
    writer.finish(asset_files(assets, DTYPE))
    return sum(torch.Size(shape).numel() for shape in shapes.values()) * DTYPE.itemsize


def drop_from_cache(folder: Path) -> None:
    """Let the kernel forget the weights, so that they come from the disk again."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def proc(name: str, key: str) -> int:
    """Return a number of this process that the kernel keeps."""
    lines = Path(f"/proc/self/{name}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


@contextmanager
def watched(peaks: list[int]) -> Any:
    """Append the largest private memory, in bytes, while the block runs."""
    over = threading.Event()
    seen = [1024 * proc("status", "RssAnon")]

    def poll() -> None:
        while not over.wait(POLL_SECONDS):
            seen.append(1024 * proc("status", "RssAnon"))

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        peaks.append(max(seen))


def empty_model(folder: Path, layout: str, device: torch.device) -> tuple[Any, Any]:
    """Return the model of a folder in a layout, its values undefined, and its key map."""
    hf_config = read_hf_config(folder)
    family = family_for_hf(hf_config)
    sizes = family.config_from_hf(hf_config)
    parallel = LAYOUTS[layout]
    with torch.device("meta"):
        model = family.build(sizes)
    parallelize(
        model,
        family.plan(sizes),
        ParallelDims.of(parallel, dist.get_world_size()).build(device.type),
        parallel=parallel,
        precision=PrecisionConfig(param_dtype=DTYPE, reduce_dtype=DTYPE, master_dtype=DTYPE),
        activation_checkpoint=ActivationCheckpointConfig(),
        compile=CompileConfig(),
    )
    materialise(model, device)
    return model, family.key_map(sizes)


def work(options: argparse.Namespace) -> None:
    """Import on this rank in one way, check the values, and let rank 0 write what all found."""
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    if options.way == AS_ON_TWO_NODES:
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    model, key_map = empty_model(options.folder, options.layout, device)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    places = key_map.places(shapes)
    for parameter in model.parameters():  # its memory is touched before, not while it is measured
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.detach().zero_()
    dist.barrier()
    disk, held = proc("io", "read_bytes"), 1024 * proc("status", "RssAnon")
    peaks: list[int] = []
    weights = HfWeights(options.folder)

    def read(name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        return weights.read(places[name].stored, places[name].slices(slices))

    started = time.perf_counter()
    with watched(peaks):
        if options.way != "own slices":
            requested = load_into(model, options.folder, key_map).bytes_read
        else:
            fill(model, read)
            requested = weights.bytes_read
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
    mine = {
        "seconds": time.perf_counter() - started,
        "requested": requested,
        "from_disk": proc("io", "read_bytes") - disk,
        "parameters": sum(
            (p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters()
        ),
        "private_before": held,
        "private_peak": peaks[0],
    }
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        assert torch.equal(local.cpu(), read(name, local_slices(parameter))), name
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        options.result.write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()


def measure(folder: Path, layout: str, way: str, device: str, total: int) -> dict[str, Any]:
    """Import in processes of their own, from the disk; return the figures of all ranks."""
    drop_from_cache(folder)
    result = folder.parent / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    command += ["-m", "scripts.bench.import_folder", "--folder", str(folder), "--layout", layout]
    command += ["--way", way, "--device", device, "--result", str(result)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or not result.is_file():
        raise RuntimeError(f"{layout}, {way} ended with {done.returncode}: {done.stderr[-3000:]}")
    ranks = json.loads(result.read_text())
    seconds = max(rank["seconds"] for rank in ranks)

    def gigabytes(key: str) -> list[float]:
        return [round(rank[key] / 1e9, 3) for rank in ranks]

    grown = [round((rank["private_peak"] - rank["private_before"]) / 1e9, 3) for rank in ranks]
    return {
        "layout": layout,
        "way": way,
        "seconds": round(seconds, 1),
        "gb_per_second": round(total / 1e9 / seconds, 2),
        "requested_gb": gigabytes("requested"),
        "from_disk_gb": gigabytes("from_disk"),
        "parameters_gb": gigabytes("parameters"),
        "private_memory_growth_gb": grown,
        "load_average": round(os.getloadavg()[0], 1),
        "passed": way == "own slices" or seconds <= SECONDS_ALLOWED,
    }


def main(arguments: Sequence[str]) -> int:
    """Measure every layout in both ways and write the record."""
    parser = argparse.ArgumentParser(prog="scripts.bench.import_folder", description=__doc__)
    parser.add_argument("--out", type=Path, help="record to write")
    parser.add_argument("--layers", type=int, default=32, help="blocks; 32 is Llama 8B")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scratch", type=Path, help="where to write the folder")
    parser.add_argument("--only", default="", help="layouts whose name holds this text")
    for name in ("--folder", "--result"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    for name in ("--layout", "--way"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.result is not None:
        work(options)
        return 0
    if options.out is None:
        parser.error("--out is needed")
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch) / "model"
        total = write_folder(folder, options.layers)
        rows: list[dict[str, Any]] = []
        for layout in (name for name in LAYOUTS if options.only in name):
            extra = (AS_ON_TWO_NODES,) if layout.startswith("HSDP") else ()
            for way in (*WAYS, *extra):
                rows.append(measure(folder, layout, way, options.device, total))
                print(json.dumps(rows[-1]), flush=True)
    record = {
        "suite": "import-folder",
        "machine": {**machine_report(), "cpus": f"{os.cpu_count()} CPU cores"},
        "command": f"python -m scripts.bench.import_folder --layers {options.layers} "
        f"--device {options.device}" + f" --only {options.only}" * bool(options.only),
        "ranks": 4,
        "weights_gb": round(total / 1e9, 3),
        "bounds": {"seconds": SECONDS_ALLOWED},
        "rows": rows,
        "passed": all(row["passed"] for row in rows),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
