"""The devices a test runs on: the CPU, and a GPU where there is one."""

import pytest
import torch

ON_GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)
DEVICES = ["cpu", ON_GPU]
