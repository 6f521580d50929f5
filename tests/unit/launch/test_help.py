"""`--help` of every command: it has examples, which the parser takes, with keys that exist."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.config.keys import find_key
from penstock.config.sources import parse_arguments
from penstock_launch.__main__ import COMMANDS as RUN
from penstock_launch.__main__ import run
from penstock_launch.command_line import make_parser, split_words
from penstock_launch.help_text import CommandParser

ROOT = Path(__file__).parents[3]


def commands(parser: argparse.ArgumentParser, words: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that does something, with its parser."""
    subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in subparsers:
        for name, inner in action.choices.items():
            yield from commands(inner, f"{words} {name}")
    if not subparsers:
        yield words, parser


COMMANDS = dict(commands(make_parser(), "penstock"))


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_has_examples_that_can_be_used(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = COMMANDS[words].format_help()
    shown = [line.strip() for line in text.splitlines() if line.startswith("  penstock ")]
    assert shown, text
    for example in shown:
        assert example.startswith(words)
        arguments = shlex.split(example.partition(" > ")[0])[1:]
        _, settings = make_parser().parse_known_args(arguments)
        paths, pairs = parse_arguments(split_words(settings)[1], needs_file=False)
        assert all(find_key(key) for key, _ in pairs)
        assert all((ROOT / path).exists() for path in paths if len(path.parts) > 1)


def test_paragraphs_are_wrapped_and_indented_lines_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "42")
    parser = CommandParser(prog="x", add_help=False, description="word " * 20, epilog="examples:\n  " + "long " * 20)
    lines = parser.format_help().splitlines()
    assert "  " + "long " * 20 in [line.ljust(102) for line in lines]
    assert all(len(line) <= 40 for line in lines if line.startswith("word"))


def test_every_command_runs_something() -> None:
    assert {words.split()[1] for words in COMMANDS} == set(RUN)


@pytest.mark.parametrize(
    "words", ["init a --run.name b", "envs --config c.yaml", "keys a --all", "config --schema --run.name b"]
)
def test_words_that_a_command_does_not_have_are_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words.split()) == 2
    assert re.search(rf"saw '--\S+'; expected penstock {words.split()[0]} ", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "near"),
    [(["trian"], None), (["sampels"], "samples"), (["launch", "slrum"], "slurm"), (["launch", "kubernetes"], None)],
)
def test_a_mistyped_command_gets_the_nearest(
    words: list[str], near: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        make_parser().parse_args(words)
    said = capsys.readouterr().err
    assert "choose from" in said
    assert said.rstrip().endswith(f"; did you mean {near!r}?") if near else "did you mean" not in said
