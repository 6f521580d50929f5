"""`agent.command`: programs of a user that call a gateway."""

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from penstock.config import AgentSection
from penstock.contracts import Score
from penstock.errors import ConfigError
from penstock_agent.environments.commands import MAX_VARIABLE_BYTES
from penstock_agent.environments.driving import check_environment, open_driver
from penstock_agent.environments.episode import Driver, Ending
from tests.integration.agent.conftest import Children
from tests.integration.agent.scripted_gateway import scripted_gateway
from tests.patience import ANSWER_SECONDS

PROGRAM = """
import json, os, subprocess, sys, time, urllib.request

row = json.load(sys.stdin)
if "PENSTOCK_ROW" in os.environ:
    assert json.loads(os.environ["PENSTOCK_ROW"]) == row


def call(method, path, body):
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
    url = os.environ["OPENAI_BASE_URL"] + path
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method=method)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def ask():
    body = {"model": "policy", "messages": [{"role": "user", "content": row["prompt"]}]}
    return call("POST", "/chat/completions", body)["choices"][0]["message"]["content"]


do = row["do"]
if do != "silent":
    text = ask()
if do == "put":
    call("PUT", "/reward", {"reward": 0.5})
    print("0.25")
elif do == "cut":
    ask()
elif do == "fail":
    sys.exit("what went wrong")
elif do == "children":
    for start in ("sh", "setsid sh"):  # each announces itself, the second one when it has left the group
        command = [*start.split(), "-c", "echo $$ >> $MARK; exec sleep 600"]
        subprocess.Popen(command, env={**os.environ, "MARK": row["mark"]})
        while not (os.path.exists(row["mark"]) and os.path.getsize(row["mark"])):
            time.sleep(0.01)
    while open(row["mark"]).read().count("\\n") < 2:
        time.sleep(0.01)
    if row.get("wait"):
        time.sleep(600)
    print(1)
elif do == "secrets":
    print([key for key in os.environ if key.startswith("PENSTOCK_") and key != "PENSTOCK_ROW"])
    print(os.path.basename(os.getcwd()) == row["folder"], int("PENSTOCK_ROW" in os.environ))
    print(1)
elif do == "right":
    print("thinking ...")
    print(float(text == row["answer"]), end="\\n\\n")
elif do != "silent":
    print(do)
"""


@asynccontextmanager
async def driver_of(folder: Path, *command: str) -> AsyncIterator[Driver]:
    (folder / "agent.py").write_text(PROGRAM)
    config = AgentSection(command=command or ("python", "agent.py"), modules_path=str(folder), cut_score=-1.0)
    async with open_driver(config, await check_environment(config, needs_score=True)) as driver:
        yield driver


async def run(driver: Driver, do: str, **row: Any) -> Ending:
    with scripted_gateway("4", name="the episode") as session:
        return await driver.run({"prompt": "2+2", "answer": "4", "do": do, **row}, session)


async def test_the_last_line_or_the_reward_that_it_put_is_the_score(tmp_path: Path) -> None:
    async with driver_of(tmp_path) as driver:
        assert await run(driver, "right") == Ending(Score(1.0), "done")
        assert await run(driver, "right", answer="5") == Ending(Score(0.0), "done")
        assert await run(driver, "put") == Ending(Score(0.5), "done")
        assert await run(driver, "cut") == Ending(Score(-1.0), "max_turns")


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        ("silent", "the agent ended without a call of the model; expected requests to OPENAI_BASE_URL"),
        ("fail", "the agent ended with exit code 1; it wrote: what went wrong"),
        ("", "the agent gave no reward: expected PUT {base_url}/reward"),
        ("a text", "or the last line of the program's output"),
        ("nan", "the agent gave the reward nan; expected a finite number"),
    ],
)
async def test_what_goes_wrong_is_a_failure_with_its_reason(tmp_path: Path, do: str, reason: str) -> None:
    async with driver_of(tmp_path) as driver:
        ending = await run(driver, do)
    assert (ending.score.value, ending.end) == (None, "failure")
    assert reason in ending.score.failure


async def test_a_program_that_does_not_read_its_row_or_wait_for_it(tmp_path: Path) -> None:
    async with driver_of(tmp_path, "python", "-c", "import os; os.close(0); print(1)") as driver:
        with scripted_gateway("4") as session:
            session.num_turns = 1
            ending = await driver.run({"prompt": "x" * 10_000_000}, session)
    assert ending == Ending(Score(1.0), "done")


async def test_a_long_row_comes_on_standard_input_alone(tmp_path: Path) -> None:
    async with driver_of(tmp_path) as driver:
        assert await run(driver, "right", more="x" * MAX_VARIABLE_BYTES) == Ending(Score(1.0), "done")
        assert await run(driver, "right", more="\u00e9" * 10) == Ending(Score(1.0), "done")


async def test_it_runs_in_the_users_folder_without_secrets_and_its_output_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PENSTOCK_TOKEN", "secret")
    with caplog.at_level(logging.INFO):
        async with driver_of(tmp_path) as driver:
            assert await run(driver, "secrets", folder=tmp_path.name) == Ending(Score(1.0), "done")
    assert "agent of the episode wrote: " in caplog.text
    assert "[]" in caplog.text
    assert "True 1" in caplog.text


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def children(mark: Path, number: int) -> list[int]:
    """The processes that announce themselves in a file."""

    def announced() -> list[int]:
        return [int(line) for line in mark.read_text().split()] if mark.exists() else []

    async with asyncio.timeout(ANSWER_SECONDS):
        while len(announced()) < number:  # noqa: ASYNC110 - a file announces nothing
            await asyncio.sleep(0.02)
    return announced()


async def gone(pid: int) -> None:
    async with asyncio.timeout(ANSWER_SECONDS):
        while alive(pid):  # noqa: ASYNC110 - a process that is not our child announces its end to nobody
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("cancelled", [False, True])
async def test_its_group_ends_with_it(
    tmp_path: Path,
    cancelled: bool,
    new_children: Children,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("penstock_agent.environments.commands.REAP_SECONDS", 1.0)
    mark = tmp_path / "pids"
    async with driver_of(tmp_path) as driver:
        running = asyncio.create_task(run(driver, "children", mark=str(mark), wait=cancelled))
        inside, outside = await children(mark, 2)  # one in its group, and one that left it
        try:
            if cancelled:
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
            else:
                assert await running == Ending(Score(1.0), "done")
            await gone(inside)
        finally:
            if alive(outside):
                psutil.Process(outside).kill()
        assert not new_children()
    assert "a process that it started outside of its group still runs" in caplog.text


async def test_a_program_that_vanishes_later_is_the_episodes_failure(tmp_path: Path) -> None:
    program = tmp_path / "agent"
    program.write_text("#!/bin/sh\necho 1\n")
    program.chmod(0o755)
    async with driver_of(tmp_path, "./agent") as driver:
        program.unlink()
        ending = await run(driver, "right")
    assert ending.end == "failure"
    assert "exit code 127; it wrote: cannot start ./agent: No such file" in ending.score.failure


@pytest.mark.parametrize("name", ["no_such_program", "./absent", "agent.py/x", "agent.py"])
async def test_a_program_that_is_not_there_is_an_error_at_start(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        async with driver_of(tmp_path, name):
            pytest.fail("expected no driver")
    assert f"agent.command starts {name!r}" in str(raised.value)
    assert "agent.modules_path" in str(raised.value)


async def test_the_row_is_json_on_standard_input(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "\u00e9"}], "answer": "", "level": 2}
    async with driver_of(tmp_path, "sh", "-c", "cat > row.json; echo 0.5") as driver:
        with scripted_gateway() as session:
            session.num_turns = 1
            assert await driver.run(row, session) == Ending(Score(0.5), "done")
    assert json.loads((tmp_path / "row.json").read_text()) == row


PARENT = """
import asyncio, json, sys
from penstock.config import AgentSection
from penstock_agent.environments.driving import check_environment, open_driver
from tests.unit.agent.environments.scripted_session import ScriptedSession


async def play(section):
    async with open_driver(section, await check_environment(section, needs_score=False)) as driver:
        await driver.run({}, ScriptedSession("text"))


asyncio.run(play(AgentSection(modules_path=sys.argv[1], **json.loads(sys.argv[2]))))
"""
ENVIRONMENT = """
import subprocess, time

class Sleeps:
    def reset(self):
        return "Well?"

    def step(self, text):
        subprocess.run(["sh", "-c", "echo $PPID > pid; echo $$ >> pid; exec sleep 600"])
"""


@pytest.mark.parametrize(
    "source",
    [
        {"command": ["sh", "-c", "echo $$ > pid; sh -c 'echo $$ >> pid; exec sleep 600'; true"]},
        {"environment": "sleeps:Sleeps"},
    ],
)
async def test_what_an_episode_started_dies_with_the_service(tmp_path: Path, source: dict[str, Any]) -> None:
    (tmp_path / "sleeps.py").write_text(ENVIRONMENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", PARENT, str(tmp_path), json.dumps(source)], env=environment, cwd=tmp_path
    )
    with parent:
        started = await children(tmp_path / "pid", 2)
        parent.kill()
    for process in started:
        await gone(process)
