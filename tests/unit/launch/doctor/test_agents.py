"""What the doctor says of the environment or agent that makes a run's episodes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock_launch.doctor.agents import environment_lines
from penstock_launch.doctor.report import Line
from penstock_launch.doctor.side_by_side import Look, look_at_all
from tests.patience import START_SECONDS
from tests.unit.launch.doctor.test_folders import config_with

MODULE = """
class Guess:
    def reset(self, answer: str, **row):
        self.secret = answer

    def step(self, text: str) -> float:
        return float(text == self.secret)


class Shop:
    def reset(self, **row):
        self.cart = []

    def add(self, item: str) -> str:
        "Put an item into the cart."
        return "done"

    def buy(self) -> str:
        "Buy what is in the cart."
        return "bought"


class Untyped:
    def reset(self, **row):
        pass

    def add(self, item) -> str:
        "Put an item into the cart."
        return "done"
"""


def lines_of(folder: Path, **agent: Any) -> list[Line]:
    """As the doctor looks: in a thread of its own."""
    (folder / "own_envs.py").write_text(MODULE)
    config = config_with(agent={"modules_path": str(folder), **agent}, reward={"functions": {"exact_match": 1.0}})
    [group] = look_at_all([Look("configuration", "episodes", lambda: environment_lines(config))], START_SECONDS)
    return list(group.lines)


def test_a_run_without_episodes_has_no_line(tmp_path: Path) -> None:
    assert lines_of(tmp_path) == []


@pytest.mark.parametrize(
    ("agent", "seen"),
    [
        ({"environment": "own_envs:Guess"}, "agent.environment: own_envs:Guess (steps)"),
        ({"environment": "own_envs:Shop"}, "agent.environment: own_envs:Shop (tools: add, buy)"),
        ({"command": [sys.executable, "agent.py"]}, f"agent.command: {sys.executable} agent.py"),
    ],
)
def test_what_makes_the_episodes_is_shown(tmp_path: Path, agent: dict[str, Any], seen: str) -> None:
    [line] = lines_of(tmp_path, **agent)
    assert (line.verdict, line.seen) == ("ok", seen)


@pytest.mark.parametrize(
    ("agent", "words"),
    [
        ({"environment": "nowhere:Guess"}, ("agent.environment", "nowhere")),
        ({"environment": "own_envs:Untyped"}, ("agent.environment", "item")),
        ({"command": ["no-such-program"]}, ("agent.command", "no-such-program")),
    ],
)
def test_what_cannot_be_used_is_a_problem(tmp_path: Path, agent: dict[str, Any], words: tuple[str, ...]) -> None:
    [line] = lines_of(tmp_path, **agent)
    assert line.verdict == "problem"
    assert [word for word in words if word not in line.seen] == []
    assert "agent.modules_path" in line.advice


def test_a_host_without_the_extra_of_agents_has_a_doctor() -> None:
    asked = "import sys, penstock_launch.doctor.command; print(*sorted({*sys.modules} & {'renderers', 'transformers'}))"
    ran = subprocess.run(
        [sys.executable, "-c", asked], check=True, capture_output=True, text=True, timeout=START_SECONDS
    )
    assert ran.stdout.strip() == ""
