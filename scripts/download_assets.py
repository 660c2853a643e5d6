"""Fetch a model's tokenizer, config.json and, if asked, its weights from the Hugging Face hub.

    python scripts/download_assets.py meta-llama/Llama-3.1-8B --assets tokenizer config

The files go to `assets/hf/<name>`, ready for `model.hf_assets_path`. A gated repository needs a
token: in HF_TOKEN, by `hf auth login`, or through --token. Exit code 2 and one message for a
mistake.
"""

import argparse
import sys
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from engine.cli import run_command

PATTERNS = {
    "tokenizer": (
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "chat_template*",
    ),
    "config": ("config.json", "generation_config.json"),
    "weights": ("*.safetensors", "model.safetensors.index.json"),
}
DEFAULT_FOLDER = Path("assets/hf")


def main(arguments: list[str]) -> None:
    """Download."""
    parser = argparse.ArgumentParser(prog="download_assets.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("repository", help="owner/name on the hub")
    parser.add_argument(
        "--assets", nargs="+", choices=PATTERNS, default=["tokenizer", "config"], help="what"
    )
    parser.add_argument("--folder", type=Path, help="where to (assets/hf/<name>)")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--token", help="access token, where HF_TOKEN is not set")
    options = parser.parse_args(arguments)
    folder = options.folder or DEFAULT_FOLDER / options.repository.split("/")[-1]
    try:
        snapshot_download(
            options.repository,
            revision=options.revision,
            local_dir=folder,
            token=options.token,
            allow_patterns=[pattern for asset in options.assets for pattern in PATTERNS[asset]],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"cannot fetch {options.repository}: {error}. Check the name, the connection, and for "
            f"a gated repository the access token"
        ) from error
    print(f"{folder} is ready for model.hf_assets_path")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
