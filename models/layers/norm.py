"""Normalisation layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import liger


class RMSNorm(nn.Module):
    """Divide each token by its root mean square, then scale each channel.

    The mean is taken in fp32 whatever the dtype of the input. With `zero_centered` the weight is
    stored as its distance from 1, and added to it in fp32.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4; zero-centred: `RMSNorm` in
    google/gemma_pytorch, gemma/model.py.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float,
        zero_centered: bool = False,
        kernels: liger.Kernels = "torch",
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.kernels = kernels
        self.weight = nn.Parameter(torch.zeros(width) if zero_centered else torch.ones(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised tokens in the dtype of the input."""
        if self.kernels == "liger":
            return liger.rms_norm(x_BTD, self.weight, self.eps, offset=float(self.zero_centered))
        shape = (x_BTD.shape[-1],)
        if self.zero_centered:
            # All in fp32 and rounded once: in bf16 the sum would lose the last bits of the weight.
            scale = 1.0 + self.weight.float()
            return F.rms_norm(x_BTD.float(), shape, scale, self.eps).type_as(x_BTD)
        return F.rms_norm(x_BTD, shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Show width and epsilon."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
