"""The trainer's ends of the queue in a benchmark: tickets without what it does not look at, and the groups of them."""

import asyncio
from collections.abc import Iterable

from penstock.broker import Stage, Worker
from penstock.contracts import RolloutGroup, Sampling, Ticket, decode
from penstock.contracts.stored_groups import Part, RolloutHeader, group_of


def make_ticket(
    number: int, seeds: Iterable[int], sampling: Sampling, *, prompt_ids: bytes = b"", environment: str = ""
) -> Ticket:
    """Of completions of `prompt_ids`, or of episodes of `environment`."""
    return Ticket(
        purpose="train",
        number=number,
        attempt=0,
        policy_version=0,
        prompt="",
        prompt_ids=prompt_ids,
        seeds=tuple(seeds),
        sampling=sampling,
        answer="",
        reward="",
        metadata={},
        environment=environment,
    )


async def next_group(worker: Worker, timeout_seconds: float) -> RolloutGroup:
    """The next group that is handed over to rewards; TimeoutError if none is."""
    async with asyncio.timeout(timeout_seconds):
        while (delivery := await worker.take(Stage.ROLLOUTS)) is None:
            await worker.wait(timeout_seconds=1)
    [parts] = await worker.read([delivery], *Part)
    return group_of(decode(delivery.payload, RolloutHeader), parts)
