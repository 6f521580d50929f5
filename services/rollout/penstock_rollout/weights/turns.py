"""Turns on GPUs that the engine shares with the trainer (`trainer.take_turns`).

Owns what this service does about them. The queue says whose turn it is: the trainer's while it holds the lease with
which it took the turn, else the engines'. Invariants: no engine starts, and none takes its memory by itself, while it
is the trainer's turn; the push with which the trainer ends its turn wakes the engine, before the queue says so.

    the trainer's turn    asked by POST /v1/sleep, or seen in the queue: running requests end, memory is given up;
                          an engine that does not is killed; one that is to be started waits at the gate
    the engines' turn     an engine that still sleeps, since its trainer died or did not reach it, loads the announced
                          weights by itself
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from penstock.contracts.services import Turn
from penstock.errors import EngineError, WeightsBusyError, WeightsConflictError
from penstock_rollout.engine.engine import Engine
from penstock_rollout.weights.updater import WeightUpdater

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0

ReadTurn = Callable[[], Awaitable[Turn | None]]


class TurnGate:
    """Holds the starts of an engine back while it is the trainer's turn."""

    def __init__(self, read: ReadTurn, register: Callable[[], Awaitable[None]]) -> None:
        """`register`: show this service in the queue."""
        self.closed_for: Turn | None = None
        """The turn for which a start waits: there is no engine, and none starts while that turn lasts."""
        self._read = read
        self._register = register

    @property
    def is_closed(self) -> bool:
        return self.closed_for is not None

    async def passed(self) -> None:
        """Return when an engine may start.

        The service shows itself before it reads the turn, and the trainer takes the turn before it reads the services:
        so the trainer knows of each engine that does not know of its turn.
        """
        while True:
            await self._register()
            turn = await self._read()
            if turn is None:
                return
            self.closed_for = turn
            try:
                await asyncio.sleep(LOOK_SECONDS)
            finally:
                self.closed_for = None  # it is open between this read and the next


class Turns:
    """The turns of one engine."""

    def __init__(
        self,
        read: ReadTurn,
        gate: TurnGate,
        engine: Engine,
        weights: WeightUpdater,
        load_announced: Callable[[], Awaitable[None]],
    ) -> None:
        """`load_announced`: load the announced weights if there are any; it logs why it failed."""
        self._read = read
        self._gate = gate
        self._engine = engine
        self._weights = weights
        self._load_announced = load_announced
        self._slept_for: Turn | None = None
        self._acting = asyncio.Lock()  # from a read of the turn until what it asks for is done

    async def sleep(self, turn: Turn) -> None:
        """Return when this service uses no GPU memory, until `turn` ends. Idempotent.

        WeightsConflictError: the queue has another turn. WeightsBusyError: not yet; try again.
        """
        async with self._acting:
            await self._sleep(turn)

    async def _sleep(self, turn: Turn) -> None:
        now = await self._read()
        if now != turn:
            raise WeightsConflictError(
                f"it is not the trainer's turn {turn}: it is {f'{now}' if now else 'the turn of the engines'}"
            )
        if self._gate.closed_for == turn:
            return
        if not self._engine.up.is_set():
            raise WeightsBusyError(f"{self._engine.not_ready}; it sleeps when it is up: try again")
        await self._fall_asleep(turn)

    async def _fall_asleep(self, turn: Turn) -> None:
        """Once per turn: if the trainer has woken it in this turn, the trainer has left the GPU."""
        if self._slept_for == turn:
            return
        try:
            await self._weights.sleep(turn.lease)
        except (EngineError, TimeoutError) as error:
            raise WeightsBusyError(f"it has not given up its GPU memory yet: {error}") from error
        self._slept_for = turn

    async def watch(self) -> None:
        """Follow the queue, for ever: also if the trainer's request, or its push, does not arrive."""
        while True:
            async with self._acting:
                await self._look()
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> None:
        turn = await self._read()
        try:
            if turn is None:
                await self._wake()
            elif self._engine.up.is_set():
                await self._fall_asleep(turn)
        except WeightsBusyError:
            log.debug("not asleep yet for the trainer's turn %s", turn)
        except WeightsConflictError as error:
            log.warning("the turn %s is that of a trainer that was replaced: %s", turn, error)

    async def _wake(self) -> None:
        """It is the engines' turn."""
        slept_for, self._slept_for = self._slept_for, None
        if self._weights.asleep and self._engine.up.is_set():
            if slept_for is not None:
                log.warning("the trainer's turn %s is over without a push: loading the announced weights", slept_for)
            await self._load_announced()
