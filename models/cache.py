"""Keys and values of earlier tokens, kept during generation."""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one block; the storage is made when the first ones arrive."""

    def __init__(self, owner: "KVCache") -> None:
        self._owner = owner
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k_BTKC: Tensor, v_BTKC: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest keys and values; return those of all tokens so far (B, S, K, C)."""
        if self._keys is None or self._values is None:
            rows, _, heads, channels = k_BTKC.shape
            shape = (rows, self._owner.capacity_tokens, heads, channels)
            self._keys, self._values = k_BTKC.new_empty(shape), v_BTKC.new_empty(shape)
        end = self._owner.length_tokens
        start = end - k_BTKC.shape[1]
        self._keys[:, start:end] = k_BTKC
        self._values[:, start:end] = v_BTKC
        return self._keys[:, :end], self._values[:, :end]


class KVCache:
    """Keys, values, positions and documents of the tokens that a model has read so far."""

    def __init__(self, *, num_layers: int, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.length_tokens = 0
        self.layers = [LayerCache(self) for _ in range(num_layers)]
        self._positions_BS: Tensor | None = None
        self._documents_BS: Tensor | None = None

    def extend(
        self, positions_BT: Tensor, documents_BT: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Announce the next tokens; return positions and documents of all tokens so far.

        Every forward pass calls this once, before its blocks append.
        """
        self.length_tokens += positions_BT.shape[1]
        if self.length_tokens > self.capacity_tokens:
            raise ValueError(
                f"the cache holds {self.capacity_tokens} tokens, but {self.length_tokens} came; "
                "make it as long as the prompt and the new tokens together"
            )
        self._positions_BS = _join(self._positions_BS, positions_BT)
        if documents_BT is not None:
            self._documents_BS = _join(self._documents_BS, documents_BT)
        return self._positions_BS, self._documents_BS


def _join(earlier: Tensor | None, newest: Tensor) -> Tensor:
    return newest if earlier is None else torch.cat((earlier, newest), dim=1)
