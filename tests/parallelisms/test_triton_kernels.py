"""AdamW's Triton kernel against torch in double precision: on a GPU, or by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.devices import DEVICES

ROOT = Path(__file__).parents[2]
FP32_ROUNDING = 1e-6  # of a parameter that one update moves by 1e-2


@pytest.mark.parametrize("device", DEVICES)
def test_adamw_is_torch_s_for_any_length_and_gradient_and_writes_nothing_where_refused(
    device: str,
):
    pytest.importorskip("triton")
    # Triton reads the variable when its functions are made.
    mode = {} if device == "cuda" else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.parallelisms.test_triton_kernels", device]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **mode}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "12 cases\n"


def updates_as_torch(
    count: int, betas: tuple[float, float], dtype: torch.dtype, *, device: str
) -> None:
    from parallelisms.triton_kernels import update_by_adamw

    rates = {"lr": 1e-2, "betas": betas, "eps": 1e-8, "weight_decay": 0.3}
    value = torch.randn(count, device=device)
    expected = nn.Parameter(value.double())
    reference = torch.optim.AdamW([expected], foreach=False, **rates)
    mean, square = torch.zeros_like(value), torch.zeros_like(value)
    for step in range(1, 5):
        is_refused = step == 4
        gradient = torch.randn(count, device=device).to(dtype)
        given = torch.full_like(gradient, torch.nan) if is_refused else gradient
        scalars = {"num_steps": step, "found_inf": is_refused, "grad_scale": 4.0}
        on_device = {n: torch.tensor(float(x), device=device) for n, x in scalars.items()}
        before = value.clone(), mean.clone(), square.clone()
        update_by_adamw(value, given, mean, square, **on_device, **rates)
        if is_refused:
            assert all(map(torch.equal, (value, mean, square), before))
            continue
        expected.grad = gradient.double() / 4.0
        reference.step()
        assert (value - expected).abs().max() < FP32_ROUNDING
        slots = reference.state[expected]
        torch.testing.assert_close(mean.double(), slots["exp_avg"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(square.double(), slots["exp_avg_sq"], rtol=1e-6, atol=1e-9)


if __name__ == "__main__":
    torch.manual_seed(0)
    cases = [
        (count, betas, dtype)
        for count in (1, 511, 1500)
        for betas in ((0.9, 0.999), (0.0, 0.95))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for case in cases:
        updates_as_torch(*case, device=sys.argv[1])
    print(len(cases), "cases")
