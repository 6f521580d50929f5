"""Answers to calls: `POST /v1/generate`, for the agent service and for people.

Invariant: a call that asks for weights of at least some version is answered with tokens of such weights, which the
canary has confirmed, or with an error that says why not. A call that runs outlives updates, as a group of tickets does.

    call --> can it be answered here? --> wait for room --> wait for a running update --> still? --> generate --> answer
               | no: 503                    | too many: 503     | too long: 503             | no: 503
               v                            v                   v                           v
             the agent service tries another server, or this one later
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Iterator

from penstock.contracts import ServerState
from penstock.contracts.generation import AtLeast, GenerateAnswer, GeneratedCompletion, GenerateRequest, spelled
from penstock.errors import (
    EngineAbortedError,
    EngineBusyError,
    EngineDiedError,
    EngineError,
    EngineRejectedError,
    WeightsError,
)
from penstock_rollout.admission import Admission
from penstock_rollout.engine.types import Answer, EngineAbsentError
from penstock_rollout.generator import ASLEEP, Generated, Generator
from penstock_rollout.metrics import GroupOutcome, RolloutMetrics
from penstock_rollout.weights.in_flight import InFlight
from penstock_rollout.weights.updater import WeightUpdater
from penstock_rollout.weights.version_order import serves_at_least

PATIENCE_SECONDS = 5.0  # for a running update: the caller's cached prefix is here
DRAIN_SECONDS = 10.0  # at the end: calls that still run then are refused
RESERVED_CONNECTIONS = 64  # for pushes, probes and scrapes, while calls hold all others
STOPPING = "this service stops"

# The first class that fits decides.
OUTCOMES: tuple[tuple[type[BaseException], GroupOutcome], ...] = (
    (asyncio.CancelledError, "returned"),  # the caller has gone
    (EngineRejectedError, "rejected"),
    (EngineAbortedError, "aborted"),
    (EngineAbsentError, "returned"),
    (EngineDiedError, "engine_died"),
    (EngineError, "failed"),
    (TimeoutError, "failed"),
)


def make_admission(max_running_requests: int, max_connections: int) -> Admission:
    """The room of a service: each call, running or waiting, holds one of its connections."""
    room = max(1, max_connections - RESERVED_CONNECTIONS)
    max_running = min(max_running_requests, room)
    return Admission(max_running, min(max_running, room - max_running))


class Calls:
    """The calls of one service."""

    def __init__(
        self, generator: Generator, weights: WeightUpdater, metrics: RolloutMetrics, admission: Admission
    ) -> None:
        self._generator = generator
        self._weights = weights
        self._metrics = metrics
        self._admission = admission
        self._running = InFlight()
        self._limits: set[asyncio.Timeout] = set()
        metrics.count_waiting(lambda: admission.num_waiting)

    @property
    def not_ready(self) -> str | None:
        """Why no call can be answered now; None if one can."""
        return self._admission.closed or self._generator.not_ready

    async def answer(self, request: GenerateRequest) -> GenerateAnswer:
        """The completions. EngineBusyError: not here, or not now; EngineRejectedError: it can be answered nowhere;
        other errors of the engine: another attempt may succeed.
        """
        start = time.monotonic()
        with self._counted():
            self._require(request.at_least, updating=True)
            async with self._until_drained(), self._admission.room(len(request.seeds)):
                await self._settled(request.at_least)
                generated = await self._generator.generate(
                    request.prompt_ids, request.seeds, request.sampling, training=True
                )
            completions = self._named(request, generated)
        self._metrics.group_ended(
            "published",
            len(request.prompt_ids),
            sum(len(each.token_ids) for each in completions),
            sum(each.cached_tokens for each in completions),
        )
        return GenerateAnswer(completions, time.monotonic() - start)

    async def drain_at(self, stop: asyncio.Event) -> None:
        """Return after `stop`, once every call that runs then has ended; the last ones are refused."""
        await stop.wait()
        self._admission.close(STOPPING)
        await self._running.none_within(DRAIN_SECONDS)
        now = asyncio.get_running_loop().time()
        for limit in self._limits:
            limit.reschedule(now)
        await self._running.none()

    @contextlib.asynccontextmanager
    async def _until_drained(self) -> AsyncIterator[None]:
        """Surrounds a call: EngineBusyError if the service stops before its end."""
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._limits.add(limit)
                with self._running.one():
                    yield
        except TimeoutError:
            if limit.expired():
                raise EngineBusyError(STOPPING) from None
            raise
        finally:
            self._limits.discard(limit)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Surrounds a call, to count how it failed."""
        try:
            yield
        except EngineBusyError:
            self._metrics.call_refused()
            raise
        except (EngineError, TimeoutError, asyncio.CancelledError) as error:
            self._metrics.group_ended(next(outcome for kind, outcome in OUTCOMES if isinstance(error, kind)))
            raise

    async def _settled(self, at_least: AtLeast | None) -> None:
        """Wait for a running update; EngineBusyError if it takes too long, or has not led to weights that will do."""
        if at_least is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await self._weights.settled()
        self._require(at_least, updating=False)

    def _require(self, at_least: AtLeast | None, *, updating: bool) -> None:
        """EngineBusyError unless the call can be answered. `updating`: it may be, after the update that runs."""
        if at_least is None:
            if self._weights.asleep:
                raise EngineBusyError(ASLEEP)
            return
        if (reason := self.not_ready) is not None:
            raise EngineBusyError(reason)
        if self._weights.state is ServerState.UPDATING:
            if not updating:
                raise EngineBusyError("new weights are being loaded; expected them sooner")
            return
        identity, lease = self._weights.identity, self._weights.lease
        if not serves_at_least(identity, lease, at_least):
            raise EngineBusyError(
                f"this server serves {identity} of lease {lease}; expected version {at_least.number} of lease "
                f"{at_least.lease}, or newer: it loads what the trainer has announced"
            )

    def _named(self, request: GenerateRequest, generated: Generated) -> tuple[GeneratedCompletion, ...]:
        """The answers with their weights; without `at_least`, also with those that are not known here."""
        if request.at_least is not None:
            try:
                self._generator.completions(generated)
            except WeightsError as error:
                raise EngineError(str(error)) from error
        known = {name: spelled(policy) for name, policy in self._weights.known.items()}
        return tuple(_shown(answer, known, len(request.prompt_ids)) for answer in generated.answers)


def _shown(answer: Answer, known: dict[str, str], num_prompt_tokens: int) -> GeneratedCompletion:
    if not all(map(math.isfinite, answer.logprobs)):
        raise EngineError("the engine answered with a log-probability that is not finite")
    spans = answer.spans
    return GeneratedCompletion(
        text=answer.text,
        token_ids=tuple(answer.token_ids),
        logprobs=tuple(answer.logprobs),
        spans=tuple((known.get(each.weight_version, each.weight_version), each.start, each.end) for each in spans),
        finish_reason=answer.finish_reason,
        cached_tokens=min(answer.num_cached_tokens, num_prompt_tokens),
    )
