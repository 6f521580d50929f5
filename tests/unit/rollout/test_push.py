"""The HTTP answers to a push."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from penstock.contracts.services import Announcement
from penstock_rollout.app import make_rollout_app
from tests.unit.rollout.weights.updater_setup import Rollout, updating_rollout


@pytest.fixture
async def rollout(tmp_path: Path) -> AsyncIterator[Rollout]:
    async with updating_rollout(tmp_path) as rollout:
        yield rollout


@pytest.fixture
async def http(rollout: Rollout) -> AsyncIterator[httpx.AsyncClient]:
    app = make_rollout_app(rollout.engine, rollout.weights, rollout.metrics.registry, SecretStr("secret"))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://rollout", headers={"Authorization": "Bearer secret"}
    ) as client:
        yield client


def push(wanted: Announcement) -> tuple[str, dict[str, object]]:
    body = {"digest": wanted.identity.digest, "path": wanted.path, "lease": wanted.lease}
    return f"/v1/weights/{wanted.identity.number}", body


async def test_a_push_answers_with_what_is_served(rollout: Rollout, http: httpx.AsyncClient) -> None:
    assert (await http.get("/ready")).status_code == 503
    wanted = rollout.staged(3)
    url, body = push(wanted)
    expected = {
        "policy_version": 3,
        "checksum": wanted.identity.digest,
        "state": "serving",
        "engine": "sglang 0.5.21",
        "engine_starts": 1,
        "engine_device": "cuda",
        "engine_num_ranks": 1,
    }
    answer = await http.put(url, json=body)
    expected["paused_seconds"] = rollout.weights.paused_seconds
    assert (answer.status_code, answer.json()) == (200, expected)
    assert 0 < rollout.weights.paused_seconds < 60
    assert (await http.get("/v1/weight_version")).json() == expected
    assert (await http.get("/ready")).status_code == 200
    assert b"penstock_rollout_policy_version 3.0" in (await http.get("/metrics")).content


@pytest.mark.parametrize(("had_weights", "status"), [(False, 503), (True, 200)])
async def test_a_server_that_replaces_its_weights_stays_ready(
    rollout: Rollout, http: httpx.AsyncClient, had_weights: bool, status: int
) -> None:
    if had_weights:
        await rollout.weights.update(rollout.staged(1))
    rollout.fake.may_load.clear()
    url, body = push(rollout.staged(2))
    update = asyncio.create_task(http.put(url, json=body))
    while rollout.weights.state != "updating":  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    while rollout.weights.identity is not None:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert (await http.get("/ready")).status_code == status
    rollout.fake.may_load.set()
    assert (await update).status_code == 200
    assert (await http.get("/ready")).status_code == 200


async def test_each_failure_of_a_push_has_its_status(rollout: Rollout, http: httpx.AsyncClient) -> None:
    url, body = push(rollout.staged(3))
    assert (await http.put(url, json={**body, "path": str(rollout.root / "nowhere")})).status_code == 422
    assert (await http.put(url, json={**body, "typo": 1})).status_code == 422
    answer = await http.put(url, json={**body, "source": {"transport": "pigeon"}})
    assert (answer.status_code, answer.json()["error"]) == (422, "weights")
    assert "pigeon" in answer.json()["detail"]
    assert (await http.put(url, json=body, headers={"Authorization": "Bearer wrong"})).status_code == 401
    await http.put(url, json=body)
    old_url, old_body = push(rollout.staged(2))
    assert (await http.put(old_url, json=old_body)).status_code == 409
    rollout.fake.may_load.clear()
    url, body = push(rollout.staged(4))
    other_url, other_body = push(rollout.staged(5))
    pushes = [asyncio.create_task(http.put(to, json=what)) for to, what in ((url, body), (other_url, other_body))]
    ended, loading = await asyncio.wait(pushes, return_when=asyncio.FIRST_COMPLETED)  # either may come first
    refused = ended.pop().result()
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) > 0
    rollout.fake.may_load.set()
    assert (await loading.pop()).status_code == 200
    rollout.fake.fail_load = "shape"
    url, body = push(rollout.staged(6))
    answer = await http.put(url, json=body)
    assert (answer.status_code, answer.json()["error"]) == (502, "engine_rejected")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"digest": "short"}, "digest"),
        ({"path": ""}, "path"),
        ({"lease": -1}, "lease"),
        ({"canary": {"token_ids": [1], "logprobs": [], "tolerance": 0.1}}, "expected at least 2"),
    ],
)
async def test_what_is_wrong_in_a_push_is_named(
    rollout: Rollout, http: httpx.AsyncClient, wrong: dict[str, object], named: str
) -> None:
    url, body = push(rollout.staged(3))
    answer = await http.put(url, json={**body, **wrong})
    assert (answer.status_code, answer.json()["error"]) == (422, "weights")
    assert named in answer.json()["detail"]
    assert (await http.put("/v1/weights/-1", json=body)).status_code == 422


async def test_pause_resume_and_generate(rollout: Rollout, http: httpx.AsyncClient) -> None:
    await http.put(push(rollout.staged(1))[0], json=push(rollout.staged(1))[1])
    assert (await http.post("/v1/pause")).json()["state"] == "paused"
    assert (await http.get("/ready")).status_code == 503
    assert (await http.post("/v1/resume")).json()["state"] == "serving"
    answer = await http.post("/v1/generate", json={"prompt_ids": [1, 2], "seeds": [3, 4], "max_new_tokens": 5})
    assert answer.status_code == 200
    assert [len(each["token_ids"]) for each in answer.json()["completions"]] == [5, 5]
