"""The large fields of a group, on a real server: written before the entry, deleted with the last entry naming them."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.broker import Delivery, Queue, Stage, Worker, connect, examine_server
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import DropReason, decode, pack_float32
from penstock.contracts.ledger import DropRecord, StepRecord
from penstock.contracts.stored_groups import Part, ScoredHeader, Taught, scored_group
from penstock.errors import ConfigError, QueueError
from tests.integration.broker.broker_calls import DiedError, Fate, with_fates
from tests.integration.broker.queue_setup import (
    issue,
    make_group,
    make_scored,
    make_ticket,
    make_worker,
    part_keys,
    read_group,
    written,
)
from tests.patience import ANSWER_SECONDS


async def taken(worker: Worker, stage: Stage) -> Delivery:
    delivery = await worker.take(stage)
    assert delivery is not None
    return delivery


async def in_rollouts(worker: Worker, number: int = 0) -> Delivery:
    """A group whose ticket is issued, on its way to the reward service."""
    delivery = await taken(worker, Stage.TICKETS)
    assert await worker.hand_over(delivery, make_group(make_ticket(number)), Stage.ROLLOUTS)
    return await taken(worker, Stage.ROLLOUTS)


async def in_scored(worker: Worker, number: int = 0) -> Delivery:
    delivery = await in_rollouts(worker, number)
    assert await worker.hand_over(delivery, make_scored(make_ticket(number)), Stage.SCORED)
    return await taken(worker, Stage.SCORED)


async def test_texts_end_with_the_scores_and_completions_with_the_commit(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    rollout = await in_rollouts(worker)
    completions, texts, _ = queue.keys.parts(rollout.parts)
    assert await part_keys(queue) == {completions: -1, texts: -1}
    assert await worker.hand_over(rollout, make_scored(make_ticket(0)), Stage.SCORED)
    scored = await taken(worker, Stage.SCORED)
    assert await part_keys(queue) == {completions: -1}
    [parts] = await worker.read([scored], *Part)
    assert scored_group(decode(scored.payload, ScoredHeader), parts).group == make_group(make_ticket(0)).without_text()
    record = StepRecord(0, (0,), "f", "d")
    await trainer.commit_step(record, {0: scored})
    assert await part_keys(queue) == {}
    await trainer.commit_step(record, {0: scored})


async def test_a_head_without_parts_is_not_handed_over(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    rollout = replace(await in_rollouts(worker), parts="")
    with pytest.raises(ValueError, match="ticket 0 has no parts in the queue"):
        await worker.hand_over(rollout, make_scored(make_ticket(0)), Stage.SCORED)


async def test_a_late_worker_buries_nothing(
    trainer: TrainerQueue, queue: Queue, queue_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker was frozen; another has scored the group meanwhile, and its texts are gone."""
    await issue(trainer, 0)
    late, other = make_worker(queue, queue_config), make_worker(queue, queue_config)
    held = await in_rollouts(late)
    await late.retire()
    again = await taken(other, Stage.ROLLOUTS)
    assert again.entry_id == held.entry_id
    assert await other.hand_over(again, make_scored(make_ticket(0)), Stage.SCORED)
    assert await late.read([held], Part.TEXTS) == [{Part.TEXTS: None}]
    assert not await late.bury(held, "its texts are not in the queue")
    assert (await queue.depths())["dead"] == 0
    assert "dead letter" not in caplog.text


async def test_whatever_deletes_an_entry_deletes_its_parts(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0, 1, 2)
    worker = make_worker(queue, queue_config)
    scored = [await in_scored(worker, number) for number in range(3)]
    assert len(await part_keys(queue)) == 3
    await trainer.drop(DropRecord(0, DropReason.DEGENERATE), scored[0])
    await trainer.reissue(make_ticket(1, attempt=1), scored[1])
    await trainer.discard(scored[2])
    assert await part_keys(queue) == {}


async def test_the_texts_of_an_evaluation_reach_the_trainer(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    ticket = msgspec.structs.replace(make_ticket(0), purpose="eval")
    await trainer.issue_eval([ticket])
    worker = make_worker(queue, queue_config)
    assert await worker.hand_over(await taken(worker, Stage.EVAL), make_group(ticket), Stage.ROLLOUTS)
    assert await worker.hand_over(await taken(worker, Stage.ROLLOUTS), make_scored(ticket), Stage.SCORED)
    scored = await taken(worker, Stage.SCORED)
    [parts] = await worker.read([scored], *Part)
    assert scored_group(decode(scored.payload, ScoredHeader), parts).group == make_group(ticket)
    await trainer.discard(scored)
    assert await part_keys(queue) == {}


async def test_the_parts_of_a_late_worker_expire_and_are_not_those_of_the_holder(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0)
    late, worker = make_worker(queue, queue_config), make_worker(queue, queue_config)
    delivery = await taken(late, Stage.TICKETS)
    await late.retire()
    group = await in_rollouts(worker)
    other = msgspec.structs.replace(make_group(make_ticket(0)), server="late")
    assert not await late.hand_over(delivery, other, Stage.ROLLOUTS)
    keys = await part_keys(queue)
    assert {key for key, milliseconds in keys.items() if milliseconds < 0} == set(queue.keys.parts(group.parts)[:2])
    assert sum(0 < milliseconds <= 60_000 for milliseconds in keys.values()) == 2


async def test_what_a_teacher_adds_is_there_until_the_commit_and_a_late_worker_does_not_replace_it(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0)
    late, worker = make_worker(queue, queue_config), make_worker(queue, queue_config)
    held = await in_rollouts(late)
    completions, _, teacher = queue.keys.parts(held.parts)
    await late.retire()
    delivery = await taken(worker, Stage.ROLLOUTS)
    logprobs = tuple(pack_float32([-0.5] * each.num_tokens) for each in make_group(make_ticket(0)).completions)
    others = tuple(pack_float32([-7.0] * each.num_tokens) for each in make_group(make_ticket(0)).completions)
    scored = make_scored(make_ticket(0))
    assert await worker.hand_over(delivery, Taught(scored, logprobs), Stage.SCORED)
    assert not await late.hand_over(held, Taught(scored, others), Stage.SCORED)
    assert await part_keys(queue) == {completions: -1, teacher: -1}
    arrived = await taken(worker, Stage.SCORED)
    [parts] = await worker.read([arrived], *Part)
    found = scored_group(decode(arrived.payload, ScoredHeader), parts)
    assert (found.teacher_logprobs, found.is_taught) == (logprobs, True)
    await trainer.commit_step(StepRecord(0, (0,), "f", "d"), {0: arrived})
    assert await part_keys(queue) == {}


async def test_a_teachers_part_that_the_queue_did_not_keep_is_written_again(
    trainer: TrainerQueue, queue: Queue, queue_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.broker.worker.FULL_RETRY_SECONDS", 0.01)
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    held = await in_rollouts(worker)
    logprobs = tuple(bytes(4 * each.num_tokens) for each in make_group(make_ticket(0)).completions)
    calls = await with_fates(queue)
    calls.fate = Fate.PARTS_EXPIRE
    assert await worker.hand_over(held, Taught(make_scored(make_ticket(0)), logprobs), Stage.SCORED)
    arrived = await taken(worker, Stage.SCORED)
    [parts] = await worker.read([arrived], *Part)
    assert scored_group(decode(arrived.payload, ScoredHeader), parts).is_taught


async def test_a_script_that_is_repeated_leaves_the_parts_to_the_successor(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    calls = await with_fates(queue)
    calls.fate = Fate.ANSWER_LOST
    ticket = await taken(worker, Stage.TICKETS)
    assert not await worker.hand_over(ticket, make_group(make_ticket(0)), Stage.ROLLOUTS)
    rollout = await taken(worker, Stage.ROLLOUTS)
    assert await part_keys(queue) == dict.fromkeys(queue.keys.parts(rollout.parts)[:2], -1)
    calls.fate = Fate.ANSWER_LOST
    assert not await worker.hand_over(rollout, make_scored(make_ticket(0)), Stage.SCORED)
    assert await part_keys(queue) == {queue.keys.part(rollout.parts, Part.COMPLETIONS): -1}


async def test_parts_that_the_queue_did_not_keep_are_written_again(
    trainer: TrainerQueue, queue: Queue, queue_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.broker.worker.FULL_RETRY_SECONDS", 0.01)
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    calls = await with_fates(queue)
    calls.fate = Fate.PARTS_EXPIRE
    group = await in_rollouts(worker)
    assert await read_group(worker, group) == make_group(make_ticket(0)).without_text()
    assert list((await part_keys(queue)).values()) == [-1, -1]


async def test_a_refused_write_is_an_error_and_not_waited_for(
    trainer: TrainerQueue, queue: Queue, queue_config: Config
) -> None:
    """A retry helps only if the server was full."""
    await issue(trainer, 0)
    worker = make_worker(queue, queue_config)
    delivery = await taken(worker, Stage.TICKETS)
    password = queue_config.redis.password
    assert password is not None
    await queue.client.acl_setuser("nobody", enabled=True, passwords=[f"+{password.get_secret_value()}"],
                                   keys=["*"], commands=["+@all", "-set"])  # fmt: skip
    section = queue_config.redis.model_copy(update={"url": queue_config.redis.url.replace("//", "//nobody@")})
    limited = await connect(queue_config.model_copy(update={"redis": section}))
    try:
        worker._queue = limited
        with pytest.raises(QueueError, match="no permissions"):
            async with asyncio.timeout(ANSWER_SECONDS):
                await worker.hand_over(delivery, make_group(make_ticket(0)), Stage.ROLLOUTS)
    finally:
        await limited.close()
        await queue.client.acl_deluser("nobody")


@pytest.mark.parametrize("name", [b"", b"live", b"0" * 31, b"0" * 33, b"A" * 32, b"0" * 32 + b"\n", b"\xff" * 32])
async def test_an_entry_names_no_other_key(
    trainer: TrainerQueue, queue: Queue, queue_config: Config, name: bytes
) -> None:
    await issue(trainer, 0)
    fields: Any = {"t": "0", "a": "0", "p": b"x", "n": name}
    await queue.client.xadd(queue.keys.stream(Stage.SCORED), fields)
    worker = make_worker(queue, queue_config)
    delivery = await taken(worker, Stage.SCORED)
    assert delivery.parts == ""
    assert await worker.read([delivery], *Part) == [dict.fromkeys(Part)]
    before = await queue.client.keys(queue.keys.pattern)
    await trainer.discard(delivery)
    assert await queue.client.keys(queue.keys.pattern) == before


async def test_named_parts_outlive_a_restart_of_the_queue_that_takes_longer_than_others_live(
    tmp_path: Path, queue_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.broker.worker.PART_TTL_MS", 500)
    with EmbeddedServer(tmp_path / "queue") as server:
        config = queue_config.model_copy(update={"redis": server.section(queue_config.redis)})
        queue = await connect(config)
        try:
            trainer = TrainerQueue(queue, await acquire_lease(queue, config))
            await issue(trainer, 0, 1)
            worker = make_worker(queue, config)
            first, second = [await taken(worker, Stage.TICKETS) for _ in range(2)]
            assert await worker.hand_over(first, make_group(make_ticket(0)), Stage.ROLLOUTS)
            calls = await with_fates(queue)
            calls.fate = Fate.DIES
            with pytest.raises(DiedError):
                await worker.hand_over(second, make_group(make_ticket(1)), Stage.ROLLOUTS)
            await written(queue)
            server.kill()
            await asyncio.sleep(0.6)
            server.start()
            later = make_worker(queue, config)
            group = await taken(later, Stage.ROLLOUTS)
            assert await read_group(later, group) == make_group(make_ticket(0)).without_text()
            assert await part_keys(queue) == dict.fromkeys(queue.keys.parts(group.parts)[:2], -1)
        finally:
            await queue.close()


async def test_a_server_that_deletes_what_it_likes_is_refused(queue: Queue, queue_config: Config) -> None:
    try:
        for policy, limit in (("allkeys-lru", "0"), ("volatile-lru", "200mb"), ("noeviction", "200mb")):
            await queue.client.config_set("maxmemory-policy", policy)
            await queue.client.config_set("maxmemory", limit)
            await (await connect(queue_config)).close()
        await queue.client.config_set("maxmemory-policy", "allkeys-lru")
        for look in (connect, examine_server):
            with pytest.raises(ConfigError, match=r"maxmemory-policy allkeys-lru.*expected noeviction"):
                await look(queue_config)
    finally:
        await queue.client.config_set("maxmemory-policy", "noeviction")
        await queue.client.config_set("maxmemory", "0")


async def test_a_look_at_the_server_writes_nothing(queue: Queue, queue_config: Config) -> None:
    await queue.delete_run()
    before = await queue.client.dbsize()
    version, memory = await examine_server(queue_config)
    assert await queue.client.dbsize() == before
    assert version == await queue.check_server(make_groups=False)
    assert 0 < memory.used_bytes < memory.limit_bytes
    large = {**queue_config.model_dump(), "data": {"train": {"path": "unused"}, "batch_size": 10**6}}
    try:
        await queue.client.config_set("maxmemory", "200mb")
        with pytest.raises(ConfigError, match="may use 200 MiB"):
            await examine_server(Config.model_validate(large))
    finally:
        await queue.client.config_set("maxmemory", "0")
