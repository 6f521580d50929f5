"""The examples in docstrings run, and give the results that they show."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = ("common", "services/agent", "services/rollout", "services/reward", "services/trainer", "deploy/launch")
READ_FIRST = {
    "penstock.contracts.groups": ("Ticket",),
    "penstock.contracts.trajectories": ("Completion", "Episode"),
    "penstock.contracts.services": ("Announcement",),
    "penstock.tickets": ("TicketBook",),
    "penstock_trainer.batching.packing": ("Pack",),
}


def modules_with_examples() -> list[str]:
    found = []
    for source in SOURCES:
        for path in sorted((ROOT / source).rglob("*.py")):
            lines = path.read_text(encoding="utf-8").splitlines()
            if any(">>> " in line and "+SKIP" not in line for line in lines):
                found.append(".".join(path.relative_to(ROOT / source).with_suffix("").parts).removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_are_true(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert (failed, tried > 0) == (0, True)


@pytest.mark.parametrize("name", READ_FIRST)
def test_the_types_that_a_reader_meets_first_have_one(name: str) -> None:
    module = importlib.import_module(name)
    assert [each for each in READ_FIRST[name] if ">>> " not in (getattr(module, each).__doc__ or "")] == []
