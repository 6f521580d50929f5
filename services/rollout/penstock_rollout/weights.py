"""Which weights the engine serves, and how they are replaced.

Owns the served identity. Invariants: `identity` is set only while the engine serves exactly those bytes; an engine
whose load failed half-way is restarted, never continued; whoever holds a lower lease, or an older version of the same
lease, changes nothing. Called by `app` (a push) and by `producer` (a server that is behind loads by itself).

    prepare -> pause -> load, flush -> compare the engine's word -> continue
        |         '-- fails --> continue with the old weights
        '-- fails --> nothing has happened      load fails --> engine restarted, no weights
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Literal

from penstock.broker import Announcement
from penstock.config import WeightsSection
from penstock.contracts import PolicyIdentity
from penstock.errors import EngineError, PenstockError, WeightsBusyError, WeightsConflictError
from penstock.transfer import GroupRequest
from penstock_rollout.engine.engine import Engine
from penstock_rollout.loaders import DiskLoader, Loader
from penstock_rollout.local_copy import ChainError, LocalCopy
from penstock_rollout.metrics import RolloutMetrics

log = logging.getLogger(__name__)

State = Literal["starting", "waiting", "updating", "serving", "paused"]
NUM_KNOWN = 64  # versions that a span may still name: far more than one request can live through


class Weights:
    """The weights of one engine."""

    def __init__(
        self, engine: Engine, section: WeightsSection, metrics: RolloutMetrics, copy: LocalCopy | None = None
    ) -> None:
        """`copy`: where deltas are applied; None: whole versions are loaded from where they are."""
        self.copy = copy
        self.needs_whole = False  # deltas did not lead to what was wanted last
        self.identity: PolicyIdentity | None = None
        self.lease = 0
        self.known: dict[str, PolicyIdentity] = {}
        self.paused = False
        self.num_loads = 0
        self.paused_seconds = 0.0  # of generation, for the weights that are served
        self._engine = engine
        self._section = section
        self._metrics = metrics
        self._updating = False
        self._replacing = False  # the update that runs began with weights that were served
        self._settled = asyncio.Event()
        self._settled.set()
        self._num_running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Around one group's request, so that an update can let it finish."""
        self._num_running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()

    async def settled(self) -> None:
        """Return once no update runs: what starts during one only delays it."""
        await self._settled.wait()

    @property
    def state(self) -> State:
        if not self._engine.up.is_set():
            return "starting"
        if self._updating:
            return "updating"
        if self.paused:
            return "paused"
        return "waiting" if self.identity is None else "serving"

    @property
    def loaded(self) -> bool:
        """Whether there are weights to serve; stays true while a push replaces them."""
        return self.identity is not None or (self._updating and self._replacing)

    def forget(self) -> None:
        """The engine has been started anew: it serves no known weights until some are loaded."""
        self.identity = None
        self._replacing = False
        self._metrics.weights_lost()

    def behind(self, announced: Announcement) -> bool:
        """Whether the announced version must be loaded before work for it may run here."""
        if self.identity is None or self.lease < announced.lease:
            return True
        return self.lease == announced.lease and (
            self.identity.number < announced.identity.number
            or (self.identity.number == announced.identity.number and self.identity != announced.identity)
        )

    async def update(self, wanted: Announcement, loader: Loader | None = None) -> None:
        """Serve the wanted version, from its files unless a loader is given; returns when the engine does.

        WeightsConflictError: a lower lease, or an older version. WeightsBusyError: another update runs.
        WeightsError: the bytes are not those that were announced. EngineError: no engine, or it failed.
        """
        if self._updating:
            raise WeightsBusyError("another weight update runs on this server; expected one at a time: try again")
        self._engine.require_up()
        self._check_order(wanted)
        if wanted.identity == self.identity:
            self.lease = wanted.lease
            return
        self._updating, self._replacing = True, self.identity is not None
        self._settled.clear()
        try:
            await self._replace(wanted, loader or DiskLoader(self.copy))
        except (PenstockError, TimeoutError) as error:
            self.needs_whole = isinstance(error, ChainError)
            self._metrics.weights_failed()
            raise
        finally:
            self._updating = False
            self._settled.set()

    async def join_group(self, request: GroupRequest) -> None:
        """Let the engine join a trainer's process group, for pushes that are broadcast in it."""
        self._check_not_updating()
        self._check_lease(request.lease)
        await self._engine.join_group(request)

    def _check_lease(self, lease: int) -> None:
        if lease < self.lease:
            raise WeightsConflictError(
                f"lease {lease} is lower than {self.lease}, which this server has followed: another trainer has taken "
                "over; expected the sender to stop"
            )

    def _check_order(self, wanted: Announcement) -> None:
        self._check_lease(wanted.lease)
        older = self.identity is not None and wanted.identity.number <= self.identity.number
        if wanted.lease == self.lease and older and wanted.identity != self.identity:
            raise WeightsConflictError(
                f"this server serves {self.identity}; expected one newer than {wanted.identity}, or a lease higher "
                f"than {self.lease}"
            )

    async def _replace(self, wanted: Announcement, loader: Loader) -> None:
        start = time.monotonic()
        await loader.prepare(wanted)
        await self._drain()
        epoch, client = self._engine.epoch, self._engine.client
        self._engine.require_up()
        pause_start = time.monotonic()
        loading = False
        try:
            await client.pause(self._section.pause_mode)
            loading = True
            self.identity = None
            self.known[str(wanted.identity)] = wanted.identity
            await self._load(wanted, loader)
            loading = False
        finally:
            if loading:
                self._engine.report(epoch, f"loading {wanted.identity} failed half-way")
            elif not self.paused and self._engine.epoch == epoch and self._engine.up.is_set():
                await self._resume(epoch)
        if self._engine.epoch != epoch:
            raise EngineError(f"the engine was started anew while it loaded {wanted.identity}; expected it to last")
        now = time.monotonic()
        self.paused_seconds = now - pause_start
        self.identity, self.lease = wanted.identity, wanted.lease
        self.needs_whole = False
        self.num_loads += 1
        while len(self.known) > NUM_KNOWN:
            del self.known[next(iter(self.known))]
        self._metrics.weights_loaded(loader.transport, now - start, now - pause_start, wanted.identity.number)
        log.info(
            "serving %s",
            wanted.identity,
            extra={"seconds": round(now - start, 3), "paused": round(now - pause_start, 3)},
        )

    async def _drain(self) -> None:
        """Let running groups finish: a pause throws their key-value cache away, to be computed again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._section.drain_seconds):
                await self._idle.wait()

    async def _load(self, wanted: Announcement, loader: Loader) -> None:
        """Within the time of a push: an engine that ends later has missed its version, whatever it says then."""
        client, timeout_seconds = self._engine.client, self._section.push_timeout_seconds
        deadline = time.monotonic() + timeout_seconds
        async with asyncio.timeout(timeout_seconds):
            await loader.load(wanted, client, timeout_seconds)
            await client.flush()
            said = await client.weight_version()
        if time.monotonic() > deadline:  # this process was stopped meanwhile, and its timer with it
            raise TimeoutError(f"loading {wanted.identity} took longer than {timeout_seconds:g} s")
        if said != str(wanted.identity):
            raise EngineError(f"after loading {wanted.identity} the engine says that it serves {said!r}")

    async def _resume(self, epoch: int) -> None:
        try:
            await self._engine.client.resume()
        except (EngineError, TimeoutError):
            self._engine.report(epoch, "generation could not be continued after a pause")
            raise

    async def pause(self) -> None:
        """Hold generation, until `resume`; updates still happen."""
        self._engine.require_up()
        self._check_not_updating()
        self.paused = True
        await self._engine.client.pause("retract")

    async def resume(self) -> None:
        """Go on generating."""
        self._engine.require_up()
        self._check_not_updating()
        await self._engine.client.resume()
        self.paused = False

    def _check_not_updating(self) -> None:
        if self._updating:
            raise WeightsBusyError("a weight update runs on this server; try again after it")
