"""Add words to the tokenizer of a Hugging Face folder, and rows for them to its model.

    python scripts/extend_tokenizer.py IN OUT --tokens words.txt
    python scripts/extend_tokenizer.py IN OUT --tokens "<|tool|>" "<|result|>" --special

Text without the words keeps its token ids. OUT is ready for `model.hf_assets_path` and for
transformers; train it before the new tokens mean anything. Exit code 2 and one message for a
mistake.
"""

import argparse
import sys
from pathlib import Path

from engine.cli import run_command
from engine.extend import Extended, extend_folder


def main(arguments: list[str]) -> None:
    """Extend, and say by how much."""
    parser = argparse.ArgumentParser(prog="extend_tokenizer.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("folder", metavar="IN", type=Path, help="with tokenizer.json and, if any, the model")
    add("out", metavar="OUT", type=Path, help="folder to make; it must not exist")
    add("--tokens", nargs="+", required=True, help="words, or one file with a word a line")
    add("--special", action="store_true", help="control tokens, which decoding can leave out")
    add(
        "--inside_words",
        action="store_true",
        help="find a word inside a longer one too, as text without spaces needs; control tokens "
        "are found anywhere",
    )
    add("--pad_to_multiple_of", type=int, default=1, help="rows of embedding and head (1)")
    options = parser.parse_args(arguments)
    report(
        options.out,
        extend_folder(
            options.folder,
            options.out,
            read_words(options.tokens),
            is_special=options.special,
            whole_words=not (options.special or options.inside_words),
            multiple=options.pad_to_multiple_of,
        ),
    )


def read_words(values: list[str]) -> list[str]:
    """Return the words of `--tokens`: its values, or the lines of the one file that they name."""
    if len(values) == 1 and Path(values[0]).is_file():
        try:
            return Path(values[0]).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--tokens {values[0]}: not a text in UTF-8 ({error})") from error
    return values


def report(out: Path, done: Extended) -> None:
    """Print what was added and what was not."""
    new, known = done.tokens.new, done.tokens.known
    print(f"{out}: {len(new)} new tokens, ids {new[0].id} to {new[-1].id}")
    if known:
        shown = ", ".join(map(repr, known[:8])) + (", ..." if len(known) > 8 else "")
        print(f"{len(known)} words are one token already: {shown}")
    if done.new_rows:
        what = "rows of embedding and head" if done.holds_weights else "vocab_size of config.json"
        print(f"{what}: {done.old_rows} -> {done.new_rows}")
    if not done.holds_weights:
        print("there are no weights: only tokenizer and configuration were written")
    if done.not_copied:
        print(f"not copied: {', '.join(done.not_copied)}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
