"""What may happen to a run on the queue, in any order: to its workers, to its trainers, and to the server.

Called by `test_broker_stateful`, whose machine obeys all of them.
"""

from typing import Any, cast

import pytest
from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from penstock.broker import Delivery, Stage
from penstock.errors import FencedError, LostWritesError
from penstock_trainer.consumer import oldest_version
from tests.integration.broker_entries import age, copy_keys, put_back_keys
from tests.integration.broker_machine import RunMachine
from tests.integration.broker_workers import Holder, Holding

MAX_FAILED_REWARDS = 2  # more than half of four batches would end the run, as they should
OLD_MILLISECONDS = 10_000_000
index = st.integers(0, 7)
ABSENT = Delivery(Stage.SCORED, "1-1", "0", 0, b"", "", 0, 0)


class WorkerRules(RunMachine):
    """Rollout servers and reward workers work, die, come back, fail and are late."""

    @rule(which=index)
    def take(self, which: int) -> None:
        holder = self.holders[which % len(self.holders)]
        self.check_taken(holder, self.run(holder.take()))

    def check_taken(self, holder: Holder, holding: Holding | None) -> None:
        if holding is not None and holder.stage is Stage.TICKETS:
            announced = self.run(self.queue.announced())
            assert announced is not None
            assert holder.policy.number >= announced.identity.number, "a server older than announced took a ticket"
            assert holder.lease >= announced.lease, "a server with the weights of an earlier trainer took a ticket"
            assert holding.message.policy_version <= holder.policy.number  # type: ignore[union-attr]

    @precondition(lambda self: self.held(self.holders))
    @rule(which=index, values=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (1.0, None)]))
    def hand_over(self, which: int, values: tuple[float | None, ...]) -> None:
        held = self.held(self.holders)
        if None in values and self.num_failed_rewards >= MAX_FAILED_REWARDS:
            values = (1.0, 0.0)
        self.publish(*held[which % len(held)], values)

    @precondition(lambda self: self.held(self.holders))
    @rule(which=index)
    def hand_over_and_take(self, which: int) -> None:
        held = self.held(self.holders)
        holder, holding = held[which % len(held)]
        self.check_taken(holder, self.publish_and_take(holder, holding, (1.0, 0.0)))

    @precondition(lambda self: self.held(self.holders))
    @rule(which=index)
    def hand_over_and_die(self, which: int) -> None:
        """The answer of the script, and with it what it gave, never comes."""
        held = self.held(self.holders)
        holder, holding = held[which % len(held)]
        following = self.publish_and_take(holder, holding, (1.0, 0.0))
        if following is not None:
            holder.holds.remove(following)
        self.believe_dead(self.holders.index(holder))

    @precondition(lambda self: self.held(self.ghosts))
    @rule(which=index, takes=st.booleans())
    def publish_late(self, which: int, takes: bool) -> None:
        held = self.held(self.ghosts)
        ghost, holding = held[which % len(held)]
        if takes:
            self.check_taken(ghost, self.publish_and_take(ghost, holding, (1.0, 0.0)))
        else:
            self.publish(ghost, holding, (1.0, 0.0))

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


class TrainerRules(RunMachine):
    """Trainers judge, commit, update, announce, are replaced, and live on as if they were not."""

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


class QueueRules(TrainerRules):
    """The server forgets its last writes, and messages are there twice."""

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
        self.restart_trainer(bits)

    @rule(which=index)
    def duplicate(self, which: int) -> None:
        entries = self.entries()
        if entries:
            entry = entries[which % len(entries)]
            stream = self.queue.keys.stream(entry.stage)
            self.run(self.queue.client.xadd(stream, entry.fields))  # type: ignore[arg-type]
            self.duplicated.add(entry.ticket)
