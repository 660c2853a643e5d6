"""Tokenise before paying for GPUs: everything that a run will read, and what it is made of.

    python scripts/prepare_data.py --job.config_file X.toml [--section.key value]

Takes the command line of train.py, which then finds the tokens in the cache folder. It is the same
code that train.py runs at its first start; what is there already is not made again.
"""

import sys

from engine.batches import open_sources, token_rows
from engine.build import open_tokenizer
from engine.cli import load_config, run_command
from engine.combinations import check_data
from engine.data.report import report_console, report_of, tables
from engine.logging import start_logging


def main(arguments: list[str]) -> None:
    """Tokenise what is not in the cache, then print a report to standard output."""
    config = load_config(arguments, prog="prepare_data.py")
    check_data(config)
    output = start_logging(rank=0)
    try:
        rows = token_rows(open_sources(config, open_tokenizer(config)))
    finally:
        output.close()
    console = report_console()
    if rows:
        console.print(tables([report_of(source) for source in rows]))
    else:
        console.print("the run reads random tokens or a stream: there is nothing to prepare")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
