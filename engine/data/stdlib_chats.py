"""The built-in chats: questions about the Python standard library, answered from its own sources.

They are written once, as a file of JSON lines in the shape of OpenAI's, which may serve as an
example of one's own.
"""

import ast
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.data.cache import build_once, digest_of, file_digest
from engine.data.stdlib import Split, module_name, stdlib_files

CHATS_RECIPE = 1
LONGEST_ANSWER = 400
SYSTEM_PROMPT = "You know the standard library of Python, and answer briefly."
QUESTIONS = (
    "What does {name} do?",
    "What is {name} for?",
    "Can you explain {name} to me?",
    "I came across {name}. What is it?",
)
HOW_TO_CALL = ("How do I call it?", "Which arguments does it take?", "And its signature?")
WHAT_ELSE = ("What does it offer?", "Which names does it have?", "What is in it?")

Turn = dict[str, str]


def stdlib_chats(split: Split, root: Path) -> Path:
    """Return the file of one split's chats, written below the cache folder `root` at first use."""
    files = stdlib_files(split)
    key = digest_of("chats", CHATS_RECIPE, [file_digest(file) for file in files])
    folder = build_once(
        root / "chats" / key,
        f"writing chats about the standard library ({split})",
        lambda target: _write(files, target / "chats.jsonl"),
    )
    return folder / "chats.jsonl"


def _write(files: Sequence[Path], target: Path) -> None:
    with open(target, "w", encoding="utf-8") as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, about the sources
        for file in files:
            name = module_name(file)
            if any(part.startswith("_") for part in name.split(".")):
                continue
            try:
                tree = ast.parse(file.read_text("utf-8", "replace"))
            except (SyntaxError, ValueError):  # samples of wrong sources are among them
                continue
            for turns in _chats(name, tree):
                out.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def _chats(module: str, tree: ast.Module) -> Iterator[list[Turn]]:
    """Yield a chat on the module, and one on each public function, class and method in it."""
    names = [name for name, _ in _public(tree)]
    if (answer := _answer(tree)) and names:
        yield _chat(f"the module {module}", answer, WHAT_ELSE, ", ".join(names[:12]))
    for name, node in _public(tree):
        if answer := _answer(node):
            yield _chat(f"{module}.{name}", answer, HOW_TO_CALL, _signature(name, node))


def _chat(name: str, answer: str, follow_ups: Sequence[str], second: str) -> list[Turn]:
    draw = int(digest_of(name)[:8], 16)
    turns = [
        ("user", QUESTIONS[draw % len(QUESTIONS)].format(name=name)),
        ("assistant", answer),
        ("user", follow_ups[draw // 4 % len(follow_ups)]),
        ("assistant", second),
    ]
    if draw // 12 % 4 == 0:
        turns.insert(0, ("system", SYSTEM_PROMPT))
    return [{"role": role, "content": text} for role, text in turns]


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _public(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _public(node, f"{prefix}{node.name}.")


def _answer(node: ast.Module | Definition) -> str:
    """Return the first paragraph of a docstring in one line, nothing if there is none to use."""
    paragraph = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    return paragraph if 10 <= len(paragraph) <= LONGEST_ANSWER else ""


def _signature(name: str, node: Definition) -> str:
    if not isinstance(node, ast.ClassDef):
        return f"{name}({ast.unparse(node.args)})"
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef) and inner.name == "__init__":
            return f"{name}({ast.unparse(inner.args)})"
    return f"{name}({', '.join(ast.unparse(base) for base in node.bases)})"
