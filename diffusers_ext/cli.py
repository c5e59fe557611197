"""The command `diffusers-ext`: edits a picture by words, restores a degraded one, steers a flow model to one, does so
with many, draws the demo sheets, or publishes.

What a user can do wrong ends in one sentence on standard error and exit code 2; `--debug` shows where it came from.
What a command does is in `commands/`.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .commands import batch, demo, edit, publish, restore, steer
from .commands.edit import METHODS
from .commands.steer import TASKS


__all__ = ["METHODS", "TASKS", "main"]


class _Parser(argparse.ArgumentParser):
    """One sentence for a wrong call; argparse would print the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments (`Sequence[str]`, *optional*): The words after the command's name; those of the process by default.

    Returns:
        `int`: 0 if all is well, 2 if the user can cure what is wrong, 3 if some pictures of a batch failed, 1 for
            anything else, 130 after an interrupt.
    """
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
    except KeyboardInterrupt:
        print("diffusers-ext: interrupted; nothing more was written", file=sys.stderr)
        return 130
    except (OSError, ValueError, TypeError) as error:
        if options.debug:
            raise
        print(f"diffusers-ext: {_sentence(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if options.debug:
            raise
        if "out of memory" in str(error):
            print("diffusers-ext: the device ran out of memory; use a smaller model or --device cpu", file=sys.stderr)
            return 2
        kind = type(error).__name__
        print(f"diffusers-ext: unexpected {kind}: {_sentence(error)}; --debug shows the trace", file=sys.stderr)
        return 1
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="diffusers-ext", description="Methods for diffusers, from the command line.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"diffusers-ext {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in (edit, restore, steer, batch, demo, publish):
        command.add(commands)
    return parser


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
