"""Random interleavings of everything that can happen to a run's queue, with the invariants after every step.

The rules move rollout servers, reward workers and trainers (`broker_world`) over a real server through the product's
own classes and scripts. At the end of each run whatever is left is worked off, and every ticket must have ended.

CI runs a fixed selection. To search for longer, with new random choices each time:

    PENSTOCK_STATEFUL_EXAMPLES=3000 .venv/bin/python -m pytest tests/integration/test_broker_stateful.py --timeout 0
"""

import asyncio
import logging
import os
import uuid
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import Any, ClassVar, TypeVar, cast

import pytest
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from penstock.broker import Delivery, Queue, Stage, Worker, connect
from penstock.config import Config
from penstock.errors import FencedError, LostWritesError
from penstock.ledger import LedgerState
from penstock.tickets import TicketState
from penstock_trainer.consumer import oldest_version
from tests.integration.broker_world import (
    INITIAL,
    PROMPTS,
    Entry,
    Holder,
    Holding,
    TrainerLife,
    age,
    age_all,
    copy_keys,
    entries_of,
    holder_of,
    lease_of,
    next_life,
    put_back_keys,
    without_waiting,
)

# By a thread: a signal's exception is one more failing example to Hypothesis, which then looks for the smallest one.
pytestmark = [pytest.mark.redis, pytest.mark.timeout(300, method="thread")]

NUM_EXAMPLES = int(os.environ.get("PENSTOCK_STATEFUL_EXAMPLES", "0"))
CI_EXAMPLES = 60  # about 20 s
STEPS = 60
MAX_FAILED_REWARDS = 2  # more than half of four batches would end the run, as they should
DRAIN_ROUNDS = 200
OLD_MILLISECONDS = 10_000_000
NUM_ROLLOUT, NUM_REWARD = 2, 1

PHASES = list(Phase) if NUM_EXAMPLES else [Phase.generate]  # CI tells of the first failure; a search shrinks it
T = TypeVar("T")
index = st.integers(0, 7)
ABSENT = Delivery(Stage.SCORED, "1-1", "0", 0, b"", "", 0, 0)


class QueueMachine(RuleBasedStateMachine):
    """One run of ten tickets."""

    runner: ClassVar[asyncio.Runner]
    base: ClassVar[Config]

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    @initialize(batch_size=st.integers(1, 3), max_staleness=st.integers(0, 2), dynamic_sampling=st.booleans())
    def begin(self, batch_size: int, max_staleness: int, dynamic_sampling: bool) -> None:
        name = f"stateful-{uuid.uuid4().hex[:12]}"
        config = self.base.model_copy(update={"run": self.base.run.model_copy(update={"name": name})})
        self.config = without_waiting(config, max_staleness=max_staleness)
        self.batch_size, self.dynamic_sampling = batch_size, dynamic_sampling
        self.queue: Queue = self.run(connect(self.config))
        self.files: dict[str, tuple[int, ...]] = {}
        self.ghosts: list[Holder] = []
        self.zombies: list[TrainerLife] = []
        self.saved: dict[bytes, bytes] | None = None
        self.duplicated: set[int] = set()
        self.num_failed_rewards = 0
        self.has_lost = False
        self.holders = [self.new_holder(Stage.TICKETS) for _ in range(NUM_ROLLOUT)]
        self.holders += [self.new_holder(Stage.ROLLOUTS) for _ in range(NUM_REWARD)]
        self.start_trainer(bits=0)
        self.announce()

    def new_holder(self, stage: Stage) -> Holder:
        return Holder(Worker(self.queue, stage, self.config.staleness), stage, INITIAL)

    def start_trainer(self, bits: int) -> None:
        make = next_life(
            self.queue,
            self.config,
            batch_size=self.batch_size,
            dynamic_sampling=self.dynamic_sampling,
            above=max((lease_of(name) for name in self.files), default=0),
        )
        self.trainer = self.run(make)
        self.run(self.trainer.begin(self.ledger(), bits))

    def ledger(self) -> LedgerState:
        return self.run(self.trainer.queue.ledger())

    # Workers.

    @rule(which=index)
    def take(self, which: int) -> None:
        holder = self.holders[which % len(self.holders)]
        announced = self.run(self.queue.announced())
        holding = self.run(holder.take())
        if holding is not None and holder.stage is Stage.TICKETS:
            assert announced is not None
            assert holder.policy.number >= announced.identity.number, "a server older than announced took a ticket"
            assert holding.message.policy_version <= holder.policy.number  # type: ignore[union-attr]

    def held(self, holders: list[Holder]) -> list[tuple[Holder, Holding]]:
        return [(holder, holding) for holder in holders for holding in holder.holds]

    def publish(self, holder: Holder, holding: Holding, values: tuple[float | None, ...]) -> None:
        owner = self.run(holder_of(self.queue, holding.delivery))
        if holder.stage is Stage.ROLLOUTS and None in values:
            self.num_failed_rewards += 1
        assert self.run(holder.publish(holding, values)) == (owner == holder.worker.name)

    @precondition(lambda self: self.held(self.holders))
    @rule(which=index, values=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (1.0, None)]))
    def hand_over(self, which: int, values: tuple[float | None, ...]) -> None:
        held = self.held(self.holders)
        if None in values and self.num_failed_rewards >= MAX_FAILED_REWARDS:
            values = (1.0, 0.0)
        self.publish(*held[which % len(held)], values)

    @precondition(lambda self: self.held(self.ghosts))
    @rule(which=index)
    def publish_late(self, which: int) -> None:
        held = self.held(self.ghosts)
        self.publish(*held[which % len(held)], (1.0, 0.0))

    @rule(which=index)
    def believe_dead(self, which: int) -> None:
        """Its heartbeat is gone; it may still be working."""
        place = which % len(self.holders)
        ghost = self.holders[place]
        self.run(ghost.worker.retire())
        self.ghosts.append(ghost)
        self.holders[place] = self.new_holder(ghost.stage)
        self.holders[place].policy, self.holders[place].lease = ghost.policy, ghost.lease

    @precondition(lambda self: self.ghosts)
    @rule(which=index)
    def come_back(self, which: int) -> None:
        """The one that was believed dead beats again, with what it thinks that it holds."""
        ghost = self.ghosts.pop(which % len(self.ghosts))
        self.run(cast(Any, self.queue.client.hset(self.queue.keys.beats, ghost.worker.name, str(2**53))))
        self.holders.append(ghost)

    @precondition(lambda self: self.held(self.holders))
    @rule(which=index)
    def stop_renewing(self, which: int) -> None:
        held = self.held(self.holders)
        self.run(age(self.queue, held[which % len(held)][1].delivery, OLD_MILLISECONDS))

    @precondition(lambda self: self.held(self.holders + self.ghosts))
    @rule(which=index, outcome=st.sampled_from(["free", "failed", "engine_died", "bury"]))
    def let_go(self, which: int, outcome: str) -> None:
        held = self.held(self.holders + self.ghosts)
        holder, holding = held[which % len(held)]
        holder.holds.remove(holding)
        if outcome == "bury":
            self.run(holder.worker.bury(holding.delivery, "it does not decode"))
        else:
            failed, died = outcome == "failed", outcome == "engine_died"
            self.run(holder.worker.give_back(holding.delivery, failed=failed, engine_died=died, reason=outcome))

    @rule(values=st.sampled_from([(1.0, 0.0), (1.0, 1.0)]))
    def work(self, values: tuple[float | None, ...]) -> None:
        """Everybody does what there is to do: rare events meet a run that is under way."""
        for holder in self.holders:
            while self.run(holder.take()) is not None:
                pass
            for holding in list(holder.holds):
                self.publish(holder, holding, values)
        self.run(self.trainer.judge(9))

    # The trainer.

    @rule(count=st.integers(1, 3))
    def judge(self, count: int) -> None:
        self.run(self.trainer.judge(count))

    @precondition(lambda self: self.trainer.untrained is None)
    @rule()
    def close_batch(self) -> None:
        life = self.trainer
        batch = self.run(life.close_batch(self.files))
        for arrival in batch or ():
            event("a batch is trained")
            oldest = oldest_version(arrival.group)
            assert oldest is not None
            assert life.version - oldest <= life.max_staleness, "a token is staler than max_staleness"

    @precondition(lambda self: self.trainer.untrained is not None and self.trainer.release is None)
    @rule(bits=st.integers(0, 1))
    def finish_update(self, bits: int) -> None:
        self.run(self.trainer.finish_update(bits))

    @precondition(lambda self: self.trainer.release is not None)
    @rule(which=index)
    def push(self, which: int) -> None:
        """One server loads what was staged; those that are left out are fenced once it is announced."""
        assert self.trainer.release is not None
        servers = [holder for holder in self.holders + self.ghosts if holder.stage is Stage.TICKETS]
        servers[which % len(servers)].load(self.trainer.release[0])

    @rule(which=index)
    def catch_up(self, which: int) -> None:
        announced = self.run(self.queue.announced())
        servers = [holder for holder in self.holders + self.ghosts if holder.stage is Stage.TICKETS]
        server = servers[which % len(servers)]
        if announced is not None and server.is_behind(announced):
            server.load(announced)

    @precondition(lambda self: self.trainer.release is not None)
    @rule()
    def announce(self) -> None:
        self.run(self.trainer.announce())

    @precondition(lambda self: self.trainer.untrained is None)
    @rule()
    def checkpoint(self) -> None:
        self.run(self.trainer.checkpoint())

    @rule(bits=st.integers(0, 1))
    def restart_trainer(self, bits: int) -> None:
        self.zombies.append(self.trainer)
        self.start_trainer(bits)

    @precondition(lambda self: self.zombies)
    @rule(which=index)
    def old_trainer_changes_nothing(self, which: int) -> None:
        zombie = self.zombies[which % len(self.zombies)]
        before = self.run(copy_keys(self.queue))
        tickets = [zombie.draws.ticket(0, attempt=9, policy_version=0)]
        for call in (zombie.queue.issue(tickets), zombie.checkpoint(), zombie.queue.reissue(tickets[0], ABSENT)):
            with pytest.raises((FencedError, LostWritesError)):  # the latter: the queue went back past its lease
                self.run(call)
        assert self.run(copy_keys(self.queue)) == before

    # The queue.

    @rule()
    def remember(self) -> None:
        """The server's disk holds everything until now."""
        self.saved = self.run(copy_keys(self.queue))

    @precondition(lambda self: self.saved is not None)
    @rule(bits=st.integers(0, 1))
    def lose_the_tail(self, bits: int) -> None:
        """The server comes back without its last writes; the trainer, which stood on them, starts again."""
        assert self.saved is not None
        self.run(put_back_keys(self.queue, self.saved))
        self.has_lost = True
        self.restart_trainer(bits)

    @rule(which=index)
    def duplicate(self, which: int) -> None:
        entries = self.entries()
        if entries:
            entry = entries[which % len(entries)]
            stream = self.queue.keys.stream(entry.stage)
            self.run(self.queue.client.xadd(stream, entry.fields))  # type: ignore[arg-type]
            self.duplicated.add(entry.ticket)

    def entries(self) -> list[Entry]:
        return self.run(entries_of(self.queue))

    # What must always be so.

    @invariant()
    def every_ticket_is_in_exactly_one_place(self) -> None:
        ledger, live = self.ledger(), self.run(self.trainer.queue.live())
        counters = self.run(self.trainer.queue.counters())
        trained = Counter(ticket for record in ledger.steps for ticket in record.tickets)
        assert not [ticket for ticket, times in trained.items() if times > 1], "trained twice"
        assert not trained.keys() & ledger.dropped.keys(), "trained and dropped"
        assert [record.step for record in ledger.steps] == list(range(len(ledger.steps)))
        assert all(self.files[record.file] == record.tickets for record in ledger.steps)
        ended = trained.keys() | ledger.dropped.keys()
        issued = set(range(counters.next_number))
        assert ended <= issued
        assert issued - ended <= live.keys(), "a ticket is nowhere"
        assert live.keys() <= issued - ledger.dropped.keys()
        assert len(live) <= self.trainer.credits, "more outstanding than credits"
        assert counters.issued == counters.next_number
        assert counters.trained == len(trained)
        assert Counter(ledger.dropped.values()) == Counter(counters.dropped)
        places: dict[int, list[str]] = {}
        for entry in self.entries():
            places.setdefault(entry.ticket, []).append(entry.place)
        for ticket, place in live.items():
            if ticket in trained:
                assert place.startswith("committed|")
            elif ticket in self.duplicated:
                assert places.get(ticket)
            else:
                assert places.get(ticket) == [place]
        assert {ticket for ticket in places if ticket in ended} <= self.duplicated
        self.the_book_is_what_the_ledger_says()

    def the_book_is_what_the_ledger_says(self) -> None:
        book, ledger = self.trainer.book, self.ledger()
        live = self.run(self.trainer.queue.live())
        states = book.outstanding
        assert states.keys() == live.keys()
        committed = {ticket for ticket, state in states.items() if state is TicketState.COMMITTED}
        assert committed == live.keys() & ledger.trained.keys()
        assert book.num_steps == len(ledger.steps)
        assert book.next_number == self.run(self.trainer.queue.counters()).next_number

    def teardown(self) -> None:
        if not hasattr(self, "trainer"):
            return
        try:
            self.work_off()
        finally:
            self.run(self.queue.delete_run())
            self.run(self.queue.close())

    def work_off(self) -> None:
        """Nothing goes wrong any more: every ticket ends, and nothing is left."""
        self.run(age_all(self.queue, OLD_MILLISECONDS))  # what somebody holds and does not know of
        for _ in range(DRAIN_ROUNDS):
            if self.trainer.book.finished:
                break
            for holder in list(self.holders):
                announced = self.run(self.queue.announced())
                if holder.stage is Stage.TICKETS and announced is not None and holder.is_behind(announced):
                    holder.load(announced)
                while self.run(holder.take()) is not None:
                    pass
                for holding in list(holder.holds):
                    self.publish(holder, holding, (1.0, 0.0))
            self.judge(9)
            if self.trainer.untrained is None:
                self.close_batch()
            if self.trainer.release is not None:
                self.announce()
            if self.trainer.untrained is not None:
                self.finish_update(0)
        self.every_ticket_is_in_exactly_one_place()
        self.judge(99)
        ledger = self.ledger()
        assert ledger.trained.keys() | ledger.dropped.keys() == set(range(len(PROMPTS)))
        assert {entry.ticket for entry in self.entries()} <= self.duplicated


@pytest.fixture
def machine(queue_config: Config) -> Iterator[type[QueueMachine]]:
    logging.getLogger("penstock").setLevel(logging.CRITICAL)
    with asyncio.Runner() as runner:
        QueueMachine.runner, QueueMachine.base = runner, queue_config
        yield QueueMachine


def test_nothing_is_lost_or_trained_twice(machine: type[QueueMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=NUM_EXAMPLES or CI_EXAMPLES,
            stateful_step_count=STEPS,
            derandomize=not NUM_EXAMPLES,
            database=None,
            deadline=None,
            phases=PHASES,
            suppress_health_check=list(HealthCheck),
        ),
    )
