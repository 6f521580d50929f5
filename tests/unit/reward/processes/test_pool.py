"""The pool with real worker processes, and functions that misbehave in every way."""

import asyncio
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from penstock.config import RewardSection
from penstock.errors import RewardError
from penstock_reward.processes.in_flight import InFlight
from penstock_reward.processes.messages import Call, Outcome
from penstock_reward.processes.pool import Pool, open_pool, split
from tests.patience import ANSWER_SECONDS

FUNCTIONS = '''
"""Functions of a user."""
import asyncio, ctypes, os, sys, time


def length(prompt, completion, answer, metadata):
    """How long the completion is.

    More text.
    """
    return len(completion)


def obey(prompt, completion, answer, metadata):
    """Obeys the completion."""
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "hang":
        time.sleep(600)
    if completion == "spin":
        while True:
            pass
    if completion == "library":
        import json
        return json.loads("no")
    if completion == "exit":
        sys.exit(7)
    if completion == "_exit":
        os._exit(7)
    if completion == "segfault":
        ctypes.string_at(0)
    if completion == "surrogate":
        raise ValueError("\\ud800")
    if completion == "unprintable":
        class Unprintable(Exception):
            def __str__(self):
                raise RuntimeError("no")
        raise Unprintable
    if completion == "print":
        print("hello from a function", flush=True)
        sys.stdout.write("no newline")
        return os.write(1, b"raw") - 2
    if completion == "close":
        os.closerange(3, 100)
        time.sleep(600)
    if completion == "stdin":
        return len(sys.stdin.read())
    if completion == "environment":
        return sum(key.startswith("PENSTOCK_") for key in os.environ)
    if completion == "mutate":
        return metadata.pop("value", 0.0)
    return RESULTS[completion]


class Half:
    shape = ()
    def item(self):
        return 0.5


RESULTS = {"nan": float("nan"), "inf": -float("inf"), "none": None, "text": "1", "huge": 10**400, "complex": 1j,
           "true": True, "false": False, "int": 3, "scalar": Half(), "one": 1.0}


async def slowly(prompt, completion, answer, metadata):
    """Async."""
    await asyncio.sleep(float(completion))
    return bool(completion)


def misses_some(prompt, completion):
    return 1.0


number = 5
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    (tmp_path / "ending.py").write_text("import os\nprint('about to end', flush=True)\nos._exit(3)\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(4)\n")
    return tmp_path


def section(folder: Path, *functions: str, **keys: Any) -> RewardSection:
    names = functions or ("mine:obey",)
    return RewardSection(
        functions=dict.fromkeys(names, 1.0), modules_path=str(folder), **{"timeout_seconds": ANSWER_SECONDS, **keys}
    )


async def run(pool: Pool, completions: Sequence[str], function: str = "mine:obey", **metadata: Any) -> list[Outcome]:
    calls = [Call(function, index) for index in range(len(completions))]
    return await pool.run("a prompt", completions, "an answer", metadata, calls)


async def test_results_come_in_order_and_results_that_are_no_number_fail(folder: Path) -> None:
    texts = ["one", "nan", "inf", "none", "text", "huge", "complex", "true", "false", "int", "scalar", "absent"]
    async with open_pool(section(folder)) as pool:
        outcomes = dict(zip(texts, await run(pool, texts), strict=True))
    values = {text: outcome.value for text, outcome in outcomes.items() if outcome.value is not None}
    assert values == {"one": 1.0, "true": 1.0, "false": 0.0, "int": 3.0, "scalar": 0.5}
    reasons = {text: (outcome.kind, outcome.reason) for text, outcome in outcomes.items() if outcome.kind}
    assert reasons["nan"] == ("not_a_number", "returned nan; expected a finite number")
    assert reasons["inf"] == ("not_a_number", "returned -inf; expected a finite number")
    assert reasons["huge"] == ("not_a_number", "returned inf; expected a finite number")
    assert reasons["none"] == ("not_a_number", "returned NoneType; expected a number")
    assert reasons["text"] == ("not_a_number", "returned str; expected a number")
    assert reasons["complex"] == ("not_a_number", "returned complex; expected a number")
    assert reasons["absent"][1].startswith("KeyError: 'absent' (mine.py:")


async def test_what_a_function_raises_is_the_reason(folder: Path) -> None:
    texts = ["raise", "library", "exit", "surrogate", "unprintable", "one"]
    async with open_pool(section(folder)) as pool:
        raised, library, left, surrogate, unprintable, after = await run(pool, texts)
    assert (raised.kind, left.kind) == ("exception", "exception")
    assert raised.reason.startswith("KeyError: 'no such thing' (mine.py:")
    assert re.search(r" \(mine\.py:\d+; raised at json/decoder\.py:\d+\)$", library.reason), library.reason
    assert left.reason.startswith("SystemExit: 7")
    assert surrogate.reason.startswith("ValueError: ?")
    assert unprintable.reason.startswith("Unprintable: <its message raises RuntimeError>")
    assert after.value == 1.0


async def test_calls_that_end_or_outlive_their_process_fail_alone(folder: Path) -> None:
    texts = ["one", "_exit", "one", "hang", "segfault", "spin", "close", "one"]
    async with open_pool(section(folder, timeout_seconds=2.5)) as pool:
        async with asyncio.timeout(ANSWER_SECONDS):
            outcomes = await run(pool, texts)
    assert [outcome.value for outcome in outcomes] == [1.0, None, 1.0, None, None, None, None, 1.0]
    assert [outcome.kind for outcome in outcomes] == [
        None, "died", None, "timeout", "died", "timeout", "timeout", None,
    ]  # fmt: skip
    assert outcomes[1].reason == "the worker process ended with exit code 7 during the call"
    assert outcomes[3].reason == "killed after 2.5 s (reward.timeout_seconds)"
    assert outcomes[3].seconds >= 2.4
    assert outcomes[4].reason == "the worker process was killed by SIGSEGV during the call"


async def test_the_deadline_is_per_call_not_per_group(folder: Path) -> None:
    async with open_pool(section(folder, "mine:slowly", timeout_seconds=3)) as pool:
        outcomes = await run(pool, ["0.8"] * 4, "mine:slowly")
    assert [outcome.value for outcome in outcomes] == [1.0] * 4


async def test_functions_may_print_and_it_reaches_the_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with open_pool(section(folder)) as pool:
            outcomes = await run(pool, ["print", "one", "stdin"])
    assert [outcome.value for outcome in outcomes] == [1.0, 1.0, 0.0]
    assert "hello from a function" in caplog.text
    assert "raw" in caplog.text


async def test_functions_see_no_secrets_and_cannot_change_each_others_metadata(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_TOKEN", "secret")
    async with open_pool(section(folder)) as pool:
        outcomes = await run(pool, ["environment", "mutate", "mutate"], value=2.0)
    assert [outcome.value for outcome in outcomes] == [0.0, 2.0, 2.0]


async def test_builtins_and_descriptions(folder: Path) -> None:
    async with open_pool(section(folder, "mine:length", "exact_match")) as pool:
        assert pool.descriptions["mine:length"] == "How long the completion is."
        assert pool.not_ready() is None
        [outcome] = await run(pool, ["an answer"], "exact_match")
        assert outcome.value == 1.0
        # A built-in that is not configured is loaded when a row names it; loading does not count against its deadline.
        [outcome] = await run(pool, ["12"], "math")
        assert outcome.reason.startswith("ValueError: the answer is 'an answer'") or outcome.value == 0.0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("broken:f", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("leaving:f", "SystemExit: 4"),
        ("mine:absent", "has no attribute 'absent'"),
        ("mine:number", "it is a int; expected a function"),
        ("mine:misses_some", "its parameters are (prompt, completion)"),
        ("ending:f", "ended with exit code 3; it wrote: about to end"),
    ],
)
async def test_a_function_that_cannot_be_loaded_is_an_error_at_start(folder: Path, function: str, reason: str) -> None:
    with pytest.raises(RewardError) as raised:
        async with open_pool(section(folder, function, num_workers=2)):
            pytest.fail("expected no pool")
    assert "reward.functions" in str(raised.value)
    assert function in str(raised.value)
    assert reason in str(raised.value)
    assert raised.value.exit_code == 2


async def test_a_missing_folder_is_an_error_at_start(folder: Path) -> None:
    with pytest.raises(RewardError, match=r"reward\.modules_path is .*expected an existing folder"):
        async with open_pool(section(folder / "absent", "mine:length")):
            pytest.fail("expected no pool")


async def test_metadata_that_cannot_be_packed_is_the_callers_error(folder: Path) -> None:
    async with open_pool(section(folder)) as pool:
        for metadata in ({"n": 2**70}, {"text": "\ud800"}):
            with pytest.raises(RewardError, match="cannot be packed"):
                await run(pool, ["one"], **metadata)
        assert (await run(pool, ["one"]))[0].value == 1.0


def test_calls_are_split_evenly() -> None:
    calls = [Call("f", index) for index in range(8)]
    assert [len(part) for part in split(calls, 1)] == [8]
    assert [len(part) for part in split(calls, 3)] == [3, 3, 2]
    assert [len(part) for part in split(calls, 100)] == [1] * 8
    assert split([], 3) == []


async def test_outcomes_are_known_at_once_and_calls_that_hang_are_seen_as_waiting(folder: Path) -> None:
    seen, answered, now = list[int](), asyncio.Event(), [0.0]
    calls = [Call("mine:obey", index) for index in range(3)]

    def on_outcome(call: Call, outcome: Outcome) -> None:
        seen.append(call.completion)
        answered.set()

    async with open_pool(section(folder)) as pool, asyncio.timeout(ANSWER_SECONDS):
        pool.in_flight = InFlight(lambda: now[0])
        running = asyncio.create_task(
            pool.run("", ["one", "hang", "one"], "", {}, calls, on_outcome=on_outcome),
        )
        await answered.wait()
        assert seen == [0]
        assert not running.done()
        now[0] = 20.0
        assert pool.in_flight.describe() == "mine:obey: 2 calls wait, the oldest for 20 s"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_call_that_tests_a_function_comes_before_those_that_wait(folder: Path) -> None:
    order: list[str] = []

    async def call(pool: Pool, name: str, *, is_test: bool = False) -> None:
        await pool.run("", ["int"], "", {}, [Call("mine:obey", 0)], is_test=is_test)
        order.append(name)

    async with open_pool(section(folder, num_workers=1)) as pool, asyncio.timeout(ANSWER_SECONDS):
        await asyncio.gather(*(call(pool, name) for name in ("a", "b", "c")), call(pool, "test", is_test=True))
    assert order.index("test") < order.index("b")
