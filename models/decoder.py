"""The decoder that all dense families share, and its one parallel plan."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from models.attention import AttentionCore, AttentionMask, AttentionMasks
from models.decoder_config import FULL, SLIDING, DecoderConfig
from models.layers.head import LMHead
from models.layers.liger import Kernels
from models.layers.mlp import GatedMLP
from models.layers.norm import RMSNorm
from models.layers.rope import Rotary, RotaryEmbedding, rotate_both
from models.plan import ModelPlan, Role

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
        "model.embedding_noise": "split_tokens",
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

TIED_PLAN = DECODER_PLAN | ModelPlan(tied=(("model.embed_tokens.weight", "lm_head.weight"),))


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
        self.qk_norm = config.qk_norm
        if config.qk_norm != "none":
            widths = (queries, keys) if config.qk_norm == "width" else (config.head_dim,) * 2
            self.q_norm, self.k_norm = (_norm(config, width) for width in widths)
        self.core = AttentionCore(
            config.attention,
            query_pre_attn_scalar=config.query_pre_attn_scalar,
            softcap=config.attention_softcap,
        )
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
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if self.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        # Heads are counted by unflatten, since a rank may hold only some of them.
        q_BTHC, k_BSKC, v_BSKC = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.qk_norm == "head":
            q_BTHC, k_BSKC = self.q_norm(q_BTHC), self.k_norm(k_BSKC)
        q_BTHC, k_BSKC = rotate_both(q_BTHC, k_BSKC, rotary, kernels=self.kernels)
        if cache is not None:
            k_BSKC, v_BSKC = cache.append(k_BSKC, v_BSKC)
        return self.o_proj(self.core(q_BTHC, k_BSKC, v_BSKC, mask=mask).flatten(-2))


class Block(nn.Module):
    """Attention and feed-forward, each with a norm before and a residual around it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = _norm(config)
        self.mlp = _feed_forward(config)

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


class PostNormBlock(nn.Module):
    """Attention and feed-forward, each with a norm behind it and a residual around both.

    Source: OLMo 2, arXiv:2501.00656, section 3.2.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.post_attention_layernorm = _norm(config)
        self.mlp = _feed_forward(config)
        self.post_feedforward_layernorm = _norm(config)

    def forward(
        self,
        x_BTD: Tensor,
        *,
        rotary: Rotary,
        mask: AttentionMask,
        cache: "LayerCache | None" = None,
    ) -> Tensor:
        """Return the tokens after this block."""
        attended = self.self_attn(x_BTD, rotary=rotary, mask=mask, cache=cache)
        x_BTD = x_BTD + self.post_attention_layernorm(attended)
        return x_BTD + self.post_feedforward_layernorm(self.mlp(x_BTD))


class SandwichNormBlock(nn.Module):
    """Attention and feed-forward, each between two norms and with a residual around the three.

    Source: Ding et al. 2021, CogView, arXiv:2105.13290, section 2.4; Gemma Team 2024,
    arXiv:2408.00118, section 2.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = _norm(config)
        self.pre_feedforward_layernorm = _norm(config)
        self.mlp = _feed_forward(config)
        self.post_feedforward_layernorm = _norm(config)

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
        x_BTD = x_BTD + self.post_attention_layernorm(attended)
        fed_forward = self.mlp(self.pre_feedforward_layernorm(x_BTD))
        return x_BTD + self.post_feedforward_layernorm(fed_forward)


BLOCKS = {"before": Block, "after": PostNormBlock, "both": SandwichNormBlock}
"""By `DecoderConfig.norms`."""


def _norm(config: DecoderConfig, width: int | None = None) -> RMSNorm:
    return RMSNorm(
        width or config.hidden_size,
        eps=config.norm_eps,
        zero_centered=config.zero_centered_norm,
        kernels=config.kernels,
    )


def _feed_forward(config: DecoderConfig) -> GatedMLP:
    return GatedMLP(
        config.hidden_size,
        config.intermediate_size,
        bias=config.mlp_bias,
        activation=config.activation,
        kernels=config.kernels,
    )


class Decoder(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_types = config.attention_types
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # Where noise of whole rows enters, so that a plan can say how it meets the embeddings.
        self.embedding_noise = nn.Identity()
        self.embedding_scale = math.sqrt(config.hidden_size) if config.scaled_embedding else None
        block = BLOCKS[config.norms]
        self.layers = nn.ModuleList(block(config) for _ in range(config.num_layers))
        self.norm = _norm(config)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        rotary: Mapping[str, Rotary],
        masks: Mapping[str, AttentionMask],
        embedding_noise_BTD: Tensor | None = None,
        cache: "KVCache | None" = None,
    ) -> Tensor:
        """Return the hidden state of each token (B, T, D), in the dtype of the embedding.

        `rotary` and `masks` have one for each type of attention that a block has.
        """
        x_BTD = self.embed_tokens(tokens_BT)
        if self.embedding_scale is not None:
            # A tensor, so that it is rounded to the dtype of the embeddings before the product.
            x_BTD = x_BTD * x_BTD.new_full((), self.embedding_scale)
        if embedding_noise_BTD is not None:
            x_BTD = x_BTD + self.embedding_noise(embedding_noise_BTD)
        for index, block in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[index]
            kind = self.attention_types[index]
            x_BTD = block(x_BTD, rotary=rotary[kind], mask=masks[kind], cache=layer_cache)
        return self.norm(x_BTD)


class DecoderLM(nn.Module):
    """A causal language model whose parameters carry Hugging Face's names."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        windows = {FULL: None, SLIDING: config.sliding_window}
        self.masks = nn.ModuleDict(
            {
                kind: AttentionMasks(
                    config.attention,
                    head_dim=config.head_dim,
                    window=window,
                    has_softcap=config.attention_softcap is not None,
                )
                for kind, window in windows.items()
                if kind in config.attention_types
            }
        )
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)
        self.sliding_rotary = self.rotary
        if config.sliding_rope is not None:
            self.sliding_rotary = RotaryEmbedding(config.sliding_rope, config.head_dim)
        self.model = Decoder(config)
        self.lm_head = LMHead(
            config.hidden_size,
            config.vocab_size,
            chunk_tokens=config.head_chunk_tokens,
            softcap=config.logit_softcap,
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
        longest_document_tokens: int | None = None,
        labels_BT: Tensor | None = None,
        embedding_noise_BTD: Tensor | None = None,
        cache: "KVCache | None" = None,
    ) -> Tensor:
        """Return logits (B, T, V), or with labels their fp32 log-probabilities (B, T).

        A token sees the tokens of its own document up to its position. Without `documents_BT`
        each row is one document with positions 0 to T-1, with or without padding after it.
        Backends that attend document by document also need `document_offsets`: where each begins in
        the joined rows, then B x T, int32; a row's padding is a document, and some may be empty.
        None is longer than `longest_document_tokens`, by default T: the closer, the faster.
        A label of -100 scores 0. `embedding_noise_BTD`, of the embedding's dtype, is added to the
        embeddings, after they are scaled if they are, as in transformers 5. With a cache, keys and
        values of earlier calls are seen too.
        """
        keys = None if cache is None else cache.extend(positions_BT, documents_BT)
        documents: dict[str, Any] = {
            "documents_BT": documents_BT,
            "document_offsets": document_offsets,
            "longest_document_tokens": longest_document_tokens,
            "keys": keys,
        }
        masks = {kind: make(positions_BT, **documents) for kind, make in self.masks.items()}
        rotary = {FULL: self.rotary(positions_BT)}
        is_shared = self.sliding_rotary is self.rotary
        rotary[SLIDING] = rotary[FULL] if is_shared else self.sliding_rotary(positions_BT)
        x_BTD = self.model(
            tokens_BT,
            rotary=rotary,
            masks=masks,
            embedding_noise_BTD=embedding_noise_BTD,
            cache=cache,
        )
        return self.lm_head(x_BTD, labels_BT=labels_BT)


def decoder_plan(config: DecoderConfig) -> ModelPlan:
    """Return the plan of the shared decoder with what the configuration changes in it."""
    plan = TIED_PLAN if config.tie_word_embeddings else DECODER_PLAN
    roles: dict[str, Role] = dict(plan.tensor)
    if config.qk_norm != "none":
        roles["model.layers.*.self_attn.[qk]_norm"] = (
            "per_head" if config.qk_norm == "head" else "across_columns"
        )
    if config.norms != "before":
        roles["model.layers.*.post_feedforward_layernorm"] = "per_token"
    if config.norms == "after":
        del roles["model.layers.*.input_layernorm"]
    if config.norms == "both":
        roles["model.layers.*.pre_feedforward_layernorm"] = "per_token"
    return replace(plan, tensor=roles)
