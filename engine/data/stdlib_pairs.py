"""The built-in pairs: a good and a bad answer to a question about the Python standard library.

They are written once, from the built-in chats, as a file of JSON lines with `prompt`, `chosen` and
`rejected`. What is preferred is to answer at once; the bad answer evades the question first, and
then says no more than half of it.
"""

import json
from pathlib import Path

from engine.data.cache import build_once, digest_of, file_digest
from engine.data.stdlib import Split
from engine.data.stdlib_chats import stdlib_chats

PAIRS_RECIPE = 1
EVASIONS = (
    "That is hard to say, and I may be wrong.",
    "I am not sure about that.",
    "It depends. You had better read the documentation.",
    "Why do you want to know?",
)


def stdlib_pairs(split: Split, root: Path) -> Path:
    """Return the file of one split's pairs, written below the cache folder `root` at first use."""
    chats = stdlib_chats(split, root)
    key = digest_of("pairs", PAIRS_RECIPE, file_digest(chats))
    folder = build_once(
        root / "pairs" / key,
        f"writing pairs of answers about the standard library ({split})",
        lambda target: _write(chats, target / "pairs.jsonl"),
    )
    return folder / "pairs.jsonl"


def _write(chats: Path, target: Path) -> None:
    with open(chats, encoding="utf-8") as lines, open(target, "w", encoding="utf-8") as out:
        for line in lines:
            turns = json.loads(line)["messages"]
            draw = int(digest_of(turns[-4]["content"])[:8], 16)
            # Every other prompt is a conversation of several turns.
            end = len(turns) if draw % 2 else len(turns) - 2
            *prompt, chosen = turns[:end]
            words = chosen["content"].split()
            evasive = [EVASIONS[draw // 2 % len(EVASIONS)], *words[: len(words) // 2]]
            rejected = {"role": "assistant", "content": " ".join(evasive)}
            record = {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
