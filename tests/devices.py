"""The devices a test runs on: the CPU, and a GPU where there is one."""

import pytest
import torch

SKIP_WITHOUT_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, SKIP_WITHOUT_GPU])
DEVICES = ["cpu", ON_GPU]
