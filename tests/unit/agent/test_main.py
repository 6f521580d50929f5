"""What the record of an agent service says that it does."""

from types import SimpleNamespace
from typing import Any

from penstock_agent.__main__ import not_ready, state
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
        assert state(servers(), breaker, watch) == "episode 12/3, turn 4, waits for tool add since 31 s"
        assert state(servers(AWAY), breaker, watch) == AWAY
        for ticket in "1234":
            breaker.failed(ticket, "the sandbox is away")
        expected = "the environment fails: 4 attempts failed in a row, the last: the sandbox is away; 0 attempts wait"
        assert state(servers(AWAY), breaker, watch) == expected
    breaker.worked("1")


def test_it_is_ready_once_a_rollout_server_is_known() -> None:
    assert not_ready(servers()) is None
    assert not_ready(servers(num_known=0)) == "no rollout server is registered in the queue"
