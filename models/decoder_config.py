"""The shape of the decoder that all dense families share."""

from dataclasses import dataclass
from typing import Literal

from models.layers.liger import Kernels
from models.layers.mlp import Activation
from models.layers.rope import RopeConfig
from models.sizes import Feature

FULL, SLIDING = "full_attention", "sliding_attention"
"""Types of attention of a block, in the words of config.json."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Shape of a decoder; a family file makes one from a size table or from a config.json."""

    vocab_size: int
    """Rows of the embedding."""

    hidden_size: int
    """Channels of a token between blocks."""

    num_layers: int
    """Blocks."""

    num_heads: int
    """Query heads."""

    num_kv_heads: int
    """Key/value heads; each serves num_heads / num_kv_heads query heads."""

    head_dim: int
    """Channels of a head."""

    intermediate_size: int
    """Channels inside the feed-forward layer."""

    rope: RopeConfig
    """Rotary position embedding; where `sliding_rope` is set, of layers of type full_attention."""

    max_position_embeddings: int
    """Longest row in tokens that the model is meant for."""

    norm_eps: float = 1e-5
    """Added to the mean square before its root."""

    tie_word_embeddings: bool = False
    """The head is the embedding, one tensor."""

    attention_bias: bool = False
    """The four projections of attention have a bias."""

    qkv_bias: bool = False
    """The projections to queries, keys and values have a bias, whatever `attention_bias` says."""

    qk_norm: Literal["none", "head", "width"] = "none"
    """Queries and keys are normalised before they are rotated, over the channels of each head or
    over those of all heads."""

    norms: Literal["before", "after", "both"] = "before"
    """Attention and feed-forward read normalised tokens, or what they return is normalised; or
    both."""

    zero_centered_norm: bool = False
    """Weights of norms are stored as their distance from 1."""

    scaled_embedding: bool = False
    """Embeddings are multiplied by the root of `hidden_size`, rounded to their dtype."""

    activation: Activation = "silu"
    """Function of the gate in the feed-forward layer."""

    query_pre_attn_scalar: float | None = None
    """Scores of attention are divided by the root of this; None is `head_dim`."""

    attention_softcap: float | None = None
    """Scores of attention s become c * tanh(s / c) with this c, if any."""

    logit_softcap: float | None = None
    """The same for logits."""

    sliding_window: int | None = None
    """Newest tokens that a query sees in layers of type sliding_attention, itself among them."""

    sliding_rope: RopeConfig | None = None
    """Rotary position embedding of layers of type sliding_attention; None is that of all."""

    layer_types: tuple[str, ...] = ()
    """full_attention or sliding_attention for each block; empty is full_attention in all."""

    mlp_bias: bool = False
    """The three projections of the feed-forward layer have a bias."""

    initializer_range: float = 0.02
    """Standard deviation of initial values; see `models/initialise.py`."""

    bos_token_id: int | None = None
    """First token of a document."""

    eos_token_id: int | tuple[int, ...] | None = None
    """Last token of a document; generation stops at any of them."""

    pad_token_id: int | None = None
    """Filler token."""

    attention: str = "sdpa"
    """Attention backend, a file name of `models/attention/`; eager where scores are capped, since
    sdpa cannot."""

    kernels: Kernels = "torch"
    """What computes norms, SwiGLU and GEGLU, rotary embedding and the scores of labels; see
    `models/layers/liger.py`."""

    head_chunk_tokens: int = 4096
    """Tokens whose logits the head holds at once when it scores labels."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "intermediate_size", "head_chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"model has {name} = {getattr(self, name)}; give at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model has num_heads = {self.num_heads}, which num_kv_heads = "
                f"{self.num_kv_heads} does not divide; give a divisor"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model has head_dim = {self.head_dim}; rotary embedding needs an even number"
            )
        for name in ("query_pre_attn_scalar", "attention_softcap", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"model has {name} = {value}; give more than 0, or None")
        self.rope.rotary_dim(self.head_dim)
        if self.sliding_rope is not None:
            self.sliding_rope.rotary_dim(self.head_dim)
            if self.sliding_rope.depends_on_length:
                raise ValueError(
                    f"model has sliding_rope of type {self.sliding_rope.kind}, whose angles depend "
                    "on how long a document is; use another type for layers that see a window of it"
                )
        self._check_layer_types()

    def _check_layer_types(self) -> None:
        if self.layer_types and len(self.layer_types) != self.num_layers:
            raise ValueError(
                f"model has layer_types for {len(self.layer_types)} blocks, but num_layers = "
                f"{self.num_layers}; give one for each block"
            )
        for kind in self.layer_types:
            if kind not in (FULL, SLIDING):
                raise ValueError(
                    f"model has layer_types with {kind!r}; the types are {FULL} and {SLIDING}"
                )
        if SLIDING in self.layer_types and (self.sliding_window or 0) < 1:
            raise ValueError(
                f"model has sliding_window = {self.sliding_window} and layers of type {SLIDING}; "
                "give at least 1"
            )

    @property
    def attention_types(self) -> tuple[str, ...]:
        """Type of each block."""
        return self.layer_types or (FULL,) * self.num_layers

    def has_window_in(self, num_tokens: int | None) -> bool:
        """Say whether some blocks see less than a row of so many tokens; None: than some row."""
        if SLIDING not in self.layer_types or self.sliding_window is None:
            return False
        return num_tokens is None or self.sliding_window < num_tokens

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have a bias."""
        return self.attention_bias or self.qkv_bias

    @property
    def angles_depend_on_length(self) -> bool:
        """Whether rotary angles need the length of the whole document."""
        return self.rope.depends_on_length

    @property
    def attention_backends(self) -> tuple[str, ...]:
        """Backends that the model can run: all that there are."""
        return ()

    @property
    def longest_row(self) -> int | None:
        """Tokens of the longest row that the model can read: there is no such."""
        return None

    @property
    def waits_for_device(self) -> bool:
        """Whether the host waits for the device in each forward pass: it does not."""
        return False

    @property
    def notes(self) -> tuple[str, ...]:
        """What the log says about how the model is trained: nothing."""
        return ()

    def refusal(self, feature: Feature) -> str | None:
        """Say why the model cannot do this, or None if it can: it can do everything."""
        return None
