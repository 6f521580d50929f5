"""Dead letters are noted in the run's folder: each once, with its message as text, whatever it holds."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.broker import Queue, Stage, Worker
from penstock.broker.dead import DeadLetters
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import ActorSection, Config
from penstock.contracts.ledger import RunRecord
from penstock.contracts.stored_groups import Stored
from penstock.records.dead_letters import DeadLetterLine
from penstock.records.files import DEAD_FILE
from penstock.records.lines import complete_lines
from penstock_trainer.rollouts.buried import MOST_BYTES, REASON_CHARACTERS, TEXT_CHARACTERS, BuriedMessages
from tests.integration.trainer.consumer_setup import BATCH_SIZE, NUM_PROMPTS, ConsumerSetup, dead_file

HOSTILE = f"<img src=x onerror=alert(1)>{chr(0x202E)}{chr(0)}"
MOST_LINE_BYTES = 6 * (TEXT_CHARACTERS + 2 * REASON_CHARACTERS) + 2000  # \\u0000 is six


@pytest.fixture
def config(queue_config: Config) -> Config:
    return queue_config.model_copy(update={"actor": ActorSection(path="m", group_size=2)})


@pytest.fixture
async def trainer_queue(queue: Queue, config: Config) -> TrainerQueue:
    found = TrainerQueue(queue, await acquire_lease(queue, config.model_copy(deep=True)))
    await found.append(RunRecord("d" * 16, NUM_PROMPTS, BATCH_SIZE, 2, 0))
    return found


def noted(folder: Path) -> list[DeadLetterLine]:
    return [msgspec.json.decode(line, type=DeadLetterLine) for line in complete_lines(folder / DEAD_FILE)]


def nested(depth: int) -> bytes:
    """A list in a list in a list."""
    return b"\x91" * depth + b"\x90"


async def test_what_no_service_can_use_is_noted_before_its_ticket_ends(
    trainer_queue: TrainerQueue, config: Config, tmp_path: Path
) -> None:
    setup = ConsumerSetup(trainer_queue, config, folder=tmp_path)
    await setup.issue()
    other = Worker(setup.queue, "reward", config.staleness)
    delivery = await other.take(Stage.TICKETS)
    assert delivery is not None
    await other.bury(delivery, f"judge: {HOSTILE}")  # before the trainer consumes
    async with setup.consuming():
        await setup.until(lambda: 0 not in setup.book.outstanding)
        await setup.deliver("1", Stored(b"\xc1junk"))
        await setup.until(lambda: 1 not in setup.book.outstanding)
        await setup.deliver("", Stored(msgspec.msgpack.encode({"text": HOSTILE})))
        await setup.answer(2)
        await setup.until(lambda: setup.arrived == [2])
    first, second, third = noted(tmp_path)
    assert (first.ticket, first.stage, first.reason, first.problem) == ("0", "tickets", f"judge: {HOSTILE}", "")
    assert '"schema": "ticket/1"' in first.text
    assert (second.ticket, second.stage) == ("1", "scored")
    assert second.text.startswith("00000000  c1 6a 75 6e 6b")
    assert (third.ticket, HOSTILE in msgspec.json.decode(third.text)["message"]["text"]) == ("", True)
    assert [each.id for each in noted(tmp_path)] == [each.entry_id async for each in DeadLetters(setup.queue).letters()]


async def test_each_letter_is_noted_once_over_the_lives_of_a_trainer(
    trainer_queue: TrainerQueue, config: Config, tmp_path: Path
) -> None:
    queue = trainer_queue.queue
    for life in range(3):
        await queue.client.xadd(queue.keys.dead, {"t": str(life), "x": "why", "s": "tickets", "p": b"x"})
        await BuriedMessages(DeadLetters(queue), dead_file(tmp_path)).note()
    assert [each.ticket for each in noted(tmp_path)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff" * 5000,
        nested(5000),
        msgspec.msgpack.encode({"token_ids": b"123", "text": HOSTILE * 5000}),
        msgspec.msgpack.encode({7: {b"\xff": float("nan")}}),
        b"\xd9" + bytes([255]) + b"\xfe" * 255,
        msgspec.msgpack.encode("x" * (MOST_BYTES + 1)),
        bytes(MOST_BYTES + 1),
    ],
)
@pytest.mark.parametrize("stage", ["tickets", "rollouts", "scored", "<script>"])
async def test_no_message_makes_a_long_line_or_an_error(
    queue: Queue, tmp_path: Path, stage: str, payload: bytes
) -> None:
    fields: Any = {"t": HOSTILE * 100, "a": "1" * 10_000, "x": HOSTILE * 10_000, "s": stage, "p": payload}
    await queue.client.xadd(queue.keys.dead, fields)
    await BuriedMessages(DeadLetters(queue), dead_file(tmp_path)).note()
    [line] = noted(tmp_path)
    assert line.num_bytes == len(payload)
    assert line.stage == stage
    assert (tmp_path / DEAD_FILE).stat().st_size < MOST_LINE_BYTES
