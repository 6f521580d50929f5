"""A version that comes from other servers: with each fault of a parent, and with none."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from penstock.contracts.services import Announcement
from penstock.contracts.weight_sources import Parent
from penstock.errors import WeightsError
from penstock.weights.chunks import list_chunks
from penstock.weights.relay import Relay
from penstock_rollout.weights import fetch, parent_stream
from tests.patience import ANSWER_SECONDS
from tests.small_disk import fill, small_disk
from tests.unit.rollout.weights.relay_setup import (
    NUM_CHUNKS,
    FaultyRelay,
    Receiver,
    Sender,
    crawls,
    dies,
    falls_silent,
    lies,
    receiver,
    sending,
    staged,
)

AUTHORIZED = {"Authorization": "Bearer secret"}
FAST = 1e9  # bytes a second that a parent has received with


def holding(relay: Relay, root: Path, *, rate: float = 0.0) -> tuple[Relay, Announcement]:
    wanted, held = staged(root, rate=rate)
    relay.hold(held)
    return relay, wanted


@pytest.fixture
async def trainer(tmp_path: Path) -> AsyncIterator[tuple[Sender, Announcement]]:
    relay, wanted = holding(Relay(), tmp_path / "trainer")
    async with sending("trainer-1", relay) as sender:
        yield sender, wanted


def same_files(folder: Path, other: Path) -> bool:
    return all((folder / file.name).read_bytes() == file.read_bytes() for file in other.iterdir())


async def assert_brought(got: Receiver, wanted: Announcement, *parents: Sender) -> list[tuple[str, str]]:
    """Bring it; compare every byte; returns who was left, and why."""
    folder, left = await got.versions.bring(wanted, tuple(each.parent for each in parents), ANSWER_SECONDS)
    assert same_files(folder, Path(wanted.path))
    return [(each.name, each.reason) for each in left]


async def test_a_version_comes_from_the_trainer_and_is_passed_on(
    tmp_path: Path, trainer: tuple[Sender, Announcement]
) -> None:
    source, wanted = trainer
    first, second = receiver(tmp_path, "first"), receiver(tmp_path, "second")
    num_bytes = list_chunks(Path(wanted.path)).num_bytes
    async with sending("first", first.versions.relay) as passing:
        both = await asyncio.gather(
            assert_brought(second, wanted, passing, source), assert_brought(first, wanted, source)
        )
    assert not any(both)
    assert first.sample("received_bytes_total", sender="trainer") == num_bytes
    assert second.sample("received_bytes_total", sender="server") == num_bytes
    assert second.sample("received_bytes_total", sender="trainer") == 0
    assert first.sample("sent_bytes_total") == num_bytes


async def test_a_chunk_is_passed_on_before_the_next_one_has_come(tmp_path: Path) -> None:
    """The trainer waits in the middle until the last server in the line has all that was sent."""
    first, second = receiver(tmp_path, "first"), receiver(tmp_path, "second")
    reached = asyncio.Event()

    async def waits(piece: bytes) -> AsyncIterator[bytes]:
        await reached.wait()
        yield piece

    relay, wanted = holding(FaultyRelay(NUM_CHUNKS // 2, waits), tmp_path / "trainer")
    async with sending("trainer-1", relay) as source, sending("first", first.versions.relay) as passing:
        bringing = [
            asyncio.create_task(assert_brought(first, wanted, source)),
            asyncio.create_task(assert_brought(second, wanted, passing, source)),
        ]
        async with asyncio.timeout(ANSWER_SECONDS):
            while wanted.chunks not in second.versions.relay.digests:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            held = await second.versions.relay.find(wanted.chunks)
            while held.num_held < NUM_CHUNKS // 2:
                await held.wait(NUM_CHUNKS // 2 - 1)
        reached.set()
        assert await asyncio.gather(*bringing) == [[], []]


@pytest.mark.parametrize(
    ("fault", "reason"), [(dies, "gone"), (lies, "wrong"), (crawls, "slow"), (falls_silent, "gone")]
)
async def test_a_parent_with_a_fault_is_left_and_its_chunks_are_not_fetched_again(
    tmp_path: Path,
    trainer: tuple[Sender, Announcement],
    fault: Callable[[bytes], AsyncIterator[bytes]],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parent_stream, "SILENT_SECONDS", 1.5)
    source, wanted = trainer
    got = receiver(tmp_path)
    relay, same = holding(FaultyRelay(NUM_CHUNKS // 2, fault), tmp_path / "faulty", rate=FAST)
    assert same.chunks == wanted.chunks
    async with sending("faulty", relay) as faulty:
        assert await assert_brought(got, wanted, faulty, source) == [("faulty", reason)]
    assert got.sample("parents_left_total", reason=reason) == 1
    chunk_bytes = list_chunks(Path(wanted.path)).chunk_bytes
    from_faulty = got.sample("received_bytes_total", sender="server")
    assert from_faulty is not None
    assert from_faulty >= (NUM_CHUNKS // 2 - 2) * chunk_bytes
    assert (
        from_faulty + (got.sample("received_bytes_total", sender="trainer") or 0)
        == list_chunks(Path(wanted.path)).num_bytes
    )


async def test_every_parent_but_the_last_may_have_a_fault(tmp_path: Path, trainer: tuple[Sender, Announcement]) -> None:
    source, wanted = trainer
    got = receiver(tmp_path)
    absent = Sender("absent", "http://127.0.0.1:9", Relay())
    liar, _ = holding(FaultyRelay(5, lies), tmp_path / "liar")
    dying, _ = holding(FaultyRelay(20, dies), tmp_path / "dying")
    async with sending("liar", liar) as first, sending("dying", dying) as second, sending("empty", Relay()) as empty:
        left = await assert_brought(got, wanted, absent, empty, first, second, source)
    assert left == [("absent", "gone"), ("empty", "gone"), ("liar", "wrong"), ("dying", "gone")]


async def test_a_parent_that_waits_itself_is_not_left(
    tmp_path: Path, trainer: tuple[Sender, Announcement], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own parent crawls, and has no other: what comes is all that there is."""
    monkeypatch.setattr(fetch, "JUDGE_SECONDS", 0.2)
    first, second = receiver(tmp_path, "first"), receiver(tmp_path, "second")
    slow, wanted = holding(FaultyRelay(NUM_CHUNKS + 30, crawls), tmp_path / "slow")
    async with sending("trainer-1", slow) as source, sending("first", first.versions.relay) as passing:
        both = await asyncio.gather(
            assert_brought(first, wanted, source), assert_brought(second, wanted, passing, source)
        )
    assert not any(both)


async def test_no_parent_is_blamed_for_a_slow_link_of_this_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both parents are as slow to it: after the second one it knows."""
    monkeypatch.setattr(fetch, "JUDGE_SECONDS", 0.2)
    got = receiver(tmp_path)
    first, wanted = holding(FaultyRelay(NUM_CHUNKS + 30, crawls), tmp_path / "first", rate=FAST)
    second, _ = holding(FaultyRelay(NUM_CHUNKS + 30, crawls), tmp_path / "second", rate=FAST)
    last, _ = holding(Relay(), tmp_path / "last")
    async with (
        sending("first", first) as one,
        sending("second", second) as two,
        sending("trainer-1", last) as trainer,
    ):
        assert await assert_brought(got, wanted, one, two, trainer) == []
    assert got.sample("received_bytes_total", sender="trainer") == 0


async def test_if_nobody_sends_it_the_error_names_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "AGAIN_SECONDS", 0.01)
    got = receiver(tmp_path)
    liar, wanted = holding(FaultyRelay(5, lies), tmp_path / "liar")
    async with sending("liar", liar) as parent:
        with pytest.raises(WeightsError, match=r"liar: wrong, it sent chunk 5 .* trainer-1: gone"):
            await got.versions.bring(wanted, (parent.parent, Parent("trainer-1", "http://127.0.0.1:9")), ANSWER_SECONDS)
    assert got.versions.relay.digests == []
    assert got.folders() == []


async def test_the_trainer_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "AGAIN_SECONDS", 0.01)
    got = receiver(tmp_path)
    times = iter(range(2))

    async def dies_twice(piece: bytes) -> AsyncIterator[bytes]:
        if next(times, None) is not None:
            raise ConnectionAbortedError
        yield piece

    relay, wanted = holding(FaultyRelay(5, dies_twice), tmp_path / "trainer")
    async with sending("trainer-1", relay) as source:
        assert await assert_brought(got, wanted, source) == [("trainer-1", "gone")] * 2


async def test_a_push_that_takes_too_long_ends_and_names_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent_stream, "LAST_SILENT_SECONDS", 1.0)
    got = receiver(tmp_path)
    relay, wanted = holding(FaultyRelay(5, crawls), tmp_path / "trainer")
    async with sending("trainer-1", relay) as source:
        with pytest.raises(TimeoutError, match=r"within weights.push_timeout_seconds = 1.5"):
            await got.versions.bring(wanted, (source.parent,), 1.5)
    assert got.folders() == []


async def test_without_room_the_error_names_the_key_and_blames_no_parent(
    tmp_path: Path, trainer: tuple[Sender, Announcement]
) -> None:
    source, wanted = trainer
    with small_disk(tmp_path / "small", megabytes=1) as disk:
        got = receiver(disk)
        with pytest.raises(WeightsError, match=r"No space left on device.*weights.local_folder"):
            await got.versions.bring(wanted, (source.parent, source.parent), ANSWER_SECONDS)
        assert got.sample("parents_left_total", reason="gone") == 0
        assert got.folders() == []
        fill(disk)


@pytest.mark.parametrize("fault", [crawls, falls_silent])
async def test_a_cancelled_fetch_ends_at_once_and_before_its_files_go(
    tmp_path: Path, fault: Callable[[bytes], AsyncIterator[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parent_stream, "LAST_SILENT_SECONDS", 3600.0)
    got = receiver(tmp_path)
    relay, wanted = holding(FaultyRelay(5, fault), tmp_path / "trainer")
    async with sending("trainer-1", relay) as source:
        bringing = asyncio.create_task(got.versions.bring(wanted, (source.parent,), 3600))
        async with asyncio.timeout(ANSWER_SECONDS):
            while not got.folders():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            bringing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await bringing
    assert got.folders() == []


async def test_two_versions_stay_at_most_and_a_doubted_one_goes(tmp_path: Path) -> None:
    relay, got = Relay(), receiver(tmp_path)
    async with sending("trainer-1", relay) as source:
        for version in range(4):
            wanted, held = staged(tmp_path / "trainer", version)
            relay.hold(held)
            assert await assert_brought(got, wanted, source) == []
            got.versions.loaded(wanted)
            assert len(got.folders()) == min(version + 1, 2)
        before = got.sample("received_bytes_total", sender="trainer")
        assert await assert_brought(got, wanted, source) == []  # it is here already
        assert got.sample("received_bytes_total", sender="trainer") == before
        await got.versions.forget()
        assert (got.folders(), got.versions.relay.digests) == ([], [])
        assert await assert_brought(got, wanted, source) == []
    await asyncio.to_thread(got.versions.close)
    assert list(got.root.iterdir()) == []


async def test_a_stream_of_a_replaced_version_ends(tmp_path: Path, trainer: tuple[Sender, Announcement]) -> None:
    """The next version replaces it at the parent while a slow child still reads it: the child goes on elsewhere."""
    source, wanted = trainer
    got = receiver(tmp_path)
    reached = asyncio.Event()

    async def waits(piece: bytes) -> AsyncIterator[bytes]:
        reached.set()
        await asyncio.sleep(0.5)
        yield piece

    relay, _ = holding(FaultyRelay(10, waits), tmp_path / "parent")
    async with sending("parent", relay) as parent:
        bringing = asyncio.create_task(assert_brought(got, wanted, parent, source))
        await reached.wait()
        relay.drop_all_but(set())
        assert await bringing == [("parent", "gone")]


async def test_a_server_that_is_behind_asks_servers_first_and_then_the_trainer(
    tmp_path: Path, trainer: tuple[Sender, Announcement]
) -> None:
    source, wanted = trainer
    got = receiver(tmp_path)
    relay, _ = holding(Relay(), tmp_path / "peer")
    with pytest.raises(WeightsError, match="no server serves"):
        await got.versions.bring(wanted, (), ANSWER_SECONDS)
    async with sending("peer", relay) as peer:
        got.registry.add(source)
        got.registry.add(peer, wanted.identity)
        assert await assert_brought(got, wanted) == []
    assert got.sample("received_bytes_total", sender="trainer") == 0
    again = receiver(tmp_path, "again")
    again.registry.records = got.registry.records
    assert await assert_brought(again, wanted) == [("peer", "gone")]


async def test_weights_are_sent_only_with_the_token(tmp_path: Path, trainer: tuple[Sender, Announcement]) -> None:
    source, wanted = trainer
    body = {"chunks": wanted.chunks, "start": 0, "with_list": True}
    async with httpx.AsyncClient(base_url=source.url) as http:
        assert (await http.post("/v1/weights/relay", json=body)).status_code == 401
        assert (await http.get("/v1/weights/relay")).status_code == 405
        answer = await http.post("/v1/weights/relay", json={**body, "chunks": "../../etc"}, headers=AUTHORIZED)
        assert (answer.status_code, answer.json()["error"]) == (422, "weights")


async def test_a_version_without_a_list_names_the_key(tmp_path: Path) -> None:
    wanted, _ = staged(tmp_path)
    with pytest.raises(WeightsError, match=r"weights\.relay_fan_out"):
        await receiver(tmp_path).versions.bring(
            Announcement(wanted.identity, wanted.path, wanted.lease), (), ANSWER_SECONDS
        )
