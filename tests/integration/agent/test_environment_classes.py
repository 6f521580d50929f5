"""Classes as environments, in real worker processes, with a model that answers from a script."""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from penstock.config import AgentSection
from penstock.contracts import Score
from penstock.errors import ConfigError, PenstockError
from penstock_agent.environments.driving import check_environment, open_driver
from penstock_agent.environments.episode import Driver, Ending, Environment
from tests.integration.agent.conftest import Children
from tests.patience import ANSWER_SECONDS
from tests.unit.agent.environments.scripted_session import ScriptedSession, calls

MODULE = '''
"""Environments of a user."""
import asyncio, os, sys, time
from typing import Literal

from penstock.errors import EpisodeFailedError

print("imported", flush=True)


class Guess:
    """Guess 1-7 in three tries."""

    def reset(self, answer: str, **row):
        self.secret, self.left = int(answer), 3
        return "Guess:"

    def step(self, text):
        guess, self.left = int(text), self.left - 1
        if guess == self.secret or self.left == 0:
            return float(guess == self.secret)
        return "higher. Guess:" if guess < self.secret else "lower. Guess:"


class Obey:
    """Does what the model writes."""

    def __init__(self):
        self.closed = None

    async def reset(self, first="", mark="", lie="", **row):
        self.mark, self.lie = mark, lie
        if first == "raise":
            raise KeyError("no such thing")
        if first == "number":
            return 5
        if first == "messages":
            return [{"role": "system", "content": "be brief"}, {"role": "user", "content": "begin"}]
        if first == "huge":
            return [{"role": "user", "content": 2**70}]
        if first == "none":
            return None
        return first

    def step(self, text):
        if text == "raise":
            raise ValueError("the board is broken")
        if text == "exit":
            sys.exit(3)
        if text == "_exit":
            os._exit(7)
        if text == "kill":
            os.kill(os.getpid(), 9)
        if text == "hang":
            time.sleep(600)
        if text == "hang with a child":
            import subprocess
            child = subprocess.Popen(["sleep", "600"])
            open(self.mark, "w").write(str(child.pid))
            time.sleep(600)
        if text == "print":
            print("hello from the environment")
            sys.stderr.write("an error line\\n")
        if text == "environment":
            return str([key for key in os.environ if "SECRET" in key or key.startswith("PENSTOCK_")])
        if text == "pid":
            return f"pid {os.getpid()}"
        if text == "where":
            return os.getcwd()
        if text == "chdir":
            os.chdir("/")
            return "gone"
        if text == "later":
            return self.start_work()
        if text == "tasks":
            return self.count_tasks()
        return RESULTS[text]

    async def start_work(self):
        self.task = asyncio.create_task(asyncio.sleep(600))
        return "started"

    async def count_tasks(self):
        return f"{len(asyncio.all_tasks())} task"

    def close(self):
        if self.mark.endswith("closed"):
            open(self.mark, "a").write("x")
        if self.mark == "close raises":
            raise OSError("cannot close")


RESULTS = {"nan": float("nan"), "inf": -float("inf"), "none": None, "bytes": b"1", "true": True, "half": 0.5,
           "empty": [], "wrong": ["text"], "one": 1, "text": "an observation",
           "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}


class Counted(Obey):
    """With a reward when it is cut."""
    def get_reward(self):
        return 1 / 0 if self.lie == "raise" else {"nan": float("nan"), "text": "1", "none": None}.get(self.lie, 0.25)


class Calculator:
    """Adds."""

    def reset(self, answer, **row):
        self.answer, self.results = answer, []

    def add(self, a: int, b: int = 1) -> int:
        """Add two integers."""
        self.results.append(a + b)
        return a + b

    async def look(self, where: Literal["here", "there"]) -> dict:
        await asyncio.sleep(0)
        return {"where": where}

    def fail(self, how: str) -> None:
        if how == "infrastructure":
            raise EpisodeFailedError("the sandbox is down")
        if how == "memory":
            raise MemoryError
        if how == "exit":
            sys.exit(1)
        if how == "hang":
            time.sleep(600)
        if how == "bytes":
            return b"\\xff"
        raise LookupError("no such page")

    def get_reward(self):
        return float(int(self.answer) in self.results)


class Unscored:
    def add(self, a: int, b: int) -> int:
        return a + b


class Last(Unscored):
    def reset(self, answer):
        self.answer = answer
    def get_reward(self, text):
        return text == self.answer
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path


def section(folder: Path, name: str, **keys: Any) -> AgentSection:
    values = {"call_timeout_seconds": ANSWER_SECONDS, "cut_score": -1.0, "sessions": 2, **keys}
    return AgentSection(environment=f"mine:{name}", modules_path=str(folder), **values)


@asynccontextmanager
async def driver_of(folder: Path, name: str, **keys: Any) -> AsyncIterator[Driver]:
    config = section(folder, name, **keys)
    async with open_driver(config, await check_environment(config, needs_score=False)) as driver:
        yield driver


async def test_a_class_with_step_plays_until_it_returns_a_number(folder: Path) -> None:
    async with driver_of(folder, "Guess") as driver:
        session = ScriptedSession("4", "6", "5")
        assert await driver.run({"prompt": "A game.", "answer": "5"}, session) == Ending(Score(1.0), "done")
        assert session.contents == [
            ("user", "A game."), ("user", "Guess:"), ("assistant", "4"), ("user", "higher. Guess:"),
            ("assistant", "6"), ("user", "lower. Guess:"),
        ]  # fmt: skip
        assert session.tools == []
        assert await driver.run({"answer": "5"}, ScriptedSession("1", "2", "3")) == Ending(Score(0.0), "done")


async def test_messages_come_from_the_row_and_from_reset(folder: Path) -> None:
    prompt = [{"role": "user", "content": "hello"}]
    async with driver_of(folder, "Obey") as driver:
        rows: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
            ({"prompt": prompt, "first": "none"}, [("user", "hello")]),
            ({"prompt": prompt, "first": "messages"}, [("user", "hello"), ("system", "be brief"), ("user", "begin")]),
            ({"prompt": "", "first": ""}, [("user", "")]),
        ]
        for row, expected in rows:
            session = ScriptedSession("one")
            assert await driver.run(row, session) == Ending(Score(1.0), "done")
            assert session.contents == expected
        session = ScriptedSession("messages", "half")
        assert (await driver.run({"prompt": "p"}, session)).score == Score(0.5)
        assert session.contents[-2:] == [("user", "a"), ("user", "b")]
        nothing = await driver.run({"first": "none"}, ScriptedSession("one"))
        assert nothing.score.failure == "the row has no prompt and reset returned none; expected one of them"
    assert prompt == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("row", "answer", "reason"),
    [
        ({"first": "raise"}, "one", "reset: KeyError: 'no such thing' (mine.py:"),
        ({"first": "number"}, "one", "reset: returned int; expected text, a list of messages, or None"),
        ({"first": "huge"}, "one", "reset: returned what cannot be packed: OverflowError"),
        ({}, "raise", "step: ValueError: the board is broken (mine.py:"),
        ({}, "exit", "step: SystemExit: 3 (mine.py:"),
        ({}, "_exit", "step: the environment's process ended with exit code 7"),
        ({}, "kill", "step: the environment's process was killed by SIGKILL (out of memory?)"),
        ({}, "nan", "step: returned nan; expected a finite number"),
        ({}, "inf", "step: returned -inf; expected a finite number"),
        ({}, "none", "step: returned NoneType; expected text, a list of messages, or a number"),
        ({}, "bytes", "step: returned bytes; expected text"),
        ({}, "empty", "step: returned an empty list; expected messages"),
        ({}, "wrong", "step: returned str in a list; expected messages, each a dict with a role"),
        ({"n": 2**70}, "one", "reset: its arguments cannot be packed"),
    ],
)
async def test_what_the_environment_does_wrong_is_a_failure_with_its_reason(
    folder: Path, row: dict[str, Any], answer: str, reason: str
) -> None:
    async with driver_of(folder, "Obey") as driver:
        broken = await driver.run(row, ScriptedSession(answer))
        assert (broken.score.value, broken.end) == (None, "failure")
        assert reason in broken.score.failure
        assert await driver.run({}, ScriptedSession("true")) == Ending(Score(1.0), "done")


async def test_a_column_that_reset_needs_is_named(folder: Path) -> None:
    async with driver_of(folder, "Guess") as driver:
        broken = await driver.run({"prompt": "x"}, ScriptedSession("1"))
    assert broken.score.failure == "reset: needs 'answer', which the row lacks; it has prompt"


async def test_a_hung_method_is_killed_and_the_next_episode_is_fine(folder: Path) -> None:
    async with driver_of(folder, "Obey", call_timeout_seconds=5, sessions=1) as driver:
        hung = await driver.run({}, ScriptedSession("hang"))
        assert hung == Ending(Score(None, "step was killed after 5 s (agent.call_timeout_seconds)"), "timeout")
        assert await driver.run({}, ScriptedSession("one")) == Ending(Score(1.0), "done")


async def test_a_cut_is_scored_by_get_reward_or_else_by_the_configuration(folder: Path) -> None:
    async with driver_of(folder, "Obey") as driver:
        assert await driver.run({}, ScriptedSession("text")) == Ending(Score(-1.0), "max_turns")
        assert await driver.run({}, ScriptedSession("text", cut="max_tokens")) == Ending(Score(-1.0), "max_tokens")
        unfitting = await driver.run({}, ScriptedSession(cut="max_tokens"))
        assert unfitting.end == "max_tokens"
        assert unfitting.score.failure == "the first call of the model does not fit agent.max_tokens"
        refused = await driver.run({}, ScriptedSession(PenstockError("the template refuses two messages")))
        assert refused == Ending(
            Score(None, "a call of the model failed: the template refuses two messages"), "failure"
        )
    async with driver_of(folder, "Counted") as driver:
        assert await driver.run({}, ScriptedSession("text")) == Ending(Score(0.25), "max_turns")


async def test_close_is_called_at_each_end_but_a_kill(folder: Path) -> None:
    mark = folder / "closed"
    async with driver_of(folder, "Obey") as driver:
        for answers in (["one"], ["text"], ["raise"], ["_exit"]):
            await driver.run({"mark": str(mark)}, ScriptedSession(*answers))
        assert mark.read_text() == "xxx"
        assert await driver.run({"mark": "close raises"}, ScriptedSession("one")) == Ending(Score(1.0), "done")


async def test_output_is_logged_under_the_episodes_name(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with driver_of(folder, "Obey") as driver:
            await driver.run({}, ScriptedSession("text", lambda messages: "one", name="first"))
            with pytest.raises(KeyError):
                await driver.run({}, ScriptedSession(KeyError("a defect of ours"), name="second"))
            await driver.run({}, ScriptedSession("print", name="third"))
    assert "environment of third wrote: hello from the environment" in caplog.text
    assert "an error line" in caplog.text
    assert "environment of first wrote" not in caplog.text


async def test_no_secret_is_in_the_environments_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_TOKEN", "secret")
    async with driver_of(folder, "Obey") as driver:
        session = ScriptedSession("environment", "one")
        await driver.run({}, session)
    assert session.contents[-1] == ("user", "[]")


async def test_processes_are_reused_and_no_more_than_sessions_exist(folder: Path) -> None:
    async def pid(driver: Driver) -> str:
        session = ScriptedSession("pid", "one")
        await driver.run({}, session)
        return str(session.contents[-1][1])

    async with driver_of(folder, "Obey", sessions=2) as driver:
        pids = set(await asyncio.gather(*[pid(driver) for _ in range(12)]))
        assert 1 <= len(pids) <= 2
        [first] = {await pid(driver) for _ in range(3)}
        assert first in pids
        os.kill(int(first.removeprefix("pid ")), signal.SIGKILL)  # it dies while idle, which costs no episode
        assert await pid(driver) != first


async def test_what_an_episode_leaves_running_ends_with_it(folder: Path) -> None:
    async with driver_of(folder, "Obey", sessions=1) as driver:
        session = ScriptedSession("later", "tasks", "one")
        await driver.run({}, session)
        assert session.contents[-1] == ("user", "2 task")
        session = ScriptedSession("tasks", "one")
        await driver.run({}, session)
        assert session.contents[-1] == ("user", "1 task")


async def test_a_cancelled_episode_leaves_no_process(folder: Path, new_children: Children) -> None:
    mark = folder / "pid"
    async with driver_of(folder, "Obey", sessions=1) as driver:
        running = asyncio.create_task(driver.run({"mark": str(mark)}, ScriptedSession("hang with a child")))
        async with asyncio.timeout(ANSWER_SECONDS):
            while not (mark.exists() and mark.read_text()):  # noqa: ASYNC110 - the child announces itself in a file
                await asyncio.sleep(0.02)
        workers = new_children()
        assert int(mark.read_text()) in {process.pid for process in workers}
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        _, alive = psutil.wait_procs(workers, timeout=ANSWER_SECONDS)
        assert not alive
        assert await driver.run({}, ScriptedSession("one")) == Ending(Score(1.0), "done")
    assert not new_children()


async def test_episodes_that_are_cancelled_at_any_moment_leave_nothing(folder: Path, new_children: Children) -> None:
    random = Random(7)
    answers = ["one", "text", "raise", "_exit", "messages", "none"]
    num_files = psutil.Process().num_fds()
    num_done = num_cancelled = 0
    async with driver_of(folder, "Obey", sessions=3) as driver:
        for _ in range(12):
            tasks = [
                asyncio.create_task(driver.run({}, ScriptedSession(*random.choices(answers, k=3)))) for _ in range(4)
            ]
            for task in tasks[:2]:
                await asyncio.sleep(random.choice([0.0, 0.01, 0.05, 0.2]))
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            num_done += sum(isinstance(each, Ending) for each in ended)
            num_cancelled += sum(isinstance(each, asyncio.CancelledError) for each in ended)
            assert len(new_children()) <= 3
        assert await driver.run({}, ScriptedSession("one")) == Ending(Score(1.0), "done")
    assert (num_done + num_cancelled, num_done >= 24, num_cancelled > 0) == (48, True, True)
    assert not new_children()
    assert psutil.Process().num_fds() <= num_files + 1  # a selector may be new


async def test_nobody_is_left_when_the_driver_ends(folder: Path, new_children: Children) -> None:
    async with driver_of(folder, "Obey", sessions=3) as driver:
        await asyncio.gather(*[driver.run({}, ScriptedSession("one")) for _ in range(3)])
        assert new_children()
    assert not new_children()


async def test_tools_are_called_until_an_answer_without_calls(folder: Path) -> None:
    async with driver_of(folder, "Calculator") as driver:
        session = ScriptedSession(
            calls(("add", {"a": 2, "b": 3}), ("look", {"where": "here"})), calls(("add", '{"a": "4"}')), "It is 5."
        )
        assert await driver.run({"prompt": "2+3", "answer": "5"}, session) == Ending(Score(1.0), "done")
        assert session.contents == [
            ("user", "2+3"), ("assistant", ""), ("tool", "5"), ("tool", '{"where":"here"}'),
            ("assistant", ""), ("tool", "5"),
        ]  # fmt: skip
        assert session.messages[3]["tool_call_id"] == "call_1"
        assert [tool["function"]["name"] for tool in session.tools] == ["add", "look", "fail"]
        silent = await driver.run({"prompt": "2+3", "answer": "5"}, ScriptedSession("It is 5."))
        assert silent == Ending(Score(0.0), "done")


async def test_an_episode_does_not_begin_where_another_one_went(folder: Path) -> None:
    async with driver_of(folder, "Obey", sessions=1) as driver:
        told = []
        for wanted in ("chdir", "text"):
            session = ScriptedSession("pid", "where", wanted, "one")
            assert await driver.run({}, session) == Ending(Score(1.0), "done")
            told.append(session.contents)
    assert told[0][2] == told[1][2], "one process played both"
    assert told[0][4] == told[1][4]


async def test_wrong_calls_are_answered_and_counted(folder: Path) -> None:
    async with driver_of(folder, "Calculator") as driver:
        session = ScriptedSession(
            calls(("add", "{"), ("add", {}), ("nothing", {}), ("fail", {"how": "page"}), ("reset", {"answer": "0"})),
            calls(("add", {"a": 4})),
            "done",
        )
        ending = await driver.run({"prompt": "4+1", "answer": "5"}, session)
    assert ending == Ending(Score(1.0), "done", num_failed_tool_calls=5)
    texts = [content for role, content in session.contents if role == "tool"]
    assert texts[0].startswith("Error: the arguments of add are not JSON")
    assert texts[1] == "Error: the arguments of add do not fit: a: Field required"
    assert texts[2] == "Error: there is no tool nothing; expected one of add, look, fail"
    assert texts[3] == "Error: LookupError: no such page"
    assert texts[4] == "Error: there is no tool reset; expected one of add, look, fail"
    assert texts[5] == "5"


@pytest.mark.parametrize(
    ("how", "reason", "end"),
    [
        ("infrastructure", "tool fail: EpisodeFailedError: the sandbox is down (mine.py:", "failure"),
        ("memory", "tool fail: MemoryError (mine.py:", "failure"),
        ("exit", "tool fail: SystemExit: 1 (mine.py:", "failure"),
        ("bytes", "tool fail: returned bytes, which is no JSON: PydanticSerializationError", "failure"),
        ("hang", "tool fail was killed after 5 s (agent.call_timeout_seconds)", "timeout"),
    ],
)
async def test_what_is_no_fault_of_the_model_ends_the_episode(folder: Path, how: str, reason: str, end: str) -> None:
    async with driver_of(folder, "Calculator", call_timeout_seconds=5) as driver:
        ending = await driver.run({"prompt": "x", "answer": "5"}, ScriptedSession(calls(("fail", {"how": how}))))
    assert (ending.score.value, ending.end) == (None, end)
    assert reason in ending.score.failure


async def test_tools_that_are_cut_or_have_no_reward(folder: Path) -> None:
    async with driver_of(folder, "Calculator") as driver:
        ending = await driver.run({"prompt": "x", "answer": "5"}, ScriptedSession(calls(("add", {"a": 4}))))
        assert ending == Ending(Score(1.0), "max_turns")
    async with driver_of(folder, "Unscored") as driver:
        assert await driver.run({"prompt": "x"}, ScriptedSession("5")) == Ending(Score(0.0), "done"), "others score it"
        assert await driver.run({"prompt": "x"}, ScriptedSession(calls(("add", {})))) == Ending(
            Score(-1.0), "max_turns", 1
        )
    async with driver_of(folder, "Last") as driver:
        assert (await driver.run({"prompt": "x", "answer": "5"}, ScriptedSession("5"))).score == Score(1.0)
    with pytest.raises(ConfigError, match=r"mine:Unscored.*has no get_reward, and reward.functions names environment"):
        await check_environment(section(folder, "Unscored"), needs_score=True)
    with pytest.raises(ConfigError, match=r"mine:Calculator.*agent.template is plain, which has no form for tools"):
        await check_environment(section(folder, "Calculator", template="plain"), needs_score=True)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ("nan", "get_reward: returned nan; expected a finite number"),
        ("text", "get_reward: returned str; expected a number"),
        ("none", "get_reward: returned NoneType; expected a number"),
        ("raise", "get_reward: ZeroDivisionError: division by zero (mine.py:"),
    ],
)
async def test_a_get_reward_that_lies_is_a_failure(folder: Path, lie: str, reason: str) -> None:
    async with driver_of(folder, "Counted") as driver:
        ending = await driver.run({"lie": lie}, ScriptedSession("text"))
    assert (ending.score.value, ending.end) == (None, "failure")
    assert reason in ending.score.failure


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("absent:Guess", None, "it cannot be imported: ModuleNotFoundError: No module named 'absent'"),
        ("broken:Guess", "import json\nimport no_such_library", "No module named 'no_such_library' (broken.py:2)"),
        ("broken:Guess", "x = 1 / 0", "it cannot be imported: ZeroDivisionError: division by zero (broken.py:1)"),
        ("broken:Guess", "def f(:\n", "it cannot be imported: SyntaxError: invalid syntax (broken.py, line 1)"),
        ("broken:Guess", "raise SystemExit(4)", "it cannot be imported: SystemExit: 4 (broken.py:1)"),
        ("broken:Guess", "import os\nprint('bye')\nos._exit(3)", "ended with exit code 3; it wrote: bye"),
        ("broken:Guess", "number = 5", "broken has no 'Guess'"),
        ("broken:Guess", "Guess = 5", "it is a int; expected a class with reset and step"),
        ("broken:Guess", "class Guess:\n def look(self, x): ...", "the parameter 'x' of its tool 'look' has no type"),
        ("broken:Guess", "class Guess:\n def look(self, *x: int): ...", "its tool 'look' has a parameter *x: int"),
        ("broken:Guess", "class Guess:\n def step(self, text): ...", "it has step and no reset"),
    ],
)
async def test_an_environment_that_cannot_be_used_is_an_error_at_start(
    tmp_path: Path, name: str, source: str | None, reason: str, new_children: Children
) -> None:
    if source is not None:
        (tmp_path / "broken.py").write_text(source)
    with pytest.raises(ConfigError) as raised:
        await check_environment(AgentSection(environment=name, modules_path=str(tmp_path)), needs_score=True)
    assert str(raised.value).startswith(f"agent.environment names {name!r}")
    assert reason in str(raised.value)
    assert raised.value.exit_code == 2
    assert not new_children()


KILLED_AT_IMPORT = """
import os, pathlib, signal
imports = pathlib.Path(__file__).with_name("imports")
imports.write_text(imports.read_text() + "i")
if len(imports.read_text()) < {enough}:
    os.kill(os.getpid(), signal.SIGKILL)
class Guess:
    def reset(self): ...
    def step(self, text): ...
"""


@pytest.mark.parametrize(("enough", "num_imports"), [(3, 3), (9, 3)])
async def test_a_process_that_the_host_kills_at_start_is_no_fault_of_the_configuration(
    tmp_path: Path, enough: int, num_imports: int, new_children: Children
) -> None:
    (tmp_path / "imports").touch()
    (tmp_path / "killed.py").write_text(KILLED_AT_IMPORT.replace("{enough}", str(enough)))
    found = check_environment(AgentSection(environment="killed:Guess", modules_path=str(tmp_path)), needs_score=True)
    if enough == num_imports:
        assert (await found).kind == "steps"
    else:
        with pytest.raises(ConfigError, match=r"was killed by SIGKILL \(out of memory\?\)"):
            await found
    assert len((tmp_path / "imports").read_text()) == num_imports
    assert not new_children()


async def test_a_folder_that_does_not_exist_is_an_error_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"agent\.modules_path is .*expected an existing folder"):
        await check_environment(section(tmp_path / "absent", "Guess"), needs_score=True)


async def test_what_is_found_at_start(folder: Path) -> None:
    guess = await check_environment(section(folder, "Guess"), needs_score=True)
    assert guess == Environment("steps", "Guess 1-7 in three tries.")
    calculator = await check_environment(section(folder, "Calculator"), needs_score=True)
    assert (calculator.kind, calculator.has_get_reward, len(calculator.tools)) == ("tools", True, 3)
    assert calculator.tools[0]["function"]["parameters"]["properties"]["b"] == {"type": "integer", "default": 1}


async def test_a_module_that_breaks_later_is_the_episodes_failure(folder: Path) -> None:
    async with driver_of(folder, "Guess") as driver:
        (folder / "mine.py").write_text("x = 1 / 0")
        ending = await driver.run({"answer": "5"}, ScriptedSession("5"))
    assert ending.end == "failure"
    assert "ZeroDivisionError" in ending.score.failure
