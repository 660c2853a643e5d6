"""Tokenise before paying for GPUs: everything that a run will read, and what it is made of.

    python scripts/prepare_data.py --job.config_file X.toml [--section.key value]

Takes the command line of train.py, which then finds the tokens in the cache folder. It is the same
code that train.py runs at its first start; what is there already is not made again.
"""

import sys
from collections.abc import Sequence

from rich.console import Console

from engine.build import open_tokenizer
from engine.cli import load_config, run_command
from engine.config import JobConfig
from engine.data.report import report_of, tables
from engine.data.rows import RowSource, TokenRows
from engine.data.sources import open_rows
from engine.data.tokenizer import Tokenizer
from engine.logging import start_logging

PLAIN_WIDTH = 110


def main(arguments: list[str]) -> None:
    """Tokenise what is not in the cache, then print a report to standard output."""
    config = load_config(arguments, prog="prepare_data.py")
    output = start_logging(rank=0)
    try:
        rows = token_rows(open_sources(config, open_tokenizer(config)))
    finally:
        output.close()
    console = report_console()
    if rows:
        console.print(tables([report_of(source) for source in rows]))
    else:
        console.print("the run reads random tokens (dummy): there is nothing to prepare")


def open_sources(config: JobConfig, tokenizer: Tokenizer) -> list[RowSource]:
    """Open all rows that a run reads, those of training first; tokenise what was not yet."""
    training, validation = config.training, config.validation
    opened: list[RowSource] = []
    if not validation.only:
        opened.append(
            open_rows(
                training.dataset,
                training.dataset_path,
                split="train",
                seq_len=training.seq_len,
                seed=config.debug.effective_seed,
                tokenizer=tokenizer,
                config=config.data,
                shuffle=True,
            )
        )
    if validation.enable or validation.only:
        opened.append(
            open_rows(
                validation.dataset,
                validation.dataset_path,
                split="validation",
                seq_len=validation.seq_len,
                seed=config.debug.effective_seed,
                tokenizer=tokenizer,
                config=config.data,
                shuffle=True,
            )
        )
    return opened


def token_rows(opened: Sequence[RowSource]) -> list[TokenRows]:
    """Return those that hold text; random tokens have nothing to report."""
    return [rows for rows in opened if isinstance(rows, TokenRows)]


def report_console() -> Console:
    """Return standard output for tables: as wide as the terminal, or as a page of a log."""
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
