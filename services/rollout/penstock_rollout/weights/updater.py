"""Which weights the engine serves, and how they are replaced.

Owns the served identity. Invariants: `identity` is set only while the engine serves exactly those bytes, as far as its
own word and the canary show; from the pause of an update until both have been heard, any failure restarts the engine,
and what it made meanwhile names a version that is not known; whoever holds a lower lease, or an older version of the
same lease, changes nothing.

    prepare -> pause -> load, flush -> compare the engine's word -> continue -> canary -> serving
        |        '------------------ fails, too late ---------------------------'
        '-- fails --> fenced, with the old weights      '--> fenced, engine restarted, no weights

    pause_mode  running requests                     their cache              the prefix cache
    retract     wait, then go on                     computed anew            emptied
    in_place    stand still, then go on              kept, of older weights   only what the new weights computed is used
    abort       end; the producer sends their rest   computed anew            emptied
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator

from penstock.config import WeightsSection
from penstock.contracts import PolicyIdentity, ServerState
from penstock.contracts.services import Announcement
from penstock.contracts.weight_sources import GroupRequest
from penstock.errors import EngineError, PenstockError, WeightsBusyError
from penstock_rollout.engine.engine import Engine
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights.loaders import DiskLoader, Loader
from penstock_rollout.weights.local_copy import ChainError, LocalCopy
from penstock_rollout.weights.version_order import check_lease, check_order, is_behind

log = logging.getLogger(__name__)

NUM_KNOWN = 64  # versions that a span may still name: far more than one request can live through
ABORT_SECONDS = 1.0  # for running requests to end after an abort


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
        self.fenced = ""
        """Why the last update failed; empty after one that did not."""
        self.num_interruptions = 0
        """Updates that ended running requests, whose rest is then to be sent again."""
        self.condemned_epoch = 0
        """The engine that was last given up because of an update, not because of a request."""
        self._unproved: Announcement | None = None
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

    @property
    def unproved(self) -> str:
        """The version that is loaded and has not yet shown that it is the announced one; empty when there is none."""
        return "" if self._unproved is None else str(self._unproved.identity)

    async def settled(self) -> None:
        """Return once no update runs: what starts during one only delays it."""
        await self._settled.wait()

    @property
    def state(self) -> ServerState:
        if not self._engine.up.is_set():
            return ServerState.STARTING
        if self._updating:
            return ServerState.UPDATING
        if self.paused:
            return ServerState.PAUSED
        if self.fenced:
            return ServerState.FENCED
        return ServerState.WAITING if self.identity is None else ServerState.SERVING

    @property
    def loaded(self) -> bool:
        """Whether there are weights to serve; stays true while a push replaces them."""
        return self.identity is not None or (self._updating and self._replacing)

    def forget(self) -> None:
        """The engine has been started anew: it serves no known weights until some are loaded."""
        self.identity = None
        self._replacing = False
        self._unproved = None
        self._metrics.weights_lost()

    def behind(self, announced: Announcement) -> bool:
        """Whether the announced version must be loaded before work for it may run here."""
        return is_behind(self.identity, self.lease, announced)

    async def update(self, wanted: Announcement, loader: Loader | None = None) -> None:
        """Serve the wanted version, from its files unless a loader is given; returns when the engine does.

        WeightsConflictError: a lower lease, or an older version. WeightsBusyError: another update runs.
        WeightsError: the bytes are not those that were announced. EngineError: no engine, or it failed.
        """
        if self._updating:
            raise WeightsBusyError("another weight update runs on this server; expected one at a time: try again")
        self._engine.require_up()
        check_order(wanted, self.identity, self.lease)
        if wanted.identity == self.identity:
            self.lease, self.fenced = wanted.lease, ""
            self._metrics.weights_kept()
            return
        with self._changing(wanted):
            await self._replace(wanted, loader or DiskLoader(self.copy))

    @contextlib.contextmanager
    def _changing(self, wanted: Announcement) -> Iterator[None]:
        """Around an update: no ticket is taken, and a failure fences the server."""
        self._updating, self._replacing = True, self.identity is not None
        self._settled.clear()
        try:
            yield
        except (PenstockError, TimeoutError) as error:
            before, self.fenced = self.fenced, f"version {wanted.identity}: {error}"
            self.needs_whole = isinstance(error, ChainError)
            self._metrics.weights_failed(error)
            if self.fenced != before:  # it is tried again and again
                log.error("fenced: %s", self.fenced)
            raise
        finally:
            self._updating = False
            self._settled.set()

    async def join_group(self, request: GroupRequest) -> None:
        """Let the engine join a trainer's process group, for pushes that are broadcast in it."""
        self._check_not_updating()
        check_lease(request.lease, self.lease)
        await self._engine.join_group(request)

    async def _replace(self, wanted: Announcement, loader: Loader) -> None:
        start = time.monotonic()
        await loader.prepare(wanted, self._engine.client.loading, self._section.push_timeout_seconds)
        await self._drain()
        self._engine.require_up()
        epoch = self._engine.epoch
        with self._condemning(epoch, wanted):
            async with self._in_time(wanted):
                pause_start = time.monotonic() if self.paused else await self._stop_requests()
                self.identity, self._unproved = None, wanted
                self.known[str(wanted.identity)] = wanted.identity
                await self._load(wanted, loader)
                now = time.monotonic()
                if not self.paused:
                    await self._engine.client.generation.resume()
                    now = time.monotonic()
                    await self._prove(wanted)
            if self._engine.epoch != epoch:
                raise EngineError(f"the engine was started anew while it loaded {wanted.identity}; expected it to last")
        self.identity, self.lease, self.fenced = wanted.identity, wanted.lease, ""
        self.paused_seconds = now - pause_start
        self.needs_whole = False
        while len(self.known) > NUM_KNOWN:
            del self.known[next(iter(self.known))]
        self._metrics.weights_loaded(loader.transport, now - start, now - pause_start, wanted.identity.number)
        log.info(
            "serving %s",
            wanted.identity,
            extra={
                "seconds": round(now - start, 3),
                "paused": round(now - pause_start, 3),
                "canary": round(time.monotonic() - now, 3),
            },
        )

    @contextlib.contextmanager
    def _condemning(self, epoch: int, wanted: Announcement) -> Iterator[None]:
        """Around what must succeed as a whole: otherwise the engine is restarted, and nothing that it made is used."""
        try:
            yield
        except BaseException as error:
            self.identity = self._unproved = None
            self.known.pop(str(wanted.identity), None)
            self.condemned_epoch = epoch
            self._engine.report(epoch, f"{wanted.identity} could not be loaded: {str(error) or type(error).__name__}")
            raise

    @contextlib.asynccontextmanager
    async def _in_time(self, wanted: Announcement) -> AsyncIterator[None]:
        """Within the time of a push: an engine that ends later has missed its version, whatever it says then."""
        limit = self._section.push_timeout_seconds
        deadline = time.monotonic() + limit
        try:
            async with asyncio.timeout(limit):
                yield
            if time.monotonic() > deadline:  # this process was stopped meanwhile, and its timer with it
                raise TimeoutError
        except TimeoutError as error:
            late = f"{wanted.identity} was not served within weights.push_timeout_seconds = {limit:g}"
            raise TimeoutError(str(error) or late) from None

    async def _stop_requests(self) -> float:
        """Pause; returns since when nothing is generated."""
        generation, mode, start = self._engine.client.generation, self._section.pause_mode, time.monotonic()
        if mode == "abort":
            self.num_interruptions += 1
            await generation.abort_all()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ABORT_SECONDS):
                    await self._idle.wait()
        await generation.pause(mode, self._section.push_timeout_seconds)
        return start if mode == "abort" else time.monotonic()

    async def _drain(self) -> None:
        """Let running groups finish: a pause throws their key-value cache away, to be computed again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._section.drain_seconds):
                await self._idle.wait()

    async def _load(self, wanted: Announcement, loader: Loader) -> None:
        client = self._engine.client
        await loader.load(wanted, client.loading, self._section.push_timeout_seconds)
        # In place, what runs holds its cache, and a flush is refused.
        await client.generation.drop_prefixes(str(wanted.identity), flush=self._section.pause_mode != "in_place")
        said = await client.loading.weight_version()
        if said != str(wanted.identity):
            raise EngineError(f"after loading {wanted.identity} the engine says that it serves {said!r}")
        if self._section.checksums and loader.files is not None:
            await client.loading.compare(loader.files, self._section.push_timeout_seconds)

    async def _prove(self, wanted: Announcement) -> None:
        """Ask for the canary's tokens: when generation goes on, since a paused engine takes no request."""
        if wanted.canary is not None:
            generation, canary = self._engine.client.generation, wanted.canary
            seen = await generation.prompt_logprobs(canary.token_ids, self._section.push_timeout_seconds)
            self._metrics.canary_answered(canary.check(seen))
        self._unproved = None

    async def pause(self) -> None:
        """Hold generation, until `resume`; updates still happen."""
        self._engine.require_up()
        self._check_not_updating()
        self.paused = True
        self._settled.clear()  # what is cut waits until generation is held
        try:
            await self._stop_requests()
        finally:
            self._settled.set()

    async def resume(self) -> None:
        """Go on generating."""
        self._engine.require_up()
        self._check_not_updating()
        if self._unproved is None:
            await self._engine.client.generation.resume()
        else:
            await self._resume_unproved(self._unproved)
        self.paused = False

    async def _resume_unproved(self, loaded: Announcement) -> None:
        """Go on with what was loaded while generation was held: the canary is asked now."""
        with self._changing(loaded), self._condemning(self._engine.epoch, loaded):
            async with self._in_time(loaded):
                await self._engine.client.generation.resume()
                await self._prove(loaded)

    def _check_not_updating(self) -> None:
        if self._updating:
            raise WeightsBusyError("a weight update runs on this server; try again after it")
