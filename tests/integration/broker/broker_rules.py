"""What may happen to a run on the queue, in any order: to its workers, to its trainers, and to the server."""

from typing import Any, cast

import pytest
from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from penstock.broker import Delivery, Stage
from penstock.errors import LeaseLostError, LostWritesError
from penstock_trainer.rollouts.judge import oldest_version
from tests.integration.broker.broker_calls import DiedError, Fate
from tests.integration.broker.broker_entries import (
    age,
    copy_entry,
    copy_keys,
    holder_of,
    parts_without_an_entry_expire,
    put_back_keys,
)
from tests.integration.broker.broker_machine import RunMachine
from tests.integration.broker.broker_workers import Holder, Holding

MAX_FAILED_REWARDS = 2  # failures in more than half of four batches would end the run, as they should
OLD_MILLISECONDS = 10_000_000
index = st.integers(0, 7)
ABSENT = Delivery(Stage.SCORED, "1-1", "0", 0, b"", "", 0, 0)


class WorkerRules(RunMachine):
    """Rollout servers and reward workers work, die, come back, fail and are late."""

    @rule(which=index, loads=st.sampled_from((True, True, True, False)))
    def take(self, which: int, loads: bool) -> None:
        holder = self.holders[which % len(self.holders)]
        if loads:
            self.load_announced(holder)
        self.check_taken(holder, self.run(holder.take()))

    def check_taken(self, holder: Holder, holding: Holding | None) -> None:
        if holding is not None and holder.stage is Stage.TICKETS:
            announced = self.run(self.queue.announced())
            assert announced is not None
            assert holder.policy.number >= announced.identity.number, "a server older than announced took a ticket"
            assert holder.lease >= announced.lease, "a server with the weights of an earlier trainer took a ticket"
            assert holding.message.policy_version <= holder.policy.number  # type: ignore[union-attr]

    def holding(self, which: int) -> tuple[Holder, Holding] | None:
        """An entry that some worker holds; if none is held, take one, if there is any."""
        if not self.held(self.holders):
            for holder in self.holders:
                self.load_announced(holder)
                self.check_taken(holder, self.run(holder.take()))
        held = self.held(self.holders)
        return held[which % len(held)] if held else None

    @rule(which=index, values=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (1.0, None)]))
    def hand_over(self, which: int, values: tuple[float | None, ...]) -> None:
        if None in values and self.num_failed_rewards >= MAX_FAILED_REWARDS:
            values = (1.0, 0.0)
        if (found := self.holding(which)) is not None:
            self.publish(*found, values)
            self.met["hand_over"] += 1

    @rule(which=index)
    def hand_over_and_take(self, which: int) -> None:
        if (found := self.holding(which)) is None:
            return
        holder, holding = found
        self.check_taken(holder, self.publish_and_take(holder, holding, (1.0, 0.0)))
        self.met["hand_over_and_take"] += 1

    @rule(which=index)
    def hand_over_and_die(self, which: int) -> None:
        """The script's answer, with the entry that it gave, is lost."""
        if (found := self.holding(which)) is None:
            return
        holder, holding = found
        following = self.publish_and_take(holder, holding, (1.0, 0.0))
        if following is not None:
            holder.holds.remove(following)
        self.replace(self.holders.index(holder))

    @rule(which=index, fate=st.sampled_from(Fate), takes=st.booleans())
    def hand_over_badly(self, which: int, fate: Fate, takes: bool) -> None:
        """A repeated script finds that the entry is not ours: it counts as late, though its first run moved it."""
        if (found := self.holding(which)) is None:
            return
        holder, holding = found
        is_mine = self.run(holder_of(self.queue, holding.delivery)) == holder.worker.name
        self.calls.fate = fate
        self.met[fate.name] += is_mine
        try:
            if takes:
                moved, following = self.run(holder.publish_and_take(holding, (1.0, 0.0)))
                self.check_taken(holder, following)
            else:
                moved = self.run(holder.publish(holding, (1.0, 0.0)))
        except DiedError:
            self.replace(self.holders.index(holder))
        else:
            # The first run may have taken this very entry, if it was free: then it is ours when the script is repeated.
            taken_back = takes and fate is Fate.ANSWER_LOST and not is_mine
            assert moved == (is_mine and fate is Fate.PARTS_EXPIRE) or taken_back

    @precondition(lambda self: self.held(self.ghosts))
    @rule(which=index, takes=st.booleans())
    def publish_late(self, which: int, takes: bool) -> None:
        held = self.held(self.ghosts)
        ghost, holding = held[which % len(held)]
        self.met["publish_late"] += 1
        if takes:
            self.check_taken(ghost, self.publish_and_take(ghost, holding, (1.0, 0.0)))
        else:
            self.publish(ghost, holding, (1.0, 0.0))

    @rule(which=index)
    def believe_dead(self, which: int) -> None:
        """A worker's heartbeat expires; it may still be working."""
        self.replace(which)

    @rule(which=index)
    def believe_dead_who_holds(self, which: int) -> None:
        if (found := self.holding(which)) is not None:
            self.replace(self.holders.index(found[0]))

    def replace(self, which: int) -> None:
        place = which % len(self.holders)
        ghost = self.holders[place]
        self.run(ghost.worker.retire())
        self.ghosts.append(ghost)
        self.holders[place] = self.new_holder(ghost.stage)
        self.holders[place].policy, self.holders[place].lease = ghost.policy, ghost.lease

    @precondition(lambda self: self.ghosts)
    @rule(which=index)
    def come_back(self, which: int) -> None:
        """A worker that was believed dead beats again, with the entries that it believes to hold."""
        ghost = self.ghosts.pop(which % len(self.ghosts))
        self.run(cast(Any, self.queue.client.hset(self.queue.keys.beats, ghost.worker.name, str(2**53))))
        self.holders.append(ghost)

    @rule(which=index)
    def stop_renewing(self, which: int) -> None:
        if (found := self.holding(which)) is not None:
            self.run(age(self.queue, found[1].delivery, OLD_MILLISECONDS))

    @rule(which=index, outcome=st.sampled_from(["free", "failed", "engine_died", "bury"]))
    def let_go(self, which: int, outcome: str) -> None:
        late = self.held(self.ghosts)
        if (found := late[which % len(late)] if late and which % 2 else self.holding(which)) is None:
            return
        holder, holding = found
        holder.holds.remove(holding)
        self.met[outcome] += 1
        if outcome == "bury":
            self.run(holder.worker.bury(holding.delivery, "it does not decode"))
        else:
            failed, died = outcome == "failed", outcome == "engine_died"
            self.run(holder.worker.give_back(holding.delivery, failed=failed, engine_died=died, reason=outcome))

    @rule(values=st.sampled_from([(1.0, 0.0), (1.0, 1.0)]))
    def work(self, values: tuple[float | None, ...]) -> None:
        """All workers do the work that there is, so that rare events meet a run in progress."""
        for holder in self.holders:
            self.load_announced(holder)
            while self.run(holder.take()) is not None:
                pass
            for holding in list(holder.holds):
                self.publish(holder, holding, values)
        self.run(self.trainer.judge(9))


class TrainerRules(RunMachine):
    """Trainers judge, commit, update, announce, are replaced, and go on as if they were not."""

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
        """One server loads what was staged; the others are fenced once it is announced."""
        assert self.trainer.release is not None
        servers = [holder for holder in self.holders + self.ghosts if holder.stage is Stage.TICKETS]
        servers[which % len(servers)].load(self.trainer.release[0])

    @rule(which=index)
    def catch_up(self, which: int) -> None:
        everybody = self.holders + self.ghosts
        self.load_announced(everybody[which % len(everybody)])

    @precondition(lambda self: self.trainer.release is not None)
    @rule()
    def announce(self) -> None:
        self.run(self.trainer.announce())

    @precondition(lambda self: self.trainer.untrained is None)
    @rule()
    def checkpoint(self) -> None:
        self.run(self.trainer.checkpoint())

    @rule(back=st.integers(0, 2))
    def shorten_the_ledger(self, back: int) -> None:
        """Archive records of steps that are announced, as `History` does after a checkpoint."""
        present = self.run(self.trainer.queue.ledger())
        live = self.run(self.trainer.queue.live())
        steps = [record.step for record in present.steps if not live.keys() & set(record.tickets)]
        if len(steps) > back:
            self.archive_before(sorted(steps)[-1 - back])
            self.met["archive"] += 1

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
            with pytest.raises((LeaseLostError, LostWritesError)):  # the latter if the queue lost its lease
                self.run(call)
        assert self.run(copy_keys(self.queue)) == before


class QueueRules(TrainerRules):
    """The server loses its last writes, and messages are duplicated."""

    @rule()
    def remember(self) -> None:
        """The server flushes everything to its disk."""
        self.saved = self.run(copy_keys(self.queue))

    @precondition(lambda self: self.saved is not None)
    @rule(bits=st.integers(0, 1))
    def lose_the_tail(self, bits: int) -> None:
        """The server comes back without its last writes; the trainer, which relied on them, starts again."""
        assert self.saved is not None
        self.run(put_back_keys(self.queue, self.saved))
        self.met["lose_the_tail"] += 1
        self.restart_trainer(bits)

    @rule(which=index)
    def duplicate(self, which: int) -> None:
        entries = self.entries()
        if entries:
            entry = entries[which % len(entries)]
            self.run(copy_entry(self.queue, entry))
            self.duplicated.add(entry.ticket)
            self.met[f"duplicate in {entry.stage}"] += 1

    @rule()
    def expire(self) -> None:
        self.run(parts_without_an_entry_expire(self.queue))
