"""What the record of an agent service says that it does."""

from types import SimpleNamespace
from typing import Any

import pytest

from penstock.config import AgentSection
from penstock.errors import CallRefusedError, ConfigError
from penstock.runtime.connections import max_connections
from penstock_agent.__main__ import bind, not_ready, require_tools, state
from penstock_agent.environments.episode import Environment
from penstock_agent.episodes.breaker import Breaker
from penstock_agent.episodes.watch import Watch
from penstock_agent.generation.waits import Waits

AWAY = "2 calls of the model wait: no rollout server is registered"


def servers(waiting_for: str = "", num_known: int = 1) -> Any:
    return SimpleNamespace(waiting_for=waiting_for, num_known=num_known)


async def test_the_state_names_what_keeps_the_episodes_or_the_longest_wait() -> None:
    breaker, watch = Breaker(lambda is_open: None, limit=4), Watch(clock=lambda: 131.0)
    assert state(servers(), breaker, watch) == "ready"
    episode: Any = SimpleNamespace(num_turns=4, waits=Waits(clock=lambda: 100.0), asked_tools=("add",))
    with watch.over("12/3", episode):
        assert state(servers(), breaker, watch) == "episode 12/3, turn 4, has waited 31 s for tool add"
        assert state(servers(AWAY), breaker, watch) == AWAY
        for ticket in "1234":
            breaker.failed(ticket, "the sandbox is away")
        expected = "the environment fails: 4 attempts failed in a row, the last: the sandbox is away; 0 attempts wait"
        assert state(servers(AWAY), breaker, watch) == expected
    breaker.worked("1")


def test_it_is_ready_once_a_rollout_server_is_known() -> None:
    assert not_ready(servers()) is None
    assert not_ready(servers(num_known=0)) == "no rollout server is registered in the queue"


def test_a_model_that_cannot_be_shown_the_tools_is_refused() -> None:
    def render(messages: Any, tools: Any) -> list[int]:
        if tools:
            raise CallRefusedError("the template has no tools: expected another")
        return [1]

    rendering: Any = SimpleNamespace(render=render)
    require_tools(rendering, Environment("steps", ""), "my_envs:Guess")
    with pytest.raises(ConfigError, match=r"agent.environment names 'my_envs:Library', a class of tools, and the temp"):
        require_tools(rendering, Environment("tools", "", ({"type": "function"},)), "my_envs:Library")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the socket, which a server that runs closes
def test_it_has_room_for_the_connections_of_all_sessions() -> None:
    assert bind(AgentSection(environment="m:E", sessions=600)).max_connections == max_connections(4 * 600)
