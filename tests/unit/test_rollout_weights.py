"""The rules of a weight update, and the HTTP answers to a push."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from penstock.broker import Announcement
from penstock.config import EngineSection, WeightsSection
from penstock.contracts import PolicyIdentity, Sampling, pack_int32
from penstock.errors import EngineDiedError, EngineError, WeightsBusyError, WeightsConflictError, WeightsError
from penstock_rollout.app import make_rollout_app
from penstock_rollout.engine.answers import completions
from penstock_rollout.engine.client import EngineClient
from penstock_rollout.engine.engine import Engine
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights import Weights
from tests.unit.test_rollout_fake_engine import FakeServer, FakeSGLang, serving, stage_weights


@dataclass
class Bench:
    fake: FakeSGLang
    server: FakeServer
    engine: Engine
    weights: Weights
    metrics: RolloutMetrics
    root: Path

    def staged(self, version: int, lease: int = 1, content: bytes = b"") -> Announcement:
        path, digest = stage_weights(self.root / f"{lease}", version, content)
        return Announcement(PolicyIdentity(version, digest), path, lease)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    fake = FakeSGLang()
    async with serving(fake) as url:
        server = FakeServer(fake, url)
        engine = Engine(server, EngineClient(EngineSection(request_timeout_seconds=5)))
        metrics = RolloutMetrics()
        weights = Weights(engine, WeightsSection(), metrics)
        stop = asyncio.Event()
        keeping = asyncio.create_task(engine.keep_engine(stop, weights.forget))
        await engine.up.wait()
        yield Bench(fake, server, engine, weights, metrics, tmp_path)
        stop.set()
        await keeping
        await engine.close()


CYCLE = ["/pause_generation", "/update_weights_from_disk", "/flush_cache", "/continue_generation"]


async def test_a_new_version_is_loaded_while_paused_and_flushed(bench: Bench) -> None:
    wanted = bench.staged(1)
    assert bench.weights.behind(wanted)
    await bench.weights.update(wanted)
    assert bench.fake.paths() == CYCLE
    assert bench.weights.identity == wanted.identity
    assert bench.weights.state == "serving"
    assert not bench.weights.behind(wanted)
    assert bench.metrics.registry.get_sample_value("penstock_rollout_policy_version") == 1
    count = "penstock_rollout_weight_update_duration_seconds_count"
    assert bench.metrics.registry.get_sample_value(count, {"transport": "disk"}) == 1


async def test_an_equal_push_changes_nothing(bench: Bench) -> None:
    await bench.weights.update(bench.staged(1))
    await bench.weights.update(bench.staged(1))
    assert bench.fake.paths() == CYCLE


async def test_an_older_version_of_the_same_lease_conflicts(bench: Bench) -> None:
    await bench.weights.update(bench.staged(2))
    with pytest.raises(WeightsConflictError, match="newer"):
        await bench.weights.update(bench.staged(1))
    with pytest.raises(WeightsConflictError, match="newer"):
        await bench.weights.update(bench.staged(2, content=b"others"))
    assert bench.weights.identity is not None
    assert bench.weights.identity.number == 2


async def test_a_higher_lease_loads_even_a_lower_version(bench: Bench) -> None:
    await bench.weights.update(bench.staged(5))
    wanted = bench.staged(3, lease=2, content=b"branch")
    assert bench.weights.behind(wanted)
    await bench.weights.update(wanted)
    assert bench.weights.identity == wanted.identity
    with pytest.raises(WeightsConflictError, match="another trainer"):
        await bench.weights.update(bench.staged(6))


async def test_two_updates_at_once_are_too_many(bench: Bench) -> None:
    bench.fake.load_seconds = 0.2
    first = asyncio.create_task(bench.weights.update(bench.staged(1)))
    while bench.weights.state != "updating":  # noqa: ASYNC110
        await asyncio.sleep(0)
    with pytest.raises(WeightsBusyError):
        await bench.weights.update(bench.staged(2))
    await first


@pytest.mark.parametrize("damage", ["missing", "other", "bytes"])
async def test_bytes_that_are_not_those_announced_touch_nothing(bench: Bench, damage: str) -> None:
    await bench.weights.update(bench.staged(1))
    bench.fake.calls.clear()
    wanted = bench.staged(2)
    file = Path(wanted.path) / "model.safetensors"
    if damage == "missing":
        wanted = Announcement(wanted.identity, str(bench.root / "nowhere"), 1)
    elif damage == "other":
        wanted = Announcement(PolicyIdentity(2, "f" * 16), wanted.path, 1)
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(WeightsError):
        await bench.weights.update(wanted)
    assert bench.fake.calls == []
    assert bench.weights.state == "serving"


@pytest.mark.parametrize("fault", ["refused", "another version", "too late"])
async def test_a_load_that_fails_half_way_restarts_the_engine(bench: Bench, fault: str) -> None:
    await bench.weights.update(bench.staged(1))
    bench.fake.calls.clear()
    if fault == "refused":
        bench.fake.fail_load = "shape mismatch"
    elif fault == "another version":
        bench.fake.lie_about_version = True
    else:
        bench.fake.load_seconds = 60
        bench.weights._section = WeightsSection(push_timeout_seconds=0.2)
    with pytest.raises((EngineError, TimeoutError)):
        await bench.weights.update(bench.staged(2))
    assert bench.weights.identity is None
    assert not bench.engine.up.is_set()
    assert "/continue_generation" not in bench.fake.paths()
    bench.fake.lie_about_version, bench.fake.load_seconds = False, 0
    await bench.engine.up.wait()
    assert bench.server.num_starts == 2
    assert bench.weights.state == "waiting"
    await bench.weights.update(bench.staged(2))


async def test_a_running_group_continues_with_the_new_weights(bench: Bench) -> None:
    bench.fake.token_seconds = 0.05
    first, second = bench.staged(1), bench.staged(2)
    await bench.weights.update(first)
    running = asyncio.create_task(bench.engine.client.generate(pack_int32([1]), (1, 2), Sampling(1.0, 8, ())))
    await bench.fake.running.wait()
    await asyncio.sleep(0.12)
    await bench.weights.update(second)
    for completion in completions(await running, bench.weights.known):
        assert [span.policy for span in completion.spans] == [first.identity, second.identity]


async def test_a_pause_on_request_outlives_an_update(bench: Bench) -> None:
    await bench.weights.pause()
    await bench.weights.update(bench.staged(1))
    assert (bench.weights.state, bench.fake.going_on.is_set()) == ("paused", False)
    await bench.weights.resume()
    assert (bench.weights.state, bench.fake.going_on.is_set()) == ("serving", True)


async def test_a_dead_engine_takes_no_push_and_forgets_its_weights(bench: Bench) -> None:
    await bench.weights.update(bench.staged(1))
    bench.server.die()
    while bench.engine.up.is_set():  # noqa: ASYNC110
        await asyncio.sleep(0)
    with pytest.raises(EngineDiedError):
        await bench.weights.update(bench.staged(2))
    await bench.engine.up.wait()
    assert bench.weights.identity is None


async def test_reports_about_an_earlier_engine_are_old_news(bench: Bench) -> None:
    bench.engine.report(bench.engine.epoch, "first")
    while bench.server.num_starts < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await bench.engine.up.wait()
    bench.engine.report(bench.engine.epoch - 1, "late")
    assert bench.engine.up.is_set()


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
    bench.fake.load_seconds = 1.0
    url, body = push(bench.staged(2))
    update = asyncio.create_task(http.put(url, json=body))
    while bench.weights.state != "updating":  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    while bench.weights.identity is not None:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert (await http.get("/ready")).status_code == status
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
    bench.fake.load_seconds = 1.0  # longer than a busy machine takes to send the other request
    url, body = push(bench.staged(4))
    other_url, other_body = push(bench.staged(5))
    answers = await asyncio.gather(http.put(url, json=body), http.put(other_url, json=other_body))
    taken, refused = sorted(answers, key=lambda answer: answer.status_code)  # either may be taken up first
    assert (taken.status_code, refused.status_code) == (200, 503)
    assert int(refused.headers["Retry-After"]) > 0
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
