"""From a configuration and the counters of a run to its rows and one rank's microbatches.

What a finished step adds to the counters stands here too: it is where the next part of a run,
on other ranks and workers, goes on.
"""

import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial

from engine.checkpoint_storage import RankGroup
from engine.config import JobConfig
from engine.data.balance import dearest_over_mean
from engine.data.batch import Batch
from engine.data.loader import Dealing, cost_of, train_batches
from engine.data.mixture import MixedRows, mix
from engine.data.rows import RowSource, TokenRows
from engine.data.sources import open_rows, stream_rows
from engine.data.stdlib import Split
from engine.data.tokenizer import Tokenizer
from engine.objectives import PAIRED, UNPAIRED
from engine.step import SourceReport

log = logging.getLogger("tessera")

BALANCE_ROWS = 512
"""Rows of the first steps whose balance is logged, 10 to 60 microseconds each."""

Counters = MutableMapping[str, int | float]
"""Amounts by name over all ranks since the run began; a checkpoint holds them."""


def first_counters() -> dict[str, int | float]:
    """Return the counters of a run before its first step."""
    return {"step": 0, "rows_consumed": 0, "tokens": 0, "trained_tokens": 0}


def count_step(
    counters: Counters,
    step: int,
    *,
    rows: int,
    tokens: int,
    trained_tokens: int,
    sources: Mapping[str, SourceReport],
) -> None:
    """Count a finished step; `rows_consumed` is the run's place in the data."""
    counters["step"] = step
    counters["rows_consumed"] += rows
    counters["tokens"] += tokens
    counters["trained_tokens"] += trained_tokens
    for name, source in sources.items():
        counters[f"tokens/{name}"] = counters.get(f"tokens/{name}", 0) + source.tokens


def open_training_rows(
    config: JobConfig, tokenizer: Tokenizer, *, batch_degree: int = 1
) -> RowSource:
    """Return the rows that a run trains on, on so many data-parallel ranks.

    Their number matters to streams, scheduled weights and `data.largest_batch_first` alone, and
    only while `training.global_batch_size` is -1.
    """
    training = config.training
    rows_per_step = training.rows_per_step(batch_degree)
    if config.data.streaming:
        return stream_rows(
            training.dataset,
            training.dataset_path,
            seq_len=training.seq_len,
            seed=config.debug.effective_seed,
            tokenizer=tokenizer,
            config=config.data,
            rows_per_step=rows_per_step,
        )
    opened = open_training_sources(config, tokenizer, batch_degree=batch_degree)
    if not config.data.sources:
        return opened[0]
    mixture = mix(
        opened,
        config.data.sources,
        rows_per_step=rows_per_step,
        seed=config.debug.effective_seed,
    )
    mixture.log_plan(training.steps * rows_per_step)
    return mixture


def open_training_sources(
    config: JobConfig, tokenizer: Tokenizer, *, batch_degree: int = 1
) -> list[RowSource]:
    """Return the rows of each source of the training text; tokenise what was not yet."""
    training = config.training
    opened = _opener(config, tokenizer, "train", training.seq_len)
    if config.data.sources:
        return [opened(one.dataset, one.path, source=one) for one in config.data.sources]
    largest = training.rows_per_step(batch_degree) if config.data.largest_batch_first else 0
    return [opened(training.dataset, training.dataset_path, num_largest_first=largest)]


def open_validation_sources(config: JobConfig, tokenizer: Tokenizer) -> list[RowSource]:
    """Return the rows of each held-out source; none where the run does not validate."""
    validation = config.validation
    if not (validation.enable or validation.only):
        return []
    opened = _opener(config, tokenizer, "validation", validation.seq_len)
    if validation.sources:
        return [opened(one.dataset, one.path, source=one) for one in validation.sources]
    return [opened(validation.dataset, validation.dataset_path)]


def open_sources(config: JobConfig, tokenizer: Tokenizer) -> list[RowSource]:
    """Return the rows of each source that a run reads, training's first; streams are left out."""
    reads_training = not (config.validation.only or config.data.streaming)
    training = open_training_sources(config, tokenizer) if reads_training else []
    return [*training, *open_validation_sources(config, tokenizer)]


def token_rows(opened: Sequence[RowSource]) -> list[TokenRows]:
    """Return those that hold text, also of a mixture; random tokens have nothing to report."""
    single = [
        one for rows in opened for one in (rows.sources if isinstance(rows, MixedRows) else [rows])
    ]
    return [rows for rows in single if isinstance(rows, TokenRows)]


def check_pairs(config: JobConfig, read: Sequence[RowSource]) -> None:
    """Refuse rows without pairs, as a format of one's own may make them, for what compares them."""
    name = config.objective.name
    for rows in token_rows(read):
        if name in PAIRED | UNPAIRED and rows.file.pairs is None:
            raise ValueError(
                f"objective.name = {name!r}: the rows of {rows.source_names[0]} have no pairs of "
                f"answers; let data.format = {config.data.format!r} give each Document its `pair`, "
                "or use data.format = 'preference' or 'unpaired_preference'"
            )


def agree_on_data(tokenizer: Tokenizer, read: Sequence[RowSource]) -> None:
    """Refuse ranks that read different text, as nodes with folders of their own may."""
    group = RankGroup()
    found = group.gather((tokenizer.fingerprint, *(rows.fingerprint for rows in read)))
    group.close()
    if others := [rank for rank, mine in enumerate(found) if mine != found[0]]:
        raise ValueError(
            f"training.dataset, data.sources, validation or model.hf_assets_path: ranks {others} "
            "read other text or another tokenizer than rank 0; give all nodes the same files, "
            "Python and tokenizers version"
        )


def _opener(
    config: JobConfig, tokenizer: Tokenizer, split: Split, seq_len: int
) -> Callable[..., RowSource]:
    return partial(
        open_rows,
        split=split,
        seq_len=seq_len,
        seed=config.debug.effective_seed,
        tokenizer=tokenizer,
        config=config.data,
        # Held-out rows too, so that the first `validation.steps` batches stand for the whole set.
        shuffle=True,
    )


def open_training_batches(
    config: JobConfig,
    rows: RowSource,
    *,
    batch_rank: int,
    batch_degree: int,
    counters: Counters,
) -> Iterator[Batch]:
    """Yield one data-parallel rank's microbatches from where the finished steps left off."""
    training = config.training
    return train_batches(
        rows,
        local_batch_size=training.local_batch_size,
        global_batch_size=training.rows_per_step(batch_degree),
        batch_rank=batch_rank,
        batch_degree=batch_degree,
        start_row=int(counters["rows_consumed"]),
        dataloader=training.dataloader,
        pad_to_multiple=config.parallelism.token_multiple,
    )


def log_dealing(config: JobConfig, batch_degree: int) -> None:
    """Log how a step's rows are shared, with a note where some ranks compute fillers."""
    training, budget = config.training, config.data.batch_tokens
    dealing = training.dealing(batch_degree)
    unit, size = ("batches of up to", budget) if budget else ("rows of", training.seq_len)
    log.info(
        "one step: %d %s %d tokens, %s tokens, in %d microbatches of %d %s on each of %d "
        "data-parallel ranks",
        *(dealing.rows_per_step, unit, size, f"{dealing.rows_per_step * size:,}"),
        *(dealing.microbatches, dealing.rows_per_microbatch, unit.split()[0]),
        dealing.batch_degree,
    )
    if dealing.filler_share:
        log.info(
            "note: %d data-parallel ranks cannot share training.global_batch_size = %d evenly: "
            "%.1f%% of the rows they compute are fillers, which train nothing; numbers of ranks "
            "without: %s",
            *(dealing.batch_degree, dealing.rows_per_step, 100 * dealing.filler_share),
            ", ".join(map(str, training.even_degrees())),
        )


def log_balance(rows: RowSource, dealing: Dealing) -> None:
    """Log how evenly ranks attend in the first steps, where rows differ in that."""
    cost = cost_of(rows)
    if cost is None or dealing.batch_degree == 1:
        return
    as_dealt, in_order = [], []
    size = dealing.rows_per_step
    for first in range(0, max(size, BALANCE_ROWS - size + 1), size):
        costs = [cost(first + place) for place in range(size)]
        if not any(costs):
            return
        as_dealt.append(dearest_over_mean(costs, dealing.deal(costs)))
        in_order.append(dearest_over_mean(costs, dealing.deal([0] * size)))
    log.info(
        "packed rows: the data-parallel rank with most to attend to has %.2f times the mean (%.2f "
        "if rows were dealt in their order), in the first %d steps",
        *(statistics.mean(as_dealt), statistics.mean(in_order), len(as_dealt)),
    )
