"""What the config.json of every dense decoder family holds: read, refused and written in one place.

A family file adds what is its own. Rotary settings are in `models/layers/rope_settings.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.decoder import FULL, SLIDING, DecoderConfig
from models.layers.mlp import Activation
from models.layers.rope import RopeConfig
from models.layers.rope_settings import rope_from_hf, rope_to_hf
from models.weights import KeyMap

_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True, kw_only=True, slots=True)
class HfType:
    """A type of model in transformers, as far as its configuration class goes."""

    family: str
    """Our name of the family, for messages."""

    model_type: str
    """Value of `model_type` in config.json."""

    architecture: str
    """Name of the class with a language-model head, the one entry of `architectures`."""

    max_position_embeddings: int
    """What the configuration class assumes where config.json is silent."""

    norm_eps: float = 1e-6
    """The same for `rms_norm_eps`."""

    num_kv_heads: int | None = None
    """The same for `num_key_value_heads`; none is as many as query heads."""

    tie_word_embeddings: bool = False
    """The same for `tie_word_embeddings`."""

    activation: Activation = "silu"
    """The only `hidden_act` of the family."""

    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict[str, tuple[object, ...]])
    """Values of other keys that the family can reproduce."""

    def read(self, hf: Mapping[str, Any], **of_family: Any) -> DecoderConfig:
        """Return the sizes in a config.json that transformers 4 or 5 wrote.

        `of_family` holds fields that only the family knows how to read. ValueError for a size that
        is missing, and for a setting that the family cannot reproduce.
        """
        self._refuse_what_differs(hf)
        missing = [key for key in (*_REQUIRED, "intermediate_size") if hf.get(key) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        heads, eos = hf["num_attention_heads"], hf.get("eos_token_id")
        values: dict[str, Any] = {
            "vocab_size": hf["vocab_size"],
            "hidden_size": hf["hidden_size"],
            "num_layers": hf["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": hf.get("num_key_value_heads", self.num_kv_heads) or heads,
            "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
            "intermediate_size": hf["intermediate_size"],
            "max_position_embeddings": hf.get(
                "max_position_embeddings", self.max_position_embeddings
            ),
            "norm_eps": hf.get("rms_norm_eps", self.norm_eps),
            "tie_word_embeddings": hf.get("tie_word_embeddings", self.tie_word_embeddings),
            "activation": self.activation,
            "initializer_range": hf.get("initializer_range", 0.02),
            "bos_token_id": hf.get("bos_token_id"),
            "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
            "pad_token_id": hf.get("pad_token_id"),
            **of_family,
        }
        if "rope" not in values:
            values["rope"] = self.read_rope(hf)
        return DecoderConfig(**values)

    def read_rope(self, hf: Mapping[str, Any], *, is_partial: bool = False) -> RopeConfig:
        """Return the rotary settings of all layers."""
        # dynamic, yarn and longrope read the length of the context.
        silent = {"max_position_embeddings": self.max_position_embeddings}
        return rope_from_hf({**silent, **hf}, is_partial=is_partial)

    def _refuse_what_differs(self, hf: Mapping[str, Any]) -> None:
        same: dict[str, tuple[object, ...]] = {
            "model_type": (self.model_type,),
            "architectures": ([self.architecture], None),
            "hidden_act": (self.activation, None),
            "attention_dropout": (0, None),
            "rope_interleaved": (False, None),
            "quantization_config": (None,),
            **self.fixed,
        }
        for key, values in same.items():
            if hf.get(key) not in values:
                raise ValueError(
                    f"config.json has {key} = {hf.get(key)!r}, which the {self.family} family "
                    f"cannot reproduce; use a model with {values[0]!r}"
                )

    def write(self, config: DecoderConfig, **of_family: object) -> dict[str, object]:
        """Return a config.json that transformers 4 and 5 read alike, with keys of the family."""
        eos = config.eos_token_id
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "hidden_act": config.activation,
            "max_position_embeddings": config.max_position_embeddings,
            "rms_norm_eps": config.norm_eps,
            "initializer_range": config.initializer_range,
            "tie_word_embeddings": config.tie_word_embeddings,
            "attention_dropout": 0.0,
            "use_cache": True,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "pad_token_id": config.pad_token_id,
            **rope_to_hf(config.rope, sliding=config.sliding_rope),
            **of_family,
        }


def read_windows(
    hf: Mapping[str, Any], *, sliding_window: int | None, max_window_layers: int
) -> dict[str, Any]:
    """Return the window fields of `DecoderConfig` of a family that has `use_sliding_window`.

    The layers from `max_window_layers` on have the window, unless `layer_types` says which. The
    arguments are what config.json means where it is silent.
    """
    types = hf.get("layer_types")
    window = hf.get("sliding_window", sliding_window)
    if not hf.get("use_sliding_window", False) or window is None:
        if SLIDING in (types or ()):
            raise ValueError(
                f"config.json has layer_types with {SLIDING}, but use_sliding_window = "
                f"{hf.get('use_sliding_window')} and sliding_window = {window}; set both, or make "
                f"all layers {FULL}"
            )
        return {}
    first = hf.get("max_window_layers", max_window_layers)
    layers = range(hf.get("num_hidden_layers") or 0)
    types = types or [SLIDING if layer >= first else FULL for layer in layers]
    return {"sliding_window": window, "layer_types": tuple(types)} if SLIDING in types else {}


def write_windows(config: DecoderConfig) -> dict[str, object]:
    """Return what `read_windows` reads; transformers before 4.53 does not know layer_types."""
    types = config.attention_types
    first = types.index(SLIDING) if SLIDING in types else config.num_layers
    return {
        "use_sliding_window": SLIDING in types,
        "sliding_window": config.sliding_window,
        "max_window_layers": first,
        "layer_types": list(types),
    }


def decoder_key_map(config: DecoderConfig) -> KeyMap:
    """Return the identity; a tied head is not stored."""
    return KeyMap(
        not_stored=frozenset({"lm_head.weight"} if config.tie_word_embeddings else ()),
        # Tables that transformers stored until 4.31, of each layer or of the model.
        ignorable=(
            r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",
        ),
    )
