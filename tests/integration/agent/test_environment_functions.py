"""Functions as environments: agents of a user that run in worker processes and call a gateway."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from penstock.config import AgentSection
from penstock.contracts import Score
from penstock_agent.environments.driving import check_environment, open_driver
from penstock_agent.environments.episode import Driver, Ending
from tests.integration.agent.scripted_gateway import scripted_gateway
from tests.patience import ANSWER_SECONDS

MODULE = '''
import asyncio, json, os, time, urllib.request


def call(method, url, api_key, body):
    headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method=method)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def ask(base_url, api_key, text):
    body = {"model": "policy", "messages": [{"role": "user", "content": text}]}
    answer = call("POST", f"{base_url}/chat/completions", api_key, body)
    return answer["choices"][0]["message"]["content"]


async def run(row, base_url, api_key):
    """Does what the row says, after one call of the model."""
    do = row.get("do", "")
    if do == "silent":
        return 1.0
    text = await asyncio.to_thread(ask, base_url, api_key, row["prompt"])
    if do == "twice":
        ask(base_url, api_key, "again")
    if do == "twice, caught":
        try:
            ask(base_url, api_key, "again")
        except OSError:
            return 0.75
    if do == "put" or do == "put, then cut":
        call("PUT", f"{base_url}/reward", api_key, {"reward": 0.5})
    if do == "put, then cut":
        ask(base_url, api_key, "again")
    if do in ("put", "none"):
        return None
    if do == "raise":
        raise KeyError("no such thing")
    if do == "_exit":
        os._exit(3)
    if do == "hang":
        open(row["mark"], "w").write(str(os.getpid()))
        await asyncio.sleep(600)
    if do == "secrets":
        return float(sum(key.startswith("PENSTOCK_") for key in os.environ))
    return RESULTS.get(do, float(text == row["answer"]))


def run_sync(row, base_url, api_key):
    return ask(base_url, api_key, row["prompt"]) == row["answer"]


RESULTS = {"nan": float("nan"), "text": "1"}
'''


@asynccontextmanager
async def driver_of(folder: Path, name: str = "run", **keys: Any) -> AsyncIterator[Driver]:
    (folder / "mine.py").write_text(MODULE)
    config = AgentSection(environment=f"mine:{name}", modules_path=str(folder), cut_score=-1.0, sessions=2, **keys)
    async with open_driver(config, await check_environment(config, needs_score=True)) as driver:
        yield driver


async def run(driver: Driver, do: str = "", **row: Any) -> Ending:
    with scripted_gateway("4") as session:
        return await driver.run({"prompt": "2+2", "answer": "4", "do": do, **row}, session)


@pytest.mark.parametrize("name", ["run", "run_sync"])
async def test_what_it_returns_is_the_score(tmp_path: Path, name: str) -> None:
    async with driver_of(tmp_path, name) as driver:
        assert await run(driver) == Ending(Score(1.0), "done")
        assert await run(driver, answer="5") == Ending(Score(0.0), "done")


async def test_every_way_to_end(tmp_path: Path) -> None:
    async with driver_of(tmp_path) as driver:
        assert await run(driver, "put") == Ending(Score(0.5), "done")
        assert await run(driver, "put, then cut") == Ending(Score(0.5), "max_turns")
        assert await run(driver, "twice") == Ending(Score(-1.0), "max_turns")
        assert await run(driver, "twice, caught") == Ending(Score(0.75), "max_turns")
        for do, reason in [
            ("none", "the agent gave no reward"),
            ("raise", "mine:run: KeyError: 'no such thing' (mine.py:"),
            ("_exit", "mine:run: the environment's process ended with exit code 3"),
            ("nan", "mine:run: returned nan; expected a finite number"),
            ("text", "mine:run: returned str; expected a number"),
            ("silent", "the agent ended without a call of the model; expected requests to OPENAI_BASE_URL"),
        ]:
            ending = await run(driver, do)
            assert (ending.score.value, ending.end) == (None, "failure"), do
            assert reason in ending.score.failure


async def test_it_has_no_deadline_but_its_callers_and_leaves_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    async with driver_of(tmp_path, call_timeout_seconds=0.2) as driver:
        running = asyncio.create_task(run(driver, "hang", mark=str(mark)))
        async with asyncio.timeout(ANSWER_SECONDS):
            while not (mark.exists() and mark.read_text()):  # noqa: ASYNC110 - it announces itself in a file
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        assert not running.done()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not psutil.pid_exists(int(mark.read_text()))


async def test_it_sees_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_TOKEN", "secret")
    async with driver_of(tmp_path) as driver:
        assert await run(driver, "secrets") == Ending(Score(0.0), "done")
