"""The trainer's consumer on a real queue: what each arrival does to its ticket, and what is left in Redis."""

import asyncio
from collections.abc import Callable

import msgspec
import pytest

from penstock import tickets
from penstock.broker import Delivery, Queue, Stage, Worker
from penstock.broker.keys import GROUP
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import ActorSection, Config
from penstock.contracts import DropReason, PolicyIdentity, encode
from penstock.contracts.ledger import DropRecord, RunRecord
from penstock.contracts.stored_groups import CompletionsPart, Part, Stored
from penstock.errors import StallError
from tests.integration.broker.queue_setup import stored_scored
from tests.integration.trainer.consumer_setup import BATCH_SIZE, NUM_PROMPTS, OLD, POLICY, ConsumerSetup, scored
from tests.patience import ANSWER_SECONDS

pytestmark = pytest.mark.redis


@pytest.fixture
def config(queue_config: Config) -> Config:
    return queue_config.model_copy(update={"actor": ActorSection(path="m", group_size=2)})


@pytest.fixture
async def trainer_queue(queue: Queue, config: Config) -> TrainerQueue:
    found = TrainerQueue(queue, await acquire_lease(queue, config.model_copy(deep=True)))
    await found.append(RunRecord("d" * 16, NUM_PROMPTS, BATCH_SIZE, 2, 0))
    return found


@pytest.fixture
async def setup(trainer_queue: TrainerQueue, config: Config) -> ConsumerSetup:
    setup = ConsumerSetup(trainer_queue, config)
    await setup.issue()
    return setup


async def test_the_call_that_takes_the_last_group_also_waits_for_the_next(
    setup: ConsumerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, take_several, wait = list[str](), setup.worker.take_several, setup.worker.wait

    async def take_and_note(stage: Stage, limit: int) -> list[Delivery]:
        found = await take_several(stage, limit)
        calls.append(f"took {len(found)}")
        return found

    async def note_and_wait(*, timeout_seconds: float) -> None:
        calls.append("waits")
        await wait(timeout_seconds=timeout_seconds)

    monkeypatch.setattr(setup.worker, "take_several", take_and_note)
    monkeypatch.setattr(setup.worker, "wait", note_and_wait)
    await setup.answer(0)
    async with setup.consuming():
        await setup.until(lambda: setup.arrived == [0])
        async with asyncio.timeout(ANSWER_SECONDS):
            while len(calls) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert calls[:2] == ["took 1", "waits"]


async def test_a_trainer_too_late_to_renew_what_it_holds_keeps_it(
    setup: ConsumerSetup, queue: Queue, config: Config
) -> None:
    """It takes the entry from itself; as a duplicate, the group would be deleted, and lost if the trainer died."""
    async with setup.consuming():
        await setup.answer(0)
        await setup.until(lambda: setup.arrived == [0])
        stream = queue.keys.stream(Stage.SCORED)
        [(entry, _)] = await queue.guard(queue.client.xrange(stream))
        too_long = int(config.staleness.claim_idle_seconds * 1000) + 1
        await queue.client.xclaim(stream, GROUP, setup.worker.name, 0, [entry], idle=too_long, justid=True)
        await queue.delete([queue.keys.looked(Stage.SCORED)])
        await setup.answer(1)
        await setup.until(lambda: setup.arrived == [0, 1])
        await setup.answer(2)  # the look of this take, or of one before it, has found the late entry
        await setup.until(lambda: setup.arrived == [0, 1, 2])
        [pending] = await queue.guard(queue.client.xpending_range(stream, GROUP, min=entry, max=entry, count=1))
    assert pending["consumer"].decode() == setup.worker.name
    assert pending["times_delivered"] > 1
    assert await setup.depth("scored") == 3
    assert setup.worker.num_held == 3


async def test_a_batch_is_the_arrived_prefix_and_stays_in_the_queue(setup: ConsumerSetup) -> None:
    async with setup.consuming():
        for number in (2, 1):
            await setup.answer(number)
        await setup.until(lambda: setup.arrived == [1, 2])
        assert await setup.consumer.next_batch(1) is None
        await setup.answer(0)
        await setup.until(lambda: setup.arrived == [0, 1, 2])
        batch = await setup.consumer.next_batch(1)
    assert batch is not None
    assert [arrival.number for arrival in batch] == [0, 1]
    assert await setup.depth("scored") == 3
    assert setup.worker.num_held == 3
    setup.book.commit([0, 1])
    setup.consumer.release(batch)
    assert setup.worker.num_held == 1


async def test_duplicates_are_discarded(setup: ConsumerSetup) -> None:
    async with setup.consuming():
        for _ in range(3):
            await setup.answer(0)
        await setup.answer(99 % NUM_PROMPTS)  # never issued
        await setup.until(lambda: setup.count("duplicate_groups") == 3)
    assert setup.arrived == [0]
    assert await setup.depth("scored") == 1


async def test_a_group_of_an_unknown_policy_is_issued_again(setup: ConsumerSetup) -> None:
    async with setup.consuming():
        await setup.answer(0, policy=PolicyIdentity(1, "f" * 16))  # by a trainer that lost its lease
        await setup.until(lambda: setup.count("tickets", state="reissued", reason="version") == 1)
        again = (await setup.issued_tickets())[-1]
        assert (again.number, again.attempt, again.policy_version) == (0, 1, 1)
        assert await setup.depth("scored") == 0
        await setup.answer(0)
        await setup.until(lambda: setup.arrived == [0])
    assert await setup.depth("scored") == 1


async def test_a_stale_group_is_issued_again_instead_of_trained(setup: ConsumerSetup) -> None:
    async with setup.consuming():
        await setup.answer(0, policy=OLD)
        await setup.answer(1)
        await setup.until(lambda: setup.arrived == [0, 1])
    assert await setup.consumer.next_batch(2) is None  # two versions behind
    assert setup.arrived == [1]
    again = (await setup.issued_tickets())[-1]
    assert (again.number, again.attempt) == (0, 1)
    assert await setup.depth("scored") == 1


@pytest.mark.parametrize("values", [(None, None), (1.0, None)])
async def test_a_group_without_two_rewards_is_dropped_and_replaced(
    setup: ConsumerSetup, values: tuple[float | None, ...]
) -> None:
    async with setup.consuming():
        await setup.answer(1, values)
        await setup.until(lambda: 1 not in setup.book.outstanding)
    counters = await setup.trainer_queue.counters()
    assert (counters.issued, counters.dropped, counters.outstanding) == (5, {"reward_failed": 1}, 4)
    assert list(setup.book.outstanding) == [0, 2, 3, 4]
    failures = {"it raised": values.count(None)}
    record = DropRecord(1, DropReason.REWARD_FAILED, num_completions=2, failures=failures)
    assert (await setup.trainer_queue.ledger()).drops == {1: record}
    assert (await setup.issued_tickets())[-1].number == 4
    assert await setup.depth("scored") == 0
    assert setup.consumer.last_failure == "it raised"
    assert [(reason, group and group.group.ticket.number) for reason, group in setup.dropped] == [
        (DropReason.REWARD_FAILED, 1)
    ]


async def test_a_reward_that_always_fails_ends_the_run_with_its_reason(setup: ConsumerSetup) -> None:
    for number in range(5):
        await setup.answer(number, (None, None))
    with pytest.raises(
        StallError, match=r"reward failed for 5 of the last 8 .*reward.functions.*; the last one: it raised"
    ):
        async with asyncio.timeout(ANSWER_SECONDS):
            await setup.consumer.consume_groups()


@pytest.mark.parametrize("dynamic_sampling", [False, True])
async def test_equal_rewards_are_dropped_only_with_dynamic_sampling(
    trainer_queue: TrainerQueue, config: Config, dynamic_sampling: bool
) -> None:
    setup = ConsumerSetup(trainer_queue, config, dynamic_sampling=dynamic_sampling)
    await setup.issue()
    async with setup.consuming():
        await setup.answer(0, (1.0, 1.0))
        await setup.answer(1)
        await setup.until(lambda: 1 in setup.arrived)
    assert setup.arrived == ([1] if dynamic_sampling else [0, 1])
    dropped = dict((await trainer_queue.counters()).dropped)
    assert dropped == ({"degenerate": 1} if dynamic_sampling else {})


@pytest.mark.parametrize("has_kl_term", [False, True])
async def test_equal_rewards_end_a_run_even_if_a_kl_term_has_a_gradient(
    trainer_queue: TrainerQueue, config: Config, has_kl_term: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tickets, "BATCHES_WITHOUT_GRADIENT", 1)
    setup = ConsumerSetup(trainer_queue, config, has_kl_term=has_kl_term)
    await setup.issue()
    for number in range(BATCH_SIZE):
        await setup.answer(number, (0.5, 0.5))
    with pytest.raises(StallError, match="in each group all rewards were equal"):
        async with asyncio.timeout(ANSWER_SECONDS):
            await setup.consumer.consume_groups()


@pytest.mark.parametrize("dynamic_sampling", [False, True])
@pytest.mark.parametrize("values", [(1.0, 1.0), (1.0, 1.25)])
async def test_right_answers_alone_end_no_run_as_a_failure(
    trainer_queue: TrainerQueue,
    config: Config,
    dynamic_sampling: bool,
    values: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal ones: the loop sees that the run is solved. Unequal ones have a gradient."""
    monkeypatch.setattr(tickets, "BATCHES_WITHOUT_GRADIENT", 1)
    setup = ConsumerSetup(trainer_queue, config, dynamic_sampling=dynamic_sampling)
    await setup.issue()
    async with setup.consuming():
        for number in range(BATCH_SIZE):
            await setup.answer(number, values)
        await setup.until(lambda: setup.arrived == [0, 1] or not {0, 1} & setup.book.outstanding.keys())
    assert setup.book.without_gradient.lowest == (1.0 if values == (1.0, 1.0) else None)


MALFORMED: dict[str, Callable[[Stored], Stored]] = {
    "junk": lambda whole: Stored(b"junk", whole.parts),
    "cut": lambda whole: Stored(whole.header[:-3], whole.parts),
    "no parts": lambda whole: Stored(whole.header),
    "a part is cut": lambda whole: with_completions(whole, whole.parts[Part.COMPLETIONS][:-3]),
    "a part is another": lambda whole: with_completions(whole, whole.parts[Part.TEXTS]),
    "a part is of fewer": lambda whole: with_completions(whole, encode(CompletionsPart(()))),
    "a part is huge": lambda whole: with_completions(whole, bytes(4_000_000)),
    "another ticket": lambda whole: whole,
}


def with_completions(whole: Stored, data: bytes) -> Stored:
    return Stored(whole.header, {**whole.parts, Part.COMPLETIONS: data})


@pytest.mark.parametrize("case", MALFORMED)
async def test_a_malformed_message_is_a_dead_letter_and_its_ticket_poison(setup: ConsumerSetup, case: str) -> None:
    number = 3 if case == "another ticket" else 0
    whole = stored_scored(scored(setup.draws.ticket(number, attempt=0, policy_version=1), (1.0, 0.0), POLICY))
    async with setup.consuming():
        await setup.deliver("0", MALFORMED[case](whole))
        await setup.until(lambda: 0 not in setup.book.outstanding)
    assert (await setup.trainer_queue.ledger()).dropped == {0: "poison"}
    assert dict((await setup.trainer_queue.counters()).dropped) == {"poison": 1}
    assert list(setup.book.outstanding) == [1, 2, 3, 4]
    assert await setup.depth("scored") == 0
    assert await setup.depth("dead") == 1
    assert setup.count("dead_letters", reason="malformed") == 1


@pytest.mark.parametrize("key", ["", "e", "e99", "x", "77", "\u00b2"])
async def test_a_malformed_message_of_no_ticket_is_a_dead_letter_and_nothing_else(
    setup: ConsumerSetup, key: str
) -> None:
    async with setup.consuming():
        await setup.deliver(key, Stored(b"junk"))
        await setup.answer(0)
        await setup.until(lambda: setup.arrived == [0])
    assert list(setup.book.outstanding) == [0, 1, 2, 3]
    assert await setup.depth("dead") == 1


async def test_what_another_service_buried_is_poison(setup: ConsumerSetup, config: Config) -> None:
    other = Worker(setup.queue, "reward", config.staleness)
    delivery = await other.take(Stage.TICKETS)
    assert delivery is not None
    await other.bury(delivery, "it does not decode")
    async with setup.consuming():
        await setup.until(lambda: 0 not in setup.book.outstanding)
    record = DropRecord(0, DropReason.POISON, why="it does not decode")
    assert (await setup.trainer_queue.ledger()).drops == {0: record}
    assert (await setup.depth("dead"), await setup.depth("scored")) == (1, 0)


async def test_arrivals_before_the_tickets_are_known_are_kept(trainer_queue: TrainerQueue, config: Config) -> None:
    """A restarted trainer finds groups waiting; none of them is a duplicate."""
    setup = ConsumerSetup(trainer_queue, config, begun=False)
    await setup.issue()
    next_number = setup.book.next_number
    outstanding = list(setup.book.outstanding)
    setup.book.restore(0, [], 0)
    for number in (0, 1):
        await setup.answer(number)
    async with setup.consuming():
        await asyncio.sleep(0.2)
        assert await setup.depth("scored") == 2
        setup.book.restore(next_number, outstanding, 0)
        setup.begin()
        await setup.until(lambda: setup.arrived == [0, 1])
    assert setup.count("duplicate_groups") == 0


async def test_groups_that_an_earlier_life_held_are_taken_over_at_once(
    setup: ConsumerSetup, trainer_queue: TrainerQueue, config: Config
) -> None:
    async with setup.consuming():
        await setup.answer(0)
        await setup.until(lambda: setup.arrived == [0])
    later = ConsumerSetup(trainer_queue, config)
    later.book.restore(4, [0, 1, 2, 3], 0)
    async with later.consuming():
        await later.until(lambda: later.arrived == [0])


async def test_evaluation_results_complete_their_round_and_leave_the_queue(setup: ConsumerSetup) -> None:
    async with setup.consuming():
        for case, accuracies in (("answered", [1.0]), ("malformed", [None])):
            [ticket] = setup.evaluation.start(0, 1)
            whole = stored_scored(scored(msgspec.structs.replace(ticket, seeds=(1,)), (1.0,), POLICY))
            await setup.deliver(ticket.key, whole if case == "answered" else Stored(whole.header))
            await setup.until(lambda: setup.evaluation.num_waiting == 0)
            assert [result.accuracy for result in setup.evaluation.take_results()] == accuracies
    assert await setup.depth("scored") == 0
    assert setup.arrived == []
