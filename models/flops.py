"""Parameters and floating-point operations of a decoder, counted from its shape.

A multiplication and an addition are two operations. The backward of a matrix product costs twice
its forward. Recomputation by activation checkpointing or by fused attention kernels is not
counted, so that the figure says what the training needs, not what an implementation spends.
Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B (6N + 12 L H C T per token).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from models.decoder_config import SLIDING, DecoderConfig
from models.sizes import ListedSizes, Weight

Sizes = DecoderConfig | ListedSizes
Adapters = Mapping[str, Sequence[Weight]]
"""Weights that lie beside others, by the names of these; `models/adapters.py` lists them."""

NO_ADAPTERS: Adapters = {}
FORWARD_AND_BACKWARD = 3
NORMS = {
    "before": ("input_layernorm", "", "post_attention_layernorm", ""),
    "after": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "both": (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}
"""Names of the norms of a block before and after attention and feed-forward; empty is none."""


def _weights(config: Sizes) -> Iterable[Weight]:
    """Return every parameter of our decoder, or of the model that lists its own."""
    return _decoder_weights(config) if isinstance(config, DecoderConfig) else config.weights


def _decoder_weights(config: DecoderConfig) -> Iterator[Weight]:
    """Yield every parameter in the order of the forward pass, the embedding without a product."""
    width, hidden = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield Weight("model.embed_tokens.weight", config.vocab_size * width, False)

    def linear(name: str, inputs: int, outputs: int, has_bias: bool) -> Iterator[Weight]:
        yield Weight(f"{name}.weight", inputs * outputs, True)
        if has_bias:
            yield Weight(f"{name}.bias", outputs, False)

    for index in range(config.num_layers):
        block = f"model.layers.{index}"
        before_attention, after_attention, before_mlp, after_mlp = (
            [Weight(f"{block}.{name}.weight", width, False)] if name else []
            for name in NORMS[config.norms]
        )
        yield from before_attention
        for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
            yield from linear(f"{block}.self_attn.{name}_proj", width, outputs, config.has_qkv_bias)
        if config.qk_norm != "none":
            whole = config.qk_norm == "width"
            for name, channels in (("q", queries), ("k", keys)):
                size = channels if whole else config.head_dim
                yield Weight(f"{block}.self_attn.{name}_norm.weight", size, False)
        yield from linear(f"{block}.self_attn.o_proj", queries, width, config.attention_bias)
        yield from after_attention + before_mlp
        yield from linear(f"{block}.mlp.gate_proj", width, hidden, config.mlp_bias)
        yield from linear(f"{block}.mlp.up_proj", width, hidden, config.mlp_bias)
        yield from linear(f"{block}.mlp.down_proj", hidden, width, config.mlp_bias)
        yield from after_mlp
    yield Weight("model.norm.weight", width, False)
    yield Weight("lm_head.weight", width * config.vocab_size, True)


def parameter_counts(config: Sizes) -> tuple[int, int]:
    """Return the number of parameters: all, and all that are not the token embedding.

    A tied head counts once in the first figure and, since it is a matrix product, in the second.
    """
    everything = sum(weight.num_elements for weight in _weights(config))
    embedding = config.vocab_size * config.hidden_size
    return everything - embedding * config.tie_word_embeddings, everything - embedding


def train_flops_per_token(
    config: Sizes,
    seq_len: int,
    *,
    is_trainable: Callable[[str], bool] = lambda name: True,
    adapters: Adapters = NO_ADAPTERS,
) -> float:
    """Return 6 N' + 12 L H C S for one trained token of a row of S tokens.

    N' is every weight that is multiplied with a token: all but the embedding, norms and biases.
    Attention counts the whole S x S square, the usual convention, although half is masked; of
    layers with a window twice what is not masked, which is the square where it reaches all.
    """
    linear = linear_train_flops_per_token(config, is_trainable=is_trainable, adapters=adapters)
    attention = attention_train_flops(config, seq_len, longest_tokens=seq_len, causal=False)
    return linear + attention


def linear_train_flops_per_token(
    config: Sizes,
    *,
    is_trainable: Callable[[str], bool] = lambda name: True,
    adapters: Adapters = NO_ADAPTERS,
) -> int:
    """Return the operations of all weight products for one trained token.

    A frozen weight has no gradient of its own, and passes one on only if something before it in
    the forward pass is trained: 4 operations for each element instead of 6. Adapters have 6.
    """
    operations, is_anything_trained = 0, False
    weights = (one for w in _weights(config) for one in (w, *adapters.get(w.name, ())))
    for weight in weights:
        if weight.is_matrix:
            products = 1 + is_anything_trained + is_trainable(weight.name)
            operations += 2 * products * weight.num_elements
        is_anything_trained = is_anything_trained or is_trainable(weight.name)
    return operations


def attention_train_flops(
    config: Sizes,
    squared_document_tokens: float,
    *,
    longest_tokens: int,
    causal: bool = True,
) -> float:
    """Return the operations of attention for documents whose squared lengths add up to this.

    12 L H C per pair of tokens: two products of H C multiply-adds, forward and backward. With
    `causal` only half of the square is counted, the half that is not masked. Layers with a window
    count as if every document had `longest_tokens`: exact for those, too little for shorter ones.
    """
    per_pair = FORWARD_AND_BACKWARD * 4 * config.num_heads * config.head_dim
    seen = _seen_fraction(config.sliding_window, longest_tokens)
    layers = sum(seen if kind == SLIDING else 1.0 for kind in config.attention_types)
    return per_pair * layers * squared_document_tokens / (2 if causal else 1)


def _seen_fraction(window: int | None, num_tokens: int) -> float:
    """Return how much of the causal half of a square a window leaves: (2 w S - w^2) / S^2."""
    covered = min((window or num_tokens) / num_tokens, 1.0)
    return covered * (2.0 - covered)
