"""Completes prompts token by token, with a cache of keys and values."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from models.cache import KVCache
from models.decoder import DecoderLM

PADDING_DOCUMENT, PROMPT_DOCUMENT = 0, 1


@torch.no_grad()
def generate(
    model: DecoderLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_token_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, with the end-of-text token where one came.

    A temperature of 0 takes the likeliest token. `generator` lives on the model's device.
    Prompts of unequal length are padded on the left, which does not change their completions.
    """
    check_sampling(temperature, top_k, top_p)
    if not prompts or not all(prompts):
        raise ValueError("a prompt is empty; give at least one token")
    device = model.model.embed_tokens.weight.device
    tokens_BT, positions_BT, documents_BT = _pad_left(prompts, device)
    capacity_tokens = tokens_BT.shape[1] + max_new_tokens
    cache = KVCache(num_layers=model.config.num_layers, capacity_tokens=capacity_tokens)
    seen = ((tokens_BT, positions_BT, documents_BT),)
    rope = model.config.rope
    turning_point = rope.original_max_position_embeddings if rope.kind == "longrope" else None
    new_tokens: list[Tensor] = []
    is_done_B = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    stops = torch.tensor(list(eos_token_ids), dtype=tokens_BT.dtype, device=device)
    for _ in range(max_new_tokens):
        if new_tokens and turning_point is not None:
            seen = (*seen, (tokens_BT, positions_BT, documents_BT))
            # From there on a row's keys turn by other angles than those in the cache.
            if (positions_BT == turning_point).any():
                cache = KVCache(num_layers=model.config.num_layers, capacity_tokens=capacity_tokens)
                tokens_BT, positions_BT, documents_BT = (
                    torch.cat(parts, dim=1) for parts in zip(*seen, strict=True)
                )
        logits_BTV = model(
            tokens_BT, positions_BT=positions_BT, documents_BT=documents_BT, cache=cache
        )
        tokens_BT = choose(logits_BTV[:, -1], temperature, top_k, top_p, generator)[:, None]
        positions_BT, documents_BT = positions_BT[:, -1:] + 1, documents_BT[:, -1:]
        new_tokens.append(tokens_BT)
        is_done_B |= torch.isin(tokens_BT[:, 0], stops)
        if is_done_B.all():
            break
    rows = torch.cat(new_tokens, dim=1).tolist() if new_tokens else [[] for _ in prompts]
    return [_until_end(row, eos_token_ids) for row in rows]


def choose(
    logits_BV: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return one token a row: the likeliest, or a draw from the kept ones."""
    if temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    kept_BV = keep_likeliest(logits_BV.float() / temperature, top_k, top_p)
    return torch.multinomial(kept_BV.softmax(dim=-1), 1, generator=generator)[:, 0]


def keep_likeliest(logits_BV: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Set to -inf all but the `top_k` largest, then all but the nucleus of mass `top_p`.

    The nucleus is the smallest set of likeliest tokens whose probabilities reach `top_p`.
    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    if top_k is not None:
        smallest = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest, float("-inf"))
    if top_p < 1.0:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        before_BV = sorted_BV.softmax(dim=-1).cumsum(dim=-1) - sorted_BV.softmax(dim=-1)
        dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool)
        dropped_BV = dropped_BV.scatter(-1, order_BV, before_BV >= top_p)
        logits_BV = logits_BV.masked_fill(dropped_BV, float("-inf"))
    return logits_BV


def check_sampling(temperature: float, top_k: int | None, top_p: float) -> None:
    """Raise ValueError for a setting from which no token can be drawn."""
    if temperature < 0.0:
        raise ValueError(f"temperature = {temperature}; give 0 for the likeliest token, or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}; give at least 1, or leave it out for all tokens")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p = {top_p}; give a fraction above 0, up to 1 for all tokens")


def _pad_left(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    length = max(len(prompt) for prompt in prompts)
    tokens_BT = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, length - len(prompt) :] = torch.tensor(prompt)
    padding_B1 = torch.tensor([[length - len(prompt)] for prompt in prompts])
    positions_BT = torch.arange(length) - padding_B1
    documents_BT = torch.where(positions_BT >= 0, PROMPT_DOCUMENT, PADDING_DOCUMENT)
    parts = (tokens_BT, positions_BT.clamp(min=0), documents_BT)
    tokens_BT, positions_BT, documents_BT = (part.to(device) for part in parts)
    return tokens_BT, positions_BT, documents_BT


def _until_end(tokens: list[int], eos_token_ids: Collection[int]) -> list[int]:
    ends = [index for index, token in enumerate(tokens) if token in eos_token_ids]
    return tokens[: ends[0] + 1] if ends else tokens
