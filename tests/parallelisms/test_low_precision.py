"""Float8 layers, emulated, and 8-bit optimizer state: layouts, checkpoints, closeness, sizes."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from engine.cli import load_config
from engine.low_precision import float8_of
from engine.optim import OptimizerConfig, build_optimizer
from engine.verify.case import parse
from engine.verify.parity import build_case, train
from models.decoder import DecoderLM
from parallelisms import low_precision
from parallelisms.low_precision import (
    _MEANS,
    CODES,
    AdamW8bit,
    Float8,
    _mean,
    convert_linears,
    refuse_other_state,
    scaled_bits,
    transposed,
)
from parallelisms.mesh import ParallelConfig, ParallelDims
from parallelisms.resolve import resolve
from parallelisms.stored import zeros_by_rows
from scripts.check_config import fake_process_group
from tests.devices import DEVICES, SKIP_WITHOUT_GPU
from tests.models.tiny import worst_error
from tests.parallelisms import low_precision_cases as cases
from tests.ranks import RankPool

pytest.importorskip("torchao")

FLOAT8_BORDER = 2e-5  # a sum in another order may round to the next of the 8-bit numbers
ROWWISE = Float8(recipe="rowwise", emulates=True)
TENSORWISE = Float8(emulates=True)
GATHERED = replace(TENSORWISE, gathers_float8=True)
AHEAD = replace(GATHERED, precomputes_scales=True)


def test_scaled_rows_give_the_same_step_in_every_layout(ranks: RankPool):
    [(losses, expected)] = ranks(1, cases.float8_steps, "one", ROWWISE, 1)
    for plan in ("fsdp2", "tp2", "tp2-no-sp"):
        found = ranks(2, cases.float8_steps, plan, ROWWISE, 1)[0]
        assert found[0] == pytest.approx(losses, rel=FLOAT8_BORDER)
        assert worst_error(found[1], expected) < FLOAT8_BORDER


def test_gathering_in_float8_changes_no_number_nor_do_scales_computed_ahead(ranks: RankPool):
    # A rank scales its own tokens, so two ranks are as one that reads them one after the other.
    [(losses, expected)] = ranks(1, cases.float8_steps, "one-accumulate2", TENSORWISE, 2)
    for float8 in (TENSORWISE, GATHERED, AHEAD):
        found = ranks(2, cases.float8_steps, "fsdp2", float8, 2)[0]
        assert found[0] == pytest.approx(losses, rel=FLOAT8_BORDER)
        assert worst_error(found[1], expected) < FLOAT8_BORDER


def compiled_cast_steps(
    rank: int, world_size: int, plan: str, float8: Float8, steps: int
) -> tuple[Any, int]:
    """Train with the cast that GPUs take; also return how often it was compiled."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor")
    with pytest.MonkeyPatch.context() as patch:
        cast = torch.compile(scaled_bits, fullgraph=True, dynamic=True, backend=counter)
        patch.setattr(low_precision, "_cast", lambda device_type: cast)
        return cases.float8_steps(rank, world_size, plan, float8, steps), counter.frame_count


def test_the_compiled_cast_of_what_is_gathered_gives_the_same_step(ranks: RankPool):
    for float8 in (GATHERED, AHEAD):
        expected = ranks(2, cases.float8_steps, "fsdp2", float8, 2)[0]
        found, times_compiled = ranks(2, compiled_cast_steps, "fsdp2", float8, 2)[0]
        assert found[0] == expected[0]
        assert worst_error(found[1], expected[1]) == 0
        assert 1 <= times_compiled <= 2, "for all shapes, in both passes"


@pytest.mark.parametrize("compiles", [True, False])
def test_the_cast_is_compiled_on_gpus_where_it_can_be(
    compiles: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(low_precision, "is_fusible", lambda: compiles)
    choose = low_precision._cast.__wrapped__
    assert choose("cpu") is scaled_bits
    assert (choose("cuda") is not scaled_bits) == compiles


def test_gathered_bits_and_scales_are_those_of_torchao(ranks: RankPool):
    ranks(1, bits_of_torchao)


def bits_of_torchao(rank: int, world_size: int) -> None:
    from torchao.float8.float8_training_tensor import LinearMMConfig
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor as Weight

    convert(GATHERED)  # which puts the cast in place
    dtype, settings, mesh = torch.float8_e4m3fn, LinearMMConfig(), init_device_mesh("cpu", (1,))
    values = torch.randn(48, 32) * torch.logspace(-6, 6, 48)[:, None]
    expected_scale, expected = scaled_in_doubles(values, values.abs().max(), dtype)
    (bits,), (scale,) = Weight(values, settings, dtype).fsdp_pre_all_gather(mesh)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(bits.view(torch.uint8), expected.view(torch.uint8))
    # Scales that were computed before stand, and what they make too large saturates.
    (bits,), (kept,) = Weight(values, settings, dtype, scale * 4).fsdp_pre_all_gather(mesh)
    assert kept == scale * 4 and bits.float().abs().max() == torch.finfo(dtype).max


@pytest.mark.parametrize("left_dim", [0, 1])
@pytest.mark.parametrize("right_dim", [0, 1])
@pytest.mark.parametrize("role", ["INPUT", "WEIGHT"])
def test_operands_come_out_as_gpus_multiply_them(
    left_dim: int, right_dim: int, role: str, monkeypatch: pytest.MonkeyPatch
):
    from torchao.float8 import float8_ops
    from torchao.float8.float8_training_tensor import (
        Float8TrainingTensor,
        GemmInputRole,
        LinearMMConfig,
        ScaledMMConfig,
    )

    convert(TENSORWISE)  # which puts the layout in place, once
    convert(TENSORWISE)

    def operand(shape: tuple[int, int], along: int, role: GemmInputRole) -> Any:
        bits = torch.randn(shape).to(torch.float8_e4m3fn)
        bits = bits if along == 1 else bits.t().contiguous().t()
        return Float8TrainingTensor(bits, torch.tensor(2.0), torch.bfloat16, None, role)

    left = operand((48, 32), left_dim, GemmInputRole.GRAD_OUTPUT)
    right = operand((32, 64), right_dim, GemmInputRole[role])
    apart: list[torch.Size] = []
    monkeypatch.setattr(
        low_precision, "transposed", lambda m: (apart.append(m.shape), m.t().contiguous())[1]
    )
    found = float8_ops.preprocess_addmm(left, right)
    assert (found[0].stride(), found[2].stride()) == ((32, 1), (1, 32))
    for bits, given in zip(found[::2], (left, right), strict=True):
        assert torch.equal(bits.float(), given._data.float())
    assert found[1] == found[3] == 2.0
    assert len(apart) == (left_dim == 0) + (right_dim == 1 and role == "INPUT")
    # Products that are emulated take their operands as they are.
    apart.clear()
    left._linear_mm_config = LinearMMConfig(*[ScaledMMConfig(True, False, False, False)] * 3)
    right._linear_mm_config = left._linear_mm_config
    float8_ops.preprocess_addmm(left, right)
    assert not apart


class OperationsSeen(TorchDispatchMode):
    """Keeps the names of the operations that make a tensor of `size` numbers, and all dtypes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names, self.dtypes = size, set[str](), set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.dtypes.add(result.dtype)
            if result.numel() == self.size:
                self.names.add(func.__name__)
        return result


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("by_rows", [False, True])
def test_casts_have_torchao_s_bits_without_doubles_and_without_cutting_every_number(
    dtype: torch.dtype, device: str, compiles: bool, by_rows: bool
):
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import LinearMMConfig

    convert(TENSORWISE)  # which puts the casts in place
    rows: dict[str, Any] = {"axiswise_dim": -1, "round_scales_to_power_of_2": True}
    rows["scaling_granularity"] = ScalingGranularity.AXISWISE

    def cast(values: Tensor) -> tuple[Tensor, Tensor]:
        choice = rows if by_rows else {}
        found = hp_tensor_to_float8_dynamic(values, dtype, LinearMMConfig(), **choice)
        return found._data, found._scale

    if compiles:
        backend = "inductor" if device == "cuda" else "aot_eager"
        cast = torch.compile(cast, fullgraph=True, backend=backend)
    for size in (1e-20, 1e-6, 1.0, 3.0, 1e20):
        values = torch.randn(64, 512, device=device) * size
        bits, scale = cast(values)
        amax = values.abs().amax(-1, keepdim=True) if by_rows else values.abs().max()
        expected, expected_bits = scaled_in_doubles(values, amax, dtype, scale)
        expected = torch.exp2(torch.floor(torch.log2(expected))) if by_rows else expected
        torch.testing.assert_close(scale, expected, rtol=3e-7, atol=0)
        assert torch.equal(bits.view(torch.uint8), expected_bits.view(torch.uint8))
        if size > 1e-12 and not by_rows:
            assert bits.float().abs().max() == torch.finfo(dtype).max
    if not compiles:
        with OperationsSeen(values.numel()) as seen:  # pyright: ignore[reportPossiblyUnboundVariable]
            cast(values)  # pyright: ignore[reportPossiblyUnboundVariable]
        assert torch.float64 not in seen.dtypes
        assert seen.names and not any("clamp" in name for name in seen.names)


def scaled_in_doubles(
    values: Tensor, amax: Tensor, dtype: torch.dtype, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The scale as torchao computes it, and the bits as it cuts and rounds them, of that scale or
    of a given one."""
    largest = torch.finfo(dtype).max
    ours = (largest / amax.double().clamp(min=1e-12)).float()
    used = ours if scale is None else scale
    return ours, (values.float() * used).clamp(-largest, largest).to(dtype)


@pytest.mark.gpu
@SKIP_WITHOUT_GPU
def test_a_gpu_transposes_bytes_of_any_shape_compiled_or_not():
    from parallelisms.triton_kernels import transposed as on_gpu

    compiled = torch.compile(lambda matrix: on_gpu(matrix), fullgraph=True, dynamic=False)
    for shape in ((1000, 333), (17, 5), (4096, 1024)):
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            matrix = torch.randn(shape, device="cuda").to(dtype)
            expected = matrix.view(torch.uint8).t()
            for function in (transposed, compiled):
                found = function(matrix)
                assert found.is_contiguous()
                assert torch.equal(found.view(torch.uint8), expected)


def fp32_steps(rank: int, world_size: int, steps: int) -> list[float]:
    model, dims = build_case(parse("one"), subject=cases.WIDE)
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(lr=1e-3))
    losses = []
    for _ in range(steps):
        losses.append(train(model, dims, parse("one"), cases.WIDE))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_training_in_float8_stays_close_to_fp32(ranks: RankPool):
    steps = 12
    [expected] = ranks(1, fp32_steps, steps)
    assert expected[-1] < 0.5 * expected[0]
    for float8 in (TENSORWISE, ROWWISE):
        [(losses, _)] = ranks(1, cases.float8_steps, "one", float8, steps)
        assert losses[:3] == pytest.approx(expected[:3], rel=0.02)
        assert losses == pytest.approx(expected, abs=0.1), "of 5.6 at first, 0.5 at last"
        assert losses != pytest.approx(expected, rel=1e-6), "it did round"


def convert(float8: Float8, *, tp: int = 1, **sizes: int) -> dict[str, str]:
    """Convert the wide model on meta; return what stays as it is, without its layer's number."""
    config = replace(cases.WIDE.config, num_layers=1, **sizes)
    with torch.device("meta"):
        model = DecoderLM(config)
    plan = resolve(model, cases.WIDE.family.plan(config), ParallelDims.of(ParallelConfig(), 1))
    left = convert_linears(model, plan, float8, tp=tp)
    kinds = {name for name, m in model.named_modules() if type(m).__name__ == "Float8Linear"}
    assert len(kinds) + len(left) == 8
    return {name.rpartition(".")[2]: reason for name, reason in left.items()}


def test_layers_that_cannot_be_float8_stay_with_a_reason():
    outside = {"lm_head": "it is outside the blocks, as the head is"}
    assert convert(ROWWISE) == outside
    assert convert(ROWWISE, intermediate_size=248).keys() - outside == {
        *("gate_proj", "up_proj", "down_proj")
    }
    # 32 rows of keys and values are 8 on each of four ranks.
    left = convert(ROWWISE, tp=4)
    assert left["k_proj"] == "a rank's 8 x 64 weights are no multiples of 16"
    assert left.keys() - outside == {"k_proj", "v_proj"}
    assert convert(replace(ROWWISE, left_out=("mlp",))).keys() - outside == {
        *("gate_proj", "up_proj", "down_proj")
    }
    with pytest.raises(ValueError, match=r"float8(.|\n)*filter_fqns names it"):
        convert(replace(ROWWISE, left_out=("layers",)))


@pytest.mark.parametrize(("seq_len", "pads"), [(32, False), (24, True)])
def test_products_over_tokens_are_padded_unless_every_row_has_a_multiple(seq_len, pads):
    options = ["--model.converters=float8", f"--training.seq_len={seq_len}"]
    # Four rows of 24 would be a multiple, and two ranks get three of six.
    rows = ["--training.local_batch_size=4", "--training.global_batch_size=6"]
    found = float8_of(
        load_config(["--job.config_file=train_configs/debug_model.toml", *options, *rows])
    )
    assert found is not None
    assert found.pads_tokens is pads


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["float8", "nf4"])
def test_a_resumed_run_goes_on_exactly_also_on_another_number_of_ranks(
    kind: str, ranks: RankPool, tmp_path: Path
):
    saved, expected = ranks(2, cases.save_steps, kind, tmp_path / "step", 3)[0]
    read, resumed = ranks(2, cases.save_steps, kind, tmp_path / "step", 3)[0]
    assert equal(read, saved)
    assert equal(resumed, expected)
    assert not equal(resumed, saved)
    assert equal(ranks(1, cases.save_steps, kind, tmp_path / "step", 2)[0][0], saved)


def noisy_losses(name: Literal["AdamW", "AdamW8bit"]) -> tuple[list[float], Optimizer]:
    """Learn a noisy map from rows that are never seen again; return the loss of every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 32), nn.GELU(), nn.Linear(32, 8))
    teacher = nn.Linear(256, 8)
    config = OptimizerConfig(name=name, lr=2e-3, weight_decay=0.1)
    optimizer = build_optimizer(model.named_parameters(), config)
    losses = []
    for _ in range(300):
        x_BD = torch.randn(64, 256)
        y_BD = 2.0 * teacher(x_BD).detach() + torch.randn(64, 8)
        loss = nn.functional.mse_loss(model(x_BD), y_BD)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


def test_eight_bit_state_follows_adamw_at_a_quarter_of_its_memory():
    expected, _ = noisy_losses("AdamW")
    losses, optimizer = noisy_losses("AdamW8bit")
    assert sum(expected[-20:]) < 0.6 * sum(expected[:20])
    assert losses == pytest.approx(expected, rel=0.01)
    matrix, small = (optimizer.state[p] for p in optimizer.param_groups[0]["params"])
    size = sum(slot.numel() * slot.element_size() for slot in matrix.values())
    assert size / (256 * 32) < 2.2
    assert set(small) == {"step", "exp_avg", "exp_avg_sq"}


def test_state_that_adamw_saved_becomes_bytes_and_other_state_stays():
    sizes, values = ((16, 512), (4, 256), (8192,)), torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size, generator=values)) for size in sizes]
    plain = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=values)
    plain.step()
    groups = [{"params": parameters}]
    optimizer = AdamW8bit(groups, lr=1.0, betas=(0.9, 0.9), eps=1.0)
    optimizer.load_state_dict(
        {**plain.state_dict(), "param_groups": optimizer.state_dict()["param_groups"]}
    )
    matrix, *others = (optimizer.state[parameter] for parameter in parameters)
    assert matrix["exp_avg" + CODES].dtype == torch.uint8
    assert matrix["step"] == 1.0
    for name, is_signed in _MEANS:
        expected = plain.state[parameters[0]][name]
        error = (_mean(matrix, name, is_signed).dequantize() - expected).abs().max()
        assert error < 0.02 * expected.abs().max()
        for slots, parameter in zip(others, parameters[1:], strict=True):
            assert torch.equal(slots[name], plain.state[parameter][name])


def test_state_that_another_optimizer_or_layout_cannot_read_is_refused():
    parameter = nn.Parameter(torch.zeros(4, 512))
    refuse_other_state(AdamW8bit([{"params": [parameter]}], lr=1.0, betas=(0.9, 0.9), eps=1.0), [])
    with pytest.raises(ValueError, match=r"AdamW8bit(.|\n)*is another; set optimizer.name"):
        refuse_other_state(torch.optim.AdamW([parameter]), ["exp_avg" + CODES])
    assert zeros_by_rows(parameter, (4, 2), torch.float32).shape == (4, 2)
    with fake_process_group(2):
        mesh = init_device_mesh("cpu", (2,))
        half = DTensor.from_local(torch.zeros(4, 384), mesh, (Shard(1),), run_check=False)
        with pytest.raises(ValueError, match=r"a rank holds 384 columns(.|\n)*groups of 256"):
            zeros_by_rows(half, (4, 3), torch.float32)
