"""Calls of the model: which weights answer them, what becomes of them at updates, and when they are refused."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from penstock.contracts import PolicyIdentity, VersionSpan, pack_float32, unpack_float32
from penstock.contracts.canary import Canary
from penstock.contracts.generation import AtLeast, GenerateAnswer, GeneratedCompletion, GenerateRequest
from penstock.errors import EngineBusyError, WeightsError, WeightsMismatchError
from penstock_rollout import calls
from penstock_rollout.calls import RESERVED_CONNECTIONS, make_admission
from penstock_rollout.weights.version_order import serves_at_least
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.fake_model import next_token, token_logprob
from tests.unit.rollout.weights.updater_setup import CANARY_TOKENS, MAX_CALLS, Rollout, until, updating_rollout


@pytest.fixture
async def rollout(tmp_path: Path) -> AsyncIterator[Rollout]:
    async with updating_rollout(tmp_path) as rollout:
        yield rollout
        rollout.fake.open()


@pytest.fixture
async def http(rollout: Rollout) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(rollout.app())
    async with httpx.AsyncClient(transport=transport, base_url="http://rollout") as client:
        yield client


def wanted(number: int = 1, lease: int = 1, num_tokens: int = 4, seed: int = 3) -> GenerateRequest:
    return GenerateRequest((1, 2), (seed,), max_new_tokens=num_tokens, at_least=AtLeast(number, lease))


async def post(http: httpx.AsyncClient, request: GenerateRequest) -> httpx.Response:
    return await http.post("/v1/generate", content=msgspec.json.encode(request))


def only(answer: GenerateAnswer) -> GeneratedCompletion:
    (completion,) = answer.completions
    return completion


def spans_of(rollout: Rollout, *ends: tuple[int, int]) -> tuple[VersionSpan, ...]:
    """(version, end) of each."""
    starts = [0, *(end for _, end in ends)]
    return tuple(
        VersionSpan(rollout.staged(version).identity, start, end)
        for (version, end), start in zip(ends, starts, strict=False)
    )


def check(rollout: Rollout, completion: GeneratedCompletion, *ends: tuple[int, int], seed: int = 3) -> None:
    """It is what was never cut, with each token's log-probability by the version that its span names."""
    assert completion.version_spans() == spans_of(rollout, *ends)
    tokens: list[int] = []
    for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
        made_by = next(version for version, end in ends if len(tokens) < end)
        assert token == next_token([1, 2, *tokens], seed)
        assert [logprob] == unpack_float32(pack_float32([token_logprob(token, f"{made_by}-")]))
        tokens.append(token)


async def test_an_answer_names_the_weights_that_made_it_in_full(rollout: Rollout, http: httpx.AsyncClient) -> None:
    await rollout.weights.update(rollout.staged(1))
    rollout.fake.cached_tokens = 1
    answer = await post(http, wanted())
    assert answer.status_code == 200
    (completion,) = answer.json()["completions"]
    digest = rollout.staged(1).identity.digest
    assert completion["spans"] == [[f"1-{digest}", 0, 4]]
    assert (len(digest), completion["cached_tokens"], completion["finish_reason"]) == (16, 1, "length")
    assert rollout.sample("completion_tokens_total") == 4
    assert rollout.sample("prompt_tokens_total") == 2
    assert rollout.sample("cached_prompt_tokens_total") == 1
    assert rollout.sample("groups_total", outcome="published") == 1


@pytest.mark.parametrize(
    ("number", "lease", "serves"),
    [(3, 2, True), (2, 2, True), (4, 2, False), (3, 3, False), (0, 3, False), (9, 1, True)],
)
def test_which_weights_will_do(number: int, lease: int, serves: bool) -> None:
    """As for tickets: a trainer that has taken over may go on from an earlier version."""
    identity = PolicyIdentity(3, "9f86d081884c7d65")
    assert serves_at_least(identity, 2, AtLeast(number, lease)) is serves
    assert not serves_at_least(None, 2, AtLeast(number, lease))


async def test_weights_that_are_too_old_are_refused_until_they_are_newer(
    rollout: Rollout, http: httpx.AsyncClient
) -> None:
    async def said(request: GenerateRequest) -> str:
        answer = await post(http, request)
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert answer.json()["error"] == "engine_busy"
        return str(answer.json()["detail"])

    assert "no weights were loaded yet" in await said(wanted())
    await rollout.weights.update(rollout.staged(1))
    assert "expected version 2 of lease 1" in await said(wanted(2))
    assert "expected version 0 of lease 2" in await said(wanted(0, lease=2))
    await rollout.weights.update(rollout.staged(2))
    assert (await post(http, wanted(2))).status_code == 200
    await rollout.weights.pause()
    assert "paused" in await said(wanted())
    await rollout.weights.resume()
    broken = rollout.staged(3)
    (Path(broken.path) / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError):
        await rollout.weights.update(broken)
    assert "the last update failed" in await said(wanted())
    rollout.server.die()
    await until(lambda: not rollout.engine.up.is_set())
    assert "started again" in await said(wanted())
    assert rollout.sample("refused_calls_total") == 6


async def test_without_a_version_people_are_answered_by_whatever_the_engine_holds(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/generate", json={"prompt_ids": [1, 2], "max_new_tokens": 2})
    assert answer.status_code == 200
    assert answer.json()["completions"][0]["spans"] == [["default", 0, 2]]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("{", "truncated"),
        ('{"prompt_ids": []}', "prompt_ids"),
        ('{"prompt_ids": [1], "typo": 1}', "typo"),
        ('{"prompt_ids": [1], "at_least": {"number": 1}}', "lease"),
        ('{"prompt_ids": [1], "seeds": [-1]}', "seeds"),
        ('{"prompt_ids": ["1"]}', "prompt_ids"),
    ],
)
async def test_what_is_wrong_in_a_call_is_named(http: httpx.AsyncClient, body: str, named: str) -> None:
    answer = await http.post("/v1/generate", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]) == (422, "invalid_request")
    assert named in answer.json()["detail"]


@pytest.mark.parametrize("mode", ["retract", "abort"])
async def test_a_call_that_runs_outlives_updates(rollout: Rollout, mode: str) -> None:
    rollout.use(pause_mode=mode)
    await rollout.weights.update(rollout.staged(1))
    rollout.fake.holds_at = 3
    answering = asyncio.create_task(rollout.calls.answer(wanted(num_tokens=8)))
    await until(lambda: rollout.fake.num_held == 1)
    updating = asyncio.create_task(rollout.weights.update(rollout.staged(2)))
    if mode == "retract":
        await until(lambda: not rollout.fake.going_on.is_set())
        rollout.fake.holds_at = -1
    await updating
    rollout.fake.holds_at = -1
    check(rollout, only(await answering), (1, 3), (2, 8))


async def test_no_answer_leaves_before_the_canary_has_decided(rollout: Rollout) -> None:
    await rollout.weights.update(rollout.watched(1))
    rollout.fake.holds_at = 3
    answering = asyncio.create_task(rollout.calls.answer(wanted(num_tokens=8)))
    await until(lambda: rollout.fake.num_held == 1)
    rollout.fake.may_probe.clear()
    updating = asyncio.create_task(rollout.weights.update(rollout.watched(2)))
    await until(lambda: rollout.fake.weight_version.startswith("2-") and rollout.fake.going_on.is_set())
    rollout.fake.holds_at = -1
    await until(lambda: rollout.fake.num_running == 0)
    await asyncio.sleep(0.1)
    assert not answering.done()
    rollout.fake.may_probe.set()
    await updating
    check(rollout, only(await answering), (1, 3), (2, 8))


async def test_what_a_rejected_version_may_have_made_is_no_answer(rollout: Rollout, http: httpx.AsyncClient) -> None:
    """502: the agent service asks again."""
    await rollout.weights.update(rollout.watched(1))
    rollout.fake.holds_at = 3
    answering = asyncio.create_task(post(http, wanted(num_tokens=8)))
    await until(lambda: rollout.fake.num_held == 1)
    rollout.fake.may_probe.clear()
    good = rollout.watched(2)
    assert good.canary is not None
    wrong = Canary(CANARY_TOKENS, tuple(value - 1 for value in good.canary.logprobs), tolerance=0.01)
    updating = asyncio.create_task(rollout.weights.update(msgspec.structs.replace(good, canary=wrong)))
    await until(lambda: rollout.fake.weight_version.startswith("2-") and rollout.fake.going_on.is_set())
    rollout.fake.holds_at = -1
    await until(lambda: rollout.fake.num_running == 0)
    rollout.fake.may_probe.set()
    with pytest.raises(WeightsMismatchError):
        await updating
    assert (await answering).status_code == 502


async def test_a_call_waits_for_an_update_and_not_for_long(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    await rollout.weights.update(rollout.staged(1))
    rollout.fake.may_load.clear()
    updating = asyncio.create_task(rollout.weights.update(rollout.staged(2)))
    await until(lambda: rollout.weights.identity is None)
    patient = asyncio.create_task(rollout.calls.answer(wanted(2)))
    await asyncio.sleep(0)
    monkeypatch.setattr(calls, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(EngineBusyError, match="new weights are being loaded"):
        await rollout.calls.answer(wanted())
    assert not patient.done()
    rollout.fake.may_load.set()
    await updating
    check(rollout, only(await patient), (2, 4))


async def test_the_trainers_turn_cuts_a_call_and_refuses_later_ones(rollout: Rollout) -> None:
    """With `trainer.take_turns`: the call goes on with the weights of the push that ends the turn."""
    await rollout.weights.update(rollout.staged(1))
    rollout.fake.holds_at = 3
    answering = asyncio.create_task(rollout.calls.answer(wanted(num_tokens=8)))
    await until(lambda: rollout.fake.num_held == 1)
    await rollout.weights.sleep(1)
    rollout.fake.holds_at = -1
    with pytest.raises(EngineBusyError, match="the trainer's turn"):
        await rollout.calls.answer(wanted())
    assert rollout.fake.faults == []
    assert not answering.done()
    await rollout.weights.update(rollout.staged(2))
    check(rollout, only(await answering), (1, 3), (2, 8))
    check(rollout, only(await rollout.calls.answer(wanted())), (2, 4))


async def test_a_caller_that_goes_makes_room(rollout: Rollout) -> None:
    await rollout.weights.update(rollout.staged(1))
    rollout.fake.holds_at = 1
    running = [asyncio.create_task(rollout.calls.answer(wanted(seed=seed))) for seed in range(2 * MAX_CALLS)]
    await until(lambda: rollout.fake.num_held == MAX_CALLS)
    assert rollout.sample("waiting_calls") == MAX_CALLS
    assert rollout.sample("inflight_groups") == MAX_CALLS
    with pytest.raises(EngineBusyError, match="calls wait"):
        await rollout.calls.answer(wanted())
    for task in running[: MAX_CALLS + 2]:
        task.cancel()
    await until(lambda: rollout.fake.num_held == 2 * MAX_CALLS - 2)
    assert rollout.sample("groups_total", outcome="returned") == MAX_CALLS + 2
    rollout.fake.holds_at = -1
    for seed, task in list(enumerate(running))[MAX_CALLS + 2 :]:
        check(rollout, only(await task), (1, 4), seed=seed)


@pytest.mark.parametrize(("patience", "ends"), [(ANSWER_SECONDS, "answered"), (0.05, "refused")])
async def test_at_the_end_running_calls_finish_or_are_refused(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch, patience: float, ends: str
) -> None:
    monkeypatch.setattr(calls, "DRAIN_SECONDS", patience)
    await rollout.weights.update(rollout.staged(1))
    rollout.fake.holds_at = 1
    running = [asyncio.create_task(rollout.calls.answer(wanted())) for _ in range(MAX_CALLS + 1)]
    await until(lambda: rollout.fake.num_held == MAX_CALLS)
    stop = asyncio.Event()
    draining = asyncio.create_task(rollout.calls.drain_at(stop))
    stop.set()
    for refused in (running.pop(), asyncio.create_task(rollout.calls.answer(wanted()))):
        with pytest.raises(EngineBusyError, match="stops"):
            await refused
    if ends == "answered":
        assert not draining.done()
        rollout.fake.holds_at = -1
    for task in running:
        if ends == "answered":
            check(rollout, only(await task), (1, 4))
        else:
            with pytest.raises(EngineBusyError, match="stops"):
                await task
    await draining


async def failing(rollout: Rollout, http: httpx.AsyncClient, **switches: Any) -> tuple[int, str]:
    for name, value in switches.items():
        setattr(rollout.fake, name, value)
    answer = await post(http, wanted())
    return answer.status_code, answer.json()["error"]


async def test_each_failure_of_a_call_has_its_status(rollout: Rollout, http: httpx.AsyncClient) -> None:
    await rollout.weights.update(rollout.staged(1))
    assert (await post(http, wanted(num_tokens=1000))).json()["error"] == "engine_rejected"
    assert await failing(rollout, http, finish_reason="abort") == (502, "engine_aborted")
    assert await failing(rollout, http, finish_reason="length", answer=[{"text": ""}]) == (502, "engine")
    assert await failing(rollout, http, answer=None, die_on_generate=True) == (502, "engine_died")
    await until(lambda: rollout.engine.life == 2)
    for outcome in ("rejected", "aborted", "failed", "engine_died"):
        assert rollout.sample("groups_total", outcome=outcome) == 1
    assert rollout.sample("inflight_groups") == 0


async def test_weights_that_nobody_here_has_loaded_make_no_answer(rollout: Rollout, http: httpx.AsyncClient) -> None:
    """Somebody else has pushed to the engine."""
    await rollout.weights.update(rollout.staged(1))
    assert await failing(rollout, http, weight_version="7-strange") == (502, "engine")
    assert rollout.weights.state == "waiting"


def test_calls_leave_connections_for_pushes_and_probes() -> None:
    usual = make_admission(64, 512)
    assert (usual.max_running, usual.max_waiting) == (64, 64)
    for wide in (make_admission(300, 512), make_admission(4096, 512)):
        assert wide.max_running + wide.max_waiting == 512 - RESERVED_CONNECTIONS
    assert make_admission(64, 20).max_running == 1
