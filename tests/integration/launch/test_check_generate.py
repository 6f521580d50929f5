"""`penstock check --generate`: one group by a real engine; and that nothing stays, however the look ends."""

import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.launch.test_check import lives
from tests.integration.launch.test_doctor import SGLANG, entries, lines_of
from tests.integration.launch.test_errors import CONFIG_EXIT, break_sglang
from tests.integration.launch.user_commands import UserCommands
from tests.patience import START_SECONDS
from tests.real_model import real_model

pytestmark = [pytest.mark.slow]

HANGS = 'echo $$ >> "{pids}"; sleep 600 & echo $! >> "{pids}"; wait'


@pytest.fixture
def user(setup: UserCommands, tmp_path: Path) -> Iterator[UserCommands]:
    """Its temporary folders are made in one that is empty at the end; its name is short, for it holds sockets."""
    setup.document["rollout"]["engine"] |= {"dtype": "float32"}
    (tmp_path / "runs").mkdir()
    with tempfile.TemporaryDirectory(prefix="t") as temporary:
        setup.environ["TMPDIR"] = temporary
        yield setup
        assert [*Path(temporary).iterdir()] == []


def generated(user: UserCommands) -> tuple[int, str]:
    return user.run("penstock_launch", "check", "--generate")


def left(user: UserCommands, before: set[str]) -> set[str]:
    """Files that were not there before, but for what Python itself leaves, of the user's module."""
    return {name for name in entries(user.folder) - before if not name.startswith("__pycache__")}


def test_a_real_engine_generates_one_group_that_is_scored_and_leaves_nothing(user: UserCommands) -> None:
    user.document["actor"] |= {"path": str(real_model()), "group_size": 4}
    user.document["sampling"] = {"max_new_tokens": 12}
    # It needs little memory, since other tests run beside it: adapters have few moments, and no version lies in memory.
    user.document["actor"]["lora"] = {"rank": 8}
    user.document["weights"]["folder"] = "weights"
    # A small cache, of most of what is free.
    user.document["rollout"]["engine"] |= {"python": SGLANG, "max_total_tokens": 1024, "memory_fraction": 0.95}
    user.score_by("length", "def length(prompt, completion, answer, metadata):\n    return len(set(completion)) / 64\n")
    before = entries(user.folder)
    code, output = generated(user)
    found = lines_of(output)
    assert code == 0, output
    assert found["engine"][1].startswith("sglang 0.")
    assert found["prompt"][1] == "'1+1=' (4 tokens)"
    shown = [text for what, (_, text) in found.items() if what.startswith("completion ")]
    assert 2 <= len(shown) <= 3
    assert all("tokens, " in text and ": reward 0." in text for text in shown)
    assert found["rewards"][0] == "ok"
    assert "4 from 0." in found["rewards"][1]
    assert "of 4 cut at sampling.max_new_tokens = 12" in found["completions"][1]
    assert "tokens/s" in found["speed"][1]
    assert left(user, before) == set()
    assert not [each for each in psutil.process_iter(["environ"]) if is_of(each, user)]


def is_of(process: psutil.Process, user: UserCommands) -> bool:
    """Whether a process was started by this user's commands."""
    environ = process.info["environ"] or {}
    return bool(environ.get("TMPDIR") == user.environ["TMPDIR"])


def test_a_group_without_a_signal_is_a_warning(user: UserCommands) -> None:
    user.use_pure_engine()
    user.score_by("same", "def same(prompt, completion, answer, metadata):\n    return 0.5 if completion else 0.0\n")
    before = entries(user.folder)
    code, output = generated(user)
    found = lines_of(output)
    assert code == 0, output
    assert "\none group\n" in output
    _, _, group = output.partition("\none group\n")
    verdict, text = lines_of(group)["rewards"]
    assert (verdict, text.partition(":")[0]) == ("warning", "all 2 are 0.5")
    assert "such a group has no gradient" in text
    assert found["engine"][0] == "ok"
    assert left(user, before) == set()


def test_an_engine_that_does_not_start_is_named_with_the_end_of_its_log(user: UserCommands) -> None:
    break_sglang(user)
    before = entries(user.folder)
    code, output = generated(user)
    assert code == CONFIG_EXIT, output
    verdict, text = lines_of(output)["engine"]
    assert verdict == "problem"
    assert text.startswith("SGLang ended with code 1: ImportError: libcudart.so.12: cannot open shared object file")
    assert "the end of the engine's log:\n    File line 1\n" in output
    assert "Traceback" not in output
    assert left(user, before) == set()


def test_an_engine_that_does_not_answer_in_time_is_given_up(user: UserCommands) -> None:
    pids = user.folder / "pids"
    user.use_pure_engine(before=HANGS.format(pids=pids))
    user.document["rollout"]["engine"]["start_timeout_seconds"] = 1
    code, output = generated(user)
    assert code == CONFIG_EXIT, output
    verdict, text = lines_of(output)["engine"]
    assert (verdict, "rollout.engine.start_timeout_seconds = 1" in text) == ("problem", True)
    assert not [pid for pid in map(int, pids.read_text().split()) if lives(pid)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_can_be_stopped_while_the_engine_starts(user: UserCommands, number: signal.Signals) -> None:
    pids = user.folder / "pids"
    user.use_pure_engine(before=HANGS.format(pids=pids))
    before = entries(user.folder)
    process = user.start("penstock_launch", "check", "--generate")
    deadline = time.monotonic() + START_SECONDS
    while not (pids.exists() and len(pids.read_text().split()) == 2):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    assert not [pid for pid in map(int, pids.read_text().split()) if lives(pid)]
    assert left(user, before) == {"pids"}


def test_an_episode_is_not_tried_and_the_way_to_try_one_is_named(user: UserCommands) -> None:
    user.use_pure_engine()
    (user.folder / "own.py").write_text(
        "class Echo:\n    def reset(self, **row):\n        pass\n    def step(self, text):\n        return 1.0\n"
    )
    user.document["agent"] = {"environment": "own:Echo", "max_tokens": 128}
    user.document["reward"]["functions"] = {"environment": 1.0}
    code, output = generated(user)
    verdict, text = lines_of(output)["one group"]
    assert (code, verdict) == (0, "not looked at"), output
    assert "penstock launch local --config FILE --run.max_steps 1" in text
