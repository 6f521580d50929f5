"""Whose a run is: one launch of a name wins, a stranger takes nothing, and the dead block nobody for ever."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from penstock.broker import Queue, Stage, Worker, connect
from penstock.broker.launcher import HeldRun, hold_run
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import ServiceKind
from penstock.contracts.ledger import RunRecord
from penstock.contracts.services import ServiceRecord
from penstock.errors import ConfigError, LeaseLostError, LostWritesError, StrangerError
from penstock.run_home import RunHome
from tests.integration.broker.queue_setup import expire_beat, expire_lease, make_group, make_scored, make_ticket
from tests.patience import ANSWER_SECONDS

pytestmark = pytest.mark.redis

SHORT_SECONDS = 1.0  # a heartbeat that a test lets expire
HOUR_MS = 3_600_000
LIVE_SECONDS = 6.0  # one that is renewed after two seconds
OTHER_REWARD = {"reward": {"functions": {"own:other": 1.0}}}
RECORD = RunRecord("d", 1, 1, 1, 0)


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    document = config.model_dump()
    for name, values in sections.items():
        document[name] |= values
    return Config.model_validate(document)


def short(config: Config, **sections: dict[str, Any]) -> Config:
    return changed(config, staleness={"heartbeat_seconds": SHORT_SECONDS}, **sections)


def lively(config: Config, **sections: dict[str, Any]) -> Config:
    return changed(config, staleness={"heartbeat_seconds": LIVE_SECONDS}, **sections)


def home_in(folder: Path) -> RunHome:
    return RunHome(folder / "run", "launcher")


@asynccontextmanager
async def another(config: Config, **sections: dict[str, Any]) -> AsyncIterator[Queue]:
    """The queue of a process with other keys."""
    queue = await connect(changed(config, **sections))
    try:
        yield queue
    finally:
        await queue.close()


async def held_by(queue: Queue, config: Config, home: RunHome) -> HeldRun:
    async with asyncio.timeout(ANSWER_SECONDS):
        return await hold_run(queue, config, home, print)


async def owned(queue: Queue, config: Config, home: RunHome | None = None) -> TrainerQueue:
    """A trainer without a launcher: the owner."""
    async with asyncio.timeout(ANSWER_SECONDS):
        return TrainerQueue(queue, await acquire_lease(queue, config, home))


async def owner_digest(queue: Queue) -> str:
    found: Any = await queue.client.hget(queue.keys.identity, "trainer")
    return str(found.decode())


def record_of(name: str) -> ServiceRecord:
    return ServiceRecord(ServiceKind.REWARD, name, "http://127.0.0.1:1", 1, "ready")


async def test_of_two_launches_at_the_same_moment_one_wins_and_the_other_is_refused(
    queue: Queue, queue_config: Config, tmp_path: Path
) -> None:
    config = lively(queue_config)
    lost: list[Exception] = []

    async def launch(place: str) -> HeldRun:
        held = await held_by(queue, config, home_in(tmp_path / place))
        held.start_renewing(lost.append)
        return held

    first, second = await asyncio.gather(launch("a"), launch("b"), return_exceptions=True)
    winner, refused = (first, second) if isinstance(first, HeldRun) else (second, first)
    assert isinstance(winner, HeldRun)
    assert isinstance(refused, StrangerError)
    place = "a" if winner is first else "b"
    assert f"folder {tmp_path / place / 'run'}, with the same configuration" in str(refused)
    assert await queue.client.hget(queue.keys.identity, "folder") == home_in(tmp_path / place).id().encode()
    await asyncio.to_thread(winner.release)
    assert lost == []
    assert not await queue.client.exists(queue.keys.launcher)


async def test_a_launcher_that_was_killed_blocks_its_folder_not_at_all_and_others_for_a_heartbeat(
    queue: Queue, queue_config: Config, tmp_path: Path
) -> None:
    killed = await held_by(queue, queue_config, home_in(tmp_path / "a"))  # an hour's heartbeat, and no renewal
    again = await held_by(queue, queue_config, home_in(tmp_path / "a"))
    assert again.folder == killed.folder
    killed_too = await held_by(queue, short(queue_config), home_in(tmp_path / "a"))
    said: list[str] = []
    async with asyncio.timeout(ANSWER_SECONDS):
        later = await hold_run(queue, short(queue_config), home_in(tmp_path / "b"), said.append)
    assert later.folder != killed_too.folder
    assert len(said) == 1
    assert "looking whether it lives (up to 1 s" in said[0]
    for each in (killed, again, killed_too, later):
        await asyncio.to_thread(each.release)


async def test_a_launcher_that_lost_its_run_to_another_hears_of_it(
    queue: Queue, queue_config: Config, tmp_path: Path
) -> None:
    loop, lost = asyncio.get_running_loop(), asyncio.Event()
    held = await held_by(queue, short(queue_config), home_in(tmp_path / "a"))
    await queue.client.delete(queue.keys.launcher)
    other = await held_by(queue, queue_config, home_in(tmp_path / "b"))
    reasons: list[Exception] = []

    def on_loss(reason: Exception) -> None:
        reasons.append(reason)
        loop.call_soon_threadsafe(lost.set)

    held.start_renewing(on_loss)
    async with asyncio.timeout(ANSWER_SECONDS):
        await lost.wait()
    assert isinstance(reasons[0], StrangerError)
    await asyncio.to_thread(held.release)
    assert await queue.client.exists(queue.keys.launcher)
    await asyncio.to_thread(other.release)


async def test_a_hold_that_expired_while_the_queue_was_away_is_held_again(
    queue: Queue, queue_config: Config, tmp_path: Path
) -> None:
    held = await held_by(queue, short(queue_config), home_in(tmp_path))
    await queue.client.delete(queue.keys.launcher)
    held.start_renewing(print)
    async with asyncio.timeout(ANSWER_SECONDS):
        while not await queue.client.exists(queue.keys.launcher):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.to_thread(held.release)


async def test_a_full_redis_ends_no_hold(
    queue: Queue, queue_config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = await held_by(queue, short(queue_config), home_in(tmp_path))
    lost: list[Exception] = []
    await queue.client.pexpire(queue.keys.launcher, HOUR_MS)
    await queue.client.config_set("maxmemory", "1mb")
    try:
        held.start_renewing(lost.append)
        async with asyncio.timeout(ANSWER_SECONDS):
            while await queue.client.pttl(queue.keys.launcher) > SHORT_SECONDS * 1000 and not lost:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await queue.client.delete(queue.keys.launcher)
            while "not be renewed yet" not in caplog.text and not lost:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        await queue.client.config_set("maxmemory", "0")
    assert lost == []
    async with asyncio.timeout(ANSWER_SECONDS):
        while not await queue.client.exists(queue.keys.launcher):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.to_thread(held.release)


@pytest.mark.parametrize("sections", [{"run": {"existing": "replace"}}, OTHER_REWARD], ids=["replace", "other keys"])
async def test_a_live_trainer_is_seen_before_anything_is_deleted_or_changed(
    sections: dict[str, Any], queue: Queue, queue_config: Config, tmp_path: Path
) -> None:
    home = home_in(tmp_path)
    trainer = await owned(queue, lively(queue_config), home)
    trainer.lease.start_renewing(print)
    before = await queue.client.hgetall(queue.keys.identity)
    async with another(queue_config, **sections) as other:
        with pytest.raises(StrangerError, match=r"lives.*the launcher on .*folder .*/run, with ") as refused:
            await held_by(other, changed(queue_config, **sections), home)
    assert ("is not deleted (run.existing is replace)" in str(refused.value)) == ("run" in sections)
    assert await queue.client.hgetall(queue.keys.identity) == before
    assert not await queue.client.exists(queue.keys.launcher)
    held = await held_by(queue, queue_config, home)  # the same keys, the same folder: its services help that trainer
    for each in (held, trainer.lease):
        await asyncio.to_thread(each.release)


async def test_a_run_whose_trainer_is_starting_again_is_not_replaced(
    queue: Queue, queue_config: Config, tmp_path: Path
) -> None:
    trainer = await owned(queue, queue_config, home_in(tmp_path / "a"))
    await asyncio.to_thread(trainer.lease.release)
    config = lively(queue_config, run={"existing": "replace"})
    await queue.register(record_of("reward-here-1"), 60)
    launching = asyncio.create_task(held_by(queue, config, home_in(tmp_path / "b")))
    async with asyncio.timeout(ANSWER_SECONDS):
        for beat in itertools.count(1):
            await asyncio.wait([launching], timeout=0.1)
            if launching.done():
                break
            await queue.register(record_of("reward-here-1"), 60 + beat)
    with pytest.raises(StrangerError, match=r"is not deleted \(run.existing is replace\) \(reward-here-1\)\. It is"):
        await launching
    await queue.unregister("reward-here-1")
    held = await held_by(queue, config, home_in(tmp_path / "b"))
    await asyncio.to_thread(held.release)


async def test_after_a_trainer_was_killed_changed_keys_wait_for_the_end_of_its_lease_and_are_the_runs(
    queue: Queue, queue_config: Config, tmp_path: Path
) -> None:
    killed = await owned(queue, short(queue_config), home_in(tmp_path))
    async with another(queue_config, **OTHER_REWARD) as other:
        held = await held_by(other, changed(queue_config, **OTHER_REWARD), home_in(tmp_path))
        assert await owner_digest(queue) == other.identity.digests[ServiceKind.TRAINER]
        with pytest.raises(StrangerError, match=r"reward.functions is \{'own:other': 1.0\} there"):
            await queue.register(record_of("of the old keys"), 1)
        with pytest.raises(LostWritesError):  # it was only frozen, and wakes
            await killed.lease.renew(queue)
        await asyncio.to_thread(held.release)


async def test_the_state_in_another_folder_is_not_resumed(queue: Queue, queue_config: Config, tmp_path: Path) -> None:
    trainer = await owned(queue, queue_config, home_in(tmp_path / "a"))
    await trainer.append(RECORD)
    await asyncio.to_thread(trainer.lease.release)
    said = rf"run.root: the folder of run .* is not the one .*a ledger of 1 records.*folder {tmp_path}/a/run"
    with pytest.raises(ConfigError, match=said):
        await held_by(queue, queue_config, home_in(tmp_path / "b"))
    with pytest.raises(ConfigError, match=said):
        await owned(queue, queue_config, home_in(tmp_path / "b"))
    refuse = changed(queue_config, run={"existing": "refuse"})
    with pytest.raises(ConfigError, match=r"run\.existing is refuse and Redis at .* holds an earlier run"):
        await held_by(queue, refuse, home_in(tmp_path / "b"))
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = await held_by(queue, queue_config, home_in(tmp_path / "moved"))
    await asyncio.to_thread(moved.release)
    replaced = await held_by(queue, changed(queue_config, run={"existing": "replace"}), home_in(tmp_path / "b"))
    assert replaced.folder not in (moved.folder, home_in(tmp_path / "b").id())
    await asyncio.to_thread(replaced.release)


async def test_a_folder_from_a_backup_without_its_id_goes_on(
    queue: Queue, queue_config: Config, tmp_path: Path
) -> None:
    trainer = await owned(queue, queue_config, home_in(tmp_path / "a"))
    await trainer.append(RECORD)
    await asyncio.to_thread(trainer.lease.release)
    (tmp_path / "b" / "run" / "steps").mkdir(parents=True)
    again = await owned(queue, queue_config, home_in(tmp_path / "b"))
    assert home_in(tmp_path / "b").id() == home_in(tmp_path / "a").id()
    await again.lease.renew(queue)
    await asyncio.to_thread(again.lease.release)


async def test_a_trainer_of_other_keys_is_refused_while_a_launcher_or_a_trainer_lives(
    queue: Queue, queue_config: Config, tmp_path: Path
) -> None:
    config, home = lively(queue_config), home_in(tmp_path)
    held = await held_by(queue, config, home)
    held.start_renewing(print)
    own = await owned(queue, config, home)
    own.lease.start_renewing(print)
    async with another(queue_config, **OTHER_REWARD) as other:
        for lives in (held, own.lease):
            with pytest.raises(StrangerError, match=r"reward\.functions is .* there and .*own:other"):
                await owned(other, lively(queue_config, **OTHER_REWARD), home)
            await asyncio.to_thread(lives.release)
        successor = await owned(other, changed(queue_config, **OTHER_REWARD), home)
        assert successor.lease.number == 2
        assert await owner_digest(queue) == other.identity.digests[ServiceKind.TRAINER]
        await asyncio.to_thread(successor.lease.release)


async def test_a_stranger_takes_nothing_and_is_told_which_keys_differ(queue: Queue, queue_config: Config) -> None:
    trainer = await owned(queue, queue_config)
    await trainer.issue([make_ticket(0)])
    async with another(queue_config, **OTHER_REWARD) as other:
        stranger = Worker(other, "stranger", queue_config.staleness)
        with pytest.raises(StrangerError, match=r"reward.functions is \{'exact_match': 1.0\} there and \{'own:other"):
            await stranger.take(Stage.TICKETS)
        with pytest.raises(StrangerError):
            await other.register(record_of("stranger"), ANSWER_SECONDS)
        alive_until = await queue.guard(queue.client.hget(queue.keys.beats, stranger.name))
        with pytest.raises(StrangerError):
            await stranger.keep_alive(lambda: record_of(stranger.name))
        assert await queue.guard(queue.client.hget(queue.keys.beats, stranger.name)) == alive_until
        await queue.register(record_of("own"), ANSWER_SECONDS)
        assert [each.name for each in await queue.services()] == ["own"]
    assert (await queue.client.xpending(queue.keys.stream(Stage.TICKETS), "penstock"))["pending"] == 0
    worker = Worker(queue, "own", queue_config.staleness)
    assert await worker.take(Stage.TICKETS) is not None
    await asyncio.to_thread(trainer.lease.release)


async def test_a_service_is_no_stranger_for_keys_that_it_does_not_read(queue: Queue, queue_config: Config) -> None:
    trainer = await owned(queue, queue_config)
    await trainer.issue([make_ticket(0)])
    config = changed(queue_config, optimizer={"lr": 1.0}, weights={"pause_mode": "abort"})
    reward, rollout = [await connect(config, kind) for kind in (ServiceKind.REWARD, ServiceKind.ROLLOUT)]
    try:
        assert await Worker(reward, "reward", config.staleness).take(Stage.ROLLOUTS) is None
        await reward.register(record_of("reward"), ANSWER_SECONDS)
        assert [each.name for each in await queue.services()] == ["reward"]
        with pytest.raises(
            StrangerError, match=r"configuration: weights\.pause_mode is '\w+' there and 'abort' here\. C"
        ):
            await Worker(rollout, "rollout", config.staleness).take(Stage.TICKETS)
    finally:
        await reward.close()
        await rollout.close()
    await asyncio.to_thread(trainer.lease.release)


async def test_a_worker_of_the_next_keys_waits_for_their_owner_and_then_takes(
    queue: Queue, queue_config: Config
) -> None:
    trainer = await owned(queue, queue_config)
    await trainer.issue([make_ticket(0)])
    await asyncio.to_thread(trainer.lease.release)
    async with another(queue_config, **OTHER_REWARD) as other:
        early = Worker(other, "early", queue_config.staleness)
        await other.register(record_of("early"), ANSWER_SECONDS)
        assert await early.take(Stage.TICKETS) is None
        async with asyncio.timeout(ANSWER_SECONDS):
            await early.wait(timeout_seconds=0.01)  # nothing wakes it: it does not turn in a circle
        assert await other.services() == []
        resumed = await owned(other, changed(queue_config, **OTHER_REWARD))
        assert [each.name for each in await other.services()] == ["early"]
        assert await early.take(Stage.TICKETS) is not None
        await asyncio.to_thread(resumed.lease.release)


async def test_what_was_taken_before_the_keys_changed_is_neither_published_nor_blamed(
    queue: Queue, queue_config: Config
) -> None:
    trainer = await owned(queue, queue_config)
    await trainer.issue([make_ticket(number) for number in range(4)])
    rollout, old = (Worker(queue, name, queue_config.staleness) for name in ("rollout", "old"))
    for number in range(4):
        ticket = await rollout.take(Stage.TICKETS)
        assert ticket is not None
        await rollout.hand_over(ticket, make_group(make_ticket(number)), Stage.ROLLOUTS)
    held = [each for _ in range(4) if (each := await old.take(Stage.ROLLOUTS)) is not None]
    kept, poison, failed, _ = held
    await expire_lease(queue)
    async with another(queue_config, **OTHER_REWARD) as other:
        await owned(other, changed(queue_config, **OTHER_REWARD))
        with pytest.raises(StrangerError):
            await old.hand_over(kept, make_scored(make_ticket(0)), Stage.SCORED)
        with pytest.raises(StrangerError):
            await old.bury(poison, "own:other is unknown")
        for _ in range(queue_config.staleness.max_deliveries):
            await old.give_back(failed, failed=True, reason="own:other is unknown")
        assert (await queue.depths())["scored"] == 0
        assert (await queue.depths())["dead"] == 0
        new = Worker(other, "new", queue_config.staleness)
        assert (await new.take(Stage.ROLLOUTS) or kept).ticket_key == failed.ticket_key
        await expire_beat(queue, old)  # its process has ended
        taken = [await new.take(Stage.ROLLOUTS) for _ in range(3)]
        assert sorted(each.ticket_key for each in taken if each) == ["0", "1", "3"]
        assert all(each.failures == 0 for each in taken if each)


async def test_a_replaced_run_keeps_its_owner_and_the_number_of_its_lease(
    queue: Queue, queue_config: Config, tmp_path: Path
) -> None:
    trainer = await owned(queue, queue_config, home_in(tmp_path))
    await trainer.append(RECORD)
    await trainer.issue([make_ticket(0)])
    assert await queue.contents() == "a ledger of 1 records, 1 tickets, 0 trained, 0 dead"
    await asyncio.to_thread(trainer.lease.release)
    replace = changed(queue_config, run={"existing": "replace"})
    held = await held_by(queue, replace, home_in(tmp_path))
    assert await queue.delete_run(but_owner=True) > 0
    assert await queue.contents() == ""
    home_in(tmp_path).keep(held.folder)
    assert (await owned(queue, queue_config, home_in(tmp_path))).lease.number == 2
    with pytest.raises(LeaseLostError):
        await trainer.issue([make_ticket(1)])
