"""examples/guess and examples/own_agent, with a model that answers from a script."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock.config.load import load_config
from penstock.contracts import Score
from penstock_agent.environments.driving import check_environment, open_driver
from penstock_agent.environments.episode import Driver, Ending, Message
from tests.integration.agent.scripted_gateway import scripted_gateway
from tests.unit.agent.environments.scripted_session import ScriptedSession, calls

ROOT = Path(__file__).parents[3]


@asynccontextmanager
async def driver_of(example: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Driver]:
    monkeypatch.chdir(ROOT)
    config = load_config(["--config", f"examples/{example}/config.yaml"])
    environment = await check_environment(config.agent, needs_score="environment" in config.reward.functions)
    async with open_driver(config.agent, environment) as driver:
        yield driver


def rows(example: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ROOT / "examples" / example / "train.jsonl").read_text().splitlines()]


def halve(messages: Sequence[Message]) -> str:
    """The middle of the numbers that are left."""
    left = list(range(1, 8))
    guesses = [int(each["content"]) for each in messages if each["role"] == "assistant"]
    for guess, told in zip(guesses, [each["content"] for each in messages if each["role"] == "user"][2:], strict=True):
        left = [each for each in left if (each > guess if told.startswith("higher") else each < guess)]
    return f" {left[len(left) // 2]}\n"


async def test_the_game_is_won_by_halving_and_survives_any_text(monkeypatch: pytest.MonkeyPatch) -> None:
    async with driver_of("guess", monkeypatch) as driver:
        for row in rows("guess")[:7]:
            assert await driver.run(row, ScriptedSession(halve, halve, halve)) == Ending(Score(1.0), "done")
        session = ScriptedSession("", "one\n", "9" * 5000)
        assert await driver.run(rows("guess")[0], session) == Ending(Score(0.0), "done")
        assert session.contents[-1] == ("user", "not a number\nGuess:")


async def test_the_program_uses_its_tool_and_its_sdk_repeats_refused_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai", reason="the example's own library")
    row = {"prompt": "How many figs and limes are there together?", "answer": "23"}
    assert row in rows("own_agent")
    async with driver_of("own_agent", monkeypatch) as driver:
        asked = calls(
            ("stock", {"item": "Figs"}), ("stock", {"item": "limes"}), ("stock", "{"), ("stock", {"item": "x"})
        )
        with scripted_gateway(asked, "There are 23.", num_refusals=1) as session:
            assert await driver.run(row, session) == Ending(Score(1.0), "done")
        results = [content for role, content in session.contents if role == "tool"]
        assert results[:3] == ["6", "17", 'error: expected {"item": "..."}']
        assert results[3].startswith("error: no x; there are apples")
        with scripted_gateway("I think 7.") as session:
            assert await driver.run(row, session) == Ending(Score(0.0), "done")
        with scripted_gateway(asked) as session:
            assert (await driver.run(row, session)).end == "max_turns"
