"""The model that the parity check compares, and the size of its batch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.hf_io import CONFIG_NAME, read_hf_config
from engine.verify.case import DEFAULTS, Case
from models.adapters import AdapterSpec
from models.decoder import DecoderConfig
from models.layers.rope import RopeConfig
from models.registry import FAMILIES, ModelFamily, family_for_hf, load_family, member_names

SHRUNK = {"num_layers": 3, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.05}
"""Sizes of a model given by name or folder; its heads and all its switches stay."""

SMALLEST_FLAVOR = "debugmodel"
WINDOWS_OF_A_ROW = 4  # a sliding window is shorter than either of the two documents of a row
CHUNK = 10 / 16  # of a row: the head scores labels in several uneven chunks


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model of random weights and the shape of the global batch that it reads."""

    family_name: str
    config: DecoderConfig
    num_rows: int
    num_tokens: int

    @property
    def family(self) -> ModelFamily:
        """The family that builds the model and has its plan."""
        return load_family(self.family_name)

    def sizes(self, case: Case) -> DecoderConfig:
        """Return the configuration of the model with the switches of a case.

        A module of transformers has none.
        """
        if not self.family.hf_model_types:
            return self.config
        return replace(
            self.config,
            vocab_size=case.vocab,
            tie_word_embeddings=case.tied,
            attention_bias=self.config.attention_bias or case.bias,
            mlp_bias=self.config.mlp_bias or case.bias,
            attention=self.attention(case),
            kernels=case.kernels,
            head_chunk_tokens=int(self.num_tokens * CHUNK) if case.chunks else 4096,
        )

    def attention(self, case: Case) -> str:
        """Return the backend of a case: eager for the usual one where that cannot cap scores."""
        is_usual = case.attention == DEFAULTS["attention"]
        has_softcap = self.config.attention_softcap is not None
        return "eager" if is_usual and has_softcap else case.attention

    def for_ranks(self, world_size: int) -> "Subject":
        """Return it with rows and tokens that every layout of `world_size` ranks divides."""
        even = 2 * world_size  # two microbatches on each rank; tp x 2 cp divides it
        return replace(
            self,
            num_rows=_multiple(self.num_rows, even),
            num_tokens=_multiple(self.num_tokens, even),
        )


def _multiple(at_least: int, factor: int) -> int:
    return -(-at_least // factor) * factor


TINY = Subject(
    family_name="llama3",
    config=DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        intermediate_size=48,
        rope=RopeConfig(theta=10_000.0),
        max_position_embeddings=64,
        initializer_range=0.2,
    ),
    num_rows=8,
    num_tokens=16,
)
"""A Llama that one CPU core trains in milliseconds."""

SMALL = replace(
    TINY,
    config=replace(
        TINY.config,
        hidden_size=256,
        num_layers=4,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=256,
        initializer_range=0.05,
    ),
    num_tokens=256,
)
"""A Llama whose tensors are large enough for the kernels of a GPU."""


def find_subject(model: str, device_type: str) -> tuple[Subject, str]:
    """Return the model that `--model` names, shrunk, and a sentence that says how.

    `model` is a family, a family with a size such as "llama3:8B", a folder with a config.json,
    or empty for the small Llama.
    """
    usual = SMALL if device_type == "cuda" else TINY
    if not model:
        sizes = ", ".join(f"{n} {getattr(usual.config, n)}" for n in list(SHRUNK)[:3])
        return usual, f"a Llama of random weights ({sizes})"
    folder = Path(model)
    if (folder / CONFIG_NAME).is_file():
        hf_config = read_hf_config(folder)
        family = family_for_hf(hf_config)
        config, origin = family.config_from_hf(hf_config), f"{model}/{CONFIG_NAME}"
    else:
        name, _, flavor = model.partition(":")
        if name not in member_names(FAMILIES):
            raise ValueError(
                f"--model {model!r} is neither a folder with a {CONFIG_NAME} nor a family; use one "
                f"of {', '.join(member_names(FAMILIES))}, or such as llama3:8B"
            )
        family = load_family(name)
        config, origin = family.flavor(flavor or SMALLEST_FLAVOR), model
    shrunk, changes = shrink(config, usual.num_tokens)
    subject = replace(usual, family_name=family.name, config=shrunk)
    return subject, f"{origin} with random weights, shrunk: {changes}"


def shrink(config: DecoderConfig, num_tokens: int) -> tuple[DecoderConfig, str]:
    """Return the architecture at a size that any device trains, and what was changed."""
    values: dict[str, Any] = {"vocab_size": DEFAULTS["vocab"], **SHRUNK}
    if config.layer_types:
        values["sliding_window"] = min(config.sliding_window or 0, num_tokens // WINDOWS_OF_A_ROW)
        # The last blocks, and first one of each type that these leave out.
        last = config.layer_types[-values["num_layers"] :]
        others = tuple(dict.fromkeys(t for t in config.layer_types if t not in last))
        values["layer_types"] = others + last[len(others) :]
    changes = [
        f"{name} {getattr(config, name)} -> {value}"
        for name, value in values.items()
        if not isinstance(value, tuple) and getattr(config, name) != value
    ]
    return replace(config, **values), ", ".join(changes)


def adapters_of(case: Case) -> list[AdapterSpec]:
    """Return the adapters of a case: two that share every linear of the blocks."""
    if case.adapter == "none":
        return []
    kind: Any = case.adapter
    first = AdapterSpec(name="default", kind=kind, rank=4, alpha=8.0)
    return [first, AdapterSpec(name="second", kind="lora", rank=2, alpha=2.0, use_rslora=True)]
