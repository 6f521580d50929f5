"""Rollout servers and reward workers that a test moves by hand over a real queue.

Owns the state outside the queue: which worker believes to hold what, and which weights a server serves. Its actions go
through the product's own classes. Time decides nothing: a worker beats or renews only if the test makes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from penstock.broker import Delivery, Served, Stage, Worker
from penstock.contracts import (
    Completion,
    PolicyIdentity,
    RolloutGroup,
    Score,
    Ticket,
    VersionSpan,
    decode,
    pack_float32,
    pack_int32,
)
from penstock.contracts.services import Announcement
from penstock.contracts.stored_groups import Part, RolloutHeader, ScoredHeader, stored


@dataclass
class Holding:
    """A message that a worker took, and the weights that its server served then."""

    delivery: Delivery
    message: Ticket | RolloutHeader
    policy: PolicyIdentity


@dataclass
class Holder:
    """One rollout or reward worker. It cannot see whether others believe it dead."""

    worker: Worker
    stage: Stage
    policy: PolicyIdentity
    written: dict[float, Mapping[Part, bytes]]
    """The parts of all groups that were ever made, by the number that each carries in place of its start."""
    lease: int = 0
    holds: list[Holding] = field(default_factory=list)

    def load(self, announcement: Announcement) -> None:
        self.policy, self.lease = announcement.identity, announcement.lease

    def is_behind(self, announcement: Announcement) -> bool:
        """The weights of a later trainer count, even if its version is a lower one."""
        return (self.lease, self.policy.number) < (announcement.lease, announcement.identity.number)

    @property
    def served(self) -> Served | None:
        return Served(self.policy, self.lease) if self.stage is Stage.TICKETS else None

    async def take(self) -> Holding | None:
        return self._hold(await self.worker.take(self.stage, served=self.served))

    def _hold(self, delivery: Delivery | None) -> Holding | None:
        if delivery is None:
            return None
        message = decode(delivery.payload, Ticket if self.stage is Stage.TICKETS else RolloutHeader)
        assert isinstance(message, Ticket | RolloutHeader)
        holding = Holding(delivery, message, self.policy)
        self.holds.append(holding)
        return holding

    async def publish(self, holding: Holding, values: Sequence[float | None]) -> bool:
        """Hand the result over: scores, or tokens by the weights at the start and by those at the end."""
        self.holds.remove(holding)
        to, message = self._result(holding, values)
        return await self.worker.hand_over(holding.delivery, message, to)

    async def publish_and_take(self, holding: Holding, values: Sequence[float | None]) -> tuple[bool, Holding | None]:
        """`publish` and `take` in one call."""
        self.holds.remove(holding)
        to, message = self._result(holding, values)
        moved, following = await self.worker.hand_over_and_take(
            holding.delivery, message, to, self.stage, served=self.served
        )
        return moved, self._hold(following)

    def _result(self, holding: Holding, values: Sequence[float | None]) -> tuple[Stage, RolloutGroup | ScoredHeader]:
        if isinstance(holding.message, Ticket):
            spans = (VersionSpan(holding.policy, 0, 1), VersionSpan(self.policy, 1, 2))
            number = len(self.written)
            tokens, logprobs = pack_int32([5, number]), pack_float32([-0.5, -0.5])
            completion = Completion(tokens, b"\x01\x01", logprobs, spans, str(number), "stop")
            completions = (completion,) * len(holding.message.seeds)
            group = RolloutGroup(holding.message, completions, "server", float(number), number + 1.0)
            self.written[group.started_at] = stored(group).parts
            return Stage.ROLLOUTS, group
        scores = tuple(Score(None, "it raised") if value is None else Score(value) for value in values)
        return Stage.SCORED, ScoredHeader(holding.message, scores)
