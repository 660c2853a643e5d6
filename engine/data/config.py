"""The section `data`: how records become rows."""

from dataclasses import dataclass, field
from typing import Literal

CHAT_KEYS = {
    "chat_template": "",
    "train_on": "assistant",
    "system_prompts": [],
    "system_prompt_rate": 1.0,
}

BATCH_KEYS = {"pad_to_multiple": 8, "largest_batch_first": False}
LEAST = {
    "stride": 0,
    "batch_tokens": 0,
    "pad_to_multiple": 1,
    "num_processes": 0,
    "dummy_tokens": 1,
}


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

    batch_tokens: int = 0
    """Most tokens of one microbatch on one data-parallel rank under packing "none", padding
    included: documents of similar length share a batch, padded to the longest of it. 0 is off:
    `training.local_batch_size` rows, padded to `training.seq_len`. What counts rows elsewhere
    counts such batches then, as `training.global_batch_size`."""

    pad_to_multiple: int = 8
    """Under `batch_tokens` batches are padded to a length that is a multiple of this."""

    largest_batch_first: bool = False
    """Under `batch_tokens` the first step takes the batches with most tokens, so that memory runs
    out there or never."""

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
        self._check_batch_keys()
        others = ("last_row", "stride") if self.packing != "concat" else ("long_document",)
        default = {"last_row": "keep", "stride": 0, "long_document": "truncate"}
        for name in others:
            if (value := getattr(self, name)) != default[name]:
                uses_it = "'best_fit' or 'none'" if self.packing == "concat" else "'concat'"
                raise ValueError(
                    f"data.{name} = {value!r} has no meaning with data.packing = "
                    f"{self.packing!r}; remove it or use packing {uses_it}"
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

    def _check_batch_keys(self) -> None:
        if self.batch_tokens and self.packing != "none":
            raise ValueError(
                f"data.batch_tokens = {self.batch_tokens} has no meaning with data.packing = "
                f"{self.packing!r}, whose rows are full; set data.packing = 'none', or remove it"
            )
        for name, default in BATCH_KEYS.items():
            if not self.batch_tokens and (value := getattr(self, name)) != default:
                raise ValueError(
                    f"data.{name} = {value!r} has no meaning with data.batch_tokens = 0; remove "
                    "it, or give the tokens of a batch"
                )
