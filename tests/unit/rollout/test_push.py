"""The HTTP answers to a push."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from penstock.contracts.services import Announcement
from tests.unit.rollout.weights.updater_setup import Rollout, updating_rollout


@pytest.fixture
async def rollout(tmp_path: Path) -> AsyncIterator[Rollout]:
    async with updating_rollout(tmp_path) as rollout:
        yield rollout


@pytest.fixture
async def http(rollout: Rollout) -> AsyncIterator[httpx.AsyncClient]:
    app = rollout.app(SecretStr("secret"))
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
    assert (answer.status_code, answer.json()["error"]) == (422, "engine_rejected")


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


def shared(**changed: object) -> dict[str, object]:
    """A push of shared memory: 4 bytes with one tensor."""
    tensors = [{"name": "w", "dtype": "bfloat16", "shape": [2]}]
    bucket = {"handle": "/torch_1", "num_bytes": 4, "tensors": tensors}
    source = {"transport": "tensor", "manager": "/tmp/manager", "buckets": [{**bucket, **changed}]}
    return {"source": {**source, **({"manager": changed["manager"]} if "manager" in changed else {})}}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"path": "/a\0b"}, "path"),
        ({"path": "/" + "a" * 5000}, "path"),
        ({"lease": 10**40}, "lease"),
        (shared(handle="/torch\0"), "handle"),
        (shared(handle="/" + "x" * 5000), "handle"),
        (shared(handle="../../etc/passwd"), "handle"),
        (shared(handle=".."), "handle"),
        (shared(manager="/tmp/\0"), "manager"),
        (shared(num_bytes=-1), "num_bytes"),
        (shared(num_bytes=3), "its tensors 4"),
        (shared(tensors=[{"name": "w", "dtype": "bfloat16", "shape": [-2]}]), "shape"),
        (shared(tensors=[{"name": "", "dtype": "bfloat16", "shape": [2]}]), "name"),
        ({"canary": {"token_ids": [-1, 5], "logprobs": [-1.0], "tolerance": 0.1}}, "token_ids"),
        ({"canary": {"token_ids": [1, 2**40], "logprobs": [-1.0], "tolerance": 0.1}}, "token_ids"),
        ({"canary": {"token_ids": [1, 2], "logprobs": [-1.0], "tolerance": -1}}, "tolerance"),
    ],
)
async def test_a_push_that_can_be_none_is_refused_and_touches_nothing(
    rollout: Rollout, http: httpx.AsyncClient, wrong: dict[str, object], named: str
) -> None:
    await rollout.weights.update(rollout.staged(1))
    url, body = push(rollout.staged(3))
    answer = await http.put(url, json={**body, **wrong})
    assert (answer.status_code, answer.json()["error"]) == (422, "weights")
    assert named in answer.json()["detail"]
    assert (rollout.weights.state, rollout.engine.life) == ("serving", 1)


@pytest.mark.parametrize("text", ['"\\ud800"', "NaN", "1e999"])
async def test_a_push_that_is_no_json_is_refused(rollout: Rollout, http: httpx.AsyncClient, text: str) -> None:
    content = f'{{"digest": "0123456789abcdef", "path": {text}, "lease": 1}}'
    answer = await http.put("/v1/weights/3", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert rollout.weights.state == "waiting"


@pytest.mark.parametrize(
    "wrong", [{"group": "g\0"}, {"address": ""}, {"port": 0}, {"port": 70000}, {"num_ranks": 1}, {"lease": -1}]
)
async def test_a_group_that_can_be_none_is_refused(
    rollout: Rollout, http: httpx.AsyncClient, wrong: dict[str, object]
) -> None:
    body = {"group": "g", "address": "10.0.0.1", "port": 4000, "num_ranks": 2, "backend": "gloo", "lease": 1}
    answer = await http.post("/v1/weights/group", json={**body, **wrong})
    assert (answer.status_code, answer.json()["error"]) == (422, "weights")
    assert rollout.engine.up.is_set()


@pytest.mark.parametrize(
    "wrong",
    [
        '"temperature": Infinity',
        '"temperature": 1e999',
        '"temperature": 1e300',
        '"temperature": NaN',
        '"max_new_tokens": 1000000000',
        '"max_new_tokens": 1' + "0" * 40,
        '"prompt_ids": [2147483647]',
        '"prompt_ids": [' + "1," * 100000 + "1]",
        '"stop_token_ids": [1073741824]',
    ],
)
async def test_what_cannot_be_generated_is_the_callers_mistake(
    rollout: Rollout, http: httpx.AsyncClient, wrong: str
) -> None:
    prompt = "" if "prompt_ids" in wrong else '"prompt_ids": [1], '
    content = f"{{{prompt}{wrong}}}"
    answer = await http.post("/v1/generate", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert rollout.engine.life == 1
    assert rollout.engine.up.is_set()


async def test_pause_resume_and_generate(rollout: Rollout, http: httpx.AsyncClient) -> None:
    await http.put(push(rollout.staged(1))[0], json=push(rollout.staged(1))[1])
    assert (await http.post("/v1/pause")).json()["state"] == "paused"
    assert (await http.get("/ready")).status_code == 503
    assert (await http.post("/v1/resume")).json()["state"] == "serving"
    answer = await http.post("/v1/generate", json={"prompt_ids": [1, 2], "seeds": [3, 4], "max_new_tokens": 5})
    assert answer.status_code == 200
    assert [len(each["token_ids"]) for each in answer.json()["completions"]] == [5, 5]
