"""The data of a run without the run: what it reads, opened and tokenised."""

from collections.abc import Sequence

from engine.config import JobConfig
from engine.data.rows import RowSource, TokenRows
from engine.data.sources import open_rows
from engine.data.tokenizer import Tokenizer


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
