"""Pushes without files: the calls to the engine, and the state after a broken push."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace

import httpx
import pytest

from penstock.config import EngineSection, WeightsSection
from penstock.contracts import PolicyIdentity
from penstock.contracts.services import Announcement
from penstock.contracts.weight_sources import CollectiveSource, GroupRequest, SharedBucket, TensorSource, TensorSpec
from penstock.errors import EngineError, WeightsConflictError, WeightsError
from penstock_rollout.app import make_rollout_app
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.sglang.client import SGLangClient
from penstock_rollout.engine.sglang.tensor_pickle import pickled_tensors
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights.loaders import make_loader
from penstock_rollout.weights.updater import WeightUpdater
from penstock_trainer.weight_sync.shared_memory import shared_memory, shared_name
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.test_fake_engine import FakeServer, FakeSGLang, serving
from tests.unit.rollout.weights.updater_setup import calls_of

MATRIX, VECTOR = TensorSpec("matrix", "bfloat16", (2, 3)), TensorSpec("vector", "bfloat16", (4,))
WANTED = Announcement(PolicyIdentity(3, "abcdef0123456789"), "/nowhere", 2)
IN_TWO = CollectiveSource("g", ((MATRIX,), (VECTOR,)))


class Rollout:
    """The weights of a rollout service, to which a trainer pushes."""

    def __init__(self, fake: FakeSGLang, server: FakeServer) -> None:
        self.fake, self.server, self.client = fake, server, SGLangClient(EngineSection())
        self.engine = engine = Engine(server, self.client)
        self.metrics = RolloutMetrics()
        self.weights = WeightUpdater(engine, WeightsSection(push_timeout_seconds=ANSWER_SECONDS), self.metrics)

    async def join(self, group: str = "g", lease: int = 2) -> None:
        await self.weights.join_group(GroupRequest(group, "10.0.0.1", 4000, 2, "gloo", lease))

    async def push(self, source: CollectiveSource | TensorSource = IN_TWO) -> None:
        await self.weights.update(WANTED, make_loader(source, self.engine))


@pytest.fixture
async def rollout() -> AsyncIterator[Rollout]:
    fake = FakeSGLang()
    async with serving(fake) as url:
        rollout = Rollout(fake, FakeServer(fake, url))
        engine = rollout.engine
        stop = asyncio.Event()
        keeping = asyncio.create_task(engine.keep_engine(stop, rollout.weights.forget))
        await engine.up.wait()
        yield rollout
        stop.set()
        await keeping
        await engine.close()


async def test_broadcasts_are_received_while_paused_bucket_by_bucket(rollout: Rollout) -> None:
    await rollout.join()
    assert rollout.fake.calls.pop() == (
        "/init_weights_update_group",
        {
            "master_address": "10.0.0.1",
            "master_port": 4000,
            "rank_offset": 1,
            "world_size": 2,
            "group_name": "g",
            "backend": "gloo",
        },
    )
    await rollout.push()
    update = "/update_weights_from_distributed"
    assert rollout.fake.paths() == [
        *("/pause_generation", "/set_internal_state", "/begin_weight_update", update, update),
        *("/end_weight_update", "/flush_cache", "/continue_generation"),
    ]
    first, last = [body for path, body in rollout.fake.calls if path == update]
    assert (first["names"], first["dtypes"], first["shapes"]) == (["matrix"], ["bfloat16"], [[2, 3]])
    assert (first["weight_version"], last["weight_version"]) == (None, str(WANTED.identity))
    assert first["group_name"] == last["group_name"] == "g"
    assert rollout.weights.identity == WANTED.identity
    assert 0 < rollout.weights.paused_seconds < 60
    count = "penstock_rollout_weight_update_duration_seconds_count"
    assert rollout.metrics.registry.get_sample_value(count, {"transport": "nccl"}) == 1


async def test_shared_memory_is_named_and_not_copied_into_the_request(rollout: Rollout) -> None:
    manager, handle, num_bytes = shared_name(shared_memory(20))
    bucket = SharedBucket(handle, num_bytes, (MATRIX, VECTOR))
    await rollout.push(TensorSource(manager, (bucket,)))
    (body,) = [body for path, body in rollout.fake.calls if path == "/update_weights_from_tensor"]
    assert body["serialized_named_tensors"] == [base64.b64encode(pickled_tensors(manager, bucket)).decode()]
    assert rollout.weights.identity == WANTED.identity


async def test_a_push_in_a_group_that_the_engine_is_not_in_touches_nothing(rollout: Rollout) -> None:
    with pytest.raises(WeightsError, match=r"in the group '', not in 'g'.*POST /v1/weights/group"):
        await rollout.push()
    await rollout.join("g")
    rollout.engine.report(rollout.engine.life, "lost")
    while rollout.server.num_starts < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await rollout.engine.up.wait()
    rollout.fake.calls.clear()
    with pytest.raises(WeightsError, match="started anew"):
        await rollout.push()
    assert rollout.fake.calls == []
    assert rollout.engine.up.is_set()


async def test_shared_memory_of_another_host_touches_nothing(rollout: Rollout) -> None:
    with pytest.raises(WeightsError, match="on one; expected disk or nccl"):
        await rollout.push(TensorSource("/tmp/manager", (SharedBucket("/torch_not_here", 20, (MATRIX, VECTOR)),)))
    assert rollout.fake.calls == []


async def test_a_new_group_replaces_the_old_one(rollout: Rollout) -> None:
    await rollout.join("old")
    await rollout.join("new")
    assert rollout.fake.calls[1] == ("/destroy_weights_update_group", {"group_name": "old"})
    assert rollout.engine.group == "new"


async def test_an_engine_that_hangs_in_a_group_is_started_again(rollout: Rollout) -> None:
    rollout.client.connection.control_timeout_seconds = 0.5
    rollout.fake.join_seconds = 30
    with pytest.raises(TimeoutError, match=r"did not answer /init_weights_update_group in 0\.5 s"):
        await rollout.join()
    assert rollout.engine.group == ""
    while rollout.server.num_starts < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_a_bucket_that_fails_ends_the_engine(rollout: Rollout) -> None:
    await rollout.join()
    rollout.fake.fail_load = "Failed to receive weights: Connection closed by peer"
    with pytest.raises(EngineError, match="Connection closed"):
        await rollout.push()
    assert rollout.weights.identity is None
    assert not rollout.engine.up.is_set()
    assert "/continue_generation" not in rollout.fake.paths()


async def test_the_whole_load_has_one_deadline(rollout: Rollout) -> None:
    """Each bucket is in time; together they are too late."""
    rollout.weights._section = WeightsSection(push_timeout_seconds=0.5)
    rollout.fake.load_seconds = 0.3
    await rollout.join()
    with pytest.raises(TimeoutError):
        await rollout.push()
    assert not rollout.engine.up.is_set()


async def test_a_service_that_wakes_up_too_late_ends_its_engine(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service was stopped and its timer with it; the engine reports success too late."""

    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 2 * ANSWER_SECONDS)

    async def frozen() -> str:
        monkeypatch.setattr("penstock_rollout.weights.updater.time", later)
        return str(WANTED.identity)

    await rollout.join()
    monkeypatch.setattr(rollout.engine.client.loading, "weight_version", frozen)
    with pytest.raises(TimeoutError, match="was not served within"):
        await rollout.push()
    assert rollout.weights.identity is None
    assert not rollout.engine.up.is_set()


async def test_a_trainer_that_has_lost_its_lease_forms_no_group(rollout: Rollout) -> None:
    await rollout.join()
    await rollout.push()
    with pytest.raises(WeightsConflictError, match="another trainer"):
        await rollout.join("late", lease=1)


async def test_groups_over_http(rollout: Rollout) -> None:
    calls = calls_of(rollout.engine, rollout.weights, rollout.metrics)
    app = make_rollout_app(rollout.engine, rollout.weights, calls, rollout.metrics.registry, None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://r") as client:
        request = {"group": "g", "address": "h", "port": 1, "num_ranks": 2, "backend": "gloo", "lease": 2}
        answer = await client.post("/v1/weights/group", json=request)
        assert (answer.status_code, answer.json()["engine_starts"]) == (200, 1)
        assert rollout.engine.group == "g"
        answer = await client.post("/v1/weights/group", json={**request, "backend": "pigeon"})
        assert (answer.status_code, answer.json()["error"]) == (422, "weights")
        tensors = [{"name": "w", "dtype": "bfloat16", "shape": [2]}]
        source = {"transport": "nccl", "group": "g", "buckets": [tensors]}
        body = {"digest": WANTED.identity.digest, "path": "/nowhere", "lease": 2, "source": source}
        answer = await client.put("/v1/weights/3", json=body)
        assert (answer.status_code, answer.json()["policy_version"]) == (200, 3)
