"""Turns ticket numbers into tickets and sends them.

Owns every issue of a training ticket. Invariant: a ticket carries the announced version, so that no server with older
weights takes it; one that a resume finds lost carries the oldest version that may be trained. Every issue is counted.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence

from penstock.broker import Delivery
from penstock.broker.trainer import TrainerQueue
from penstock.contracts import ReissueReason, Ticket
from penstock.contracts.ledger import LedgerState
from penstock.contracts.services import Announcement
from penstock.tickets import TicketBook
from penstock_trainer.data.drawing.draws import Draws
from penstock_trainer.rollouts.judge import Reissue
from penstock_trainer.rollouts.versions import Versions
from penstock_trainer.telemetry.queue_metrics import QueueMetrics

log = logging.getLogger(__name__)


class Issuer:
    """The tickets that one trainer sends.

    await issuer.announce(announcement, num_steps=3)   issues what the credits allow, e.g. tickets 12 to 15
    await issuer.issue_again(ticket_12, delivery, Reissue(ReissueReason.STALE, "stale at version 5"))
    """

    def __init__(
        self, queue: TrainerQueue, draws: Draws, book: TicketBook, versions: Versions, metrics: QueueMetrics
    ) -> None:
        self._queue = queue
        self._draws = draws
        self._book = book
        self._versions = versions
        self._metrics = metrics

    async def restore(self, ledger: LedgerState, next_number: int) -> None:
        """Bring the draws to the end of the ledger, of which tickets below `next_number` were issued."""
        await asyncio.to_thread(self._draws.restore, ledger, next_number)

    async def announce(self, announcement: Announcement, num_steps: int) -> None:
        """Announce weights that include the first `num_steps` steps, resolve their tickets and refill; one script."""
        resolved = self._book.announce(num_steps)
        self._metrics.tickets.labels(state="trained", reason="").inc(len(resolved))
        await self._issue(self._book.issue(), announcement, resolved)

    async def refill(self) -> None:
        """Issue the tickets that the credits allow."""
        numbers = self._book.issue()
        if numbers:
            await self._issue(numbers)

    async def issue_again(self, earlier: Ticket, delivery: Delivery, verdict: Reissue) -> None:
        """Issue a ticket again, because its group cannot be trained, and delete that group."""
        attempt = max(delivery.attempt, earlier.attempt) + 1
        ticket = self._draws.ticket(earlier.number, attempt=attempt, policy_version=self._versions.announced_version)
        log.warning("ticket %d is issued again: %s", earlier.number, verdict.why, extra={"attempt": attempt})
        await self._queue.reissue(ticket, delivery)
        self._metrics.tickets.labels(state="reissued", reason=verdict.reason).inc()

    async def issue_lost(self, numbers: Sequence[int], *, oldest_version: int) -> None:
        """Issue tickets that are in no stream of the queue. oldest_version: the oldest that may generate for them."""
        await self._queue.issue(self._tickets(numbers, attempt=1, policy_version=oldest_version))
        self._metrics.tickets.labels(state="reissued", reason=ReissueReason.LOST).inc(len(numbers))

    async def _issue(
        self, numbers: Sequence[int], announcement: Announcement | None = None, resolved: Sequence[int] = ()
    ) -> None:
        tickets = self._tickets(numbers, attempt=0, policy_version=self._versions.announced_version)
        await self._queue.issue(tickets, announcement, resolved)
        self._metrics.tickets.labels(state="issued", reason="").inc(len(tickets))

    def _tickets(self, numbers: Iterable[int], *, attempt: int, policy_version: int) -> list[Ticket]:
        return [self._draws.ticket(number, attempt=attempt, policy_version=policy_version) for number in numbers]
