"""Turn a checkpoint into a Hugging Face folder that transformers loads. One process, no GPU.

    python scripts/convert_dcp_to_hf.py CHECKPOINT OUT [--verify] [--merge] [--dtype bfloat16]

CHECKPOINT is a step folder, or a folder of them (the newest good one is taken). Of a run that
trained adapters OUT is a folder that PEFT loads, or with --merge a whole model, for which the
base must still be where the run had it. --merge adds to the base's weights as its files have
them; a run with adapter.merge_export adds to them as it computed with them, rounded to
training.mixed_precision_param or dequantised from four bits (nf4). Exit code 2 and one message
for a mistake, 1 where --verify finds the logits apart.
"""

import argparse
import sys
from pathlib import Path

from engine.cli import run_command
from engine.convert import DTYPES, checkpoint_to_hf, compare_logits, find_step


def main(arguments: list[str]) -> None:
    """Convert, and verify if asked; exits with 1 where the verification fails."""
    parser = argparse.ArgumentParser(prog="convert_dcp_to_hf.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", type=Path, help="step folder, or folder of steps")
    parser.add_argument("out", type=Path, help="folder to make; it must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument("--max_shard_gb", type=float, default=5.0, help="10^9 bytes in one file")
    parser.add_argument(
        "--verify", action="store_true", help="load the result with transformers, compare logits"
    )
    parser.add_argument(
        "--merge", action="store_true", help="put adapters into the weights of their base"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference of logits (relative to the largest one above 1) and KL",
    )
    options = parser.parse_args(arguments)
    dtype = DTYPES[options.dtype]
    step = find_step(options.checkpoint)
    max_shard_bytes = round(options.max_shard_gb * 10**9)
    checkpoint_to_hf(step, options.out, dtype, merge=options.merge, max_shard_bytes=max_shard_bytes)
    print(f"wrote {options.out} from {step} in {options.dtype}")
    if options.verify:
        difference = compare_logits(step, options.out, dtype)
        print(f"against transformers: {difference}")
        if not difference.is_within(options.tolerance):
            sys.exit(f"error: the logits differ by more than --tolerance {options.tolerance}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
