"""`penstock dead` against a real server: what is listed, shown and sent again, and that no ticket ends twice."""

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.broker import Queue, Stage, Worker
from penstock.broker.dead import DeadLetters
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import DropReason, decode, encode
from penstock.contracts import Ticket as TicketMessage
from penstock.contracts.ledger import DropRecord, RunRecord, StepRecord
from penstock.contracts.stored_groups import Part, Stored, TextsPart, stored
from penstock_launch.__main__ import run
from tests.integration.broker.queue_setup import make_group, make_scored, make_ticket, part_keys, put, read_group
from tests.integration.trainer.consumer_setup import ConsumerSetup

pytestmark = pytest.mark.redis


@pytest.fixture
async def trainer(queue: Queue, queue_config: Config) -> TrainerQueue:
    trainer = TrainerQueue(queue, await acquire_lease(queue, queue_config))
    await trainer.append(RunRecord("d", 10, 1, 2, 0))
    return trainer


class Hand:
    """A worker, and a person at the command line."""

    def __init__(self, queue: Queue, config: Config, folder: Path) -> None:
        self.queue, self.dead = queue, DeadLetters(queue)
        self.worker = Worker(queue, "worker", config.staleness)
        password = config.redis.password.get_secret_value() if config.redis.password else None
        document = {
            "run": {"name": config.run.name, "root": str(folder)},
            "actor": {"path": "unused"},
            "data": {"train": {"path": "unused"}},
            "redis": {"url": config.redis.url, "password": password},
        }
        self.path = folder / "config.yaml"
        self.path.write_text(yaml.safe_dump(document))

    async def bury(self, stage: Stage, reason: str = "not a message") -> str:
        """Bury the next entry of a stage; returns the letter's id."""
        delivery = await self.worker.take(stage)
        assert delivery is not None
        await self.worker.bury(delivery, reason)
        return [letter.entry_id async for letter in self.dead.letters()][-1]

    async def command(self, *words: str) -> int:
        return await asyncio.to_thread(run, ["dead", *words, "--config", str(self.path)])

    async def depths(self) -> dict[str, int]:
        return {name: depth for name, depth in (await self.queue.depths()).items() if depth}

    async def take(self, stage: Stage) -> bytes:
        delivery = await self.worker.take(stage)
        assert delivery is not None
        return delivery.payload


@pytest.fixture
def hand(queue: Queue, queue_config: Config, tmp_path: Path) -> Hand:
    return Hand(queue, queue_config, tmp_path)


async def refused(hand: Hand, entry_id: str) -> str:
    """The reason why a letter is not sent again; checks that nothing has changed."""
    before = await hand.depths()
    result = await hand.dead.retry(entry_id)
    assert not result.is_sent
    assert await hand.depths() == before
    return result.text


async def test_an_outstanding_ticket_is_sent_again_and_trained_once(
    trainer: TrainerQueue, hand: Hand, queue: Queue
) -> None:
    await trainer.issue([make_ticket(0)])
    await queue.client.hset(queue.keys.failures, "0", "2")
    letter = await hand.bury(Stage.TICKETS)
    assert await hand.depths() == {"scored": 1, "dead": 1}
    assert (await hand.dead.retry(letter)).text == "sent again to tickets"
    assert await hand.depths() == {"tickets": 1}
    assert await hand.worker.take(Stage.SCORED) is None
    delivery = await hand.worker.take(Stage.TICKETS)
    assert delivery is not None
    assert (decode(delivery.payload, TicketMessage), delivery.failures) == (make_ticket(0), 0)
    assert (await trainer.live())[0] == f"tickets|{delivery.entry_id}|0"
    assert await refused(hand, letter) == "not sent: it is no longer there: it was sent again or removed"
    assert await hand.worker.hand_over(delivery, make_group(make_ticket(0)), Stage.SCORED)
    scored = await hand.worker.take(Stage.SCORED)
    assert scored is not None
    await trainer.commit_step(StepRecord(0, (0,), "00000000.1.pack", "ff"), {0: scored})
    assert (await trainer.counters()).outstanding == 0


async def test_a_ticket_that_has_ended_is_not_sent_again(trainer: TrainerQueue, hand: Hand) -> None:
    await trainer.issue([make_ticket(0)])
    letter = await hand.bury(Stage.TICKETS)
    note = await hand.worker.take(Stage.SCORED)
    assert note is not None
    assert "about to drop" in await refused(hand, letter)
    await trainer.drop(DropRecord(0, DropReason.POISON), note)
    assert "has ended" in await refused(hand, letter)
    assert (await hand.depths()) == {"dead": 1}


async def test_a_note_that_a_dead_trainer_held_is_taken_back(trainer: TrainerQueue, hand: Hand) -> None:
    await trainer.issue([make_ticket(0)])
    letter = await hand.bury(Stage.TICKETS)
    assert await hand.worker.take(Stage.SCORED) is not None
    await asyncio.to_thread(trainer.lease.release)
    assert (await hand.dead.retry(letter)).is_sent
    assert await hand.depths() == {"tickets": 1}


async def test_a_trained_or_reissued_ticket_is_not_sent_again(trainer: TrainerQueue, hand: Hand, queue: Queue) -> None:
    await trainer.issue([make_ticket(0), make_ticket(1)])
    letters = [await hand.bury(Stage.TICKETS), await hand.bury(Stage.TICKETS)]
    await trainer.issue([make_ticket(0, attempt=1)])
    assert "was issued again and is in tickets" in await refused(hand, letters[0])
    await queue.client.hset(queue.keys.live, "1", "committed|1-0|")
    assert "its ticket is trained" in await refused(hand, letters[1])


async def test_a_ticket_that_is_in_no_stream_is_sent_again(trainer: TrainerQueue, hand: Hand, queue: Queue) -> None:
    """The trainer died between burying a scored group and dropping its ticket."""
    await trainer.issue([make_ticket(0)])
    delivery = await hand.worker.take(Stage.TICKETS)
    assert delivery is not None
    await hand.worker.hand_over(delivery, make_group(make_ticket(0)), Stage.ROLLOUTS)
    rollout = await hand.worker.take(Stage.ROLLOUTS)
    assert rollout is not None
    await hand.worker.hand_over(rollout, make_scored(make_ticket(0)), Stage.SCORED)
    letter = await hand.bury(Stage.SCORED)
    assert await hand.depths() == {"dead": 1}
    assert (await hand.dead.retry(letter)).is_sent
    scored = await hand.worker.take(Stage.SCORED)
    assert scored is not None
    assert (scored.payload, scored.parts) == (encode(make_scored(make_ticket(0))), rollout.parts)
    assert await part_keys(queue) == {queue.keys.part(rollout.parts, Part.COMPLETIONS): -1}
    await trainer.discard(scored)
    assert await part_keys(queue) == {}


async def test_a_letter_keeps_its_parts_and_they_go_on_with_it(
    trainer: TrainerQueue, hand: Hand, queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    await trainer.issue([make_ticket(0)])
    delivery = await hand.worker.take(Stage.TICKETS)
    assert delivery is not None
    await hand.worker.hand_over(delivery, make_group(make_ticket(0)), Stage.ROLLOUTS)
    letter = await hand.bury(Stage.ROLLOUTS, "no such reward")
    assert list((await part_keys(queue)).values()) == [-1, -1]
    assert await hand.command("show", letter) == 0
    shown = json.loads(capsys.readouterr().out)
    assert "problem" not in shown
    assert shown["message"]["server"] == "server"
    assert shown["parts"]["texts"]["message"]["texts"] == ["2", "2"]
    assert shown["parts"]["completions"]["message"]["completions"][0]["token_ids"] == [5, 2]
    assert (await hand.dead.retry(letter)).is_sent
    again = await hand.worker.take(Stage.ROLLOUTS)
    assert again is not None
    assert await read_group(hand.worker, again) == make_group(make_ticket(0)).without_text()


async def test_what_is_wrong_with_a_part_is_shown(
    trainer: TrainerQueue, hand: Hand, queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = stored(make_group(make_ticket(0)))
    wrong = [{}, {**whole.parts, Part.COMPLETIONS: b"\xc1"}, {**whole.parts, Part.TEXTS: encode(TextsPart(("2",)))}]
    for parts, problem in zip(wrong, ["texts are not", "not a CompletionsPart", "1 texts for 2"], strict=True):
        await put(queue, Stage.ROLLOUTS, "x", Stored(whole.header, parts))
        assert await hand.command("show", await hand.bury(Stage.ROLLOUTS)) == 0
        shown = json.loads(capsys.readouterr().out)
        assert problem in shown["problem"]
        assert shown.get("parts", {}).keys() == {str(part) for part in parts}


@pytest.mark.parametrize(("key", "sent"), [("", True), ("x7", True), ("e3", False), ("99", False)])
async def test_messages_without_an_outstanding_ticket(
    trainer: TrainerQueue, hand: Hand, queue: Queue, key: str, sent: bool
) -> None:
    await queue.client.xadd(queue.keys.stream(Stage.ROLLOUTS), {"t": key, "a": "0", "p": b"\xff\x00garbage"})
    letter = await hand.bury(Stage.ROLLOUTS)
    if not sent:
        assert ("of an evaluation" if key == "e3" else "has ended") in await refused(hand, letter)
        return
    assert (await hand.dead.retry(letter)).is_sent
    assert await hand.take(Stage.ROLLOUTS) == b"\xff\x00garbage"
    assert await trainer.live() == {}


async def test_a_letter_from_no_stage_is_not_sent(trainer: TrainerQueue, hand: Hand, queue: Queue) -> None:
    entry: Any = await queue.client.xadd(queue.keys.dead, {"t": "", "x": "forged", "s": "ledger", "p": b"x"})
    assert "no stage of work" in await refused(hand, entry.decode())


async def test_a_drop_that_crosses_a_retry_ends_the_ticket_once(
    trainer: TrainerQueue, hand: Hand, queue_config: Config
) -> None:
    """The trainer holds the note, but the script cannot see its lease: the drop counts, the letter's result is a
    duplicate.
    """
    actor = queue_config.actor.model_copy(update={"group_size": 2})
    setup = ConsumerSetup(trainer, queue_config.model_copy(update={"actor": actor}))
    await setup.issue()
    letter = await hand.bury(Stage.TICKETS)
    note = await setup.worker.take(Stage.SCORED)
    assert note is not None
    await trainer.queue.client.delete(trainer.queue.keys.lease)
    assert (await hand.dead.retry(letter)).is_sent
    await trainer.queue.client.set(trainer.queue.keys.lease, trainer.lease.token)
    await setup.consumer.receive(note, {})
    await setup.answer(0)
    async with setup.consuming():
        await setup.until(lambda: setup.count("duplicate_groups") == 1)
    assert (await trainer.ledger()).dropped == {0: "poison"}
    assert dict((await trainer.counters()).dropped) == {"poison": 1}


async def test_the_command_lists_shows_and_sends(
    trainer: TrainerQueue, hand: Hand, queue: Queue, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await hand.command("list") == 0
    assert "has no dead letters" in capsys.readouterr().out
    await trainer.issue([make_ticket(0)])
    ticket = await hand.bury(Stage.TICKETS, "the engine\nrefused it")
    await queue.client.xadd(queue.keys.stream(Stage.ROLLOUTS), {"t": "7", "a": "0", "p": b"\xc1garbage"})
    garbage = await hand.bury(Stage.ROLLOUTS)
    assert await hand.command("list") == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["ID", "TICKET", "ATTEMPT", "SINCE", "STAGE", "REASON"]
    assert [row.split()[:3] for row in rows] == [[ticket, "0", "0"], [garbage, "7", "0"]]
    assert rows[0].endswith("tickets   the engine refused it")

    assert await hand.command("show", ticket) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["ticket"], shown["stage"], shown["reason"]) == ("0", "tickets", "the engine\nrefused it")
    assert (shown["message"]["prompt_ids"], shown["message"]["schema"]) == ([1, 2, 3], "ticket/1")
    assert "problem" not in shown
    assert await hand.command("show", garbage) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["hexdump"] == ["00000000  c1 67 61 72 62 61 67 65                          |.garbage|"]
    assert "not a RolloutHeader" in shown["problem"]

    assert await hand.command("retry", "--all") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{ticket}: sent again to tickets",
        f"{garbage}: not sent: its ticket has ended and is not outstanding; a ticket never ends twice",
        "1 sent again, 1 not",
    ]
    assert await hand.command("retry", garbage) == 1


@pytest.mark.parametrize(
    ("words", "code", "seen"),
    [
        (["show", "5-0"], 2, "no dead letter 5-0"),
        (["show", "five"], 2, "'five' is no id of a dead letter"),
        (["show"], 2, "saw 0 ids"),
        (["retry"], 2, "expected ids of dead letters, or --all"),
        (["retry", "5-0", "--all"], 2, "or --all, and not both"),
        (["list", "5-0"], 2, "saw '5-0'; expected penstock dead list"),
        (["list", "--run.name", "other"], 2, "has no run 'other'; expected .*check run.name"),
        (["list", "--redis.url", "redis://127.0.0.1:1/0"], 4, "redis.url redis://127.0.0.1:1/0: "),
        (["list", "--redis.url", ""], 1, "is not running: no live launcher"),
    ],
)
async def test_what_cannot_be_done_is_said(
    trainer: TrainerQueue, hand: Hand, capsys: pytest.CaptureFixture[str], words: Sequence[str], code: int, seen: str
) -> None:
    before = {key async for key in hand.queue.client.scan_iter(match="penstock:{other}:*")}
    assert await hand.command(*words) == code
    assert re.search(seen, capsys.readouterr().err)
    assert {key async for key in hand.queue.client.scan_iter(match="penstock:{other}:*")} == before
