"""The life of worker processes: they are killed with their children, replaced, and end with their parent."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from penstock.config import RewardSection
from penstock.workers.guard import GroupGuard
from penstock_reward.processes.messages import Call, Outcome
from penstock_reward.processes.pool import Pool, open_pool
from penstock_reward.processes.process import WorkerProcess
from tests.patience import ANSWER_SECONDS

FUNCTIONS = '''
"""Functions of a user."""
import os, subprocess, time


def obey(prompt, completion, answer, metadata):
    if completion == "hang":
        time.sleep(600)
    if completion == "mark":
        open(metadata["file"], "w").close()
        time.sleep(600)
    if completion == "spin":
        while True:
            pass
    if completion == "grandchild":
        child = subprocess.Popen(["sleep", "600"])
        with open(metadata["file"], "w") as file:
            print(child.pid, file=file)
        time.sleep(600)
    return 1


def pid(prompt, completion, answer, metadata):
    time.sleep(0.02)
    return os.getpid()
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return tmp_path


def section(folder: Path, *functions: str, **keys: Any) -> RewardSection:
    names = functions or ("mine:obey",)
    return RewardSection(
        functions=dict.fromkeys(names, 1.0), modules_path=str(folder), **{"timeout_seconds": ANSWER_SECONDS, **keys}
    )


async def run(pool: Pool, completions: Sequence[str], function: str = "mine:obey", **metadata: Any) -> list[Outcome]:
    calls = [Call(function, index) for index in range(len(completions))]
    return await pool.run("a prompt", completions, "an answer", metadata, calls)


async def test_the_children_of_a_killed_call_are_killed_too(folder: Path, tmp_path: Path) -> None:
    async with open_pool(section(folder, timeout_seconds=4)) as pool:
        [outcome] = await run(pool, ["grandchild"], file=str(tmp_path / "pid"))
    assert outcome.kind == "timeout"
    await gone(int((tmp_path / "pid").read_text()))


def alive(pid: int) -> bool:
    """False if the process is gone, or is a zombie that its parent has not reaped yet."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


async def gone(pid: int) -> None:
    async with asyncio.timeout(ANSWER_SECONDS):
        while alive(pid):  # noqa: ASYNC110 - a process that is not our child announces its end to nobody
            await asyncio.sleep(0.02)


async def test_several_workers_share_a_group(folder: Path) -> None:
    async with open_pool(section(folder, "mine:pid", num_workers=2)) as pool:
        await asyncio.sleep(0)
        pids = {outcome.value for outcome in await run(pool, ["x"] * 8, "mine:pid")}
    assert len(pids) == 2


async def test_a_process_that_dies_while_idle_costs_no_call(folder: Path) -> None:
    async with open_pool(section(folder, "mine:pid")) as pool:
        [first] = await run(pool, ["x"], "mine:pid")
        assert first.value is not None
        os.kill(int(first.value), signal.SIGKILL)
        [second] = await run(pool, ["x"], "mine:pid")
    assert second.value not in (None, first.value)


async def test_a_caller_that_gives_up_leaves_the_pool_working(folder: Path) -> None:
    async with open_pool(section(folder, timeout_seconds=5)) as pool:
        calling = asyncio.create_task(run(pool, ["mark"], file=str(folder / "mark")))
        while not (folder / "mark").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        [outcome] = await run(pool, ["one"])
    assert outcome.value == 1.0


async def test_the_loop_is_not_blocked_while_a_function_runs(folder: Path) -> None:
    async with open_pool(section(folder, timeout_seconds=1)) as pool:
        running = asyncio.create_task(run(pool, ["spin"]))
        num_turns = 0
        while not running.done():
            await asyncio.sleep(0.01)
            num_turns += 1
        assert (await running)[0].kind == "timeout"
    assert num_turns > 3  # about a hundred on an idle machine; one or two if the loop were blocked


async def test_math_calls_that_never_end_are_killed(tmp_path: Path) -> None:
    config = RewardSection(functions={"math": 1.0}, modules_path=str(tmp_path), timeout_seconds=6)
    async with open_pool(config) as pool:
        calls = [Call("math", index) for index in range(2)]
        tower, right = await pool.run("", ["$9^{9^{9^{9}}}$", "$7$"], "7", {}, calls)
    assert tower.kind == "timeout" or tower.value == 0.0
    assert right.value == 1.0


PARENT = """
import asyncio, sys
from penstock.config import RewardSection
from penstock_reward.processes.messages import Call
from penstock_reward.processes.pool import open_pool

async def main(folder):
    section = RewardSection(functions={"mine:pid": 1.0, "mine:obey": 1.0}, modules_path=folder, timeout_seconds=600)
    async with open_pool(section) as pool:
        [outcome] = await pool.run("", ["x"], "", {}, [Call("mine:pid", 0)])
        print(int(outcome.value), flush=True)
        await pool.run("", [sys.argv[2]], "", {"file": folder + "/pid"}, [Call("mine:obey", 0)])
        await asyncio.sleep(600)

asyncio.run(main(sys.argv[1]))
"""


def start_parent(folder: Path, completion: str) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", PARENT, str(folder), completion]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)


@pytest.mark.parametrize("busy", ["one", "spin"])
async def test_workers_die_with_their_parent(folder: Path, busy: str) -> None:
    with start_parent(folder, busy) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        await asyncio.sleep(0.2)
        parent.kill()
    await gone(worker)


async def test_what_functions_started_dies_with_the_parent_of_their_workers(folder: Path) -> None:
    started = folder / "pid"
    with start_parent(folder, "grandchild") as parent:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                while not (started.exists() and started.read_text().endswith("\n")):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        finally:
            parent.kill()
    await gone(int(started.read_text()))


# arc_agi compares with tuples, which no message can carry: its own answers would score 0.05.
# Its library leaves files open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("task", ["chain_sum", "countdown", "arc_agi", "rearc"])
async def test_reasoning_gym_accepts_its_own_answer(task: str, tmp_path: Path) -> None:
    import reasoning_gym

    [entry] = list(reasoning_gym.create_dataset(task, size=1, seed=1))
    carried = msgspec.msgpack.decode(msgspec.msgpack.encode(entry))
    texts = [entry["answer"], f"so <answer>{entry['answer']}</answer>", "no"]
    async with open_pool(RewardSection(functions={"reasoning_gym": 1.0}, modules_path=str(tmp_path))) as pool:
        right, tagged, wrong = await run(pool, texts, "reasoning_gym", task=task, entry=carried)
    assert (right.value, tagged.value) == (1.0, 1.0)
    assert wrong.value is not None
    assert wrong.value < 1


async def test_reasoning_gym_without_its_entry_is_the_rows_fault(tmp_path: Path) -> None:
    async with open_pool(RewardSection(functions={"reasoning_gym": 1.0}, modules_path=str(tmp_path))) as pool:
        [outcome] = await run(pool, ["7"], "reasoning_gym", task="chain_sum")
    assert outcome.kind == "exception"
    assert "reasoning_gym expected `task`" in outcome.reason


async def test_a_close_that_is_cancelled_while_threads_are_busy_still_reaps() -> None:
    loop, busy = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(ThreadPoolExecutor(max_workers=1))
    blocked = loop.run_in_executor(None, busy.wait)
    with GroupGuard() as guard:
        process = WorkerProcess(timeout_seconds=1, guard=guard)
        closing = asyncio.create_task(process.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
    busy.set()
    await blocked
    await loop.shutdown_default_executor()
    assert not psutil.pid_exists(process.pid)
