"""Kernels in Triton: a matrix of single bytes transposed, and AdamW's update of a parameter.

To be imported only where there are a GPU and Triton.
"""

import math

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.library import triton_op, wrap_triton

TILE_ROWS, TILE_COLUMNS = 64, 128
"""Of the tiles tried on an H200 the fastest or nearly: 3.7 to 3.9 TB/s read and written, where the
compiler's own kernel reaches 2.5 and torch's copy 0.35."""

UPDATE_BLOCK = 512
"""Numbers that a program updates. On an H200 4.0 TB/s are read and written with it; torch's fused
kernel reaches 3.5, and moves 32 bytes a number in place of 28 where it clips as well."""


@triton.jit
def _transpose_tile(  # pyright: ignore[reportUntypedFunctionDecorator]
    source, target, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    source = source.to(tl.pointer_type(tl.uint8), bitcast=True)
    target = target.to(tl.pointer_type(tl.uint8), bitcast=True)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row, column = rows[:, None], columns[None, :]
    inside = (row < num_rows) & (column < num_columns)
    tile = tl.load(source + row * num_columns + column, mask=inside)
    place = target + columns[:, None] * num_rows + rows[None, :]
    tl.store(place, tl.trans(tile), mask=tl.trans(inside))


@triton_op("tessera::transposed_bytes", mutates_args={})
def transposed(matrix: Tensor) -> Tensor:
    """Return a contiguous matrix (M, N) of a dtype of one byte as a contiguous one (N, M).

    Compiled graphs call the kernel directly.
    """
    num_rows, num_columns = matrix.shape
    target = torch.empty(num_columns, num_rows, dtype=matrix.dtype, device=matrix.device)
    tiles = (triton.cdiv(num_rows, TILE_ROWS), triton.cdiv(num_columns, TILE_COLUMNS))
    # In its own dtype: a view of it as bytes would be written by what comes before, once more.
    wrap_triton(_transpose_tile)[tiles](
        matrix, target, num_rows, num_columns, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS
    )
    return target


@triton.jit
def _update_block_by_adamw(  # pyright: ignore[reportUntypedFunctionDecorator]
    values,
    gradients,
    means,
    squares,
    num_steps,
    found_inf,
    grad_scale,
    count,
    lr,
    weight_decay,
    eps,
    log_beta1,
    log_beta2,
    rest1,
    rest2,
    BLOCK: tl.constexpr,
):
    if tl.load(found_inf) == 0:
        # In double precision: of 1 - 0.999 single precision keeps four digits.
        steps = tl.load(num_steps).to(tl.float64)
        correction1 = (1.0 - tl.exp(steps * log_beta1)).to(tl.float32)
        correction2 = (1.0 - tl.exp(steps * log_beta2)).to(tl.float32)
        factor = 1.0 / tl.load(grad_scale)

        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < count
        gradient = tl.load(gradients + place, mask=inside).to(tl.float32) * factor
        mean = (1.0 - rest1) * tl.load(means + place, mask=inside) + rest1 * gradient
        square = tl.load(squares + place, mask=inside)
        square = (1.0 - rest2) * square + rest2 * gradient * gradient
        value = tl.load(values + place, mask=inside) * (1.0 - lr * weight_decay)
        root = tl.sqrt(square) / tl.sqrt(correction2) + eps
        value -= (lr / correction1) * mean / root
        tl.store(values + place, value, mask=inside)
        tl.store(means + place, mean, mask=inside)
        tl.store(squares + place, square, mask=inside)


def update_by_adamw(
    value: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    num_steps: Tensor,
    found_inf: Tensor,
    grad_scale: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update a parameter and its running means in place, all fp32 and contiguous on one GPU.

    The gradient may have another dtype and layout. Loshchilov and Hutter 2019, arXiv:1711.05101,
    algorithm 2. `num_steps`, this one counted, `found_inf` and `grad_scale` are fp32 scalars of
    that GPU: gradients are divided by the last, and where the one before is not zero nothing is
    written.
    """
    assert all(tensor.is_contiguous() for tensor in (value, mean, square))
    count = value.numel()
    _update_block_by_adamw[(triton.cdiv(count, UPDATE_BLOCK),)](  # pyright: ignore[reportIndexIssue]
        value,
        gradient.contiguous(),
        mean,
        square,
        num_steps,
        found_inf,
        grad_scale,
        count,
        lr,
        weight_decay,
        eps,
        *(math.log(beta) if beta else -math.inf for beta in betas),
        *(1.0 - beta for beta in betas),
        BLOCK=UPDATE_BLOCK,
    )
