"""One plan of the parity check: a layout with its switches, and its short text form."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

from models.layers.liger import Kernels
from models.registry import suggestion

CONTEXT_MODES = ("allgather", "ring", "ulysses")
CHECKPOINTING = ("none", "full", "op", "2", "budget")
RESHARD = ("default", "always", "never")
BACKENDS = ("aot_eager", "inductor")
KERNELS = ("torch", "liger")
ADAPTERS = ("none", "lora", "dora")
OBJECTIVES = ("pretrain", "dpo", "orpo", "simpo", "kto")
ATTENTION = ("eager", "sdpa", "flex", "cudnn", "varlen", "flash")

DEGREES = {"rep": "replicate", "fsdp": "shard", "tp": "tp", "cp": "cp"}
"""Word of the text form that a degree follows -> field."""

NUMBERS = {"v": "vocab", "accumulate": "accumulate"}
"""Word of the text form that another number follows -> field."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout and its switches; the defaults are one plain rank.

    `str` of it is the short text form, such as "fsdp2-tp2-cp2-ring", which `parse` reads.
    """

    replicate: int = 1
    shard: int = 1
    tp: int = 1
    cp: int = 1
    context: str = "allgather"  # how keys and values meet when cp > 1
    balanced: bool = True  # head-and-tail dealing of tokens when cp > 1
    sequence: bool = True
    loss_parallel: bool = True
    checkpointing: str = "none"
    backend: str = ""  # of torch.compile; empty is eager
    attention: str = "sdpa"
    kernels: Kernels = "torch"
    vocab: int = 64
    packed: bool = True
    accumulate: int = 1
    reshard: str = "default"
    tied: bool = False
    bias: bool = False
    chunks: bool = False
    offload: bool = False
    copy_engine: bool = False  # parameters gathered by the copy engines of GPUs
    neftune: bool = False  # noise on the embeddings
    objective: str = "pretrain"
    adapter: str = "none"
    bfloat16: bool = False

    @property
    def world_size(self) -> int:
        """Ranks that the case runs on."""
        return self.replicate * self.shard * self.tp * self.cp

    def __str__(self) -> str:
        hidden = {"context"}
        hidden |= {"balanced"} if self.cp == 1 else set()
        hidden |= {"sequence"} if self.tp == 1 else set()
        parts = [f"{w}{n}" for w, f in DEGREES.items() if (n := getattr(self, f)) > 1] or ["one"]
        parts += [self.context] if self.cp > 1 else []
        parts += [
            word
            for word, (name, value) in WORDS.items()
            if name not in hidden and getattr(self, name) == value
        ]
        numbers = {word: getattr(self, name) for word, name in NUMBERS.items()}
        parts += [f"{w}{n}" for w, n in numbers.items() if n != DEFAULTS[NUMBERS[w]]]
        return "-".join(parts)


DEFAULTS: Mapping[str, object] = {f.name: f.default for f in fields(Case)}

WORDS: Mapping[str, tuple[str, object]] = {
    **{mode: ("context", mode) for mode in CONTEXT_MODES},
    "contiguous": ("balanced", False),
    "no-sp": ("sequence", False),
    "whole-loss": ("loss_parallel", False),
    **{f"ac-{mode}": ("checkpointing", mode) for mode in CHECKPOINTING[1:]},
    **{name: ("backend", name) for name in BACKENDS},
    **{f"attention-{name}": ("attention", name) for name in ATTENTION if name != "sdpa"},
    **{name: ("kernels", name) for name in KERNELS[1:]},
    "unpacked": ("packed", False),
    **{name: ("objective", name) for name in OBJECTIVES[1:]},
    **{name: ("adapter", name) for name in ADAPTERS[1:]},
    **{f"reshard-{name}": ("reshard", name) for name in RESHARD[1:]},
    "copy-engine": ("copy_engine", True),
    **{name: (name, True) for name in ("tied", "bias", "chunks", "offload", "neftune", "bfloat16")},
}
"""Words of the text form that stand alone -> field and value."""

_NUMBERED = "|".join([*DEGREES, *NUMBERS])
_WORD = re.compile(
    rf"(?P<plain>{'|'.join(sorted(WORDS, key=len, reverse=True))}|one)(?=-|$)"
    rf"|(?P<name>{_NUMBERED})(?P<number>[1-9][0-9]*)(?=-|$)"
)


def parse(text: str) -> Case:
    """Return the case of a short text form; words may come in any order, each at most once."""
    values: dict[str, object] = {}
    place = 0
    while True:
        match = _WORD.match(text, place)
        if match is None:
            raise ValueError(f"--plan {text!r}: {_unknown(text[place:])}")
        name, value = _meaning(match)
        if name in values:
            raise ValueError(f"--plan {text!r}: {match[0]!r} sets {name} a second time; leave one")
        values[name] = value
        if match.end() == len(text):
            break
        place = match.end() + 1
    alone = values.pop("one", False)
    case = Case(**values)  # pyright: ignore[reportArgumentType]
    if alone and case.world_size > 1:
        raise ValueError(f"--plan {text!r}: 'one' is one rank without degrees; leave it out")
    _refuse_without_effect(text, values, case)
    return case


def _meaning(match: re.Match[str]) -> tuple[str, object]:
    if match["plain"] == "one":
        return "one", True
    if match["plain"]:
        return WORDS[match["plain"]]
    return {**DEGREES, **NUMBERS}[match["name"]], int(match["number"])


def _refuse_without_effect(text: str, values: Mapping[str, object], case: Case) -> None:
    needs = {"context": "cp", "balanced": "cp", "sequence": "tp"}
    for name, degree in needs.items():
        if name in values and getattr(case, degree) == 1:
            raise ValueError(
                f"--plan {text!r}: {name} has no effect without {degree}; add {degree}2, or leave "
                "the word out"
            )


def _unknown(rest: str) -> str:
    numbered = [f"{word}N" for word in (*DEGREES, *NUMBERS)]
    known = ("one", *numbered, *WORDS)
    word = rest.split("-")[0]
    hint = suggestion(word, known) if word else ""
    return f"{rest!r} does not begin with a known word; {hint}use words of {', '.join(known)}"
