"""The form of `--help`: paragraphs are wrapped, examples keep their lines."""

import argparse
import textwrap
from typing import Any

SETTINGS = "--config FILE, then any keys of the configuration: --actor.group_size 8 --run.name mine ..."


class CommandParser(argparse.ArgumentParser):
    """A parser whose help has this form, and so have those of its subcommands."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": _Formatter, **options})


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
