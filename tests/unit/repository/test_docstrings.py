"""The examples in docstrings say what the code does."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = ("common", "services/trainer", "services/rollout", "services/reward", "deploy/launch")


def modules_with_examples() -> list[str]:
    files = [(ROOT / source, path) for source in SOURCES for path in sorted((ROOT / source).rglob("*.py"))]
    return [
        ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
        for source, path in files
        if ">>> " in path.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_types_that_a_reader_meets_first_have_an_example() -> None:
    assert {"penstock.tickets", "penstock_trainer.batching.packing"} <= set(modules_with_examples())
