"""Completes a prompt with transformers' own generation, for models that have no cache of ours."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from models.wrapped.module import num_positions


def load(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """Return transformers' model of a folder; it reads the weights itself."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.generation_config = GenerationConfig()  # else its settings stand in for those not given
    return model.to(device).eval()


def longest_row(model: Any) -> int | None:
    """Return the most tokens that the model can read at all; None where there is no such limit."""
    return num_positions(model, model.get_input_embeddings(), model.config)


@torch.no_grad()
def generate(
    model: Any,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    eos_token_ids: Collection[int],
    seed: int,
) -> list[int]:
    """Return the new tokens of a prompt, with the end-of-text token where one came.

    As `models.generate.generate`, but for one prompt, and a seed of the global generators.
    """
    from transformers import GenerationConfig

    draws: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        draws |= {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p}
    ends = list(eos_token_ids)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **draws,
    )
    torch.manual_seed(seed)
    tokens_BT = torch.tensor([list(prompt)], device=model.device)
    found_BT = model.generate(
        tokens_BT, attention_mask=torch.ones_like(tokens_BT), generation_config=settings
    )
    return found_BT[0, len(prompt) :].tolist()
