"""Complete a text with a model in a Hugging Face folder, such as `hf/` of a finished run, or with
an adapter in a folder of PEFT, whose base is where its adapter_config.json says.

    python scripts/generate.py --model outputs/hf --prompt "def "
    python scripts/generate.py --model outputs/sft/hf --chat --prompt "What does os.walk do?"

It runs the engine's own model with a cache of keys and values, or transformers' model where the
engine has none of the type, on a GPU where there is one.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.cli import run_command
from engine.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from engine.hf_io import CONFIG_NAME, read_generation_config, read_hf_config
from engine.hf_weights import load_into
from engine.peft_io import AdapterFolder, adapters_below, is_adapter_folder, merge_into
from models.decoder import DecoderLM
from models.decoder_config import DecoderConfig
from models.generate import check_sampling, generate
from models.registry import ModelFamily, family_for_hf
from models.weights import KeyMap
from models.wrapped import generate as wrapped
from models.wrapped.module import read_config
from parallelisms.materialise import materialise

DESCRIPTION = "Complete a text with a model in a Hugging Face folder."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A model with its tokenizer, ready to complete texts."""

    model: Any
    """A `DecoderLM`, or a model of transformers."""

    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    made_for: int | None
    """Tokens that the model was made for, where that is known."""

    longest_row: int | None = None
    """Tokens that it can read at all, where there is such a limit."""

    def complete(
        self, prompt: list[int], options: argparse.Namespace, device: torch.device
    ) -> list[int]:
        """Return the tokens that follow a prompt."""
        how: dict[str, Any] = {
            "max_new_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "eos_token_ids": self.eos_token_ids,
        }
        if not isinstance(self.model, DecoderLM):
            return wrapped.generate(self.model, prompt, seed=options.seed, **how)
        generator = torch.Generator(device).manual_seed(options.seed)
        (tokens,) = generate(self.model, [prompt], generator=generator, **how)
        return tokens


def load(folder: Path, *, device: torch.device, dtype: str) -> Loaded:
    """Build the model that a folder's config.json describes and fill it from its weights.

    The folder of an adapter names its base; what it holds of tokenizer and settings goes first.
    """
    adapter = _open_adapter(folder)
    own, folder = folder, adapter.base_folder if adapter else folder
    hf_config = read_hf_config(folder)
    family = family_for_hf(hf_config, or_any=True)
    is_ours = bool(family.hf_model_types)
    config = family.config_from_hf(hf_config) if is_ours else read_config(hf_config)
    if dtype == "auto":  # as stored; transformers 4 called the key torch_dtype
        dtype = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: use one of {', '.join(DTYPES)}")
    tokenizer = load_tokenizer(str(own if has_tokenizer(own) else folder), "")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, but the model only "
            f"{config.vocab_size}; put the tokenizer of this model there"
        )
    eos_token_ids = _end_tokens(
        read_generation_config(own).get("eos_token_id"),
        read_generation_config(folder).get("eos_token_id"),
        hf_config.get("eos_token_id"),
        tokenizer.eos_id,
    )
    model = _load_model(folder, family, config, device=device, dtype=DTYPES[dtype])
    if adapter is not None:
        merge_into(model, adapter, family.key_map(config) if is_ours else KeyMap())
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        made_for=getattr(config, "max_position_embeddings", None),
        longest_row=None if is_ours else wrapped.longest_row(model),
    )


def _open_adapter(folder: Path) -> AdapterFolder | None:
    """Return the adapter that a folder holds, if any; further ones below it are only named."""
    below = ", ".join(path.name for path in adapters_below(folder))
    all_of_them = "scripts/convert_dcp_to_hf.py --merge writes a model with all adapters of a run"
    if is_adapter_folder(folder):
        if below:
            print(f"note: without the adapters in {below}; {all_of_them}", file=sys.stderr)
        return AdapterFolder(folder, key="--model")
    if below and not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"--model {folder} has its adapters in folders of their own, {below}; give one of "
            f"these ({all_of_them})"
        )
    return None


def _load_model(
    folder: Path, family: ModelFamily, config: Any, *, device: torch.device, dtype: torch.dtype
) -> Any:
    if not isinstance(config, DecoderConfig):
        return wrapped.load(folder, device=device, dtype=dtype)
    # It attends with sdpa, or eager where scores are capped: a cache asks for one query at a time,
    # for which other backends would have to prepare.
    with torch.device("meta"):
        model = family.build(config)
    materialise(model.to(dtype), device)
    load_into(model, folder, family.key_map(config))
    return model.eval()


def _end_tokens(*settings: Any) -> tuple[int, ...]:
    """Return the first setting that says something; each is an id, several, or None."""
    for setting in settings:
        if setting is not None:
            return tuple(setting) if isinstance(setting, list | tuple) else (setting,)
    return ()


def choose_device(name: str) -> torch.device:
    """Return the device that `--device` asks for."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, is_chat: bool) -> list[int]:
    """Return the ids to go on from: the text's, or those of a chat that asks it."""
    if not is_chat:
        return tokenizer.encode(prompt, add_special_tokens=True)
    if not tokenizer.chat_template:
        raise ValueError(
            "--chat, but the model's folder has no chat template; leave the option out, or put a "
            "chat_template.jinja there"
        )
    from engine.data.chat_template import ChatTemplate  # slow to import, and only for chats

    return tokenizer.encode(ChatTemplate(tokenizer.chat_template, tokenizer).prompt(prompt))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options; argparse itself answers mistakes with exit code 2."""
    parser = argparse.ArgumentParser(prog="generate.py", description=DESCRIPTION)
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        required=True,
        help="Hugging Face folder with weights and tokenizer, or of an adapter",
    )
    add("--prompt", required=True, help="text to complete")
    add("--chat", action="store_true", help="put the prompt as a question, in the chat template")
    add("--max_new_tokens", type=int, default=100, help="tokens to add at most (100)")
    add("--temperature", type=float, default=0.0, help="0: the likeliest token; more: draw (0)")
    add("--top_k", type=int, default=None, help="draw among this many likeliest tokens (all)")
    add("--top_p", type=float, default=1.0, help="draw among the likeliest of this mass (1.0)")
    add("--seed", type=int, default=0, help="of the draws (0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (auto)")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: as stored (auto)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Load, complete, print the text; what took how long goes to standard error."""
    options = parse(arguments)
    check_sampling(options.temperature, options.top_k, options.top_p)
    if options.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens {options.max_new_tokens}: give at least 1")
    if not options.model.is_dir():
        raise ValueError(f"--model {options.model} is not a folder; give one with a config.json")
    device = choose_device(options.device)
    loaded = load(options.model, device=device, dtype=options.dtype)
    prompt = encode_prompt(loaded.tokenizer, options.prompt, is_chat=options.chat)
    if not prompt:
        raise ValueError("--prompt is empty and the tokenizer adds nothing; give some text")
    num_tokens = len(prompt) + options.max_new_tokens
    if loaded.longest_row is not None and num_tokens > loaded.longest_row:
        raise ValueError(
            f"--max_new_tokens {options.max_new_tokens} and a prompt of {len(prompt)} tokens: the "
            f"model has {loaded.longest_row} positions; ask for fewer tokens"
        )
    if loaded.made_for is not None and num_tokens > loaded.made_for:
        print(f"note: the model was made for {loaded.made_for} tokens", file=sys.stderr)

    started = time.perf_counter()
    tokens = loaded.complete(prompt, options, device)
    seconds = time.perf_counter() - started
    print(loaded.tokenizer.decode(tokens if options.chat else prompt + tokens))
    rate = len(tokens) / seconds
    print(f"{len(tokens)} tokens on {device}, {rate:.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
