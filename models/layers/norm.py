"""Normalisation layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import liger


class RMSNorm(nn.Module):
    """Divide each token by its root mean square, then scale each channel.

    The mean is taken in fp32 whatever the dtype of the input.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """

    def __init__(self, width: int, *, eps: float, kernels: liger.Kernels = "torch") -> None:
        super().__init__()
        self.eps = eps
        self.kernels = kernels
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised tokens in the dtype of the input."""
        if self.kernels == "liger":
            return liger.rms_norm(x_BTD, self.weight, self.eps)
        return F.rms_norm(x_BTD, (x_BTD.shape[-1],), self.weight, self.eps)

    def extra_repr(self) -> str:
        """Show width and epsilon."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
