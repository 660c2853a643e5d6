"""What the engine asks of a model's sizes, whichever family they belong to.

`decoder_config.py` has those of our own decoder, `families/hf.py` those of a wrapped model.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

Feature = Literal[
    "tensor_parallel",
    "sequence_parallel",
    "context_parallel",
    "packed_documents",
    "embedding_noise",
    "adapter_dropout",
    "liger_kernels",
]
"""What a run may ask of a model, and not every model can do."""


class Weight(NamedTuple):
    """One parameter, as far as operations are counted."""

    name: str
    num_elements: int
    is_matrix: bool
    """Tokens are multiplied with it."""


class ModelSizes(Protocol):
    """Sizes of a model; `DecoderConfig` says what each means."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        ...

    @property
    def hidden_size(self) -> int:
        """Channels of a token between blocks."""
        ...

    @property
    def num_layers(self) -> int:
        """Blocks."""
        ...

    @property
    def num_heads(self) -> int:
        """Query heads."""
        ...

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads."""
        ...

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        ...

    @property
    def intermediate_size(self) -> int:
        """Channels inside the feed-forward layer."""
        ...

    @property
    def tie_word_embeddings(self) -> bool:
        """The head is the embedding, one tensor."""
        ...

    @property
    def sliding_window(self) -> int | None:
        """Newest tokens that a query sees in layers of type sliding_attention."""
        ...

    @property
    def attention_types(self) -> Sequence[str]:
        """Type of attention of each block, in the words of config.json."""
        ...

    @property
    def max_position_embeddings(self) -> int | None:
        """Tokens that the model was made for, where that is known."""
        ...

    @property
    def kernels(self) -> str:
        """What computes norms, SwiGLU, rotary embedding and the scores of labels."""
        ...

    @property
    def attention_softcap(self) -> float | None:
        """What its backend must cap scores at, softly; None: nothing."""
        ...

    @property
    def attention(self) -> str:
        """Attention backend."""
        ...

    @property
    def attention_backends(self) -> Sequence[str]:
        """Backends that the model can run, the preferred one first; empty: all that there are."""
        ...

    @property
    def longest_row(self) -> int | None:
        """Tokens of the longest row that the model can read at all; None where there is no such."""
        ...

    @property
    def angles_depend_on_length(self) -> bool:
        """Whether rotary angles need the length of the whole document."""
        ...

    @property
    def waits_for_device(self) -> bool:
        """Whether the host waits for the device in each forward pass."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What the log says about how the model is trained."""
        ...

    def has_window_in(self, num_tokens: int | None) -> bool:
        """Say whether its backend must mask a window in a row of so many tokens."""
        ...

    def refusal(self, feature: Feature) -> str | None:
        """Say why the model cannot do this, or None if it can."""
        ...


class ListedSizes(ModelSizes, Protocol):
    """Sizes of a model whose parameters do not follow from them."""

    @property
    def weights(self) -> Sequence[Weight]:
        """Every parameter in the order of the forward pass, a tied head too."""
        ...
