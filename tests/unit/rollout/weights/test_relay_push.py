"""Pushes to a rollout service that relays: what it loads, what it answers, and how a doubt about it ends."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from penstock.config import WeightsSection
from penstock.contracts import PolicyIdentity
from penstock.contracts.services import Announcement, push_body
from penstock.contracts.weight_sources import DiskSource, RelaySource
from penstock.errors import WeightsConflictError, WeightsError
from penstock.weights.chunks import list_chunks
from penstock.weights.relay import HeldVersion, Relay
from penstock_rollout.weights.updater import WeightUpdater
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.test_fake_engine import stage_weights
from tests.unit.rollout.weights.relay_setup import TOKEN, Receiver, Sender, receiver, sending
from tests.unit.rollout.weights.updater_setup import Rollout, updating_rollout


@dataclass
class World:
    """A trainer that sends versions, and a rollout service that receives them."""

    rollout: Rollout
    got: Receiver
    trainer: Sender
    http: httpx.AsyncClient
    root: Path

    def staged(self, version: int) -> Announcement:
        path, digest = stage_weights(self.root / "trainer", version)
        held = HeldVersion(Path(path), list_chunks(Path(path)), complete=True)
        self.trainer.relay.hold(held)
        return Announcement(PolicyIdentity(version, digest), "/only/on/the/trainer", 1, chunks=held.digest)

    async def push(self, wanted: Announcement, *parents: Sender) -> httpx.Response:
        source = RelaySource(tuple(each.parent for each in (*parents, self.trainer)))
        return await self.http.put(f"/v1/weights/{wanted.identity.number}", json=push_body(wanted, source))

    def loaded(self) -> list[Path]:
        calls = self.rollout.fake.calls
        return [Path(body["model_path"]) for path, body in calls if path == "/update_weights_from_disk"]


@asynccontextmanager
async def relaying(root: Path) -> AsyncIterator[World]:
    async with updating_rollout(root) as rollout, sending("trainer-1", Relay()) as trainer:
        got = receiver(root, "rollout")
        got.registry.add(trainer)
        section = WeightsSection(push_timeout_seconds=ANSWER_SECONDS)
        rollout.weights = WeightUpdater(rollout.engine, section, rollout.metrics, relayed=got.versions)
        transport = httpx.ASGITransport(rollout.app(TOKEN))
        headers = {"Authorization": f"Bearer {TOKEN.get_secret_value()}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://rollout", headers=headers) as http:
            yield World(rollout, got, trainer, http, root)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with relaying(tmp_path) as world:
        yield world


async def test_its_engine_loads_what_the_trainer_sent(world: World) -> None:
    wanted = world.staged(3)
    answer = await world.push(wanted)
    assert (answer.status_code, answer.json()["checksum"], answer.json().get("left")) == (
        *(200, wanted.identity.digest),
        None,
    )
    (folder,) = world.loaded()
    assert folder.is_relative_to(world.got.root)
    assert (folder / "model.safetensors").read_bytes() == (
        world.root / "trainer" / "v3" / "model.safetensors"
    ).read_bytes()


async def test_it_reports_the_parents_that_it_left(world: World) -> None:
    answer = await world.push(world.staged(3), Sender("absent", "http://127.0.0.1:9", Relay()))
    assert answer.status_code == 200
    assert [(each["name"], each["reason"]) for each in answer.json()["left"]] == [("absent", "gone")]


async def test_weights_of_another_identity_are_not_loaded(world: World) -> None:
    """The chunks are those of the list; the tensors in them are not those that were announced."""
    sent, announced = world.staged(3), world.staged(4)
    wanted = Announcement(PolicyIdentity(3, announced.identity.digest), "/nowhere", 1, chunks=sent.chunks)
    answer = await world.push(wanted)
    assert (answer.status_code, answer.json()["error"]) == (422, "weights")
    assert (world.rollout.weights.state, world.loaded(), world.got.folders()) == ("fenced", [], [])


async def test_a_doubted_server_takes_no_ticket_until_it_has_loaded_its_weights_anew(world: World) -> None:
    wanted = world.staged(3)
    await world.push(wanted)
    weights = world.rollout.weights
    body = {"lease": 1, "why": "s7 left it: it sent chunk 5 with another digest"}
    answer = await world.http.post("/v1/weights/doubt", json=body)
    assert (answer.status_code, answer.json()["state"], answer.json()["policy_version"]) == (200, "fenced", None)
    assert weights.fenced == body["why"]
    assert weights.behind(wanted)
    assert world.got.folders() == []
    weights.confirm(wanted)
    assert weights.fenced  # it is not enough that it served this version
    await weights.update(wanted)  # as the producer does
    assert (weights.state, weights.identity, weights.fenced) == ("serving", wanted.identity, "")
    assert len(world.loaded()) == 2
    assert world.rollout.engine.life == 1


async def test_an_older_trainer_casts_no_doubt(world: World) -> None:
    await world.push(Announcement(*(lambda it: (it.identity, it.path, 5, None, it.chunks))(world.staged(3))))
    with pytest.raises(WeightsConflictError):
        await world.rollout.weights.doubt(4, "why")
    assert world.rollout.weights.state == "serving"


async def test_a_server_that_does_not_relay_refuses_such_a_push(tmp_path: Path) -> None:
    async with updating_rollout(tmp_path) as rollout:
        app = rollout.app(TOKEN)
        headers = {"Authorization": f"Bearer {TOKEN.get_secret_value()}"}
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://rollout", headers=headers
        ) as http:
            wanted = rollout.staged(3)
            source = RelaySource((Sender("trainer-1", "http://127.0.0.1:9", Relay()).parent,))
            answer = await http.put("/v1/weights/3", json=push_body(wanted, source))
            assert (answer.status_code, "weights.relay_fan_out" in answer.json()["detail"]) == (422, True)
            assert (await http.put("/v1/weights/3", json=push_body(wanted, DiskSource()))).status_code == 200
            assert (await http.post("/v1/weights/relay", json={})).status_code == 405


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"relay_fan_out": 2}, "expected transport disk"),
        ({"relay_fan_out": 2, "transport": "nccl"}, "expected transport disk"),
        ({"relay_fan_out": 2, "transport": "disk", "full_every": 5}, "full_every 5: expected one of them"),
    ],
)
def test_what_cannot_be_relayed_is_refused(keys: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        WeightsSection.model_validate(keys)
    assert WeightsSection(transport="disk", relay_fan_out=2).relay_fan_out == 2


async def test_damaged_files_are_fetched_again(world: World) -> None:
    """They are compared with the identity before each load, also if they came long ago."""
    wanted = world.staged(3)
    await world.push(wanted)
    (folder,) = world.loaded()
    world.rollout.weights.forget()  # the engine was started anew
    weights_file = folder / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1] + b"!")
    with pytest.raises(WeightsError, match="damaged"):
        await world.rollout.weights.update(wanted)
    await world.rollout.weights.update(wanted)
    assert world.rollout.weights.identity == wanted.identity
