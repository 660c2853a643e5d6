"""The decoder that all dense families share, and its one parallel plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from models.attention import AttentionCore, AttentionMask, AttentionMasks
from models.layers.head import LMHead
from models.layers.liger import Kernels
from models.layers.mlp import GatedMLP
from models.layers.norm import RMSNorm
from models.layers.rope import RopeConfig, Rotary, RotaryEmbedding, rotate_both
from models.plan import ModelPlan

if TYPE_CHECKING:
    from models.cache import KVCache, LayerCache

DECODER_PLAN = ModelPlan(
    first=("model.embed_tokens",),
    blocks=("model.layers.*",),
    last=("model.norm", "lm_head"),
    attention=("model.layers.*.self_attn.core",),
    masks=("masks.*",),
    tensor={
        "": "whole_output",
        "model.embed_tokens": "vocab_rows",
        "model.layers.*.input_layernorm": "per_token",
        "model.layers.*.self_attn": "gather_tokens",
        "model.layers.*.self_attn.[qkv]_proj": "columns",
        "model.layers.*.self_attn.o_proj": "rows",
        "model.layers.*.post_attention_layernorm": "per_token",
        "model.layers.*.mlp": "gather_tokens",
        "model.layers.*.mlp.gate_proj": "columns",
        "model.layers.*.mlp.up_proj": "columns",
        "model.layers.*.mlp.down_proj": "rows",
        "model.norm": "per_token",
        "lm_head": "vocab_columns",
    },
)

HEAD_NORMS_PLAN = ModelPlan(tensor={"model.layers.*.self_attn.[qk]_norm": "per_head"})
TIED_PLAN = DECODER_PLAN | ModelPlan(tied=(("model.embed_tokens.weight", "lm_head.weight"),))


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
    """Rotary position embedding."""

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

    qk_norm: bool = False
    """Queries and keys are normalised over the channels of each head, before they are rotated."""

    sliding_window: int | None = None
    """Newest tokens that a query sees in layers of type sliding_attention, itself among them."""

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
    """Attention backend, a file name of `models/attention/`."""

    kernels: Kernels = "torch"
    """What computes norms, SwiGLU, rotary embedding and the scores of labels; see
    `models/layers/liger.py`."""

    head_chunk_tokens: int = 4096
    """Tokens whose logits the head holds at once when it scores labels."""

    head_recompute_logits: bool = True
    """Compute logits again in the backward when there are several chunks, instead of keeping
    them: less memory, one more matrix product."""

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
        self.rope.rotary_dim(self.head_dim)
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

    @property
    def has_window(self) -> bool:
        """Whether some blocks see less than the longest rows that the model is meant for."""
        window = self.sliding_window if SLIDING in self.layer_types else None
        return window is not None and window < self.max_position_embeddings

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have a bias."""
        return self.attention_bias or self.qkv_bias


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.has_qkv_bias
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=config.attention_bias)
        if config.qk_norm:
            norm = partial(RMSNorm, config.head_dim, eps=config.norm_eps, kernels=config.kernels)
            self.q_norm, self.k_norm = norm(), norm()
        self.has_norms = config.qk_norm
        self.core = AttentionCore(config.attention)
        self.kernels: Kernels = config.kernels

    def forward(
        self,
        x_BTD: Tensor,
        *,
        rotary: Rotary,
        mask: AttentionMask,
        cache: "LayerCache | None" = None,
    ) -> Tensor:
        """Return what each token reads from the tokens that `mask` lets it see."""
        # Heads are counted by unflatten, since a rank may hold only some of them.
        q_BTHC = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BSKC = self.k_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BSKC = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        if self.has_norms:
            q_BTHC, k_BSKC = self.q_norm(q_BTHC), self.k_norm(k_BSKC)
        q_BTHC, k_BSKC = rotate_both(q_BTHC, k_BSKC, rotary, kernels=self.kernels)
        if cache is not None:
            k_BSKC, v_BSKC = cache.append(k_BSKC, v_BSKC)
        return self.o_proj(self.core(q_BTHC, k_BSKC, v_BSKC, mask=mask).flatten(-2))


class Block(nn.Module):
    """Attention and feed-forward, each with a norm before and a residual around it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, eps, kernels = config.hidden_size, config.norm_eps, config.kernels
        self.input_layernorm = RMSNorm(width, eps=eps, kernels=kernels)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(width, eps=eps, kernels=kernels)
        self.mlp = GatedMLP(width, config.intermediate_size, bias=config.mlp_bias, kernels=kernels)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        rotary: Rotary,
        mask: AttentionMask,
        cache: "LayerCache | None" = None,
    ) -> Tensor:
        """Return the tokens after this block."""
        attended = self.self_attn(
            self.input_layernorm(x_BTD), rotary=rotary, mask=mask, cache=cache
        )
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_types = config.attention_types
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, kernels=config.kernels)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        rotary: Rotary,
        masks: Mapping[str, AttentionMask],
        cache: "KVCache | None" = None,
    ) -> Tensor:
        """Return the hidden state of each token (B, T, D), in the dtype of the embedding.

        `masks` has one for each type of attention that a block has.
        """
        x_BTD = self.embed_tokens(tokens_BT)
        for index, block in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[index]
            mask = masks[self.attention_types[index]]
            x_BTD = block(x_BTD, rotary=rotary, mask=mask, cache=layer_cache)
        return self.norm(x_BTD)


class DecoderLM(nn.Module):
    """A causal language model whose parameters carry Hugging Face's names."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        windows = {FULL: None, SLIDING: config.sliding_window}
        self.masks = nn.ModuleDict(
            {
                kind: AttentionMasks(config.attention, head_dim=config.head_dim, window=window)
                for kind, window in windows.items()
                if kind in config.attention_types
            }
        )
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)
        self.model = Decoder(config)
        self.lm_head = LMHead(
            config.hidden_size,
            config.vocab_size,
            chunk_tokens=config.head_chunk_tokens,
            recompute_logits=config.head_recompute_logits,
            kernels=config.kernels,
        )
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor,
        documents_BT: Tensor | None = None,
        document_offsets: Tensor | None = None,
        labels_BT: Tensor | None = None,
        cache: "KVCache | None" = None,
    ) -> Tensor:
        """Return logits (B, T, V), or with labels their fp32 log-probabilities (B, T).

        A token sees the tokens of its own document up to its position. Without `documents_BT`
        each row is one document with positions 0 to T-1, with or without padding after it.
        Backends that attend document by document also need `document_offsets`: where each begins in
        the joined rows, then B x T, int32; a row's padding is a document, and some may be empty.
        A label of -100 scores 0. With a cache, keys and values of earlier calls are seen too.
        """
        keys = None if cache is None else cache.extend(positions_BT, documents_BT)
        documents: dict[str, Any] = {
            "documents_BT": documents_BT,
            "document_offsets": document_offsets,
            "keys": keys,
        }
        masks = {kind: make(positions_BT, **documents) for kind, make in self.masks.items()}
        x_BTD = self.model(tokens_BT, rotary=self.rotary(positions_BT), masks=masks, cache=cache)
        return self.lm_head(x_BTD, labels_BT=labels_BT)


def decoder_plan(config: DecoderConfig) -> ModelPlan:
    """Return the plan of the shared decoder, with head norms and a tied pair where there are."""
    plan = TIED_PLAN if config.tie_word_embeddings else DECODER_PLAN
    return plan | HEAD_NORMS_PLAN if config.qk_norm else plan
