"""One run on a real queue that is moved at random, and the invariants after every step.

Owns everything that outlives a step: the workers and trainers (`broker_workers`, `broker_trainer`), the step files, and
the record of what was lost or duplicated. `broker_rules` defines what may happen.
"""

import asyncio
import uuid
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from penstock.broker import Queue, Stage, Worker, connect
from penstock.broker.trainer import read_ledger
from penstock.config import Config
from penstock.contracts.ledger import ArchivedRecord, LedgerState, Record, replay
from penstock.contracts.stored_groups import Part
from penstock.run_home import RunHome
from penstock.tickets import TicketState
from tests.integration.broker.broker_calls import with_fates
from tests.integration.broker.broker_entries import Copy, Entry, dead_entries, entries_of, holder_of
from tests.integration.broker.broker_trainer import INITIAL, TrainerLife, next_life
from tests.integration.broker.broker_workers import Holder, Holding
from tests.integration.broker.queue_setup import part_keys

T = TypeVar("T")
NUM_ROLLOUT, NUM_REWARD = 2, 1


def without_waiting(config: Config, *, max_staleness: int) -> Config:
    """No worker dies and no entry becomes free because time has passed."""
    staleness = replace_section(
        config.staleness, heartbeat_seconds=3600, claim_idle_seconds=3600, max_staleness=max_staleness
    )
    return config.model_copy(update={"staleness": staleness, "actor": replace_section(config.actor, group_size=2)})


def replace_section(section: Any, **changes: Any) -> Any:
    return section.model_copy(update=changes)


class RunMachine(RuleBasedStateMachine):
    """One run of ten tickets."""

    runner: ClassVar[asyncio.Runner]
    base: ClassVar[Config]
    folders: ClassVar[Path]
    """Where each run has its own."""
    met: ClassVar[Counter[str]] = Counter()
    """How often the rules did what is rare, over all runs."""

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    @initialize(batch_size=st.integers(1, 3), max_staleness=st.integers(0, 2), dynamic_sampling=st.booleans())
    def begin(self, batch_size: int, max_staleness: int, dynamic_sampling: bool) -> None:
        name = f"stateful-{uuid.uuid4().hex[:12]}"
        config = self.base.model_copy(update={"run": self.base.run.model_copy(update={"name": name})})
        self.config = without_waiting(config, max_staleness=max_staleness)
        self.batch_size, self.dynamic_sampling = batch_size, dynamic_sampling
        self.queue: Queue = self.run(connect(self.config))
        self.calls = self.run(with_fates(self.queue))
        self.folder = self.folders / name
        self.files: dict[str, tuple[int, ...]] = {}
        self.archive: list[Record] = []
        self.ghosts: list[Holder] = []
        self.zombies: list[TrainerLife] = []
        self.saved: Copy | None = None
        self.written: dict[float, Mapping[Part, bytes]] = {}
        self.duplicated: set[int] = set()
        self.num_failed_rewards = self.num_names = 0
        self.holders = [self.new_holder(Stage.TICKETS) for _ in range(NUM_ROLLOUT)]
        self.holders += [self.new_holder(Stage.ROLLOUTS) for _ in range(NUM_REWARD)]
        self.start_trainer(bits=0)
        self.run(self.trainer.announce())

    def new_holder(self, stage: Stage) -> Holder:
        worker = Worker(self.queue, stage, self.config.staleness)
        # Workers are asked in the order of their names, and a repeated run must be the same.
        worker.name = f"{stage}-{self.num_names:03}"
        self.num_names += 1
        return Holder(worker, stage, INITIAL, self.written)

    def load_announced(self, holder: Holder) -> None:
        """Load the announced version, as a server that is behind does by itself."""
        announced = self.run(self.queue.announced())
        if holder.stage is Stage.TICKETS and announced is not None and holder.is_behind(announced):
            holder.load(announced)

    def start_trainer(self, bits: int) -> None:
        make = next_life(
            self.queue,
            self.config,
            RunHome(self.folder, "trainer"),
            batch_size=self.batch_size,
            dynamic_sampling=self.dynamic_sampling,
        )
        self.trainer = self.run(make)
        self.trainer.worker.name = f"trainer-{self.num_names:03}"
        self.num_names += 1
        self.run(self.trainer.begin(self.run(self.trainer.queue.ledger()), bits))

    def ledger(self) -> LedgerState:
        """With all records, those in the archive included."""
        records = self.run(read_ledger(self.queue))
        if records and isinstance(begin := records[0], ArchivedRecord):
            records[:1] = self.archive[: begin.num_bytes]
        return replay(records)

    def archive_before(self, step: int) -> None:
        """Move the records before that of a step out of the ledger; here the archive is a list."""
        archived = self.run(self.trainer.queue.ledger()).archived

        async def write(records: Sequence[Record]) -> int:
            self.archive = [*self.archive[: archived.num_bytes if archived else 0], *records]
            return len(self.archive)

        self.run(self.trainer.queue.archive(step, write, exists=()))

    def held(self, holders: list[Holder]) -> list[tuple[Holder, Holding]]:
        return [(holder, holding) for holder in holders for holding in holder.holds]

    def publish(self, holder: Holder, holding: Holding, values: tuple[float | None, ...]) -> None:
        owner = self.run(holder_of(self.queue, holding.delivery))
        if holder.stage is Stage.ROLLOUTS and None in values:
            self.num_failed_rewards += 1
        assert self.run(holder.publish(holding, values)) == (owner == holder.worker.name)

    def publish_and_take(self, holder: Holder, holding: Holding, values: tuple[float | None, ...]) -> Holding | None:
        owner = self.run(holder_of(self.queue, holding.delivery))
        moved, following = self.run(holder.publish_and_take(holding, values))
        assert moved == (owner == holder.worker.name)
        return following

    def entries(self) -> list[Entry]:
        return self.run(entries_of(self.queue))

    @invariant()
    def every_ticket_is_in_exactly_one_place(self) -> None:
        ledger, live = self.ledger(), self.run(self.trainer.queue.live())
        present = self.run(self.trainer.queue.ledger())
        assert (present.num_steps, present.ended) == (ledger.num_steps, ledger.ended)
        assert (present.num_trained, present.num_dropped) == (ledger.num_trained, ledger.num_dropped)
        counters = self.run(self.trainer.queue.counters())
        trained = Counter(ticket for record in ledger.steps for ticket in record.tickets)
        assert not [ticket for ticket, times in trained.items() if times > 1], "trained twice"
        assert not trained.keys() & ledger.dropped.keys(), "trained and dropped"
        assert [record.step for record in ledger.steps] == list(range(len(ledger.steps)))
        assert all(self.files[record.file] == record.tickets for record in ledger.steps)
        ended = trained.keys() | ledger.dropped.keys()
        issued = set(range(counters.next_number))
        assert ended <= issued
        assert issued - ended <= live.keys(), "a ticket is in no stream"
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

    @invariant()
    def every_group_has_its_parts_and_every_part_one_group(self) -> None:
        entries = [each for each in (*self.entries(), *self.run(dead_entries(self.queue))) if each.parts]
        expected = {}
        for entry in entries:
            read_by = (Part.COMPLETIONS, Part.TEXTS) if entry.stage is Stage.ROLLOUTS else (Part.COMPLETIONS,)
            for part in read_by:
                expected[self.queue.keys.part(entry.parts, part)] = self.written[entry.number][part]
        assert len({entry.parts for entry in entries}) == len(entries), "two entries with the same parts"
        lasting = [key for key, milliseconds in self.run(part_keys(self.queue)).items() if milliseconds < 0]
        assert sorted(lasting) == sorted(expected), "parts without an entry, or the other way round"
        found = self.run(self.queue.read(list(expected)))
        assert found == list(expected.values()), "parts that the hand-over of their entry did not write"

    def the_book_is_what_the_ledger_says(self) -> None:
        book, ledger = self.trainer.book, self.ledger()
        live = self.run(self.trainer.queue.live())
        states = book.outstanding
        assert states.keys() == live.keys()
        committed = {ticket for ticket, state in states.items() if state is TicketState.COMMITTED}
        assert committed == live.keys() & ledger.trained.keys()
        assert book.num_steps == len(ledger.steps)
        assert book.next_number == self.run(self.trainer.queue.counters()).next_number
