"""Feed-forward layers."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import liger

Activation = Literal["silu", "gelu_pytorch_tanh"]
"""Function of the gate, in the words of config.json; GELU is the approximation by tanh."""


class GatedMLP(nn.Module):
    """SwiGLU or GEGLU feed-forward: `down(activation(gate(x)) * up(x))`.

    Source: Shazeer 2020, arXiv:2002.05202, eq. 6. The approximation of GELU: Hendrycks and Gimpel
    2016, arXiv:1606.08415, section 2.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        bias: bool,
        activation: Activation = "silu",
        kernels: liger.Kernels = "torch",
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.kernels = kernels
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the update of each token, each computed alone."""
        gate_BTF, up_BTF = self.gate_proj(x_BTD), self.up_proj(x_BTD)
        is_silu = self.activation == "silu"
        if self.kernels == "liger":
            multiply = liger.silu_mul if is_silu else liger.gelu_mul
            return self.down_proj(multiply(gate_BTF, up_BTF))
        gate_BTF = F.silu(gate_BTF) if is_silu else F.gelu(gate_BTF, approximate="tanh")
        return self.down_proj(gate_BTF * up_BTF)
