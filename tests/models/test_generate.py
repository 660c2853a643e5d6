"""Generation: the cache changes nothing, padding changes nothing, draws follow the settings."""

from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from models.cache import KVCache
from models.generate import choose, generate, keep_likeliest
from models.layers.rope import RopeConfig
from tests.models.tiny import TINY, random_tokens, tiny_model

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5], [3, 5, 8, 9, 7]]


def greedy_without_cache(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            row = torch.tensor([tokens])
            logits = model(row, positions_BT=torch.arange(len(tokens))[None])
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex"])
def test_greedy_tokens_with_a_cache_equal_those_without(backend):
    model = tiny_model(attention=backend)
    # flex makes its masks slowly where they are not compiled.
    prompts, count = (PROMPTS[:1], 3) if backend == "flex" else (PROMPTS, 16)
    for prompt in prompts:
        expected = greedy_without_cache(model, prompt, count)
        assert generate(model, [prompt], max_new_tokens=count) == [expected]
        assert len(set(expected)) > 1


def test_rows_that_outgrow_the_original_context_are_rotated_anew():
    half = TINY.head_dim // 2
    rope = RopeConfig(
        theta=10_000.0,
        kind="longrope",
        factor=4.0,
        original_max_position_embeddings=12,
        short_factor=(1.0,) * half,
        long_factor=tuple(2.0 + n for n in range(half)),
    )
    model = tiny_model(rope=rope)
    expected = [greedy_without_cache(model, prompt, 16) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=16) == expected


def test_a_batch_of_unequal_prompts_completes_like_each_prompt_alone():
    model = tiny_model()
    alone = [generate(model, [prompt], max_new_tokens=20)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=20) == alone


def test_logits_through_the_cache_equal_those_of_one_pass():
    model = tiny_model()
    tokens = random_tokens(2, 14)
    positions = torch.arange(14).expand(2, 14)
    cache = KVCache(num_layers=2, capacity_tokens=14)
    with torch.no_grad():
        expected = model(tokens, positions_BT=positions)
        parts = [
            model(tokens[:, a:b], positions_BT=positions[:, a:b], cache=cache)
            for a, b in ((0, 5), (5, 6), (6, 14))
        ]
    assert torch.allclose(torch.cat(parts, dim=1), expected, atol=1e-5)


def test_a_full_cache_is_refused():
    model = tiny_model()
    cache = KVCache(num_layers=2, capacity_tokens=4)
    with torch.no_grad(), pytest.raises(ValueError, match="holds 4 tokens, but 5 came"):
        model(random_tokens(1, 5), positions_BT=torch.arange(5)[None], cache=cache)


def test_a_row_stops_at_its_end_token_and_the_others_go_on():
    model = tiny_model()
    free = generate(model, PROMPTS, max_new_tokens=20)
    stop = free[0][4]
    stopped = generate(model, PROMPTS, max_new_tokens=20, eos_token_ids=(stop,))
    for row, expected in zip(stopped, free, strict=True):
        end = expected.index(stop) + 1 if stop in expected else len(expected)
        assert row == expected[:end]


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others():
    model = tiny_model()

    def draw(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return generate(
            model, PROMPTS, max_new_tokens=20, temperature=1.5, generator=generator
        )  # fmt: skip

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_at_the_temperature(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    rows = 200_000
    generator = torch.Generator().manual_seed(0)
    tokens = choose(logits.expand(rows, -1), temperature, generator=generator)
    shares = torch.bincount(tokens, minlength=5) / rows
    expected = (logits / temperature).softmax(-1)
    deviation = (expected * (1 - expected) / rows).sqrt()
    assert ((shares - expected).abs() <= 4 * deviation + 1e-9).all()


def as_transformers_would(warper: Any, logits: torch.Tensor) -> torch.Tensor:
    return warper(torch.zeros(len(logits), 1, dtype=torch.long), logits)


@pytest.mark.parametrize("top_k", [1, 3, 10, 50, 1000])
def test_top_k_keeps_what_transformers_keeps(top_k):
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    expected = as_transformers_would(TopKLogitsWarper(top_k), logits)
    assert torch.equal(keep_likeliest(logits, top_k, 1.0), expected)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999, 1.0])
def test_top_p_keeps_what_transformers_keeps(top_p):
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0)) * 3
    expected = as_transformers_would(TopPLogitsWarper(top_p), logits)
    assert torch.equal(keep_likeliest(logits, None, top_p), expected)


def test_draws_stay_among_the_kept_tokens():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(5000, -1)
    generator = torch.Generator().manual_seed(0)
    assert set(choose(logits, 1.0, top_k=2, generator=generator).tolist()) == {0, 1}
    assert set(choose(logits, 1.0, top_p=0.7, generator=generator).tolist()) == {0, 1}
    assert set(choose(logits, 1.0, top_p=1e-6, generator=generator).tolist()) == {0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 0.0}, r"top_p = 0\.0"),
        ({"top_p": 1.5}, r"top_p = 1\.5"),
    ],
)
def test_settings_that_cannot_draw_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), PROMPTS, max_new_tokens=1, **settings)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(tiny_model(), [[1], []], max_new_tokens=1)


def test_no_new_tokens_give_empty_completions():
    assert generate(tiny_model(), PROMPTS, max_new_tokens=0) == [[], [], []]
