"""`python -m engine.verify NAME …`: prove a promise on this machine before spending hours on it."""

import sys

from engine.cli import USER_MISTAKE_EXIT_CODE
from engine.verify import command, elastic_command, families_command, hf_command, lora_command

COMMANDS = {
    "parity": command.main,
    "families": families_command.main,
    "hf": hf_command.main,
    "lora": lora_command.main,
    "data-elastic": elastic_command.main,
}


def main(arguments: list[str]) -> int:
    """Run the command that the first word names; return its exit code."""
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    known = "\n".join(
        f"  {name}: {(one.__doc__ or '').splitlines()[0]}" for name, one in COMMANDS.items()
    )
    print(f"python -m engine.verify NAME …, where NAME is one of\n{known}", file=sys.stderr)
    return 0 if arguments in (["--help"], ["-h"]) else USER_MISTAKE_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
