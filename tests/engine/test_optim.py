import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from engine import optim
from engine.optim import OptimizerConfig, build_optimizer, decides_on_device, update_where
from tests.devices import DEVICES

IMPLEMENTATIONS = ("for-loop", "foreach", "fused")
OURS = "fused, by the kernel of our own"
REORDERED_ARITHMETIC = 1e-6  # the implementations round in different orders, fp32


def small_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "embed.weight": (16, 8),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
        "norm.weight": (8,),
    }
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in shapes.items()
    }


def gradient(parameter: Tensor, step: int) -> Tensor:
    return torch.cos(torch.arange(parameter.numel()).reshape(parameter.shape) + step) / 3


def adamw_by_hand(value: Tensor, config: OptimizerConfig, decay: float, steps: int) -> Tensor:
    """Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2, in float64."""
    value = value.double()
    mean = torch.zeros_like(value)
    square = torch.zeros_like(value)
    for step in range(1, steps + 1):
        grad = gradient(value, step).double()
        value = value * (1 - config.lr * decay)
        mean = config.beta1 * mean + (1 - config.beta1) * grad
        square = config.beta2 * square + (1 - config.beta2) * grad**2
        corrected_mean = mean / (1 - config.beta1**step)
        corrected_square = square / (1 - config.beta2**step)
        value = value - config.lr * corrected_mean / (corrected_square.sqrt() + config.eps)
    return value


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_adamw_follows_its_closed_form_with_decay_on_matrices_alone(implementation: str):
    config = OptimizerConfig(lr=0.01, weight_decay=0.3, implementation=implementation)  # type: ignore[arg-type]
    parameters = small_parameters()
    expected = {
        name: adamw_by_hand(p.detach(), config, 0.3 if p.ndim == 2 else 0.0, steps=5)
        for name, p in parameters.items()
    }
    optimizer = build_optimizer(parameters.items(), config)
    for step in range(1, 6):
        for parameter in parameters.values():
            parameter.grad = gradient(parameter, step)
        optimizer.step()
    for name, parameter in parameters.items():
        difference = (parameter.detach().double() - expected[name]).abs().max()
        assert difference < REORDERED_ARITHMETIC, name


def test_vectors_are_in_a_group_without_decay_and_keep_the_rate_to_scale():
    parameters = small_parameters()
    optimizer = build_optimizer(parameters.items(), OptimizerConfig(weight_decay=0.1, lr=0.5))
    decay_of = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {name: decay_of[id(p)] for name, p in parameters.items()} == {
        "embed.weight": 0.1,
        "proj.weight": 0.1,
        "proj.bias": 0.0,
        "norm.weight": 0.0,
    }
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_frozen_parameters_are_left_out_and_tied_ones_are_counted_once():
    parameters = small_parameters()
    parameters["proj.weight"].requires_grad_(False)
    parameters["head.weight"] = parameters["embed.weight"]
    optimizer = build_optimizer(parameters.items(), OptimizerConfig())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == 3
    assert sum(p is parameters["embed.weight"] for p in held) == 1


def test_only_vectors_make_one_group():
    norm = small_parameters()["norm.weight"]
    optimizer = build_optimizer([("norm.weight", norm)], OptimizerConfig())
    assert len(optimizer.param_groups) == 1


def test_a_wholly_frozen_model_is_refused():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer([("norm.weight", frozen)], OptimizerConfig())


def test_adam_puts_the_decay_into_the_gradient():
    parameters = small_parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    config = OptimizerConfig(name="Adam", lr=0.01, weight_decay=0.5)
    optimizer = build_optimizer(parameters.items(), config)
    for parameter in parameters.values():
        parameter.grad = gradient(parameter, 1)
    optimizer.step()
    for name, parameter in parameters.items():
        decay = 0.5 if parameter.ndim == 2 else 0.0
        grad = gradient(parameter, 1) + decay * start[name]
        expected = start[name] - 0.01 * grad / (grad.abs() + config.eps)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=0)


def test_a_device_without_fused_kernels_takes_foreach_and_says_so(caplog):
    parameter = nn.Parameter(torch.ones(2, 2, device="meta"))
    with caplog.at_level(logging.WARNING, logger="tessera"):
        optimizer = build_optimizer([("w", parameter)], OptimizerConfig())
    assert optimizer.defaults["foreach"] is True
    assert "optimizer.implementation = 'fused' has no kernel for parameters on meta" in caplog.text


def test_the_implementation_asked_for_is_the_one_used(caplog):
    for implementation in IMPLEMENTATIONS:
        config = OptimizerConfig(implementation=implementation)  # type: ignore[arg-type]
        defaults = build_optimizer(small_parameters().items(), config).defaults
        assert defaults["fused"] is (implementation == "fused")
        assert defaults["foreach"] is (implementation == "foreach")
    assert not caplog.records


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_device_decides_where_fused_kernels_run_on_the_one_that_computes(implementation: str):
    config = OptimizerConfig(implementation=implementation)  # type: ignore[arg-type]
    optimizer = build_optimizer(small_parameters().items(), config)
    assert decides_on_device(optimizer, torch.device("cpu")) is (implementation == "fused")
    assert not decides_on_device(optimizer, torch.device("cuda")), "parameters in host memory"
    for group in optimizer.param_groups:
        del group["fused"]  # as those of AdamW8bit
    assert not decides_on_device(optimizer, torch.device("cpu"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("early_step_in_backward", True),
        ("lr", -1.0),
        ("weight_decay", -0.1),
        ("eps", -1e-8),
        ("beta1", 1.0),
        ("beta2", -0.5),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name_and_value(key: str, value: float):
    shown = "true" if value is True else value
    with pytest.raises(ValueError, match=rf"optimizer\.{key} = {shown}"):
        OptimizerConfig(**{key: value})  # type: ignore[arg-type]


def update_by_torch(
    value: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    betas: tuple[float, float],
    num_steps: Tensor,
    **settings: Any,
) -> None:
    """What `update_by_adamw` does, for the CPU, by the kernel that torch's AdamW calls."""
    settings |= {"beta1": betas[0], "beta2": betas[1], "amsgrad": False, "maximize": False}
    tensors = ([value], [gradient.contiguous()], [mean], [square], [], [num_steps])
    torch._fused_adamw_(*tensors, **settings)


def update_on_mixed_meshes(rank: int, world_size: int, implementation: str) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts = {
        "embed.weight": (mesh, (Shard(0), Shard(1))),
        "proj.weight": (mesh, (Shard(0), Replicate())),
        "proj.bias": (mesh["dp"], (Shard(0),)),
        "norm.weight": (mesh["tp"], (Replicate(),)),
    }
    parameters = {
        name: nn.Parameter(distribute_tensor(p.detach(), *layouts[name]))
        for name, p in small_parameters().items()
    }
    with pytest.MonkeyPatch.context() as patch:
        if is_ours := implementation == OURS:
            patch.setattr(optim, "_fit_kernel", lambda parameters: True)
            patch.setattr(optim, "_kernel", lambda: update_by_torch)
            implementation = "fused"
        config = OptimizerConfig(lr=0.01, implementation=implementation)  # type: ignore[arg-type]
        optimizer = build_optimizer(parameters.items(), config)
        assert isinstance(optimizer, optim.TritonAdamW) == is_ours
        return updated_thrice(parameters, layouts, optimizer, implementation)


def updated_thrice(
    parameters: dict[str, nn.Parameter],
    layouts: dict[str, tuple[DeviceMesh, tuple[Placement, ...]]],
    optimizer: Optimizer,
    implementation: str,
) -> dict[str, Tensor]:
    for step in range(1, 4):
        if implementation == "fused":  # one is refused before each, the very first included
            for parameter in parameters.values():
                parameter.grad = torch.full_like(parameter, torch.nan)
            update_where(optimizer, torch.tensor(False), torch.tensor(1.0))
        for name, parameter in parameters.items():
            parameter.grad = distribute_tensor(gradient(parameter, step), *layouts[name])
        if implementation == "fused" and step == 2:  # a factor of one step alone
            for parameter in parameters.values():
                assert parameter.grad is not None
                parameter.grad *= 4.0
            update_where(optimizer, torch.tensor(True), torch.tensor(0.25))
        else:
            optimizer.step()
    gathered: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        assert isinstance(parameter, DTensor)
        gathered[name] = parameter.full_tensor().detach()
    return gathered


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, OURS])
def test_parameters_on_several_meshes_get_the_single_process_update(ranks, implementation: str):
    parameters = small_parameters()
    alone = "fused" if implementation == OURS else implementation
    config = OptimizerConfig(lr=0.01, implementation=alone)  # type: ignore[arg-type]
    optimizer = build_optimizer(parameters.items(), config)
    for step in range(1, 4):
        for parameter in parameters.values():
            parameter.grad = gradient(parameter, step)
        optimizer.step()
    for updated in ranks(4, update_on_mixed_meshes, implementation):
        for name, parameter in parameters.items():
            difference = (updated[name] - parameter.detach()).abs().max()
            assert difference < REORDERED_ARITHMETIC, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_a_kernel_of_our_own_does_what_torch_s_does(
    device: str, beta1: float, monkeypatch: pytest.MonkeyPatch
):
    config = OptimizerConfig(lr=0.01, weight_decay=0.3, beta1=beta1, beta2=0.999)
    shapes = {"w": (48, 33), "b": (33,), "one": (1,), "none": (0, 7), "frozen": (4, 4)}
    start = {name: torch.randn(shape).to(device) for name, shape in shapes.items()}

    def trained(kernel: bool) -> tuple[dict[str, nn.Parameter], dict[str, Any], type]:
        with monkeypatch.context() as patch:
            if device == "cpu":
                patch.setattr(optim, "_kernel", lambda: update_by_torch)
            if device == "cpu" or not kernel:
                patch.setattr(optim, "_fit_kernel", lambda parameters: kernel)
            parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
            optimizer = build_optimizer(parameters.items(), config)
            plan = [(False, 1.0), (True, 1.0), (True, 0.25), (False, 1.0), None]
            for step, decided in enumerate(plan):
                for name, parameter in parameters.items():
                    if name != "frozen":
                        parameter.grad = gradient(parameter, step).to(device)
                if kernel and step == 2:  # as tensor parallelism may lay one out
                    parameters["w"].grad = parameters["w"].grad.t().contiguous().t()  # type: ignore[union-attr]
                if decided is None:
                    optimizer.param_groups[0]["lr"] = 0.5
                    optimizer.step()
                    continue
                if not decided[0]:
                    parameters["w"].grad = torch.full_like(parameters["w"], torch.nan)
                flags = (torch.tensor(flag, device=device) for flag in decided)
                update_where(optimizer, *flags)
            return parameters, optimizer.state_dict(), type(optimizer)

    ours, our_state, our_kind = trained(kernel=True)
    theirs, their_state, their_kind = trained(kernel=False)
    assert (our_kind, their_kind) == (optim.TritonAdamW, torch.optim.AdamW)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name])
    assert our_state["param_groups"] == their_state["param_groups"]
    assert our_state["state"].keys() == their_state["state"].keys()
    for number, slots in our_state["state"].items():
        torch.testing.assert_close(slots, their_state["state"][number])
    assert torch.equal(ours["frozen"], start["frozen"])
