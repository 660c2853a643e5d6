"""Train a model: `torchrun train.py --job.config_file x.toml --section.key value`."""

import sys

from engine.cli import load_config, run_command
from engine.loop import fit


def main(arguments: list[str]) -> None:
    """Parse the configuration and train."""
    fit(load_config(arguments))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
