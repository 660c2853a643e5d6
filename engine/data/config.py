"""The section `data`: how records become rows, and which sources they come from."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

DATASETS_FROM_FILES = frozenset({"text", "json", "jsonl", "parquet", "arrow"})
BUILTIN_DATASETS = frozenset(
    {"python_stdlib", "python_stdlib_chat", "python_stdlib_preference", "dummy"}
)
PREFERENCE_FORMATS = frozenset({"preference", "unpaired_preference"})
CHAT_FORMATS = PREFERENCE_FORMATS | {"chat"}

CHAT_KEYS = {
    "chat_template": "",
    "train_on": "assistant",
    "system_prompts": [],
    "system_prompt_rate": 1.0,
}

DEFAULT_BUFFER_SIZE = 10_000
BATCH_KEYS = {"pad_to_multiple": 8, "largest_batch_first": False}
LEAST = {
    "stride": 0,
    "batch_tokens": 0,
    "pad_to_multiple": 1,
    "num_processes": 0,
    "dummy_tokens": 1,
    "shuffle_buffer_size": 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One of several sources of text."""

    name: str
    """What metrics, messages and the command line call it: letters, digits, `_`, `-` and `.`."""

    dataset: str = "jsonl"
    """Kind of the data or name of a dataset, as training.dataset."""

    path: str | None = None
    """File or folder of the data, where the dataset needs one."""

    split: str = ""
    """Split of a dataset of the `datasets` package, such as "train_sft"; empty takes the one named
    train or validation, by what it is used for."""

    format: str = ""
    """What a record holds, as data.format; empty takes that."""

    text_field: str = ""
    """Field that holds the text, as data.text_field; empty takes that."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name, re.ASCII):
            raise ValueError(
                f"sources: the name {self.name!r} may hold only letters, digits, '_', '-' and "
                "'.', and not be empty; give another"
            )
        if self.dataset in DATASETS_FROM_FILES and not self.path:
            raise ValueError(
                f"sources.{self.name}.path is not set, and dataset {self.dataset!r} reads files; "
                "give a file, a folder or a pattern"
            )
        if self.split and self.dataset in DATASETS_FROM_FILES | BUILTIN_DATASETS:
            raise ValueError(
                f"sources.{self.name}.split = {self.split!r} has no meaning with dataset "
                f"{self.dataset!r}; remove it, or name a dataset of the datasets package"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedSourceConfig(SourceConfig):
    """One of the sources of the training text, with how much is read of it."""

    weight: float | None = None
    """Share of the tokens that this source gives, in proportion to the weights of the others."""

    weights: list[list[float]] | None = None
    """Weight on a schedule, `[[0, 0.7], [1000, 0.3]]`: pairs of a number of finished steps and the
    weight from there on."""

    epochs: float | None = None
    """Passes over this source in one epoch of the mixture, such as 2.5 or 0.3; all sources have
    these, or all have weights."""

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)  # slots leave `super()` without its class
        given = [key for key in ("weight", "weights", "epochs") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"sources.{self.name} has {' and '.join(given)}; give it one of them")
        if not given:
            raise ValueError(
                f"sources.{self.name} has no weight; give it weight, weights or epochs, or remove "
                "it"
            )
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(
                f"sources.{self.name}.epochs = {self.epochs}; give a number above 0, such as 0.3"
            )
        for pair in self.schedule:
            if not 0 <= pair[1] < math.inf:
                raise ValueError(f"sources.{self.name} has weight {pair[1]}; give 0 or more")
        steps = [step for step, _ in self.schedule]
        ascend = steps[:1] == [0] and all(a < b for a, b in pairwise(steps))
        if self.epochs is None and not ascend:
            raise ValueError(
                f"sources.{self.name}.weights has steps {steps}; let them begin at 0 and ascend"
            )

    @property
    def schedule(self) -> list[tuple[int, float]]:
        """The weight from each number of finished steps on; empty where there are epochs."""
        if self.weight is not None:
            return [(0, self.weight)]
        pairs: list[tuple[int, float]] = []
        for pair in self.weights or ():
            if len(pair) != 2 or not float(pair[0]).is_integer():
                raise ValueError(
                    f"sources.{self.name}.weights has {pair!r}; give pairs of a whole number of "
                    "steps and a weight, such as [1000, 0.3]"
                )
            pairs.append((int(pair[0]), float(pair[1])))
        return pairs


def weight_at(schedule: Sequence[tuple[int, float]], step: int) -> float:
    """Return the weight of a schedule once `step` steps are done."""
    return next(weight for first, weight in reversed(schedule) if first <= step)


def check_names(sources: Sequence[SourceConfig], section: str) -> None:
    """Refuse two sources of one name."""
    for name, number in Counter(source.name for source in sources).items():
        if number > 1:
            raise ValueError(
                f"{section}.sources has {number} tables named {name!r}; give each its own name"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How text becomes rows of tokens."""

    sources: list[MixedSourceConfig] = field(default_factory=list[MixedSourceConfig])
    """Sources that the training text is mixed from, `[[data.sources]]` once for each, in place of
    training.dataset. Each row holds text of one of them."""

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
    in the log. Pairs of answers are never cut: they need "drop" or "error"."""

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
        check_names(self.sources, "data")
        self._check_shares()
        self._check_chat_keys()
        self._check_preferences()
        self._check_streaming()
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

    def read(self, dataset: str) -> set[tuple[str, str]]:
        """Return dataset and format of all sources; without any, of `dataset` alone."""
        named = {(source.dataset, source.format or self.format) for source in self.sources}
        return named or {(dataset, self.format)}

    def _check_shares(self) -> None:
        with_epochs = [source.name for source in self.sources if source.epochs is not None]
        with_weight = [source.name for source in self.sources if source.epochs is None]
        if with_epochs and with_weight:
            raise ValueError(
                f"data.sources: {', '.join(with_epochs)} have epochs and {', '.join(with_weight)} "
                "have weights; give all of them epochs, or all of them weights"
            )
        schedules = [source.schedule for source in self.sources if source.epochs is None]
        for step in sorted({step for schedule in schedules for step, _ in schedule}):
            if not any(weight_at(schedule, step) for schedule in schedules):
                raise ValueError(
                    f"data.sources: every weight is 0 from step {step} on; give a source a weight "
                    "above 0 there"
                )

    def _check_streaming(self) -> None:
        if not self.streaming and self.shuffle_buffer_size != DEFAULT_BUFFER_SIZE:
            raise ValueError(
                f"data.shuffle_buffer_size = {self.shuffle_buffer_size} has no meaning without a "
                "stream, since prepared data is shuffled as a whole; remove it, or set "
                "data.streaming = true"
            )
        if self.streaming and self.sources:
            raise ValueError(
                "data.streaming = true takes one source, and data.sources names "
                f"{len(self.sources)}, of whose rows it cannot tell how many tokens they hold; "
                "name one as training.dataset, or set data.streaming = false"
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
        formats = {self.format, *(source.format or self.format for source in self.sources)}
        for name, default in CHAT_KEYS.items():
            if formats == {"text"} and (value := getattr(self, name)) != default:
                raise ValueError(
                    f"data.{name} = {value!r} has no meaning with data.format = 'text'; remove it, "
                    "or set data.format = 'chat'"
                )
        if not 0.0 <= self.system_prompt_rate <= 1.0:
            raise ValueError(
                f"data.system_prompt_rate = {self.system_prompt_rate}; give a share from 0 to 1"
            )

    def _check_preferences(self) -> None:
        formats = {form for _, form in self.read("")}
        if not (found := formats & PREFERENCE_FORMATS):
            return
        name = min(found)
        if formats - found or len(found) > 1:
            raise ValueError(
                f"data.sources have the formats {', '.join(sorted(formats))}, and what is trained "
                f"on {name!r} has no meaning for the others; use one format for all"
            )
        check_uncut(self, f"data.format = {name!r}")
        if self.streaming:
            raise ValueError(
                f"data.streaming = true knows no pairs, and data.format = {name!r} makes them; "
                "set data.streaming = false"
            )
        if self.train_on != "assistant":
            raise ValueError(
                f"data.train_on = {self.train_on!r} has no meaning with data.format = {name!r}, "
                "which trains the last answer alone; remove it"
            )

    def _check_batch_keys(self) -> None:
        if self.batch_tokens and self.packing != "none":
            raise ValueError(
                f"data.batch_tokens = {self.batch_tokens} has no meaning with data.packing = "
                f"{self.packing!r}, whose rows are full; set data.packing = 'none', or remove it"
            )
        if self.batch_tokens and (self.sources or self.streaming):
            raise ValueError(
                f"data.batch_tokens = {self.batch_tokens} makes batches of one source whose "
                "lengths are known, while data.sources mixes rows and data.streaming knows no "
                "lengths; set data.batch_tokens = 0, or name one source as training.dataset"
            )
        for name, default in BATCH_KEYS.items():
            if not self.batch_tokens and (value := getattr(self, name)) != default:
                raise ValueError(
                    f"data.{name} = {value!r} has no meaning with data.batch_tokens = 0; remove "
                    "it, or give the tokens of a batch"
                )


def check_uncut(config: DataConfig, what: str) -> None:
    """Refuse settings that would cut a pair of answers; `what` is that which makes them."""
    if config.packing == "concat" or config.long_document not in ("drop", "error"):
        raise ValueError(
            f"{what} makes pairs of answers, which must not be cut, while data.packing = "
            f"{config.packing!r} and data.long_document = {config.long_document!r} cut what does "
            "not fit; set data.packing = 'best_fit' or 'none', and data.long_document = 'drop' or "
            "'error'"
        )
