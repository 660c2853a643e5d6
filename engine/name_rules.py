"""Rules on values that name a file of ours: an objective, a data format, a chat template.

Dotted paths are modules of the user's own, which are found where the run starts.
"""

from pathlib import Path

from engine.rules import Facts, Rule


def has_unknown_template(facts: Facts) -> bool:
    """Say whether `data.chat_template` is neither a name nor a file, which may be elsewhere."""
    setting = facts.config.data.chat_template
    if not setting or setting in facts.names["template"]:
        return False
    path = Path(setting).expanduser()
    may_be_elsewhere = not facts.is_here and bool(path.suffix or path.name != setting)
    return not may_be_elsewhere and not path.is_file()


NAME_RULES = (
    Rule(
        id="objective_that_is_not_there",
        keys=("objective.name",),
        applies=lambda f: (
            "." not in (name := f.config.objective.name) and name not in f.names["objective"]
        ),
        reason="it is none of the objectives that there are: {f.names[objective]}",
        remedy="use one of them, or the dotted path of a module of your own",
    ),
    Rule(
        id="format_that_is_not_there",
        keys=("data.format",),
        applies=lambda f: f.unknown_format is not None,
        reason="{f.unknown_format!r} is none of the formats that there are: {f.names[format]}",
        remedy="use one of them, or the dotted path of a module of your own",
    ),
    Rule(
        id="chat_template_that_is_not_there",
        keys=("data.chat_template",),
        applies=has_unknown_template,
        reason="there is no such file, and the templates by name are {f.names[template]}",
        remedy="use one of them or a file, or leave it empty for the tokenizer's own",
    ),
)
