"""A rank of a large run needs host memory for its own part of the parameters, and little more."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import psutil
import torch
from models.initialise import initial_values
from models.registry import load_family
from parallelisms import ParallelConfig, ParallelDims, parallelize
from parallelisms.activation_checkpoint import ActivationCheckpointConfig
from parallelisms.compile import CompileConfig
from parallelisms.fsdp import PrecisionConfig
from parallelisms.materialise import fill, materialise
from scripts.check_config import fake_process_group

RANKS = 64
with fake_process_group(RANKS):
    family = load_family("llama3")
    config, parallel = family.flavor("8B"), ParallelConfig()
    dims = ParallelDims.of(parallel, RANKS).build("cpu")
    with torch.device("meta"):
        model = family.build(config)
    parallelize(
        model, family.plan(config), dims, parallel=parallel, precision=PrecisionConfig(),
        activation_checkpoint=ActivationCheckpointConfig(), compile=CompileConfig(),
    )
    before = psutil.Process().memory_info().rss
    materialise(model, "cpu")
    fill(model, initial_values(model, config, seed=1))
    # Not ru_maxrss, which a process takes over from the one that started it.
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    peak = int(line.split()[1]) * 1024
    part = sum(p.to_local().nbytes for p in model.parameters())
    print((peak - before) / part, part)
"""


def test_an_8b_model_starts_in_little_more_than_its_part() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    ratio, part = map(float, run.stdout.split()[-2:])
    assert 8.0e9 * 4 / 64 < part < 8.1e9 * 4 / 64
    assert 0.9 < ratio < 1.3, f"peak is {ratio:.2f} times this rank's part"
