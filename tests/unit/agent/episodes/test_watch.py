"""What a status line says of the episode that waits longest."""

from types import SimpleNamespace

from penstock_agent.episodes.watch import Watch
from penstock_agent.generation.waits import Waits


def at(since: float, num_waiting: int = 0, *tools: str) -> SimpleNamespace:
    waits = Waits(clock=lambda: since)
    waits.num_waiting = num_waiting
    return SimpleNamespace(num_turns=4, waits=waits, asked_tools=tools)


def test_the_longest_wait_is_named_with_its_turn_and_what_it_waits_for() -> None:
    watch = Watch(clock=lambda: 131.0)
    assert watch.longest_wait() == ""
    with watch.over("12/3", at(100.0, 0, "add", "sub")), watch.over("12/4", at(120.0)):
        assert watch.longest_wait() == "episode 12/3, turn 4, has waited 31 s for tools add, sub"
        with watch.over("13/0", at(31.0, 1, "add")), watch.over("e1/0", at(0.0)):
            assert watch.num_running == 4
            assert watch.longest_wait() == "episode e1/0, turn 4, has waited 131 s for its environment"
        with watch.over("13/0", at(31.0, 1, "add")):
            assert watch.longest_wait() == "episode 13/0, turn 4, has waited 100 s for the model"
    assert watch.num_running == 0


def test_a_short_wait_is_no_news() -> None:
    watch = Watch(clock=lambda: 29.0)
    with watch.over("12/3", at(0.0)):
        assert watch.longest_wait() == ""
