"""Engines that fail their first start: the real launcher and services, with the pure engine in SGLang's place."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.launch.user_commands import UserCommands, assert_launch_ends

pytestmark = [pytest.mark.redis, pytest.mark.slow]

ENGINE_EXIT = 6
FAIL = "{ echo 'RuntimeError: Not enough memory' >&2; exit 1; }"
FIRST_START_FAILS = f'mkdir "$0.first" 2>/dev/null && {FAIL}'
ONE_NEVER_STARTS = f"""mkdir "$0.chosen" 2>/dev/null && echo $PPID > "$0.chosen/pid"
[ "$(cat "$0.chosen/pid")" = "$PPID" ] && {FAIL}"""


@pytest.fixture
def setup(tmp_path: Path, tiny_model: Path) -> Iterator[UserCommands]:
    setup = UserCommands(tmp_path, tiny_model)
    setup.document["rollout"]["num_servers"] = 2
    yield setup
    setup.end()


def launcher_log(setup: UserCommands) -> str:
    return (setup.run_folder / "logs" / "launcher.log").read_text()


def summary(setup: UserCommands) -> dict[str, object]:
    document: dict[str, object] = json.loads((setup.run_folder / "summary.json").read_text())
    return document


def test_an_engine_that_fails_its_first_start_is_started_again(setup: UserCommands) -> None:
    setup.use_pure_engine(FIRST_START_FAILS, start_attempts=2)
    code, output = setup.launch()
    assert code == 0, output
    again = "starting: the engine is being started again: SGLang ended with code 1; the end of"
    assert again in launcher_log(setup)
    assert "RuntimeError: Not enough memory" in launcher_log(setup)
    assert summary(setup)["given_up"] == {}
    assert summary(setup)["restarts"] == {"queue": 0, "rollout-0": 0, "rollout-1": 0, "trainer": 0, "reward": 0}


def test_a_run_goes_on_with_the_engines_that_start(setup: UserCommands) -> None:
    setup.use_pure_engine(ONE_NEVER_STARTS, start_attempts=1)
    code, output = setup.launch()
    assert code == 0, output
    given_up = summary(setup)["given_up"]
    assert isinstance(given_up, dict)
    assert len(given_up) == 1
    [(name, reason)] = given_up.items()
    assert reason == "its inference engine does not start: RuntimeError: Not enough memory"
    assert f"{name}: given up (exit code 6), {reason}; the run goes on without it" in launcher_log(setup)
    assert f"given up    {name}: {reason}" in output


def test_a_run_of_which_no_engine_starts_ends_with_their_names(setup: UserCommands) -> None:
    setup.use_pure_engine(FAIL, start_attempts=1)
    result = setup.launch()
    assert_launch_ends(result, ENGINE_EXIT, "its inference engine does not start", "RuntimeError: Not enough memory")
    reasons = [f"rollout-{1 - last} had been given up" for last in (0, 1) if f"rollout-{last} ended" in result[1]]
    assert [reason in result[1] for reason in reasons] == [True]
