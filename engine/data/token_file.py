"""A source's tokens in one memory-mapped file, written once for all processes and runs.

The file holds the documents back to back, with their marks, in the source's own order; shuffling
and cutting into rows happens in `packing.py`. Where not all tokens are labels, a second file says
which are. `token_writer.py` writes it.
"""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.data.cache import build_once, digest_of
from engine.data.formats import Recipe, load_format, source_digest
from engine.data.readers import Reader
from engine.data.token_writer import MASK_NAME, PAIRS_NAME, Facts, Worker, write_tokens
from engine.data.tokenizer import Tokenizer

__all__ = ["Recipe", "TokenFile", "open_token_file"]

log = logging.getLogger("tessera")

LAYOUT = 3
EXAMPLES_LOGGED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFile:
    """Documents of token ids: document i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.int64]

    digest: str
    """Digest of the tokens, the borders of documents and pairs, and which tokens are labels."""

    is_trained: npt.NDArray[np.bool_] | None = None
    """For each token whether it is a label; None: all are. A document's first token never is one,
    whatever stands here."""

    pairs: npt.NDArray[np.int64] | None = None
    """Where documents are pairs of sequences: for each the tokens of the first, and 1 if that is an
    answer that is wanted, else 0; (documents, 2)."""

    facts: Facts = field(default_factory=Facts)
    folder: Path | None = None
    """Where it lies on disk."""

    is_new: bool = False
    """Whether this process has just tokenised it, rather than found it in the cache."""

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each document, its marks included."""
        return np.diff(self.offsets)

    def num_trained(self) -> int:
        """Count the tokens that are labels of some row, if rows cut nothing off."""
        num_documents = len(self.offsets) - 1
        if self.is_trained is None:
            return int(self.offsets[-1]) - num_documents
        return int(self.is_trained.sum()) - int(self.is_trained[self.offsets[:-1]].sum())


def open_token_file(
    reader: Reader,
    *,
    name: str,
    tokenizer: Tokenizer,
    recipe: Recipe,
    root: Path,
    num_processes: int,
) -> TokenFile:
    """Return the token file of a source, tokenising it first if no process ever did.

    The key under `root` covers the bytes of the data, of the tokenizer and of the format's source,
    and `recipe`. `num_processes` 0 means one for each CPU that this process may use. A source that
    changes while it is tokenised is refused with ValueError, and nothing is kept of it.
    """
    encode = load_format(recipe.format)
    made_by = (tokenizer.fingerprint, asdict(recipe), source_digest(encode))
    content = reader.digest(root)
    worker = Worker(reader=reader, encode=encode, tokenizer=tokenizer, recipe=recipe, name=name)
    built: list[Path] = []

    def build(target: Path) -> None:
        built.append(target)
        write_tokens(target, worker, num_processes)
        if reader.digest(root) != content:
            raise ValueError(
                f"{name} was changed while it was tokenised; start again when nothing writes to it"
            )

    key = digest_of(LAYOUT, content, *made_by)
    folder = build_once(root / "tokens" / key, f"tokenising {name}", build)
    stored = json.loads((folder / "facts.json").read_text())
    file = TokenFile(
        tokens=np.memmap(folder / "tokens.bin", dtype=np.dtype(stored["dtype"]), mode="r"),
        offsets=np.load(folder / "offsets.npy", mmap_mode="r"),
        digest=stored["digest"],
        is_trained=(
            np.memmap(folder / MASK_NAME, dtype=np.bool_, mode="r")
            if (folder / MASK_NAME).is_file()
            else None
        ),
        pairs=(
            np.load(folder / PAIRS_NAME, mmap_mode="r") if (folder / PAIRS_NAME).is_file() else None
        ),
        facts=Facts(**stored["facts"]),
        folder=folder,
        is_new=bool(built),
    )
    _log(file, name, stored["num_trained"])
    return file


def _log(file: TokenFile, name: str, num_trained: int) -> None:
    facts = file.facts
    log.info(
        "%s: %s documents, %s tokens, %s empty texts left out, %s bad records skipped",
        *(name, f"{len(file.offsets) - 1:,}", f"{file.offsets[-1]:,}"),
        *(f"{facts.num_empty:,}", f"{facts.num_bad:,}"),
    )
    for example in facts.bad_examples[:EXAMPLES_LOGGED]:
        log.info("skipped %s", example)
    if file.is_trained is not None:
        log.info(
            "%s: %s tokens are trained, %s documents without such a token left out",
            *(name, f"{num_trained:,}", f"{facts.num_untrained:,}"),
        )
