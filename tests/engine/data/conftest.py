import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from engine.data.config import DataConfig
from engine.data.readers import JsonLines
from engine.data.rows import RowSource
from engine.data.sources import open_rows
from engine.data.token_file import Recipe, TokenFile, open_token_file
from engine.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tokenizer(cache_folder: str) -> Tokenizer:
    return load_tokenizer(None, cache_folder)


CONTROL_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<｜User｜>", "<｜Assistant｜>"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
)


@pytest.fixture(scope="session")
def chat_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in tokenizer with the control tokens of all chat templates, as a folder."""
    folder = tmp_path_factory.mktemp("chat_tokenizer")
    tokenizer.save(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(list(CONTROL_TOKENS))
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def chat_tokenizer(chat_folder: Path) -> Tokenizer:
    return load_tokenizer(str(chat_folder), "")


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of 1 to 120 words, every one different."""
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    texts = [" ".join(f"w{i}x{j}" for j in range(1 + i * 7 % 120)) for i in range(300)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 chats of two turns, of which some are longer than others."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    turns = [
        [
            {"role": "user", "content": f"what is {number}?"},
            {"role": "assistant", "content": " ".join(f"it is {number}" for _ in range(n % 9 + 1))},
        ]
        for n, number in enumerate(range(90))
    ]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    return path


@pytest.fixture
def rows_of(cache_folder: str, tokenizer: Tokenizer) -> Callable[..., RowSource]:
    """Opens rows with short defaults: `rows_of(dataset, path, seq_len=..., **data_settings)`."""

    def rows_of(
        dataset: str,
        path: Path | str | None = None,
        *,
        split: str = "train",
        seq_len: int = 64,
        seed: int = 7,
        shuffle: bool = True,
        tokenizer: Tokenizer = tokenizer,
        **settings: object,
    ) -> RowSource:
        return open_rows(
            dataset,
            None if path is None else str(path),
            split=split,  # pyright: ignore[reportArgumentType]
            seq_len=seq_len,
            seed=seed,
            tokenizer=tokenizer,
            config=DataConfig(**{"cache_folder": cache_folder, **settings}),  # pyright: ignore
            shuffle=shuffle,
        )

    return rows_of


@pytest.fixture
def open_file(tokenizer: Tokenizer, jsonl: Path, tmp_path: Path) -> Callable[..., TokenFile]:
    """Opens the token file of JSON lines: `open_file(*paths, num_processes=..., **recipe)`."""

    def open_file(
        *paths: Path,
        num_processes: int = 1,
        tokenizer: Tokenizer = tokenizer,
        root: Path = tmp_path,
        **recipe: object,
    ) -> TokenFile:
        defaults = {"format": "text", "text_field": "text", "on_bad_record": "raise"}
        marks = {"add_bos": True, "add_eos": True}
        return open_token_file(
            JsonLines(paths or [jsonl]),
            name=(paths or [jsonl])[0].name,
            tokenizer=tokenizer,
            recipe=Recipe(**{**defaults, **marks, **recipe}),  # pyright: ignore
            root=root,
            num_processes=num_processes,
        )

    return open_file
