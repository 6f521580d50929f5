"""The trainer's turns on GPUs that it shares with the engines (`trainer.take_turns`).

Owns the order of a turn. Invariant: the models are on the GPU only from the moment when every rollout service has
confirmed that it uses no GPU memory until `leave`; only after that does a push wake the engines. The queue holds the
turn, and voids it with the trainer's lease: then the engines wake by themselves.

    take    the queue has the turn -> each server confirms that it sleeps -> the models move to the GPU
            (gradient, commit, change, stage)
    leave   the models move to host memory
            (push, announce)
    end     the queue gives the turn to the engines: a server that the push did not reach loads by itself
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal, Protocol

import httpx

from penstock.broker.trainer import TrainerQueue
from penstock.contracts.services import ServiceRecord, Turn
from penstock.errors import WeightsError
from penstock.runtime.requests import transport_fault
from penstock_trainer.weight_sync.rollout_client import RolloutClient

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.2

Holder = Literal["engines", "to_trainer", "trainer", "to_engines"]
"""Who has the GPUs, or gets them."""


class Movable(Protocol):
    """The learner, whose models are in host memory at first."""

    def to_device(self) -> None:
        """Move the models to the GPU."""

    def to_host(self) -> None:
        """Move the models to host memory, and leave no GPU memory in use that can be freed."""


class Turns:
    """The turns of one trainer."""

    def __init__(
        self,
        queue: TrainerQueue,
        client: RolloutClient,
        models: Movable,
        *,
        computing: Callable[[], AbstractContextManager[None]],
        show: Callable[[Holder, float, Holder], None],
    ) -> None:
        """`computing` goes around the trainer's own work. `show`: gets a holder, its seconds, and the next holder."""
        self._queue = queue
        self._client = client
        self._models = models
        self._computing = computing
        self._show = show
        self._number = 0
        self._holder: Holder = "engines"
        self._since = time.monotonic()
        self._why_awake: dict[str, str] = {}

    async def take(self) -> None:
        """Take the turn; returns when the models are on the GPU, and no engine uses its memory.

        A server that does not confirm keeps the trainer waiting until it does, or until its heartbeat has expired; the
        watchdog ends the run after run.stall_seconds. Each request ends after weights.push_timeout_seconds.
        """
        self._number += 1
        self._pass_to("to_trainer")
        await self._until_all_sleep()
        with self._computing():
            await asyncio.to_thread(self._models.to_device)
        self._pass_to("trainer")

    async def leave(self) -> None:
        """Move the models to host memory; the next push may wake the engines."""
        self._pass_to("to_engines")
        with self._computing():
            await asyncio.to_thread(self._models.to_host)

    async def end(self) -> None:
        """The engines have been woken: end the turn."""
        await self._queue.end_turn()
        self._pass_to("engines")

    def _pass_to(self, holder: Holder) -> None:
        now = time.monotonic()
        self._show(self._holder, now - self._since, holder)
        self._holder, self._since = holder, now

    async def _until_all_sleep(self) -> None:
        asleep: set[str] = set()
        self._why_awake.clear()
        while True:
            turn = await self._queue.take_turn(self._number)  # again, in case that the queue has lost it
            servers = [each for each in await self._queue.queue.services() if each.server_state is not None]
            awake = [each for each in servers if each.name not in asleep]
            if not awake:
                return
            answers = await asyncio.gather(*(self._ask(each, turn) for each in awake))
            asleep |= {each.name for each, sleeps in zip(awake, answers, strict=True) if sleeps}
            if not all(answers):
                await asyncio.sleep(RETRY_SECONDS)

    async def _ask(self, server: ServiceRecord, turn: Turn) -> bool:
        """Whether the server sleeps. Else its engine still starts, or is to be killed; or the server has died."""
        try:
            return await self._client.sleep(server.url, turn)
        except WeightsError as error:
            self._warn(server.name, str(error))
        except httpx.HTTPError as error:
            self._warn(server.name, transport_fault(error))
        return False

    def _warn(self, name: str, reason: str) -> None:
        """Log each reason once."""
        if self._why_awake.get(name) != reason:
            log.warning("rollout server %s does not leave the GPU: %s", name, reason)
        self._why_awake[name] = reason
