"""The section `data`: how records become rows."""

from dataclasses import dataclass, field
from typing import Literal

CHAT_KEYS = {
    "chat_template": "",
    "train_on": "assistant",
    "system_prompts": [],
    "system_prompt_rate": 1.0,
}

DEFAULT_BUFFER_SIZE = 10_000
LEAST = {"stride": 0, "num_processes": 0, "dummy_tokens": 1, "shuffle_buffer_size": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How text becomes rows of tokens."""

    format: str = "text"
    """What a record holds: the name of a file in engine/data/formats, or the dotted path of a
    module of one's own with a function `encode`."""

    text_field: str = "text"
    """Field or column of a record that holds its text; chats also stand in `messages` or
    `conversations`."""

    bos: bool = True
    """Begin each document with the tokenizer's beginning mark, if it has one; chats have only the
    marks of their template."""

    eos: bool = True
    """End each document with the tokenizer's end mark, if it has one; chats likewise."""

    chat_template: str = ""
    """How chats are written: the name of a file in engine/data/chat_templates, or the path of a
    Jinja file; empty takes the tokenizer's own. The model is exported with it."""

    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens of chats and completions are trained: what the assistant writes, in all its
    turns or in the last one, its end of turn included; or every token, prompts too."""

    system_prompts: list[str] = field(default_factory=list[str])
    """Texts of which a chat without a system turn gets one, drawn by the seed and the number of
    the record."""

    system_prompt_rate: float = 1.0
    """Share of the chats without a system turn that get one of `system_prompts`."""

    packing: Literal["concat", "best_fit", "none"] = "concat"
    """Join documents and cut the stream into full rows; fit whole documents into rows and cut none
    that fits; or put one document in each row."""

    stride: int = 0
    """Tokens from the start of one row to the next under packing "concat"; 0 is the row's length.
    A smaller stride repeats context, whose labels are trained once."""

    last_row: Literal["keep", "drop"] = "keep"
    """Pad the unfilled last row of an epoch under packing "concat", or leave it out."""

    long_document: Literal["truncate", "drop", "split", "error"] = "truncate"
    """What happens under packing "best_fit" and "none" to a document longer than the row: cut it
    there, leave it out, cut it into several that do not see each other, or stop. Each is counted
    in the log."""

    streaming: bool = False
    """Read records when they are needed, instead of tokenising them all first. Then the order is
    shuffled within a buffer only, and a resumed run reads from the beginning again. Validation rows
    are prepared all the same."""

    shuffle_buffer_size: int = DEFAULT_BUFFER_SIZE
    """Records of a stream among which the next one is drawn; 1 keeps their order."""

    on_bad_record: Literal["raise", "skip"] = "raise"
    """Stop at a record that cannot be read or has no text, or count it and go on."""

    cache_folder: str = ""
    """Folder of the token files and the built-in tokenizer; empty means `tessera` in the user's
    cache folder."""

    num_processes: int = 0
    """Processes that tokenise on the first start; 0 is one for each CPU this process may use."""

    dummy_tokens: int = 1 << 30
    """Tokens in an epoch of the `dummy` dataset."""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"data.{name} = {value}; give a whole number from {least} up")
        self._check_chat_keys()
        self._check_streaming()
        others = ("last_row", "stride") if self.packing != "concat" else ("long_document",)
        default = {"last_row": "keep", "stride": 0, "long_document": "truncate"}
        for name in others:
            if (value := getattr(self, name)) != default[name]:
                uses_it = "'best_fit' or 'none'" if self.packing == "concat" else "'concat'"
                raise ValueError(
                    f"data.{name} = {value!r} has no meaning with data.packing = "
                    f"{self.packing!r}; remove it or use packing {uses_it}"
                )

    def _check_streaming(self) -> None:
        if not self.streaming and self.shuffle_buffer_size != DEFAULT_BUFFER_SIZE:
            raise ValueError(
                f"data.shuffle_buffer_size = {self.shuffle_buffer_size} has no meaning without a "
                "stream, since prepared data is shuffled as a whole; remove it, or set "
                "data.streaming = true"
            )
        if self.streaming and self.packing == "best_fit":
            raise ValueError(
                "data.packing = 'best_fit' needs the lengths of all documents, which a stream does "
                "not tell; use 'concat' or 'none', or data.streaming = false"
            )
        if self.streaming and (self.stride or self.last_row != "keep"):
            raise ValueError(
                f"data.stride = {self.stride} and data.last_row = {self.last_row!r} have no "
                "meaning with data.streaming = true, whose rows neither overlap nor end; remove "
                "them"
            )

    def _check_chat_keys(self) -> None:
        for name, default in CHAT_KEYS.items():
            if self.format == "text" and (value := getattr(self, name)) != default:
                raise ValueError(
                    f"data.{name} = {value!r} has no meaning with data.format = 'text'; remove it, "
                    "or set data.format = 'chat'"
                )
        if not 0.0 <= self.system_prompt_rate <= 1.0:
            raise ValueError(
                f"data.system_prompt_rate = {self.system_prompt_rate}; give a share from 0 to 1"
            )
