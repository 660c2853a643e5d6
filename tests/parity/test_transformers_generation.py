"""Greedy completions equal those of transformers, with and without our cache."""

import pytest
import torch

from engine.verify.variants import SHAPE, random_model
from models.generate import generate
from tests.models.tiny import random_tokens
from tests.parity.same_weights import same_in_ours

NEW_TOKENS = 64


@pytest.mark.parametrize(
    "name",
    [
        *("llama_2", "llama_3_1", "llama_3_2", "attention_bias", "qwen2_window", "mistral_window"),
        *("gemma2", "gemma3"),
    ],
)
def test_sixty_four_greedy_tokens_equal_those_of_transformers(name, tmp_path):
    theirs = random_model(name)
    ours = same_in_ours(theirs, tmp_path)
    prompt = random_tokens(1, 7, vocab_size=SHAPE["vocab_size"])
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    found = generate(ours, prompt.tolist(), max_new_tokens=NEW_TOKENS)
    assert found == expected[:, 7:].tolist()
