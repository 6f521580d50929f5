"""`penstock completion`: the script with which a shell completes commands, flags, keys of the configuration, choices.

Owns what is completed: argparse has no keys, so that those are added to the parsers here, and only here.
"""

import argparse
from collections.abc import Iterator

import shtab

from penstock.config.reference.described import ANY_NAME, DescribedKey, described_keys
from penstock_launch.help_text import SETTINGS

SHELLS = ("bash", "zsh", "fish")
SHORT = 60  # characters of a meaning beside a key


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for a shell."""
    for command in _leaves(parser):
        if SETTINGS not in (command.epilog or ""):
            continue
        file = command.add_argument("--config", metavar="FILE", help="a configuration")
        file.complete = shtab.FILE  # type: ignore[attr-defined]
        for key in described_keys():
            if f".{ANY_NAME}." in key.name:  # a name that only the user knows
                continue
            command.add_argument(f"--{key.name}", choices=_choices(key), help=_short(key.meaning))
    return str(shtab.complete(parser, shell))


def _leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of the commands that do something."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in inner:
        for each in action.choices.values():
            yield from _leaves(each)
    if not inner:
        yield parser


def _choices(key: DescribedKey) -> tuple[str, ...] | None:
    """The words that a key takes, if they are all that it takes."""
    if key.kind == "true or false":
        return "true", "false"
    words = key.kind.split(" or ")
    return tuple(word.strip("`") for word in words) if all(word.startswith("`") for word in words) else None


def _short(meaning: str) -> str:
    """The beginning, as argparse takes it."""
    text = meaning if len(meaning) <= SHORT else f"{meaning[: SHORT - 3]}..."
    return text.replace("%", "%%").replace("`", "")
