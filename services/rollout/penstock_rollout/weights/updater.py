"""Which weights the engine serves, and how they are replaced.

Owns the steps of an update; `states` draws the situations that they lead to. Invariants: `identity` is set only once
the engine reports that version and the canary agrees. A failure between the pause and that point restarts the engine;
tokens generated in between carry an unknown version and are discarded. A lower lease, or an older version of the same
lease, changes nothing.

    prepare -> drain, pause -> load, flush -> compare the engine's version -> resume -> canary -> serving

    pause_mode  running requests                     their cache              the prefix cache
    retract     wait, then continue                  computed anew            emptied
    in_place    stop, then continue                  kept, of older weights   only what the new weights computed is used
    abort       end; the producer sends their rest   computed anew            emptied

A server may also sleep: its engine gives up its GPU memory, with the weights in it, until the next update. Meanwhile
nothing is generated, and nobody resumes generation; a sleep counts as a change, so that all who wait for `settled` wait
for its end too.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager

from penstock.config import WeightsSection
from penstock.contracts import PolicyIdentity, ServerState
from penstock.contracts.services import Announcement
from penstock.contracts.weight_sources import GroupRequest
from penstock.errors import EngineError, PenstockError, WeightsBusyError, WeightsError
from penstock_rollout.engine.engine import Engine
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights import states
from penstock_rollout.weights.in_flight import InFlight
from penstock_rollout.weights.loaders import DiskLoader, Loader, RelayLoader
from penstock_rollout.weights.local_copy import ChainError, LocalCopy
from penstock_rollout.weights.relayed import RelayedVersions
from penstock_rollout.weights.states import (
    Change,
    FallingAsleep,
    Held,
    Preparing,
    Replacing,
    Rest,
    State,
    Verifying,
    Waiting,
)
from penstock_rollout.weights.version_order import check_lease, check_order, is_behind

log = logging.getLogger(__name__)

NUM_KNOWN = 64  # versions that a span may still name: far more than one request can see
ABORT_SECONDS = 1.0  # for running requests to end after an abort


class WeightUpdater:
    """The weights of one engine."""

    def __init__(
        self,
        engine: Engine,
        section: WeightsSection,
        metrics: RolloutMetrics,
        copy: LocalCopy | None = None,
        relayed: RelayedVersions | None = None,
    ) -> None:
        """`copy`: where deltas are applied; None: full versions are loaded from their folders, or, with `relayed`, from
        what other servers have sent."""
        self.copy = copy
        self.relayed = relayed
        self.lease = 0
        """The highest lease that this server has followed, over all lives of the engine."""
        self.num_interruptions = 0
        """Updates that ended running requests; the unfinished parts are then sent again."""
        self.condemned_life = 0
        """The engine's life that was last given up because of an update, not because of a request."""
        self.paused_seconds = 0.0
        """Seconds for which generation was paused to load the weights that are served."""
        self.asleep = False
        """Whether the engine has given up its GPU memory, and its weights with it."""
        self._engine = engine
        self._section = section
        self._metrics = metrics
        self._state: State = Waiting()
        self._verified: dict[str, PolicyIdentity] = {}
        self._requests = InFlight()
        self._changes = InFlight()
        self._sleep = contextlib.ExitStack()

    def generating(self) -> AbstractContextManager[None]:
        """Surrounds one group's request, so that an update can let it finish."""
        return self._requests.one()

    async def settled(self) -> None:
        """Return once no update runs: a request that starts during one only delays it."""
        await self._changes.none()

    @property
    def aborts_requests(self) -> bool:
        """Whether an update ends running requests, so that no answer of the engine is of two versions."""
        return self._section.pause_mode == "abort"

    @property
    def state(self) -> ServerState:
        if not self._engine.up.is_set():
            return ServerState.ASLEEP if self._engine.held_back else ServerState.STARTING
        return ServerState.ASLEEP if self.asleep and not isinstance(self._state, Change) else states.name(self._state)

    @property
    def sleeps(self) -> bool:
        """Whether it is asleep or falls asleep: a request would wait for longer than its time limit."""
        return self.asleep or isinstance(self._state, FallingAsleep)

    @property
    def identity(self) -> PolicyIdentity | None:
        return states.identity(self._state)

    @property
    def loaded(self) -> bool:
        """Whether there are weights to serve; stays true while a push replaces them."""
        return states.is_loaded(self._state)

    @property
    def paused(self) -> bool:
        """Whether generation is held, until `resume`."""
        return states.is_held(self._state)

    @property
    def fenced(self) -> str:
        """Why the last update failed; empty if it succeeded."""
        return states.why_fenced(self._state)

    @property
    def needs_full(self) -> bool:
        """Whether the next update needs full files, since deltas did not lead to the version that was wanted last."""
        return states.needs_full(self._state)

    @property
    def unverified(self) -> str:
        """The version that is loaded and not yet verified by the canary; empty if there is none."""
        loaded = states.unverified(self._state)
        return "" if loaded is None else str(loaded.identity)

    @property
    def known(self) -> Mapping[str, PolicyIdentity]:
        """The versions that a span may name: the verified ones, and the one that still has to be verified."""
        loaded = states.unverified(self._state)
        return self._verified if loaded is None else {**self._verified, str(loaded.identity): loaded.identity}

    def forget(self) -> None:
        """The engine has been started anew: it serves no known weights until some are loaded."""
        self._state = states.without_weights(self._state)
        self._end_sleep()
        self._metrics.weights_lost()

    def behind(self, announced: Announcement) -> bool:
        """Whether the announced version must be loaded before its tickets may run here."""
        return is_behind(self.identity, self.lease, announced)

    async def update(self, wanted: Announcement, loader: Loader | None = None) -> None:
        """Load the wanted version, from its files unless a loader is given; returns once the engine serves it.

        WeightsConflictError: a lower lease, or an older version. WeightsBusyError: another update runs.
        WeightsError: the bytes are not the announced ones. EngineError: no engine, or it failed.
        """
        before = self._state
        if isinstance(before, Change):
            raise WeightsBusyError("another weight update runs on this server; expected one at a time: try again")
        self._engine.require_up()
        check_order(wanted, self.identity, self.lease)
        if wanted.identity == self.identity:
            self.lease, self._state = wanted.lease, states.kept(before, wanted.identity)
            self._metrics.weights_kept()
            return
        with self._changing(Preparing(wanted, before), wanted):
            await self._replace(wanted, loader or self._own_loader())

    def _own_loader(self) -> Loader:
        return DiskLoader(self.copy) if self.relayed is None else RelayLoader(self.relayed)

    def confirm(self, announced: Announcement) -> None:
        """End the fence of a server that serves the announced version: the push that failed was of another one."""
        now = self._state
        if self.fenced and not isinstance(now, Change) and self.identity == announced.identity:
            log.info("no longer fenced: the announced version %s is served", announced.identity)
            self._state = states.kept(now, announced.identity)
            self._metrics.weights_kept()

    async def doubt(self, lease: int, why: str) -> None:
        """Others received wrong bytes of the served weights from here: take no ticket until they are loaded anew.

        WeightsConflictError: a lower lease. WeightsBusyError: an update runs, which loads other ones.
        """
        check_lease(lease, self.lease)
        self._state = states.fenced(states.rest_without_weights(self._at_rest()), why, needs_full=False)
        self._metrics.weights_failed(WeightsError(why))
        log.error("fenced: %s", why)
        if self.relayed is not None:
            await self.relayed.forget()

    @contextlib.contextmanager
    def _changing(self, change: Change, wanted: Announcement) -> Iterator[None]:
        """Surrounds an update: no ticket is taken, and a failure fences the server."""
        with self._changes.one():
            self._state = change
            try:
                yield
            except (PenstockError, TimeoutError) as error:
                self._fence(error, wanted)
                raise
            finally:
                if isinstance(self._state, Change):  # it was cancelled
                    self._state = self._state.before

    def _fence(self, error: Exception, wanted: Announcement) -> None:
        earlier = self.fenced
        why = f"version {wanted.identity}: {error}"
        self._state = states.fenced(self._before, why, needs_full=isinstance(error, ChainError))
        self._metrics.weights_failed(error)
        if why != earlier:  # the update is repeated until it succeeds: log each reason once
            log.error("fenced: %s", why)

    @property
    def _before(self) -> Rest:
        """The state before the running change, without weights that were lost since."""
        assert isinstance(self._state, Change)
        return self._state.before

    async def join_group(self, request: GroupRequest) -> None:
        """Let the engine join a trainer's process group, for pushes that are broadcast in it."""
        self._at_rest()
        check_lease(request.lease, self.lease)
        await self._engine.join_group(request)

    async def _replace(self, wanted: Announcement, loader: Loader) -> None:
        start = time.monotonic()
        await loader.prepare(wanted, self._engine.client.loading, self._section.push_timeout_seconds)
        await self._drain()
        self._engine.require_up()
        life = self._engine.life
        with self._condemning(life, wanted):
            async with self._in_time(wanted):
                is_still = self.paused or self.asleep
                pause_start = time.monotonic() if is_still else await self._stop_requests()
                self._state = Replacing(wanted, self._before)
                await self._load(wanted, loader)
                now = time.monotonic()
                if not self.paused:
                    await self._engine.client.generation.resume()
                    now = time.monotonic()
                    await self._verify(wanted)
            if self._engine.life != life:
                raise EngineError(f"the engine was started anew while it loaded {wanted.identity}; expected it to last")
        self.lease, self.paused_seconds = wanted.lease, now - pause_start
        self._state = states.serving(self._before, wanted)
        self._end_sleep()
        if not self.paused:
            self._remember(wanted.identity)
        self._metrics.weights_loaded(loader.transport, now - start, now - pause_start, wanted.identity.number)
        spent = {"seconds": now - start, "paused": now - pause_start, "canary": time.monotonic() - now}
        log.info("serving %s", wanted.identity, extra={part: round(seconds, 3) for part, seconds in spent.items()})

    @contextlib.contextmanager
    def _condemning(self, life: int, wanted: Announcement) -> Iterator[None]:
        """Surrounds steps that must all succeed: otherwise the engine is restarted and its output is discarded."""
        try:
            yield
        except BaseException as error:
            self._state = states.without_weights(self._state)
            self._verified.pop(str(wanted.identity), None)  # if it was loaded again
            self.condemned_life = life
            self._engine.report(life, f"{wanted.identity} could not be loaded: {str(error) or type(error).__name__}")
            raise

    @contextlib.asynccontextmanager
    async def _in_time(self, wanted: Announcement) -> AsyncIterator[None]:
        """Limits a push: an engine that finishes later has missed its version, whatever it reports then."""
        limit = self._section.push_timeout_seconds
        deadline = time.monotonic() + limit
        try:
            async with asyncio.timeout(limit):
                yield
            if time.monotonic() > deadline:  # this process was stopped, and its timer with it
                raise TimeoutError
        except TimeoutError as error:
            late = f"{wanted.identity} was not served within weights.push_timeout_seconds = {limit:g}"
            raise TimeoutError(str(error) or late) from None

    async def _stop_requests(self) -> float:
        """Pause; returns the time (time.monotonic) since which nothing is generated."""
        generation, mode, start = self._engine.client.generation, self._section.pause_mode, time.monotonic()
        if mode == "abort":
            self.num_interruptions += 1
            await generation.abort_all()
            await self._requests.none_within(ABORT_SECONDS)
        await generation.pause(mode, self._section.push_timeout_seconds)
        return start if mode == "abort" else time.monotonic()

    async def _drain(self) -> None:
        """Let running groups finish: a pause discards their key-value cache, which is then computed again."""
        await self._requests.none_within(self._section.drain_seconds)

    async def _load(self, wanted: Announcement, loader: Loader) -> None:
        client, seconds = self._engine.client, self._section.push_timeout_seconds
        if self.asleep:
            await client.memory.take_weights(seconds)
        await loader.load(wanted, client.loading, seconds)
        if self.asleep:
            await client.memory.take_cache(seconds)
        # In place, running requests hold their cache, and a flush is refused.
        await client.generation.drop_prefixes(str(wanted.identity), flush=self._section.pause_mode != "in_place")
        said = await client.loading.weight_version()
        if said != str(wanted.identity):
            raise EngineError(f"after loading {wanted.identity} the engine reports that it serves {said!r}")
        if self._section.checksums and loader.files is not None:
            await client.loading.compare(loader.files, seconds)

    async def _verify(self, wanted: Announcement) -> None:
        """Check the canary, after generation has resumed, since a paused engine takes no request."""
        if wanted.canary is not None:
            generation, canary = self._engine.client.generation, wanted.canary
            seen = await generation.prompt_logprobs(canary.token_ids, self._section.push_timeout_seconds)
            self._metrics.canary_answered(canary.check(seen))

    def _remember(self, verified: PolicyIdentity) -> None:
        self._verified[str(verified)] = verified
        while len(self._verified) > NUM_KNOWN:
            del self._verified[next(iter(self._verified))]

    async def pause(self) -> None:
        """Hold generation until `resume`; updates still happen."""
        self._engine.require_up()
        self._state = states.held(self._at_rest())
        if self.asleep:
            return
        with self._changes.one():  # requests that were cut wait until generation is held
            await self._stop_requests()

    async def resume(self) -> None:
        """Resume generation."""
        self._engine.require_up()
        now = self._at_rest()
        if isinstance(now, Held) and now.unverified is not None:
            await self._resume_unverified(now, now.unverified)
        else:
            if not self.asleep:  # else the next update resumes it
                await self._engine.client.generation.resume()
            self._state = states.resumed(self._state)

    async def _resume_unverified(self, held: Held, loaded: Announcement) -> None:
        """Resume with the weights that were loaded while generation was held: the canary checks them now."""
        with self._changing(Verifying(loaded, held), loaded), self._condemning(self._engine.life, loaded):
            async with self._in_time(loaded):
                await self._engine.client.generation.resume()
                await self._verify(loaded)
            self._state = states.held(self._before).then
            self._remember(loaded.identity)

    async def sleep(self, lease: int) -> None:
        """Give up the engine's GPU memory until the next update, for a trainer with this lease. Idempotent.

        Running requests end, and their rest is generated after the sleep, whatever `weights.pause_mode` is: a request
        that waited would run into its time limit. WeightsConflictError: a lower lease. WeightsBusyError: an update
        runs. EngineError or TimeoutError: it did not, and is restarted.
        """
        check_lease(lease, self.lease)
        before = self._at_rest()
        self.lease = lease
        if self.asleep:
            return
        self._engine.require_up()
        life, start = self._engine.life, time.monotonic()
        with self._changes.one():
            self._state = FallingAsleep(before)
            try:
                await self._give_up_memory()
            except BaseException as error:
                self.condemned_life = life
                self._engine.report(life, f"it did not give up its GPU memory: {str(error) or type(error).__name__}")
                raise
            finally:
                self._state = states.without_weights(self._before)
            if self._engine.life == life:
                self._begin_sleep()
        log.info("asleep", extra={"seconds": round(time.monotonic() - start, 3)})

    async def _give_up_memory(self) -> None:
        client, seconds = self._engine.client, self._section.push_timeout_seconds
        await self._drain()
        async with asyncio.timeout(seconds):
            if not self.paused:
                self.num_interruptions += 1
                await client.generation.abort_all()
                await self._requests.none_within(ABORT_SECONDS)
                # Not abort, which SGLang answers while its scheduler may still have a batch.
                await client.generation.pause("retract", seconds)
            await client.memory.give_up(seconds)

    def _begin_sleep(self) -> None:
        self.asleep = True
        self._sleep.enter_context(self._changes.one())
        self._sleep.enter_context(self._metrics.asleep())
        self._metrics.weights_lost()

    def _end_sleep(self) -> None:
        self.asleep = False
        self._sleep.close()

    def _at_rest(self) -> Rest:
        """WeightsBusyError while an update runs."""
        if isinstance(self._state, Change):
            raise WeightsBusyError("a weight update runs on this server; try again after it")
        return self._state
