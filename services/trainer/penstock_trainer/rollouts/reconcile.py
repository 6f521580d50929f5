"""The tickets at the start of a trainer: which are outstanding, and which of them are in no stream of the queue.

Owns the comparison of the ledger with `live`. Invariant: afterwards every ticket that was issued and has not ended is
outstanding in the book and in a stream of the queue.
"""

import logging

from penstock.broker.trainer import TrainerQueue
from penstock.contracts.ledger import LedgerState
from penstock.tickets import TicketBook
from penstock_trainer.rollouts.issuing import Issuer

log = logging.getLogger(__name__)


async def restore_tickets(
    trainer_queue: TrainerQueue,
    book: TicketBook,
    issuer: Issuer,
    ledger: LedgerState,
    *,
    steps: int,
    version: int,
    max_staleness: int,
) -> None:
    """A ticket is outstanding if it was issued and neither trained nor dropped. One that is in no stream is reissued.

    A ticket that is trained but not announced stays outstanding too: its credit would issue a ticket that is trained
    too late.
    """
    counters = await trainer_queue.counters()
    outstanding = ledger.not_ended(counters.next_number)
    live = await trainer_queue.live()
    committed = {number: step for number, step in ledger.trained.items() if number in live}
    book.restore(counters.next_number, outstanding, steps, committed)
    await issuer.restore(ledger, counters.next_number)
    lost = [number for number in outstanding if number not in live]
    if lost:
        log.warning("tickets %s are in no stream of the queue: issued again", lost)
        await issuer.issue_lost(lost, oldest_version=max(0, version - max_staleness))
