"""From what a configuration names to rows: read, tokenise, pack."""

import logging

from engine.data.best_fit import BestFitPacking
from engine.data.cache import cache_root, digest_of
from engine.data.chat_templates import template_text
from engine.data.config import DataConfig, SourceConfig, check_uncut
from engine.data.length_batches import LengthBatches
from engine.data.named_sources import open_reader
from engine.data.packing import ConcatPacking, OneDocumentPacking, Packing
from engine.data.rows import DummyRows, RowSource, TokenRows
from engine.data.slices import cut_documents
from engine.data.stdlib import Split
from engine.data.streaming import StreamedRows, StreamSettings
from engine.data.token_file import Recipe, TokenFile, open_token_file
from engine.data.tokenizer import Tokenizer

log = logging.getLogger("tessera")


def open_rows(
    dataset: str,
    dataset_path: str | None,
    *,
    split: Split,
    seq_len: int,
    seed: int,
    tokenizer: Tokenizer,
    config: DataConfig,
    shuffle: bool,
    source: SourceConfig | None = None,
    num_largest_first: int = 0,
) -> RowSource:
    """Return the rows of a dataset; a machine's first rank tokenises it, the others wait.

    `dataset` and `dataset_path` are those of `open_reader`, or `dummy`. `source` is the table that
    names them, where they are one of several. `num_largest_first` is that of `LengthBatches`, for
    `data.batch_tokens`.
    """
    source_name = source.name if source else ""
    text_format = (source and source.format) or config.format
    text_field = (source and source.text_field) or config.text_field
    if dataset == "dummy":
        return DummyRows(
            seq_len=seq_len,
            vocab_size=tokenizer.vocab_size,
            num_tokens=config.dummy_tokens,
            seed=int(digest_of(seed, split, *filter(None, [source_name]))[:8], 16),
        )
    name = _name(dataset, dataset_path, split, source)
    root = cache_root(config.cache_folder)
    reader = open_reader(
        dataset,
        dataset_path,
        split=split,
        text_field=text_field,
        # Plain text is one column of a table; other formats look at whole records.
        only_text=text_format == "text",
        root=root,
        source=source,
    )
    file = open_token_file(
        reader,
        name=name,
        tokenizer=tokenizer,
        recipe=_recipe(config, seed, text_format, text_field),
        root=root,
        num_processes=config.num_processes,
    )
    _warn_of_cuts(name, text_format, config)
    shuffle_seed = seed if shuffle else None
    order = _order(config, num_largest_first)
    return TokenRows(
        file,
        _open_packing(file, name, seq_len, shuffle_seed, config, num_largest_first),
        name=name,
        seq_len=seq_len,
        vocab_size=tokenizer.vocab_size,
        fingerprint=digest_of(file.digest, seq_len, shuffle_seed, *order),
    )


def _name(dataset: str, path: str | None, split: Split, source: SourceConfig | None) -> str:
    what = (source.name,) if source else (dataset, path)
    return " ".join(filter(None, (*what, split)))


def _warn_of_cuts(name: str, text_format: str, config: DataConfig) -> None:
    if text_format == "chat" and config.packing == "concat":
        log.warning("%s: chats are cut where a row ends; data.packing = 'best_fit' cuts none", name)


def _order(config: DataConfig, num_largest_first: int) -> tuple[object, ...]:
    """Return the settings that decide which documents a row has, and the order of rows."""
    settings = (config.packing, config.stride, config.last_row, config.long_document)
    if not config.batch_tokens:
        return settings
    return (*settings, config.batch_tokens, config.pad_to_multiple, num_largest_first)


def stream_rows(
    dataset: str,
    dataset_path: str | None,
    *,
    seq_len: int,
    seed: int,
    tokenizer: Tokenizer,
    config: DataConfig,
    rows_per_step: int,
) -> StreamedRows:
    """Return the training rows of a dataset that is read as it goes; nothing is prepared."""
    name = " ".join(filter(None, (dataset, dataset_path, "train")))
    reader = open_reader(
        dataset,
        dataset_path,
        split="train",
        text_field=config.text_field,
        only_text=config.format == "text",
        root=cache_root(config.cache_folder),
        streaming=True,
    )
    log.info(
        "%s: a stream. Every data-parallel rank reads all of it and tokenises its own rows; a "
        "resumed run reads from the beginning again, and meets the same rows only if the source "
        "still has the same records; order is random within %s records; the end of an epoch is "
        "not known; another training.global_batch_size changes the order. data.streaming = false "
        "has none of these limits",
        *(name, f"{config.shuffle_buffer_size:,}"),
    )
    assert config.packing != "best_fit", "the section data refuses it for streams"
    return StreamedRows(
        reader,
        name=name,
        tokenizer=tokenizer,
        recipe=_recipe(config, seed, config.format, config.text_field),
        settings=StreamSettings(
            seq_len=seq_len,
            seed=seed,
            num_lanes=rows_per_step,
            buffer_size=config.shuffle_buffer_size,
            packing=config.packing,
            long_document=config.long_document,
        ),
    )


def _recipe(config: DataConfig, seed: int, text_format: str, text_field: str) -> Recipe:
    if text_format == "text":
        # Chats beside it have settings that plain text does not depend on.
        config = DataConfig(bos=config.bos, eos=config.eos, on_bad_record=config.on_bad_record)
    return Recipe(
        format=text_format,
        text_field=text_field,
        add_bos=config.bos,
        add_eos=config.eos,
        on_bad_record=config.on_bad_record,
        chat_template=template_text(config.chat_template),
        train_on=config.train_on,
        system_prompts=tuple(config.system_prompts),
        system_prompt_rate=config.system_prompt_rate,
        seed=seed if config.system_prompts else 0,
    )


def _open_packing(
    file: TokenFile,
    name: str,
    seq_len: int,
    shuffle_seed: int | None,
    config: DataConfig,
    num_largest_first: int,
) -> Packing:
    seed, shuffle = shuffle_seed or 0, shuffle_seed is not None
    if file.pairs is not None:
        check_uncut(config, f"{name}: its format")
    if config.stride > seq_len:
        raise ValueError(
            f"data.stride = {config.stride} is longer than a row of {seq_len} tokens, so text "
            "would be passed over; use 0 or at most the row's length"
        )
    batches: LengthBatches | None = None
    if config.packing == "concat":
        packing: Packing = ConcatPacking(
            file.offsets,
            seq_len=seq_len,
            stride=config.stride or seq_len,
            keep_last=config.last_row == "keep",
            seed=seed,
            shuffle=shuffle,
        )
        done = "padded" if config.last_row == "keep" else "left out"
        note = f"last row of {packing.num_tail_tokens:,} tokens is {done}"
    else:
        slices = cut_documents(
            file.offsets,
            name,
            seq_len=seq_len,
            long_document=config.long_document,
            is_trained=file.is_trained,
        )
        note = slices.summary
        if config.packing == "best_fit":
            packing = BestFitPacking(slices, seq_len=seq_len, seed=seed, shuffle=shuffle)
        elif config.batch_tokens:
            packing = batches = LengthBatches(
                slices,
                batch_tokens=config.batch_tokens,
                pad_to_multiple=config.pad_to_multiple,
                seed=seed,
                shuffle=shuffle,
                num_largest_first=num_largest_first,
            )
        else:
            packing = OneDocumentPacking(slices, seed=seed, shuffle=shuffle)
    _check_packing(packing, file, name, seq_len=seq_len, config=config)
    fill = f"of {seq_len:,} tokens, fill "
    fill += f"{packing.tokens_per_epoch / (packing.rows_per_epoch * seq_len):.4f}"
    log.info(
        "%s: packing %s puts %s documents in %s rows %s; %s",
        *(name, config.packing, f"{len(file.offsets) - 1:,}", f"{packing.rows_per_epoch:,}"),
        *(batches.summary if batches else fill, note),
    )
    return packing


def _check_packing(
    packing: Packing, file: TokenFile, name: str, *, seq_len: int, config: DataConfig
) -> None:
    if packing.rows_per_epoch:
        return
    remedy = (
        "give more text, lower training.seq_len, or set data.last_row = 'keep'"
        if config.packing == "concat"
        else "raise training.seq_len"
    )
    if config.packing != "concat" and file.pairs is None:
        remedy += ", or set data.long_document = 'truncate' or 'split'"
    raise ValueError(
        f"{name}: its {len(file.tokens):,} tokens fill no row of {seq_len:,}; {remedy}"
    )
