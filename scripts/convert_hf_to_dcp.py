"""Turn a Hugging Face folder into a checkpoint that a run can start from. One process, no GPU.

    python scripts/convert_hf_to_dcp.py FOLDER OUT [--dtype float32]

OUT becomes a step folder with the model alone; name it in `checkpoint.initial_load_path`. Exit
code 2 and one message for a mistake.
"""

import argparse
import sys
from pathlib import Path

from engine.cli import run_command
from engine.convert import DTYPES, hf_to_checkpoint


def main(arguments: list[str]) -> None:
    """Convert."""
    parser = argparse.ArgumentParser(prog="convert_hf_to_dcp.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="with config.json and safetensors files")
    parser.add_argument("out", type=Path, help="step folder to make; it must not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the parameters")
    options = parser.parse_args(arguments)
    hf_to_checkpoint(options.folder, options.out, DTYPES[options.dtype])
    print(f"wrote {options.out}; start a run from it with checkpoint.initial_load_path")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
