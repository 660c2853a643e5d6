"""Small decoders with drawn weights, and packed rows to feed them."""

from dataclasses import replace

import torch
from torch import Tensor

from models.decoder import DecoderConfig, DecoderLM
from models.initialise import initial_values
from models.layers.rope import RopeConfig

TINY = DecoderConfig(
    vocab_size=97,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    rope=RopeConfig(theta=10_000.0),
    max_position_embeddings=128,
)


def fill(model: DecoderLM, *, seed: int = 0, spread: float = 1.0) -> DecoderLM:
    """Give a whole model on one device its initial values, `spread` times as wide."""
    draw = initial_values(model, model.config, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = draw(name, tuple(slice(0, size) for size in parameter.shape))
            parameter.copy_(values * spread if parameter.ndim > 1 else values)
    return model


def tiny_model(*, seed: int = 0, spread: float = 5.0, **overrides: object) -> DecoderLM:
    """Return a tiny decoder whose logits are far from uniform."""
    config: DecoderConfig = replace(TINY, **overrides)  # type: ignore[arg-type]
    return fill(DecoderLM(config), seed=seed, spread=spread)


def random_tokens(rows: int, length: int, *, seed: int = 0, vocab_size: int = 97) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (rows, length), generator=generator)


def packed(lengths: list[int], *, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Return positions and documents (1, T) of documents of these lengths, then padding."""
    positions = [torch.arange(n) for n in (*lengths, padding)]
    numbers = [*range(1, len(lengths) + 1), 0]
    documents = [torch.full((n,), d) for d, n in zip(numbers, (*lengths, padding), strict=True)]
    return torch.cat(positions)[None], torch.cat(documents)[None]


def gradients(model: DecoderLM) -> dict[str, Tensor]:
    """Return the gradient of every parameter by name; every one must be there and not zero."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.any(), f"the gradient of {name} is zero"
        found[name] = parameter.grad.clone()
    return found


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference over all tensors, each relative to its largest value."""
    assert found.keys() == expected.keys()
    return max(
        float((found[n] - expected[n]).abs().max() / expected[n].abs().max()) for n in expected
    )
