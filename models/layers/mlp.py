"""Feed-forward layers."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import liger


class GatedMLP(nn.Module):
    """SwiGLU feed-forward: `down(silu(gate(x)) * up(x))`.

    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """

    def __init__(
        self, width: int, hidden: int, *, bias: bool, kernels: liger.Kernels = "torch"
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the update of each token, each computed alone."""
        if self.kernels == "liger":
            return self.down_proj(liger.silu_mul(self.gate_proj(x_BTD), self.up_proj(x_BTD)))
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
