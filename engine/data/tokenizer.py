"""Tokenizers: a Hugging Face folder's own, or a small built-in one trained on first use."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from engine.data.cache import build_once, cache_root, digest_of, file_digest
from engine.data.stdlib import stdlib_files

BUILTIN_VOCAB_SIZE = 4096
BUILTIN_BOS = "<|begin_of_text|>"
BUILTIN_EOS = "<|end_of_text|>"
BUILTIN_RECIPE = 1

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)
CHAT_TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Tokenizer:
    """Text to token ids and back, with the ids that mark a document's ends."""

    def __init__(self, folder: Path, backend: tokenizers.Tokenizer) -> None:
        self._folder = folder
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        """One more than the highest token id: the least vocabulary a model needs."""
        self.bos_id = self._special_id("bos")
        self.eos_id = self._special_id("eos")
        files = [file for name in TOKENIZER_FILES if (file := folder / name).is_file()]
        self.fingerprint = digest_of([(file.name, file_digest(file)) for file in files])
        """Digest of all tokenizer files."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of `text`, with the marks the tokenizer itself adds if asked."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `encode` of each text; faster than one by one."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def encode_with_begins(
        self, texts: Sequence[str]
    ) -> list[tuple[list[int], npt.NDArray[np.int64]]]:
        """Return `encode` of each text, and for each token the character at which it begins.

        The tokens of one character all begin at it.
        """
        encoded = self._untrimmed.encode_batch(list(texts), add_special_tokens=False)
        return [
            (encoding.ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 0])
            for encoding in encoded
        ]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def save(self, folder: Path | str, *, chat_template: str = "") -> None:
        """Write every tokenizer file, so that `AutoTokenizer` loads `folder`.

        The chat template is the tokenizer's own, or the text of another.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, target / name)
        if chat_template:
            (target / CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")

    @cached_property
    def chat_template(self) -> str:
        """Text of the tokenizer's own chat template, the default one of several; empty: none."""
        file = self._folder / CHAT_TEMPLATE_FILE
        if file.is_file():
            return file.read_text(encoding="utf-8")
        found = _read_json(self._folder / "tokenizer_config.json").get("chat_template")
        if isinstance(found, list):
            found = {one["name"]: one["template"] for one in found}.get("default")
        return found if isinstance(found, str) else ""

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """Texts of the special tokens under the names that chat templates use: `eos_token`, ..."""
        found = {f"{kind}_token": self._special_token(kind) for kind in SPECIAL_TOKENS}
        return {name: token for name, token in found.items() if token is not None}

    @cached_property
    def added_tokens(self) -> frozenset[str]:
        """Texts that are a token of their own wherever they stand, such as `<|im_end|>`."""
        return frozenset(t.content for t in self._backend.get_added_tokens_decoder().values())

    @cached_property
    def _untrimmed(self) -> tokenizers.Tokenizer:
        # Some post-processors take the blank before a word out of its token's place. They change
        # no ids where no special tokens are asked for.
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
        return backend

    def _special_token(self, kind: str) -> str | None:
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _read_json(self._folder / file).get(f"{kind}_token")
            if isinstance(token, Mapping):
                token = token.get("content")
            if isinstance(token, str):
                return token
        return None

    def _special_id(self, kind: str) -> int | None:
        token = self._special_token(kind)
        if token is not None:
            return self._backend.token_to_id(token)
        for file in ("generation_config.json", "config.json"):
            value = _read_json(self._folder / file).get(f"{kind}_token_id")
            if isinstance(value, list) and value:
                value = value[0]
            if isinstance(value, int):
                return value
        return None


def has_tokenizer(folder: Path | str) -> bool:
    """Say whether a Hugging Face folder holds a tokenizer that `load_tokenizer` can read."""
    return any((Path(folder) / name).is_file() for name in VOCABULARY_FILES)


def load_tokenizer(folder: str | None, cache_folder: str) -> Tokenizer:
    """Return the tokenizer in `folder`, or the built-in one if none is named.

    The built-in tokenizer (byte-level BPE, `BUILTIN_VOCAB_SIZE` tokens) is trained once on the
    training split of the built-in corpus and kept in the cache folder.
    """
    # One thread a process: parallelism comes from tokenising processes, and a forked child of a
    # process that has used these threads prints a warning otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    path = Path(folder).expanduser() if folder else _builtin_folder(cache_folder)
    if not path.is_dir():
        raise ValueError(
            f"model.hf_assets_path = {str(folder)!r} is not a folder; give one with a tokenizer, "
            "or leave the key empty for the built-in tokenizer"
        )
    if not has_tokenizer(path):
        raise ValueError(
            f"model.hf_assets_path = {str(folder)!r} holds no tokenizer ({VOCABULARY_FILES[0]} or "
            f"{VOCABULARY_FILES[1]}); give a folder with one, such as scripts/download_assets.py "
            "makes, or leave the key empty for the built-in tokenizer"
        )
    try:
        return Tokenizer(path, _read_backend(path))
    except Exception as error:  # the tokenizers package raises bare Exception
        raise ValueError(
            f"model.hf_assets_path = {str(path)!r}: the tokenizer there cannot be read ({error}); "
            "download it again"
        ) from error


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    from transformers import AutoTokenizer  # slow to import and only needed for older formats

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer


def _builtin_folder(cache_folder: str) -> Path:
    root = cache_root(cache_folder)
    files = stdlib_files("train")
    corpus = digest_of([file_digest(file) for file in files])
    key = digest_of("tokenizer", BUILTIN_RECIPE, BUILTIN_VOCAB_SIZE, tokenizers.__version__, corpus)
    return build_once(
        root / "tokenizers" / key,
        f"training the built-in tokenizer of {BUILTIN_VOCAB_SIZE:,} tokens",
        lambda target: _train_builtin(files, target),
    )


def _train_builtin(files: Sequence[Path], target: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=BUILTIN_VOCAB_SIZE,
        special_tokens=[BUILTIN_BOS, BUILTIN_EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with _threads_on():
        texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
        backend.train_from_iterator(texts, trainer)
    bos_id = backend.token_to_id(BUILTIN_BOS)
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single=f"{BUILTIN_BOS} $A",
        pair=f"{BUILTIN_BOS} $A {BUILTIN_BOS} $B",
        special_tokens=[(BUILTIN_BOS, bos_id)],
    )
    backend.save(str(target / "tokenizer.json"))
    marks = {"bos_token": BUILTIN_BOS, "eos_token": BUILTIN_EOS}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **marks,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (target / "special_tokens_map.json").write_text(json.dumps(marks, indent=2) + "\n")


@contextmanager
def _threads_on() -> Iterator[None]:
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


def _read_json(path: Path) -> dict[str, object]:
    return json.loads(path.read_text()) if path.is_file() else {}
