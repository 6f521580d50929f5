"""What the launcher shows of a run, on a terminal and without one."""

import time
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from penstock.contracts import from_body
from penstock.contracts.status import HeldOutFigures, StepFigures, TrainerStatus
from penstock.readable import harmless
from penstock_launch.watch.figures import duration, figures, held_out_sets, heldout_of, heldout_steps_of
from penstock_launch.watch.follow import RunSnapshot, ServiceView
from penstock_launch.watch.frame import Screen, frame
from penstock_launch.watch.sample import Sample
from penstock_launch.watch.step_table import MAX_WIDTH
from penstock_launch.watch.view import GuardedView, PlainView, named_if_slow
from tests.patience import START_SECONDS

LAST = StepFigures(
    number=12,
    reward=0.472,
    loss=-0.0194,
    kl=0.0014,
    entropy=0.0371,
    length=2.42,
    learning_rate=2e-5,
    failed_ratio=0.25,
    no_signal_ratio=0.875,
    staleness_max=0,
    staleness_mean=0.0,
    seconds=1.93,
)
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
    heldout_steps=10,
    heldout_accuracy_start=0.4,
    heldout_steps_start=0,
    heldout_reward=0.62,
    heldout_reward_start=0.05,
    staleness_max=1,
    staleness_mean=0.0,
    max_staleness=1,
    queue={"tickets": 3, "eval": 0, "rollouts": 1, "scored": 2, "dead": 0},
    tokens_per_second=410.2,
    gap_to_ideal=0.123,
    step_seconds=1.9,
    eta_seconds=54.2,
    waiting_for="",
    first_step=0,
    steps=(*(msgspec.structs.replace(LAST, number=n, reward=n / 30) for n in range(1, 12)), LAST),
    kl_of="behaviour",
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


def test_every_step_has_one_aligned_line(view: PlainView, lines: list[str]) -> None:
    """A look may come late: all steps since the one before are shown, with titles now and then."""
    for number in (1, 1, 3, 4, 45):
        view.show(RunSnapshot((), with_steps(number, heldout_steps=None)))
    said = [line.split("] ", 1)[1] for line in lines]
    titles = [line for line in said if "reward" in line]
    steps = [line for line in said if line not in titles]
    assert [line.split()[1] for line in steps] == [f"{number}/50" for number in range(1, 46)]
    assert " ".join(steps[2].split()) == "step 3/50 0.472 -0.0194 0.0014 0.037 2.4 0 1.9 0:54"
    assert " ".join(titles[0].split()) == "step reward loss KL beh entropy length stale s/step left"
    assert len(titles) == 3
    assert len({len(line) for line in lines}) == 1
    assert max(map(len, lines)) <= MAX_WIDTH


def test_each_evaluation_has_a_line_of_its_own_that_names_its_steps(view: PlainView, lines: list[str]) -> None:
    """It ends during a later step, whose line says nothing of it."""
    view.show(RunSnapshot((), heldout(0, (0, 0.0, 0.05))))
    view.show(RunSnapshot((), heldout(1, (0, 0.0, 0.05))))
    view.show(RunSnapshot((), heldout(9, (8, 0.0, 0.352), start=(0, 0.0, 0.05))))
    view.show(RunSnapshot((), heldout(10, (8, 0.0, 0.352), start=(0, 0.0, 0.05))))
    assert [line.split("] ", 1)[1] for line in lines if "evaluation" in line] == [
        "evaluation after 0 steps: accuracy 0.00, reward 0.05",
        "evaluation after 8 steps: accuracy 0.00 -> 0.00, reward 0.05 -> 0.35",
    ]
    assert [line.split("step ")[1].split("/")[0] for line in lines if "/50" in line] == [*map(str, range(1, 11))]
    assert not any("accuracy" in line for line in lines if "evaluation" not in line)


@pytest.mark.parametrize(
    ("last", "start", "shown"),
    [
        ((8, 0.55, 0.55), (0, 0.4, 0.4), [("accuracy", "0.40 -> 0.55")]),  # rewards of 0 and 1
        ((8, 0.0, 0.6), (0, 0.0, 0.0), [("accuracy", "0.00 -> 0.00"), ("reward", "0.00 -> 0.60")]),
        ((8, 0.0, 0.6), (8, 0.0, 0.6), [("accuracy", "0.00"), ("reward", "0.60")]),
        ((8, 0.55, None), (0, 0.4, None), [("accuracy", "0.40 -> 0.55")]),  # of another release
        ((None, None, None), (None, None, None), []),
    ],
)
def test_the_reward_stands_beside_an_accuracy_that_differs_from_it(
    last: tuple[int | None, float | None, float | None],
    start: tuple[int | None, float | None, float | None],
    shown: list[tuple[str, str]],
) -> None:
    status = heldout(9, last, start=start)
    sets = held_out_sets(status)
    assert [each for one in sets.values() for each in heldout_of(one)] == shown
    words = dict(figures(status))["held-out"]
    assert words == (f"{', '.join(map(' '.join, shown))}, after {heldout_steps_of(sets[''])}" if shown else "-")


def test_each_further_set_has_a_line_of_its_own(view: PlainView, lines: list[str]) -> None:
    """An evaluation of one set may end before that of the others."""
    hard = HeldOutFigures(accuracy=0.25, reward=0.25, steps=8, prompts=4, failed=0, steps_start=0, accuracy_start=0.0)
    before = heldout(9, (0, 0.4, 0.4))
    one = msgspec.structs.replace(before, heldout_sets={"hard": hard})
    for status in (before, one, one, heldout(10, (8, 0.5, 0.5), start=(0, 0.4, 0.4), heldout_sets={"hard": hard})):
        view.show(RunSnapshot((), status))
    assert [line.split("] ", 1)[1] for line in lines if "evaluation" in line] == [
        "evaluation after 0 steps: accuracy 0.40",
        "evaluation of hard after 8 steps: accuracy 0.00 -> 0.25, reward - -> 0.25",
        "evaluation after 8 steps: accuracy 0.40 -> 0.50",
    ]
    assert dict(figures(one))["held-out hard"] == "accuracy 0.00 -> 0.25, reward - -> 0.25, after 0 -> 8 steps"
    shown = [str(line) for line in frame("demo", RunSnapshot((), one), "", 1.0, Screen(100, 30))]
    assert any("hard" in line and "0.25" in line for line in shown)


def test_an_accuracy_names_of_how_many_prompts_it_is_if_the_reward_of_some_failed(
    view: PlainView, lines: list[str]
) -> None:
    some: dict[str, Any] = {"heldout_prompts": 20, "heldout_prompts_start": 20, "heldout_failed_start": 2}
    view.show(RunSnapshot((), heldout(0, (0, 0.4, 0.5), heldout_failed=2, **some)))
    last = heldout(10, (10, 0.95, 0.96), start=(0, 0.4, 0.5), heldout_failed=1, **some)
    view.show(RunSnapshot((), last))
    view.show(RunSnapshot((), heldout(12, (12, None, None), start=(0, 0.4, 0.5), heldout_failed=20, **some)))
    assert [line.split("] ", 1)[1] for line in lines if "evaluation" in line] == [
        "evaluation after 0 steps: accuracy 0.40 (of 18; 2 failed), reward 0.50",
        "evaluation after 10 steps: accuracy 0.40 (of 18; 2 failed) -> 0.95 (of 19; 1 failed), reward 0.50 -> 0.96",
        "evaluation after 12 steps: accuracy 0.40 (of 18; 2 failed) -> - (all 20 failed), reward 0.50 -> -",
    ]
    screen = "\n".join(line.plain.rstrip() for line in frame("r", RunSnapshot((), last), "", 1.0, Screen(80, 24)))
    assert "held-out  accuracy 0.40 (of 18; 2 failed) -> 0.95 (of 19; 1 failed)\n" in screen
    assert "\n          reward 0.50 -> 0.96   after 0 -> 10 steps" in screen


def test_groups_that_are_dropped_are_told_with_the_reason_now_and_then(
    view: PlainView, lines: list[str], clock: FakeClock
) -> None:
    for count in (1, 2, 3):
        status = with_steps(0, dropped={"degenerate": 5, "reward_failed": count})
        view.show(RunSnapshot((), status, why_dropped="judge: HTTP 503\n"))
        clock.now += 40
    said = [line.split("] ", 1)[1] for line in lines if "dropped" in line]
    assert said == [
        "dropped groups so far: failed rewards 1 (the last: judge: HTTP 503\\n)",
        "dropped groups so far: failed rewards 3 (the last: judge: HTTP 503\\n)",
    ]
    shown = frame("r", RunSnapshot((), status, why_dropped="judge: HTTP 503"), "", 1.0, Screen(80, 24))
    screen = [line.plain for line in shown]
    at = screen.index("dropped   8 groups: no signal 5, failed rewards 3")
    assert screen[at + 1] == "          judge: HTTP 503"
    later = PlainView(lines.append, clock)
    del lines[:]
    later.show(RunSnapshot((), msgspec.structs.replace(status, first_step=4)))
    assert not [line for line in lines if "dropped" in line], "an earlier launch has told it"


def replace_status(**changes: object) -> TrainerStatus:
    return msgspec.structs.replace(STATUS, **changes)


def with_steps(last: int, **changes: object) -> TrainerStatus:
    """The status after so many steps, of which it holds the last 50."""
    steps = tuple(msgspec.structs.replace(LAST, number=number) for number in range(1, last + 1))
    return replace_status(step=last, total_steps=50, steps=steps[-50:], **changes)


def heldout(
    num_steps: int,
    last: tuple[int | None, float | None, float | None],
    *,
    start: tuple[int | None, float | None, float | None] | None = None,
    **changes: object,
) -> TrainerStatus:
    """The status after so many steps, with two evaluations: their steps, accuracy and reward."""
    fields = ("heldout_steps", "heldout_accuracy", "heldout_reward")
    named = dict(zip(fields, last, strict=True)) | {
        f"{name}_start": value for name, value in zip(fields, start or last, strict=True)
    }
    return with_steps(num_steps, **named, **changes)


def test_steps_of_an_earlier_launch_are_not_shown_again(view: PlainView, lines: list[str]) -> None:
    view.show(RunSnapshot((), with_steps(5, first_step=None)))
    view.show(RunSnapshot((), with_steps(5, first_step=5)))
    assert lines == []
    view.show(RunSnapshot((), with_steps(6, first_step=5)))
    view.show(RunSnapshot((), with_steps(4, first_step=4)))  # the queue lost two
    view.show(RunSnapshot((), with_steps(5, first_step=4)))
    assert [line.split("step ")[1].split("/")[0] for line in lines if "/50" in line] == ["6", "5"]


def test_the_end_is_told_phase_by_phase_and_after_the_trainer_has_gone(
    view: PlainView, lines: list[str], clock: FakeClock
) -> None:
    ready = (service("trainer", "ready"),)
    last = with_steps(1, phase="ending: writing a checkpoint", heldout_steps=0)
    view.show(RunSnapshot(ready, last))
    view.show(RunSnapshot(ready, msgspec.structs.replace(last, heldout_steps=1)))  # of the final weights
    view.show(RunSnapshot(ready, last, answers=False))
    clock.now += 5
    view.show(RunSnapshot(ready, last, answers=False))
    clock.now += 10
    view.show(RunSnapshot(ready, last, answers=False, ending="ending: waiting for the end of rollout (at most 20 s)"))
    assert [line.split("] ", 1)[1] for line in lines[3:]] == [
        "evaluation after 0 steps: accuracy 0.55, reward 0.62",
        "trainer: ending: writing a checkpoint",
        "evaluation after 1 steps: accuracy 0.40 -> 0.55, reward 0.05 -> 0.62",
        "still ending: the trainer leaves the run",
        "still ending: waiting for the end of rollout (at most 20 s)",
    ]


def test_silence_ends_within_five_seconds_and_then_more_and_more_seldom(
    view: PlainView, lines: list[str], clock: FakeClock
) -> None:
    """A thread ticks, also before anything is known of the run and while the launcher is blocked."""

    def said(seconds: int) -> list[tuple[float, str]]:
        lines.clear()
        found = []
        for _ in range(2 * seconds):
            clock.now += 0.5
            view.tick()
            found += [(clock.now, line.split("] ", 1)[1]) for line in lines]
            lines.clear()
        return found

    assert said(30) == [(104.0, "still starting"), (112.0, "still starting"), (128.0, "still starting")]
    view.event("x")
    view.doing("connecting to the queue")
    assert said(4) == [(134.0, "still connecting to the queue")]
    view.doing("")
    view.show(RunSnapshot((service("trainer", "ready"),), with_steps(2, waiting_for="ticket 3, which rollout-1 holds")))
    assert said(4)[0][1] == "still training (step 3), waiting for ticket 3, which rollout-1 holds"


def test_start_up_says_what_is_waited_for(view: PlainView, lines: list[str], clock: FakeClock) -> None:
    starting = RunSnapshot((service("rollout", "starting", "SGLang loads the weights"),), None)
    view.show(starting)
    view.show(starting)
    assert [line.split("] ")[1] for line in lines] == ["rollout: starting: SGLang loads the weights"]
    clock.now += 5
    view.show(starting)
    assert lines[-1].endswith("still starting: rollout: SGLang loads the weights (3 s)")
    view.show(RunSnapshot((replace(starting.services[0], state="ready", detail="", seconds=21.4),), None))
    assert lines[-1].endswith("rollout: ready after 21 s, http://rollout")


def test_what_keeps_a_ready_service_from_its_work_is_a_line_now_and_then(
    view: PlainView, lines: list[str], clock: FakeClock
) -> None:
    def said(trouble: str, seconds: float = 0.0) -> list[str]:
        lines.clear()
        clock.now += seconds
        view.show(RunSnapshot((replace(service("agent", "ready"), trouble=trouble),), None))
        return [text for line in lines if not (text := line.split("] ")[1]).startswith("still ")]

    said("")
    assert said("the environment fails: no disk") == ["agent: the environment fails: no disk"]
    assert said("the environment fails: no memory", 59) == []
    assert said("the environment fails: no memory", 1) == ["agent: the environment fails: no memory"]
    assert said("", 1) == ["agent: goes on"]
    assert said("the environment fails: no disk", 1) == []
    assert said("", 1) == []
    assert said("the environment fails: no disk", 58) == ["agent: the environment fails: no disk"]


def test_each_opening_and_closing_of_a_breaker_is_a_line(view: PlainView, lines: list[str], clock: FakeClock) -> None:
    """However soon after another line about the service."""

    def said(trouble: str, *functions: str, state: str = "ready") -> list[str]:
        lines.clear()
        clock.now += 1
        breakers = dict.fromkeys(functions, "3 failures in a row, last: killed after 10 s")
        reward = replace(service("reward", state), trouble=trouble, open_breakers=breakers)
        view.show(RunSnapshot((reward,), None))
        return [line.split("] ")[1] for line in lines]

    opens = "reward: the breaker of {} opens, its groups are parked: 3 failures in a row, last: killed after 10 s"
    said("")
    assert said("judge: 7 calls wait") == ["reward: judge: 7 calls wait"]
    assert said("breaker open: judge", "judge") == [opens.format("judge")]
    assert said("breaker open: judge", "judge") == []
    assert said("breaker open: judge; units", "judge", "units") == [opens.format("units")]
    assert said("breaker open: units", "units") == ["reward: the breaker of judge closes"]
    assert said("") == ["reward: the breaker of units closes", "reward: goes on"]
    assert said("breaker open: judge", "judge") == [opens.format("judge")]
    assert not any("closes" in line for line in said("", state="waiting")), "it died with its service"


SERVICES = (service("trainer", "ready"), service("rollout", "starting", "the engine is being started", 12.0))
SAMPLE = Sample("Add:\n2+5=7\n9+6=\n", "17", 0.0)
WELL = """
penstock demo  training  1:15
reward    0.472  \u2581\u2582\u2582\u2583\u2583\u2584\u2584\u2585\u2585\u2586\u2586\u2588
held-out  accuracy 0.40 -> 0.55   reward 0.05 -> 0.62   after 0 -> 10 steps
update    loss -0.0194   KL to behaviour 0.0014   entropy 0.037   length 2.4
          learning rate 2e-05
steps     [======              ]  12/40  1.90 s/step  0:54 left
health    failed rewards 25%   groups without a signal 88%
          staleness 0 (mean 0.00; run's maximum 1), allowed 1
          gap to ideal 0.12
sample    9+6= -> '17'  reward 0
rollout   starting  the engine is being started (12 s)
"""


def picture(snapshot: RunSnapshot | None, screen: Screen, doing: str = "") -> list[str]:
    return [line.plain.rstrip() for line in frame("demo", snapshot, doing, 75, screen)]


def test_the_picture_asks_first_whether_it_learns_and_names_services_that_are_not_ready() -> None:
    assert picture(RunSnapshot(SERVICES, STATUS, sample=SAMPLE), Screen(80, 24)) == WELL.strip().splitlines()
    assert picture(RunSnapshot(SERVICES[:1], None), Screen(80, 24)) == ["penstock demo  starting  1:15"]
    assert picture(None, Screen(80, 24), "starting the queue") == ["penstock demo  starting the queue  1:15"]


def test_services_in_trouble_restarted_and_too_many() -> None:
    troubled = replace(service("agent", "ready"), trouble="the environment\x1b[2J fails")
    again = replace(service("reward", "ready"), restarts=2)
    many = tuple(service(f"rollout-{number}", "waiting", "exit code 1") for number in range(9))
    assert picture(RunSnapshot((troubled, again, *many), None), Screen(80, 24))[1:] == [
        "agent      ready  the environment\\x1b[2J fails",
        "reward     ready  restarts 2",
        *(f"rollout-{number}  waiting  exit code 1" for number in range(3)),
        "          and 6 more",
    ]


def test_a_line_that_is_too_long_shows_that_it_is_cut() -> None:
    """Half a figure would be another one: `after 1` of `after 10 s`."""
    why = "own:judge: 3 attempts failed in a row, last: killed after 10 s (reward.timeout_seconds)"
    snapshot = RunSnapshot((replace(service("reward", "ready"), trouble=why),), None)
    assert picture(snapshot, Screen(80, 24))[1:] == [
        "reward    ready  own:judge: 3 attempts failed in a row, last: killed after ..."
    ]
    assert picture(snapshot, Screen(2 + len("reward    ready  " + why), 24))[1] == f"reward    ready  {why}"


def test_a_step_without_numbers_and_failures_stand_out() -> None:
    bad = msgspec.structs.replace(LAST, is_finite=False, loss=None)
    shown = frame("demo", RunSnapshot((), replace_status(steps=(bad,))), "", 1, Screen(80, 24))
    red = {line.plain[span.start : span.end] for line in shown for span in line.spans if span.style == "red"}
    assert red == {"nan", "25%"}


def test_what_a_step_without_a_trained_token_did_not_measure_is_a_dash(view: PlainView, lines: list[str]) -> None:
    flat = msgspec.structs.replace(LAST, loss=None, kl=None, entropy=None)
    status = replace_status(steps=(flat,))
    view.show(RunSnapshot((), status))
    assert " ".join(lines[-2].split("] ", 1)[1].split()) == "step 12/40 0.472 - - - 2.4 0 1.9 0:54"
    unmeasured = "loss -   KL to behaviour -   entropy -   length 2.4"
    assert any(unmeasured in line for line in picture(RunSnapshot((), status), Screen(80, 24)))
    shown = dict(figures(status))
    assert [shown[name] for name in ("loss", "KL to behaviour", "entropy")] == ["-", "-", "-"]


def test_staleness_is_that_of_the_last_step_beside_the_largest_of_the_run() -> None:
    last = msgspec.structs.replace(LAST, staleness_max=2, staleness_mean=0.5)
    older = msgspec.structs.replace(LAST, staleness_max=2, staleness_mean=None)
    shown = [
        dict(figures(replace_status(**given)))["staleness"]
        for given in (
            {"steps": (LAST, last), "staleness_max": 3},
            {"steps": (older,), "staleness_max": None},
            {"steps": ()},
        )
    ]
    assert shown == ["2 (mean 0.50; run's maximum 3), allowed 1", "2, allowed 1", "-, allowed 1"]


@pytest.mark.parametrize(("width", "height"), [(1, 1), (20, 5), (79, 24), (80, 24), (120, 40), (300, 9)])
def test_the_picture_fits_any_screen(width: int, height: int) -> None:
    """One line less than the screen, and room for the ^C that a terminal shows where the cursor stands."""
    sample = Sample("x" * 500, "\u6570" * 500, None)
    status = replace_status(waiting_for="t" * 200, fenced={"rollout-1": "w" * 200})
    shown = frame("demo" * 50, RunSnapshot(SERVICES, status, sample=sample), "", 1e6, Screen(width, height))
    assert max(line.cell_len for line in shown) <= max(1, min(width, MAX_WIDTH) - 2)
    assert len(shown) <= max(1, height - 1)


def test_a_long_sample_has_two_lines_and_can_do_nothing_to_the_terminal() -> None:
    evil = "\x1b]0;title\x07" + chr(0x202E) + "\b" + "word " * 40
    first, second = picture(RunSnapshot((), None, sample=Sample(evil, evil, 0.25)), Screen(80, 24))[1:]
    assert first.startswith("sample    \\x1b]0;title\\x07\\u202e\\x08word")
    assert first.endswith("...")
    assert second.startswith("  ->      '")
    assert second.endswith("...  reward 0.25")
    assert harmless("2+5=7 \u00e9\u6570") == "2+5=7 \u00e9\u6570"


def test_a_status_with_unknown_and_missing_fields_is_read() -> None:
    status = from_body(b'{"step": 3, "later": 0.5, "epoch": 1}', TrainerStatus)
    assert (status.step, status.epoch, status.reward_mean) == (3, 1, None)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "-"), (9.4, "0:09"), (245, "4:05"), (3723, "1:02:03"), (59.7, "1:00")]
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


def test_what_takes_long_before_there_is_a_view_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with named_if_slow("looking at paths", seconds=60):
        pass
    with named_if_slow("looking at the model", seconds=0):
        deadline = time.monotonic() + START_SECONDS
        while not (said := capsys.readouterr().err):
            assert time.monotonic() < deadline
    assert said.startswith("penstock: looking at the model")


def test_a_terminal_that_goes_away_does_not_end_the_run() -> None:
    def broken(line: str) -> None:
        raise BrokenPipeError

    view = GuardedView(PlainView(broken))
    view.event("x")
    view.event("y")
    view.close()
