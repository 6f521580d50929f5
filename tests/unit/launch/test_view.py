"""What the launcher shows of a run, on a terminal and without one."""

import io
from dataclasses import replace

import msgspec
import pytest
from rich.console import Console

from penstock.contracts import from_body
from penstock.contracts.status import TrainerStatus
from penstock_launch.watch.figures import duration
from penstock_launch.watch.follow import RunSnapshot, ServiceView
from penstock_launch.watch.view import GuardedView, PlainView, render

STATUS = TrainerStatus(
    run="demo",
    phase="training",
    step=12,
    total_steps=40,
    epoch=1.2,
    policy_version=12,
    outstanding=16,
    reward_mean=0.472,
    heldout_accuracy=0.55,
    staleness_max=1,
    staleness_mean=0.9,
    queue={"tickets": 3, "eval": 0, "rollouts": 1, "scored": 2, "dead": 0},
    tokens_per_second=410.2,
    gap_to_ideal=0.123,
    step_seconds=1.9,
    eta_seconds=54.2,
    waiting_for="",
)


def service(name: str, state: str, detail: str = "", seconds: float = 3.0) -> ServiceView:
    return ServiceView(name, state, detail, 0, seconds, f"http://{name}")


class FakeClock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def view(lines: list[str], clock: FakeClock) -> PlainView:
    return PlainView(lines.append, clock)


def test_one_line_for_each_step_and_each_evaluation(view: PlainView, lines: list[str]) -> None:
    view.show(RunSnapshot((), STATUS))
    view.show(RunSnapshot((), STATUS))
    view.show(RunSnapshot((), replace_status(step=13)))
    view.show(RunSnapshot((), replace_status(step=13, heldout_accuracy=0.6)))
    assert [line.split("] ")[1].split("  ")[0] for line in lines] == [
        "evaluation: held-out accuracy 0.55",
        "step 12/40",
        "step 13/40",
        "evaluation: held-out accuracy 0.60",
    ]
    for part in ("reward 0.47", "version 12", "staleness 1 (mean 0.90)", "scored 2", "tokens/s 410", "ETA 0:54"):
        assert part in lines[1]
    assert "gap to ideal 0.12" in lines[1]


def replace_status(**changes: object) -> TrainerStatus:
    return msgspec.structs.replace(STATUS, **changes)


def test_start_up_says_what_is_waited_for(view: PlainView, lines: list[str], clock: FakeClock) -> None:
    starting = RunSnapshot((service("rollout", "starting", "SGLang loads the weights"),), None)
    view.show(starting)
    view.show(starting)
    assert [line.split("] ")[1] for line in lines] == ["rollout: starting: SGLang loads the weights"]
    clock.now += 16
    view.show(starting)
    assert "still starting: rollout: SGLang loads the weights" in lines[-1]
    view.show(RunSnapshot((replace(starting.services[0], state="ready", detail="", seconds=21.4),), None))
    assert lines[-1].endswith("rollout: ready after 21 s, http://rollout")


def test_what_keeps_a_ready_service_from_its_work_is_a_line_now_and_then(
    view: PlainView, lines: list[str], clock: FakeClock
) -> None:
    def said(trouble: str, seconds: float = 0.0) -> list[str]:
        lines.clear()
        clock.now += seconds
        view.show(RunSnapshot((replace(service("agent", "ready"), trouble=trouble),), None))
        return [line.split("] ")[1] for line in lines]

    said("")
    assert said("the environment fails: no disk") == ["agent: the environment fails: no disk"]
    assert said("the environment fails: no memory", 59) == []
    assert said("the environment fails: no memory", 1) == ["agent: the environment fails: no memory"]
    assert said("", 1) == ["agent: goes on"]
    assert said("the environment fails: no disk", 1) == []
    assert said("", 1) == []
    assert said("the environment fails: no disk", 58) == ["agent: the environment fails: no disk"]


def test_live_table_holds_every_figure_and_service() -> None:
    out = io.StringIO()
    console = Console(file=out, width=160, force_terminal=False)
    services = (service("trainer", "ready"), service("rollout", "waiting", "exit code 1"))
    troubled = replace(service("agent", "ready"), trouble="the environment fails")
    console.print(render("demo", RunSnapshot((*services, troubled), STATUS), 75))
    text = out.getvalue()
    for part in (
        "demo",
        "training",
        "1:15",
        "12/40",
        "0.47",
        "0.55",
        "410",
        "0.12",
        "0:54",
        "rollout",
        "exit code 1",
        "the environment fails",
    ):
        assert part in text


def test_a_status_with_unknown_and_missing_fields_is_read() -> None:
    status = from_body(b'{"step": 3, "later": 0.5, "epoch": 1}', TrainerStatus)
    assert (status.step, status.epoch, status.reward_mean) == (3, 1, None)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "-"), (9.4, "0:09"), (245, "4:05"), (3723, "1:02:03"), (59.7, "1:00")]
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_terminal_that_goes_away_does_not_end_the_run() -> None:
    def broken(line: str) -> None:
        raise BrokenPipeError

    view = GuardedView(PlainView(broken))
    view.event("x")
    view.event("y")
    view.close()
