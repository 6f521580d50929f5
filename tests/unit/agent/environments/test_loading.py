"""What `module:name` is, from its signatures."""

import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import ConfigError, DataError
from penstock_agent.environments.loading import accepted_columns, load, takes_text

MODULE = '''
import abc, functools


class Guess:
    """Guess it.

    More.
    """
    def reset(self, answer, **row): ...
    def step(self, text): ...
    def board(self, size): "no tool, since the class has step"


class Base:
    def first(self, a: int) -> str: ...
    def overridden(self, a: int) -> str: ...


class Tools(Base):
    """Tools."""
    limit = 3
    def __init__(self, size=1): ...
    def reset(self, **row): ...
    def second(self, a: str) -> str: ...
    def overridden(self, b: str) -> str: ...
    async def third(self) -> str: ...
    def _hidden(self, a): ...
    @staticmethod
    def fourth(a: int) -> int: ...
    @classmethod
    def fifth(cls, a: int) -> int: ...
    @functools.lru_cache
    def sixth(self, a: int) -> int: ...
    @property
    def shown(self): ...
    def get_reward(self, text): ...
    def close(self): ...


class Stateless:
    def add(self, a: int, b: int) -> int: ...


async def agent(row, base_url, api_key): ...
def agent_with_more(row, *, base_url, api_key, **more): ...
class Outer:
    class Inner(Guess): ...

class NeedsArguments(Guess):
    def __init__(self, size): ...
class Abstract(abc.ABC, Guess):
    @abc.abstractmethod
    def more(self): ...
class Empty:
    def reset(self, **row): ...
class StepOnly:
    def step(self, text): ...
class StepOfTwo(Guess):
    def step(self, text, more): ...
class RewardOnly(Stateless):
    def get_reward(self): ...
class RewardOfTwo(Tools):
    def get_reward(self, a, b): ...
class Positional(Guess):
    def reset(self, row, /): ...
class Untyped(Tools):
    def look(self, where): ...
def misses_some(row): ...
number = 5
'''


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "envs_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "envs_of_a_user", raising=False)


def test_the_kinds() -> None:
    guess = load("envs_of_a_user:Guess")
    assert (guess.kind, guess.description, guess.tools, guess.has_get_reward) == ("steps", "Guess it.", {}, False)
    assert load("envs_of_a_user:Outer.Inner").kind == "steps"
    assert load("envs_of_a_user:Stateless").kind == "tools"
    assert load("envs_of_a_user:agent").kind == "function"
    assert load("envs_of_a_user:agent_with_more").kind == "function"


def test_the_tools_of_a_class_in_its_order_with_those_of_its_bases() -> None:
    tools = load("envs_of_a_user:Tools")
    assert tools.has_get_reward
    assert list(tools.tools) == ["first", "overridden", "second", "third", "fourth", "fifth", "sixth"]
    for name, parameters in {"overridden": ["b"], "third": [], "fourth": ["a"], "fifth": ["a"], "sixth": ["a"]}.items():
        assert list(tools.tools[name].schema["function"]["parameters"]["properties"]) == parameters


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent", "envs_of_a_user has no 'absent'"),
        ("Guess.absent", "Guess has no 'absent'"),
        (
            "number",
            "it is a int; expected a class with reset and step, a class with public methods as tools, or a func",
        ),
        ("misses_some", "its parameters are (row)"),
        ("NeedsArguments", "its __init__ needs more than self: (size)"),
        ("Abstract", "it is an abstract class"),
        ("Empty", "it has neither step nor public methods"),
        ("StepOnly", "it has step and no reset; expected reset(**row)"),
        ("StepOfTwo", "its step has the parameters (text, more)"),
        ("RewardOnly", "it has get_reward and no reset"),
        ("RewardOfTwo", "its get_reward has the parameters (a, b)"),
        ("Positional", "its reset has parameters without names"),
        ("Untyped", "the parameter 'where' of its tool 'look' has no type"),
    ],
)
def test_what_cannot_play_an_episode_is_refused(name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(f"envs_of_a_user:{name}")
    assert expected in str(raised.value)


def test_reset_gets_the_columns_that_it_has_parameters_for() -> None:
    row: dict[str, Any] = {"answer": "4", "level": 2}
    assert accepted_columns(lambda answer: None, row) == {"answer": "4"}
    assert accepted_columns(lambda answer, **row: None, row) == row
    assert accepted_columns(lambda *, level=1, size=3: None, row) == {"level": 2}
    assert accepted_columns(lambda *all: None, row) == {}
    with pytest.raises(DataError, match="needs 'secret', which the row lacks; it has answer, level"):
        accepted_columns(lambda secret: None, row)


def test_get_reward_may_read_the_last_text() -> None:
    assert takes_text(lambda text: None)
    assert takes_text(lambda text="": None)
    assert not takes_text(lambda: None)
