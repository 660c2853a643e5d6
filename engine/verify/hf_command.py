"""`python -m engine.verify hf`: our logits on a Hugging Face folder against those of transformers.

One model is in memory at a time; of ours the states between its modules stay behind.
"""

import argparse
import gc
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.cli import USER_MISTAKE_EXIT_CODE
from engine.convert import DTYPES, Difference, difference_of
from engine.data.tokenizer import has_tokenizer, load_tokenizer
from engine.hf_io import read_hf_config
from engine.hf_weights import load_into
from engine.verify.hidden_states import StateErrors, States, explain
from engine.verify.report import EXIT_DIFFERENT, EXIT_EQUAL
from models.decoder import DecoderConfig
from models.registry import family_for_hf
from parallelisms.materialise import materialise

TOLERANCES = {"float32": 2e-5, "bfloat16": 0.1, "float16": 1e-2}
"""Largest difference of a state or of the logits, relative to the largest of the same tensor."""

SEED = 0
BLOCKS_SHOWN_BEHIND = 2


def parser() -> argparse.ArgumentParser:
    """Return the command line's description."""
    found = argparse.ArgumentParser(
        prog="python -m engine.verify hf",
        description="Compute the logits of a Hugging Face folder with our model and then with "
        "transformers (eager attention), one model in memory at a time. Where they differ, name "
        "the first block and the part of it in which the hidden states do. Exit code 0: equal; "
        "1: different; 2: a mistake in the command or the folder.",
        allow_abbrev=False,
    )
    found.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    found.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="of both models; places are exact in float32",
    )
    found.add_argument("--tokens", type=int, default=64, help="random tokens to compare (64)")
    found.add_argument("--prompt", help="text to compare instead, with the folder's tokenizer")
    found.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return found


def main(arguments: list[str]) -> int:
    """Compare our logits on a folder with transformers', and name where hidden states part."""
    options = parser().parse_args(arguments)
    try:
        states, ours, tokens_BT, device = _run_ours(options)
        errors, theirs = _run_theirs(options, states, tokens_BT, device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_MISTAKE_EXIT_CODE
    difference, tolerance = difference_of(ours, theirs), TOLERANCES[options.dtype]
    print("\n".join(_describe(options, tokens_BT.shape[1], difference, errors, tolerance)))
    return EXIT_EQUAL if _is_equal(difference, tolerance) else EXIT_DIFFERENT


def _is_equal(difference: Difference, tolerance: float) -> bool:
    return difference.max_abs <= tolerance * difference.largest_logit


def _run_ours(options: argparse.Namespace) -> tuple[States, Tensor, Tensor, torch.device]:
    """Return the states and logits of our model, the tokens, and where it ran."""
    if not options.model.is_dir():
        raise ValueError(f"--model {options.model} is not a folder; give one with a config.json")
    device = _device(options.device)
    hf_config = read_hf_config(options.model)
    family = family_for_hf(hf_config)
    try:
        config = family.config_from_hf(hf_config)
    except ValueError as error:
        raise ValueError(f"--model {options.model}: {error}") from error
    tokens_BT = _tokens(options, config).to(device)
    with torch.device("meta"):
        model = family.build(replace(config, kernels="torch")).to(DTYPES[options.dtype])
    materialise(model, device)
    load_into(model, options.model, family.key_map(config))
    positions_BT = torch.arange(tokens_BT.shape[1], device=device).expand_as(tokens_BT)
    states = States()
    with torch.no_grad(), states.recorded(model):
        logits = model(tokens_BT, positions_BT=positions_BT)
    return states, logits.float().cpu(), tokens_BT, device


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _tokens(options: argparse.Namespace, config: DecoderConfig) -> Tensor:
    """Return one row of tokens: the prompt's, or random ones of the model's vocabulary."""
    if options.prompt is not None:
        if not has_tokenizer(str(options.model)):
            raise ValueError(
                f"--prompt, but {options.model} holds no tokenizer; leave it out to compare random "
                "tokens"
            )
        ids = load_tokenizer(str(options.model), "").encode(options.prompt, add_special_tokens=True)
        if not ids or max(ids) >= config.vocab_size:
            raise ValueError(
                f"--prompt {options.prompt!r} has the tokens {ids[:8]}, but the model's are 0 to "
                f"{config.vocab_size - 1}; give another text, or the tokenizer of this model"
            )
        return torch.tensor([ids])
    if options.tokens < 1:
        raise ValueError(f"--tokens {options.tokens}: give at least 1")
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(config.vocab_size, (1, options.tokens), generator=generator)


def _run_theirs(
    options: argparse.Namespace, states: States, tokens_BT: Tensor, device: torch.device
) -> tuple[StateErrors, Tensor]:
    """Return how far the states of transformers are from ours, and its logits."""
    from transformers import AutoModelForCausalLM  # slow to import
    from transformers.utils import logging

    logging.disable_progress_bar()
    gc.collect()  # our model, before theirs comes
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=DTYPES[options.dtype], attn_implementation="eager"
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"transformers cannot load {options.model}: {error}") from error
    errors = StateErrors(states=states)
    with torch.no_grad(), errors.compared(model.to(device)):
        output: Any = model(tokens_BT, use_cache=False)
    return errors, output.logits.float().cpu()


def _describe(
    options: argparse.Namespace,
    num_tokens: int,
    difference: Difference,
    errors: StateErrors,
    tolerance: float,
) -> Iterator[str]:
    """Yield what is printed."""
    yield (
        f"{options.model}, {options.dtype}, {num_tokens} tokens, {len(errors.errors)} states "
        "compared; one model in memory at a time"
    )
    yield f"logits: {difference}"
    worst = max((error for _, error in errors.in_order()), default=0.0)
    if _is_equal(difference, tolerance):
        yield f"equal to {tolerance:g} of the largest; worst of all states {worst:.1e}"
        return
    first = errors.first_difference(tolerance)
    if first is None:
        yield "different, but every state is equal: look at what happens to the head's output"
        return
    before = [error for event, error in _before(errors, first) if event.is_stream]
    yield (
        f"different: the hidden states part at the {first} ({first.sublayer}), relative error "
        f"{errors.errors[first]:.1e}, tolerance {tolerance:g}"
    )
    yield f"    {explain(first)}"
    if before:
        yield f"    the {len(before)} block inputs before are equal to {max(before):.1e}"
    yield from _block_lines(errors, tolerance)


def _before(errors: StateErrors, first: Any) -> list[tuple[Any, float]]:
    events = errors.in_order()
    return events[: [event for event, _ in events].index(first)]


def _block_lines(errors: StateErrors, tolerance: float) -> Iterator[str]:
    """Yield a table of the blocks up to some behind the first that differs."""
    parts = {"self_attn": "attention", "mlp": "feed-forward", "block": "block"}
    yield f"| {'block':16} | {' | '.join(f'{name:12}' for name in parts.values())} |"
    yield f"| {'---':16} | {' | '.join('---'.ljust(12) for _ in parts)} |"
    left = None
    for name, found in errors.blocks().items():
        texts = (f"{found[part]:.1e}" if part in found else "-" for part in parts)
        yield f"| {name:16} | {' | '.join(f'{text:12}' for text in texts)} |"
        if left is None and any(not error <= tolerance for error in found.values()):
            left = BLOCKS_SHOWN_BEHIND
        elif left is not None:
            left -= 1
        if left == 0:
            return
