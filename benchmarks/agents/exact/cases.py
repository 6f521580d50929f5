"""The kinds of agents: what the agent service runs, and its rows."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.agents.exact.environments import STOCK

ROOT = Path(__file__).parents[3]
HERE = str(Path(__file__).parent)
MAX_TOKENS = 768  # of a path
NEWLINE = 198  # SmolLM2's token
WORDS = {
    "system": "You answer in a few words.",
    "next": "Say it in other words.",
    "edit": "I do not know.",
    "helper": "You check what others say.",
    "summary": "So far nothing was found. Go on.",
    "title": "A title for a conversation about a town?",
}
TOWNS = ("Rome", "Oslo", "Lima", "Cairo", "Delhi", "Perth", "Quito", "Berne")


@dataclass(frozen=True)
class Case:
    """One agent service.

    agent: keys of that section. rows: that many. stop_token_ids: what ends a turn besides what the template says.
    """

    name: str
    agent: dict[str, Any]
    rows: Callable[[int], list[dict[str, Any]]]
    max_new_tokens: int
    stop_token_ids: tuple[int, ...] = ()


def _sums(count: int) -> list[dict[str, Any]]:
    lines = (ROOT / "examples" / "calculator" / "sums_train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:count]]


def _items(count: int) -> list[dict[str, Any]]:
    items = [list(STOCK)[number % len(STOCK)] for number in range(count)]
    return [{"item": item, "answer": str(STOCK[item])} for item in items]


def _towns(count: int) -> list[dict[str, Any]]:
    towns = [TOWNS[number % len(TOWNS)] for number in range(count)]
    return [{**WORDS, "question": f"What is {town} known for?", "answer": ""} for town in towns]


CASES = (
    Case(
        "calculator",
        {
            "environment": "calculator:Calculator",
            "modules_path": str(ROOT / "examples" / "calculator"),
            "template": "plain",
            "max_turns": 3,
        },
        _sums,
        max_new_tokens=12,
        stop_token_ids=(NEWLINE,),
    ),
    Case(
        "tools",
        {"environment": "environments:Shop", "modules_path": HERE, "tool_format": "hermes", "max_turns": 5},
        _items,
        max_new_tokens=40,
    ),
    Case(
        "own agent",
        {"environment": "environments:wander", "modules_path": HERE, "max_turns": 16},
        _towns,
        max_new_tokens=14,
    ),
)
