"""The HTTP answers to a push."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from penstock.contracts.services import Announcement
from penstock_rollout.app import make_rollout_app
from tests.unit.rollout.weights.updater_setup import Bench, weights_bench


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with weights_bench(tmp_path) as bench:
        yield bench


@pytest.fixture
async def http(bench: Bench) -> AsyncIterator[httpx.AsyncClient]:
    app = make_rollout_app(bench.engine, bench.weights, bench.metrics.registry, SecretStr("secret"))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://rollout", headers={"Authorization": "Bearer secret"}
    ) as client:
        yield client


def push(wanted: Announcement) -> tuple[str, dict[str, object]]:
    body = {"digest": wanted.identity.digest, "path": wanted.path, "lease": wanted.lease}
    return f"/v1/weights/{wanted.identity.number}", body


async def test_a_push_answers_with_what_is_served(bench: Bench, http: httpx.AsyncClient) -> None:
    assert (await http.get("/ready")).status_code == 503
    wanted = bench.staged(3)
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
    expected["paused_seconds"] = bench.weights.paused_seconds
    assert (answer.status_code, answer.json()) == (200, expected)
    assert 0 < bench.weights.paused_seconds < 60
    assert (await http.get("/v1/weight_version")).json() == expected
    assert (await http.get("/ready")).status_code == 200
    assert b"penstock_rollout_policy_version 3.0" in (await http.get("/metrics")).content


@pytest.mark.parametrize(("had_weights", "status"), [(False, 503), (True, 200)])
async def test_a_server_that_replaces_its_weights_stays_ready(
    bench: Bench, http: httpx.AsyncClient, had_weights: bool, status: int
) -> None:
    if had_weights:
        await bench.weights.update(bench.staged(1))
    bench.fake.may_load.clear()
    url, body = push(bench.staged(2))
    update = asyncio.create_task(http.put(url, json=body))
    while bench.weights.state != "updating":  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    while bench.weights.identity is not None:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert (await http.get("/ready")).status_code == status
    bench.fake.may_load.set()
    assert (await update).status_code == 200
    assert (await http.get("/ready")).status_code == 200


async def test_each_failure_of_a_push_has_its_status(bench: Bench, http: httpx.AsyncClient) -> None:
    url, body = push(bench.staged(3))
    assert (await http.put(url, json={**body, "path": str(bench.root / "nowhere")})).status_code == 422
    assert (await http.put(url, json={**body, "typo": 1})).status_code == 422
    answer = await http.put(url, json={**body, "source": {"transport": "pigeon"}})
    assert (answer.status_code, answer.json()["error"]) == (422, "weights")
    assert "pigeon" in answer.json()["detail"]
    assert (await http.put(url, json=body, headers={"Authorization": "Bearer wrong"})).status_code == 401
    await http.put(url, json=body)
    old_url, old_body = push(bench.staged(2))
    assert (await http.put(old_url, json=old_body)).status_code == 409
    bench.fake.may_load.clear()
    url, body = push(bench.staged(4))
    other_url, other_body = push(bench.staged(5))
    pushes = [asyncio.create_task(http.put(to, json=what)) for to, what in ((url, body), (other_url, other_body))]
    ended, loading = await asyncio.wait(pushes, return_when=asyncio.FIRST_COMPLETED)  # either may be taken up first
    refused = ended.pop().result()
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) > 0
    bench.fake.may_load.set()
    assert (await loading.pop()).status_code == 200
    bench.fake.fail_load = "shape"
    url, body = push(bench.staged(6))
    answer = await http.put(url, json=body)
    assert (answer.status_code, answer.json()["error"]) == (502, "engine_rejected")


async def test_pause_resume_and_generate(bench: Bench, http: httpx.AsyncClient) -> None:
    await http.put(push(bench.staged(1))[0], json=push(bench.staged(1))[1])
    assert (await http.post("/v1/pause")).json()["state"] == "paused"
    assert (await http.get("/ready")).status_code == 503
    assert (await http.post("/v1/resume")).json()["state"] == "serving"
    answer = await http.post("/v1/generate", json={"prompt_ids": [1, 2], "seeds": [3, 4], "max_new_tokens": 5})
    assert answer.status_code == 200
    assert [len(each["token_ids"]) for each in answer.json()["completions"]] == [5, 5]
