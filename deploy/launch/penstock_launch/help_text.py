"""The form of `--help`: paragraphs are wrapped, examples keep their lines. A mistyped command gets the nearest one."""

import argparse
import difflib
import re
import textwrap
from typing import Any, NoReturn

UNKNOWN_WORD = re.compile(r"invalid choice: '(?P<word>[^']*)' \(choose from (?P<choices>.*)\)$")
SETTINGS = "--config FILE, then any keys of the configuration: --actor.group_size 8 --run.name mine ..."


class CommandParser(argparse.ArgumentParser):
    """A parser whose help has this form, and so have those of its subcommands."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": _Formatter, **options})

    def error(self, message: str) -> NoReturn:
        """Exit code 2, as argparse has it."""
        if found := UNKNOWN_WORD.search(message):
            choices = re.findall(r"[\w-]+", found["choices"])
            near = difflib.get_close_matches(found["word"], choices, n=1)
            message += f"; did you mean {near[0]!r}?" if near else ""
        super().error(message)


class _Formatter(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Argparse's own joins all lines; here those that are indented stay."""
        lines: list[str] = []
        for line in text.splitlines():
            if line.startswith(" ") or not line:
                lines.append(indent + line)
            else:
                lines += textwrap.wrap(line, width, initial_indent=indent, subsequent_indent=indent)
        return "\n".join(lines)


def examples(*commands: str, settings: bool = True) -> str:
    """The end of a command's help. settings: whether the command takes keys of the configuration."""
    title = "example:" if len(commands) == 1 else "examples:"
    lines = [title, *(f"  {command}" for command in commands)]
    return "\n".join([SETTINGS, "", *lines] if settings else lines)
