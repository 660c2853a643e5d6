"""Chat templates by name: `<data.chat_template>.jinja` in this folder holds one.

Each marks what the assistant writes, its end of turn included, with `{% generation %}`. Formats
that publish no notation for tools include `_tools.jinja`.
"""

import re
from pathlib import Path

FOLDER = Path(__file__).parent
INCLUDE = re.compile(r'\{%- include "(\w+\.jinja)" -%\}\n')


def template_names() -> list[str]:
    """Return the names that `data.chat_template` knows, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.jinja") if not file.stem.startswith("_"))


def template_text(setting: str) -> str:
    """Return the text of the template that `data.chat_template` names; nothing for nothing.

    The text stands alone, so that it can be exported with a model.
    """
    if not setting:
        return ""
    names = template_names()
    if setting in names:
        text = (FOLDER / f"{setting}.jinja").read_text(encoding="utf-8")
        return INCLUDE.sub(lambda found: (FOLDER / found[1]).read_text(encoding="utf-8"), text)
    path = Path(setting).expanduser()
    if not path.is_file():
        raise ValueError(
            f"data.chat_template = {setting!r} is neither a file nor one of {', '.join(names)}; "
            "leave it empty for the tokenizer's own template"
        )
    return path.read_text(encoding="utf-8")
