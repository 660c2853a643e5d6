"""Look at the rows that a run will train on: decoded, the trained tokens marked.

    python scripts/inspect_data.py --job.config_file X.toml --rows 3 [--section.key value]

Takes the command line of train.py. On a terminal trained tokens are green and the others dim;
elsewhere, or with NO_COLOR, trained text stands between « and ». A line says where each document
begins. Behind the rows: lengths of the documents, bad records by file and line, and the figures of
scripts/prepare_data.py.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import groupby

import torch
from rich.console import Console
from rich.text import Text

from engine.batches import open_sources, token_rows
from engine.build import open_tokenizer
from engine.cli import load_config, run_command
from engine.combinations import check_data
from engine.data.batch import IGNORED_LABEL, PADDING_DOCUMENT, Row
from engine.data.report import histogram, label, report_console, report_of, tables
from engine.data.rows import TokenRows
from engine.data.tokenizer import Tokenizer
from engine.logging import start_logging

TRAINED, UNTRAINED = "green", "dim"
MARKS = ("«", "»")


def main(arguments: list[str]) -> None:
    """Print the first rows of an epoch of each source, then what there is to know about it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=2)
    ours, rest = parser.parse_known_args(arguments)
    if ours.rows < 0:
        raise ValueError(f"--rows {ours.rows}: give the number of rows to print, from 0 up")
    config = load_config(rest, prog="inspect_data.py --rows N")
    check_data(config)
    output = start_logging(rank=0)
    try:
        tokenizer = open_tokenizer(config)
        opened = open_sources(config, tokenizer)
    finally:
        output.close()
    console = report_console()
    if config.data.streaming and not config.validation.only:
        console.print("training rows are a stream and not shown; data.streaming = false shows them")
    for rows in opened:
        for number in range(min(ours.rows, rows.rows_per_epoch)):
            row = rows.row(number)
            console.rule(f"{label(rows.source_names[row.source])}: row {number}", align="left")
            print_row(console, row, tokenizer)
    sources = token_rows(opened)
    for rows in sources:
        print_lengths(console, rows)
        print_bad_records(console, rows)
    if sources:
        console.print(tables([report_of(rows) for rows in sources]))


def print_row(console: Console, row: Row, tokenizer: Tokenizer) -> None:
    """Print a row's documents, each behind a line that says how many tokens are trained."""
    use_color = has_color(console)
    is_trained = trained_tokens(row)
    for document in range(1, int(row.documents_T.max()) + 1):
        here = row.documents_T == document
        tokens, trained = row.tokens_T[here].tolist(), is_trained[here].tolist()
        console.print(
            f"-- document {document}: {len(tokens):,} tokens, {sum(trained):,} trained",
            style="bold" if use_color else None,
        )
        text = Text()
        for passage, is_label in passages(tokens, trained, tokenizer):
            if use_color:
                text.append(passage, style=TRAINED if is_label else UNTRAINED)
            else:
                text.append(passage.join(MARKS) if is_label else passage)
        console.print(text, soft_wrap=True)
    if padding := int((row.documents_T == PADDING_DOCUMENT).sum()):
        console.print(f"-- padding: {padding:,} tokens")


def has_color(console: Console) -> bool:
    """Say whether colours will be seen: on a terminal that has not been told to do without."""
    return console.is_terminal and not os.environ.get("NO_COLOR")


def trained_tokens(row: Row) -> torch.Tensor:
    """Return which tokens of a row are labels of the token before them: bool, shape (T,)."""
    is_trained = torch.zeros_like(row.tokens_T, dtype=torch.bool)
    is_trained[1:] = row.labels_T[:-1] != IGNORED_LABEL
    return is_trained


def passages(
    tokens: list[int], is_trained: list[bool], tokenizer: Tokenizer
) -> Iterator[tuple[str, bool]]:
    """Yield the text of each run of tokens that are trained, or are not.

    A character whose bytes belong to two runs is shown as U+FFFD in both.
    """
    pairs = zip(tokens, is_trained, strict=True)
    for is_label, run in groupby(pairs, key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        # Text of others must not steer the terminal.
        yield tokenizer.decode(ids, skip_special_tokens=False).replace("\x1b", "␛"), is_label


def print_lengths(console: Console, rows: TokenRows) -> None:
    """Print how many documents there are of which length."""
    console.rule(f"{label(rows.source_names[0])}: lengths of documents", align="left")
    console.print(histogram(rows.file.lengths()))


def print_bad_records(console: Console, rows: TokenRows) -> None:
    """Print how many records were left out, and where the first of them stand."""
    facts = rows.file.facts
    if not facts.num_bad:
        return
    shown = len(facts.bad_examples)
    rest = f", of which the first {shown}" if facts.num_bad > shown else ""
    console.rule(
        f"{label(rows.source_names[0])}: {facts.num_bad:,} bad records left out{rest}", align="left"
    )
    for example in facts.bad_examples:
        console.print(Text(example), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
