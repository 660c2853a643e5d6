"""A Hugging Face folder with more tokens: rows of embedding and head, and everything else as it is.

Which words get which ids is decided in `engine/data/added_tokens.py`. A word's rows begin as the
mean of those of the tokens that it was before (Gee et al. 2022, arXiv:2402.09977, section 3), those
of a special token, whose letters mean nothing, and of padding as the mean of all rows (Hewitt 2021,
"Initializing New Word Embeddings for Pretrained Language Models").
"""

import json
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from typing_extensions import Buffer

from engine.data.added_tokens import NewTokens, extended_files, new_tokens
from engine.hf_io import CONFIG_NAME, read_hf_config
from engine.hf_weights import INDEX_NAME, HfWeights, has_weights
from engine.manifest import refuse_small_disk, sync_folder, write_synced
from models.registry import family_for_hf

OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")
ROWS_AT_ONCE = 4096
BYTES_AT_ONCE = 8 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Extended:
    """What became of a folder."""

    tokens: NewTokens
    old_rows: int
    """Rows of the embedding before; 0 where there is no config.json."""

    new_rows: int
    """Rows of the embedding now."""

    holds_weights: bool
    not_copied: tuple[str, ...]
    """Files and folders that were left out: weights of other formats, and what lies deeper."""


def extend_folder(
    folder: Path,
    out: Path,
    words: Sequence[str],
    *,
    is_special: bool = False,
    whole_words: bool = True,
    multiple: int = 1,
) -> Extended:
    """Write `folder` with more tokens to `out`, which must not exist; safetensors files stay dealt.

    `multiple` divides the rows of embedding and head. One tensor is in memory at a time. Without
    weights the other files alone are written.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a Hugging Face folder")
    if out.exists():
        raise ValueError(f"{out} exists already; give a folder that is to be made")
    if multiple < 1:
        raise ValueError(f"--pad_to_multiple_of {multiple}: give at least 1")
    tokens = new_tokens(folder, words, is_special=is_special, whole_words=whole_words)
    weights = _open_weights(folder)
    config = read_hf_config(folder) if weights or (folder / CONFIG_NAME).is_file() else {}
    old_rows = _vocabulary(folder, config, tokens) if config else 0
    new_rows = -(-max(old_rows, tokens.size) // multiple) * multiple if config else 0
    names = _vocabulary_tensors(weights, config, old_rows) if weights else frozenset[str]()
    kept = [path.name for path in sorted(folder.iterdir()) if _is_kept(path, weights)]
    files = extended_files(folder, tokens)
    if config:
        files[CONFIG_NAME] = json.dumps({**config, "vocab_size": new_rows}, indent=2).encode()
    copied = [name for name in kept if name not in files and not name.endswith(".safetensors")]
    with _put_in_place(out, sum((folder / name).stat().st_size for name in kept)) as temporary:
        for name in copied:
            shutil.copyfile(folder / name, temporary / name)
        for name, content in files.items():
            write_synced(temporary / name, content)
        if weights:
            _write_weights(weights, temporary, names, tokens, new_rows)
    return Extended(
        tokens=tokens,
        old_rows=old_rows,
        new_rows=new_rows,
        holds_weights=weights is not None,
        not_copied=tuple(sorted({path.name for path in folder.iterdir()} - {*kept})),
    )


@contextmanager
def _put_in_place(out: Path, num_bytes: int) -> Iterator[Path]:
    """Yield a folder to fill; it becomes `out` at the end, or nothing where that is not reached."""
    temporary = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    refuse_small_disk(out.parent, num_bytes, f"write {out}")
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open_weights(folder: Path) -> HfWeights | None:
    if has_weights(folder):
        return HfWeights(folder)
    if others := sorted(p.name for p in folder.iterdir() if p.suffix in OTHER_WEIGHTS):
        raise ValueError(
            f"{folder} holds weights as {', '.join(others)} only; save the model as safetensors "
            "first: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other_folder)"
        )
    return None


def _is_kept(path: Path, weights: HfWeights | None) -> bool:
    """Say whether a file belongs to the new folder: no weights but the safetensors in use."""
    if path.suffix == ".safetensors":
        return weights is not None and path in {weights.file_of(name) for name in weights.names}
    is_other = path.suffix in OTHER_WEIGHTS or path.name.endswith(".bin.index.json")
    return path.is_file() and not is_other


def _vocabulary(folder: Path, config: Mapping[str, object], tokens: NewTokens) -> int:
    rows, path = config.get("vocab_size"), folder / CONFIG_NAME
    if not isinstance(rows, int):
        raise ValueError(f"{path} has no vocab_size; give a language model's folder")
    if tokens.old_size > rows:
        raise ValueError(
            f"{path} says vocab_size = {rows}, but the tokenizer there has {tokens.old_size} "
            "tokens; give the tokenizer of this model"
        )
    return rows


def _vocabulary_tensors(
    weights: HfWeights, config: Mapping[str, object], rows: int
) -> frozenset[str]:
    """Return the stored names of the tensors with a row for each token, as the plan says."""
    family = family_for_hf(config)
    sizes = family.config_from_hf(config)
    key_map = family.key_map(sizes)
    plan = family.plan(sizes)
    ours = [f"{name}.weight" for name, role in plan.tensor.items() if role.startswith("vocab")]
    # A head that is tied is not needed in the files, but may be there.
    names = {name: key_map.to_hf(name) for name in ours}
    stored = {hf or name for name, hf in names.items() if hf or name in weights.names}
    for name in sorted(stored):
        if name not in weights.names:
            raise ValueError(f"{weights.folder} lacks {name}; give a folder with all weights")
        if weights.shape(name)[0] != rows:
            raise ValueError(
                f"{name} in {weights.file_of(name)} has {weights.shape(name)[0]} rows, but "
                f"config.json says vocab_size = {rows}; give the files of one model"
            )
    return frozenset(stored)


def _write_weights(
    weights: HfWeights,
    target: Path,
    extended: frozenset[str],
    tokens: NewTokens,
    num_rows: int,
) -> None:
    shards = sorted({weights.file_of(name) for name in weights.names})
    total = 0
    for shard in shards:
        with shard.open("rb") as source, (target / shard.name).open("wb") as out:
            total += _write_shard(source, out, weights, extended, tokens, num_rows)
    index = weights.folder / INDEX_NAME
    if index.is_file():
        content = json.loads(index.read_text())
        content["metadata"] = {**content.get("metadata", {}), "total_size": total}
        if "total_parameters" in content["metadata"]:
            shapes = [weights.shape(name) for name in extended]
            grown = sum((num_rows - rows) * width for rows, width in shapes)
            content["metadata"]["total_parameters"] += grown
        write_synced(target / INDEX_NAME, json.dumps(content, indent=2).encode())


def _write_shard(
    source: BinaryIO,
    out: BinaryIO,
    weights: HfWeights,
    extended: frozenset[str],
    tokens: NewTokens,
    num_rows: int,
) -> int:
    """Copy a safetensors file with more rows in some tensors; return the bytes of its tensors.

    The format is 8 bytes with the header's length, the header (JSON), then the tensors' bytes.
    Source: https://github.com/huggingface/safetensors#format.
    """
    (length,) = struct.unpack("<Q", source.read(8))
    header: dict[str, dict[str, Any]] = json.loads(source.read(length))
    metadata = header.pop("__metadata__", None)
    order = sorted(header, key=lambda name: header[name]["data_offsets"])
    written: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in order:
        begin, (first, last) = end, header[name]["data_offsets"]
        shape = header[name]["shape"]
        end += (last - first) // shape[0] * num_rows if name in extended else last - first
        shape = [num_rows, *shape[1:]] if name in extended else shape
        written[name] = {**header[name], "shape": shape, "data_offsets": [begin, end]}
    content = json.dumps(written).encode()
    content += b" " * (-len(content) % 8)
    out.write(struct.pack("<Q", len(content)) + content)
    for name in order:
        if name in extended:
            rows_VD = extend_rows(weights.read(name), tokens, num_rows)
            out.write(cast(Buffer, rows_VD.reshape(-1).view(torch.uint8).numpy()))
        else:
            first, last = header[name]["data_offsets"]
            _copy(source, out, 8 + length + first, last - first)
    return end


def _copy(source: BinaryIO, out: BinaryIO, start: int, num_bytes: int) -> None:
    source.seek(start)
    while num_bytes:
        part = source.read(min(BYTES_AT_ONCE, num_bytes))
        assert part, "the header of an opened file fits its length"
        out.write(part)
        num_bytes -= len(part)


def extend_rows(old_VD: Tensor, tokens: NewTokens, num_rows: int) -> Tensor:
    """Return the rows of an embedding or head (num_rows, D), with those of the new tokens.

    Old rows keep their bits, except rows of padding that now belong to a token.
    """
    if old_VD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"the embedding or head is stored as {old_VD.dtype}, whose rows have no mean; give the "
            "model in bfloat16, float16 or float32"
        )
    used_VD = old_VD[: tokens.old_size]
    total_D = torch.zeros(old_VD.shape[1], dtype=torch.float64)
    for part_VD in used_VD.split(ROWS_AT_ONCE):
        total_D += part_VD.double().sum(dim=0)
    mean_D = total_D / len(used_VD)
    new_VD = old_VD.new_empty((num_rows, old_VD.shape[1]))
    new_VD[: len(old_VD)] = old_VD
    new_VD[len(old_VD) :] = mean_D.to(old_VD.dtype)
    for token in tokens.new:
        is_mean_of_pieces = token.pieces and not tokens.is_special
        row_D = old_VD[list(token.pieces)].double().mean(dim=0) if is_mean_of_pieces else mean_D
        new_VD[token.id] = row_D.to(old_VD.dtype)
    return new_VD
