"""docs/agents-environments.md: its examples run."""

import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock.config import AgentSection
from penstock.contracts import Score
from penstock_agent.environments.driving import check_environment, open_driver
from penstock_agent.environments.episode import Driver, Ending
from tests.integration.agent.scripted_gateway import scripted_gateway
from tests.unit.agent.environments.scripted_session import ScriptedSession, calls

TEXT = (Path(__file__).parents[3] / "docs" / "agents-environments.md").read_text()


def example(text: str, language: str = "python") -> str:
    """The one block that holds a text."""
    [block] = [each for each in re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL) if text in each]
    return str(block)


@asynccontextmanager
async def driver_of(folder: Path, **keys: Any) -> AsyncIterator[Driver]:
    section = AgentSection(modules_path=str(folder), **keys)
    async with open_driver(section, await check_environment(section, needs_score=True)) as driver:
        yield driver


async def test_the_class_with_step(tmp_path: Path) -> None:
    (tmp_path / "my_envs.py").write_text(example("class Guess"))
    async with driver_of(tmp_path, environment="my_envs:Guess") as driver:
        session = ScriptedSession("7", "?", "4")
        assert await driver.run({"answer": "4"}, session) == Ending(Score(1.0), "done")
        assert [content for role, content in session.contents if role == "user"] == [
            "Guess a number from 1 to 7.", "Lower.", "That is no number.",
        ]  # fmt: skip
        assert await driver.run({"answer": "4"}, ScriptedSession("9" * 5000, "\u00b2", "1")) == Ending(
            Score(0.0), "done"
        )


async def test_the_class_of_tools(tmp_path: Path) -> None:
    (tmp_path / "my_envs.py").write_text(example("class Library"))
    async with driver_of(tmp_path, environment="my_envs:Library") as driver:
        session = ScriptedSession(
            calls(("search", {"words": ["maps", "old"]})),
            calls(("read", {"title": "Old Maps"}), ("read", {"title": "Maps"}), ("search", {"words": "maps"})),
            "It is of clay.",
        )
        ending = await driver.run({"prompt": "Of what is the oldest map?", "answer": "clay"}, session)
    assert ending == Ending(Score(1.0), "done", num_failed_tool_calls=2)
    results = [content for role, content in session.contents if role == "tool"]
    assert results[:3] == ['["Old Maps"]', "The oldest map is of clay.", "Error: KeyError: 'Maps'"]
    assert results[3] == "Error: the arguments of search do not fit: words: Input should be a valid list"
    search = session.tools[0]["function"]
    assert search["description"] == "Find books."
    assert search["parameters"]["properties"]["order"]["description"] == "of the results"


async def test_the_function(tmp_path: Path) -> None:
    (tmp_path / "my_envs.py").write_text(example("async def run"))
    async with driver_of(tmp_path, environment="my_envs:run") as driver:
        with scripted_gateway("It is 4.") as session:
            assert await driver.run({"prompt": "2+2", "answer": "4"}, session) == Ending(Score(1.0), "done")


@pytest.mark.skipif(not shutil.which("curl"), reason="the example is of curl")
async def test_the_program(tmp_path: Path) -> None:
    (tmp_path / "agent.sh").write_text(example("curl", "sh"))
    async with driver_of(tmp_path, command=("sh", "agent.sh")) as driver:
        for text, value in (("yes", 1.0), ("no", 0.0)):
            with scripted_gateway(text) as session:
                assert await driver.run({"answer": ""}, session) == Ending(Score(value), "done")
