"""Calls of the rollout servers that the queue lists.

Invariant: a call is answered, or refused for its own fault, or tried again until its caller cancels it: a server that
is busy, behind or gone costs time and never a call. The answer may be of another server than the first attempt, and is
the same call: nothing of an attempt that failed is ever used.

A call with which engines die is sent alone, so that it is found out: the others are not to blame.

    generate --> a server that may be asked --POST /v1/generate--> 200: the answer
                    ^   (routing)                                  4xx: CallRejectedError
                    |                                              503, 5xx, no connection, gone from the queue
                    '--------- the server rests; wait if all rest ---------'
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass

import httpx
import msgspec
from pydantic import SecretStr

from penstock.contracts import (
    MalformedMessageError,
    ServerState,
    ServiceKind,
    from_body,
    pack_float32,
    pack_int32,
    unpack_int32,
)
from penstock.contracts.generation import AtLeast, GenerateAnswer, GeneratedCompletion, GenerateRequest
from penstock.contracts.services import ServiceRecord
from penstock.contracts.trajectories import require_cover
from penstock.errors import EngineDiedError
from penstock.runtime.requests import auth_headers, transport_fault
from penstock_agent.generation.call import Call, CallRejectedError, Generated
from penstock_agent.generation.routing import Router
from penstock_agent.generation.waits import Waits
from penstock_agent.metrics import AskAgainReason

log = logging.getLogger(__name__)

REFRESH_SECONDS = 1.0  # between two looks at which servers there are
SOONEST_REFRESH_SECONDS = 0.1  # after a failure
FIRST_REST_SECONDS = 0.2
LONGEST_REST_SECONDS = 5.0
CONNECT_SECONDS = 5.0
WRITE_SECONDS = 60.0  # for the longest prompt over a slow link
KEEPALIVE_SECONDS = 5.0  # a service closes a connection that is idle for 10 s
SUSPECT_DEATHS = 2  # a call with which so many engines died is sent alone
MOST_DEATHS = 3
PASSING = (408, 429)  # statuses of requests that may be sent again as they are

ReadServices = Callable[[], Awaitable[list[ServiceRecord]]]


@dataclass(frozen=True)
class _Rest:
    until: float
    num_failures: int
    why: str


class _Error(msgspec.Struct):
    error: str


class _AttemptFailedError(Exception):
    """`seconds`: for how long the server wants to be left alone."""

    def __init__(self, reason: AskAgainReason, why: str, seconds: float = 0.0) -> None:
        super().__init__(why)
        self.reason: AskAgainReason = reason
        self.seconds = seconds


class Servers:
    """The rollout servers of a run. `follow` must run beside the calls."""

    def __init__(
        self,
        services: ReadServices,
        token: SecretStr | None,
        capacity: int,
        asked_again: Callable[[AskAgainReason], None],
    ) -> None:
        """`services`: reads the queue. `capacity`: calls that one server runs at once. `asked_again`: called after each
        attempt that failed.
        """
        self._services = services
        self._asked_again = asked_again
        self._router = Router(capacity)
        self._records: dict[str, ServiceRecord] = {}
        self._rests: dict[str, _Rest] = {}
        self._attempts: dict[str, set[asyncio.Timeout]] = {}
        self._refreshed = asyncio.Event()
        self._look_now = asyncio.Event()
        self._alone = asyncio.Lock()  # among the calls with which engines died
        self.waits = Waits()
        """Of calls, while no server can be asked."""
        self._has_said = False
        self._client = httpx.AsyncClient(
            headers={**auth_headers(token), "Content-Type": "application/json"},
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS, write=WRITE_SECONDS),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_SECONDS),
            trust_env=False,  # servers of this run are not behind a proxy
        )

    async def close(self) -> None:
        await self._client.aclose()

    @property
    def num_known(self) -> int:
        """Servers that the queue lists."""
        return len(self._records)

    @property
    def waiting_for(self) -> str:
        """What calls wait for now, for people; empty if none waits."""
        if not self.waits.num_waiting:
            return ""
        servers = [f"{name} ({self._why_not(record)})" for name, record in self._records.items()]
        known = ", ".join(servers) or "no rollout server is registered"
        return f"{self.waits.num_waiting} calls of the model wait: {known}"

    async def follow(self) -> None:
        """Read which servers there are, for ever; an attempt at one that is no longer listed fails."""
        while True:
            found = [each for each in await self._services() if each.kind is ServiceKind.ROLLOUT]
            self._records = {each.name: each for each in found}
            self._rests = {name: rest for name, rest in self._rests.items() if name in self._records}
            self._end_lost_attempts()
            self._refreshed.set()
            self._refreshed = asyncio.Event()
            await asyncio.sleep(SOONEST_REFRESH_SECONDS)
            with suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_SECONDS - SOONEST_REFRESH_SECONDS):
                    await self._look_now.wait()
            self._look_now.clear()

    async def generate(self, call: Call) -> Generated:
        """The completion, by whichever server answers. CallRejectedError: none would."""
        request = GenerateRequest(
            prompt_ids=tuple(unpack_int32(call.prompt_ids)),
            seeds=(call.seed,),
            **msgspec.structs.asdict(call.sampling),
            at_least=AtLeast(call.at_least_number, call.at_least_lease),
        )
        body = msgspec.json.encode(request)
        num_deaths = 0
        while True:
            try:
                async with self._alone if num_deaths >= SUSPECT_DEATHS else nullcontext():
                    generated = await self._once(call.session, body)
            except _AttemptFailedError as failure:
                self._asked_again(failure.reason)
                num_deaths += failure.reason == "engine_died"
                if num_deaths >= MOST_DEATHS:
                    raise CallRejectedError(f"{num_deaths} engines died with this call: {failure}") from None
            else:
                self._has_said = False
                return generated

    async def _once(self, session: str, body: bytes) -> Generated:
        """One attempt, at a server that may be asked; the server rests if it fails."""
        record, servers = await self._server_for(session)
        try:
            with self._router.running(session, record.name, servers):
                generated = await self._attempt(record, body)
        except _AttemptFailedError as failure:
            self._let_rest(record.name, failure)
            raise
        self._rests.pop(record.name, None)
        return generated

    async def _server_for(self, session: str) -> tuple[ServiceRecord, list[str]]:
        """The server to ask, and all that may be asked; waits until there is one."""
        if not (servers := self._open()):
            with self.waits.one():
                while not (servers := self._open()):
                    await self._until_one_may_be_open()
        return self._records[self._router.choose(session, servers)], servers

    def _open(self) -> list[str]:
        """The servers that may be asked now.

        A record is some seconds old: if none says that it serves, one of the others may do so by now, and tells.
        """
        now = time.monotonic()
        resting = {name for name, rest in self._rests.items() if rest.until > now}
        awake = [each for name, each in self._records.items() if name not in resting]
        serving = [each.name for each in awake if each.server_state in (ServerState.SERVING, ServerState.UPDATING)]
        return serving or [each.name for each in awake if each.server_state is not ServerState.STARTING]

    async def _until_one_may_be_open(self) -> None:
        if not self._has_said:
            self._has_said = True
            # Servers that refuse for a while are back-pressure; if it lasts, `penstock status` shows it.
            log.log(logging.INFO if self._records else logging.WARNING, "%s", self.waiting_for)
        now, refreshed = time.monotonic(), self._refreshed
        ends = [rest.until for rest in self._rests.values() if rest.until > now]
        with suppress(TimeoutError):
            async with asyncio.timeout(min(ends, default=now + REFRESH_SECONDS) - now):
                await refreshed.wait()

    def _why_not(self, record: ServiceRecord) -> str:
        rest = self._rests.get(record.name)
        return rest.why if rest is not None else record.state

    def _let_rest(self, name: str, failure: _AttemptFailedError) -> None:
        """Leave the server alone: for as long as it wants, or for longer each time; with jitter."""
        if name not in self._records:
            return
        earlier = self._rests.get(name)
        now = time.monotonic()
        if earlier is not None and earlier.until > now:  # of another call that failed at the same time
            return
        num_failures = 1 if earlier is None else earlier.num_failures + 1
        backed_off = min(LONGEST_REST_SECONDS, FIRST_REST_SECONDS * 2 ** min(num_failures - 1, 10))
        seconds = failure.seconds or backed_off
        self._rests[name] = _Rest(now + seconds * random.uniform(0.5, 1.0), num_failures, str(failure))
        if failure.reason != "busy":
            log.warning("%s did not answer a call (%s): trying again", name, failure)
            self._look_now.set()

    def _end_lost_attempts(self) -> None:
        now = asyncio.get_running_loop().time()
        for name in self._attempts.keys() - self._records.keys():
            for limit in self._attempts.pop(name):
                limit.reschedule(now)

    @asynccontextmanager
    async def _while_listed(self, name: str) -> AsyncIterator[None]:
        """Surrounds an attempt: a host that is gone does not break its connections, but its record expires."""
        limit = asyncio.timeout(None)
        try:
            async with limit:
                self._attempts.setdefault(name, set()).add(limit)
                yield
        except TimeoutError:
            raise _AttemptFailedError("gone", "it is no longer in the queue") from None
        finally:
            attempts = self._attempts.get(name, set())
            attempts.discard(limit)
            if not attempts:
                self._attempts.pop(name, None)

    async def _attempt(self, record: ServiceRecord, body: bytes) -> Generated:
        try:
            async with self._while_listed(record.name):
                response = await self._client.post(f"{record.url}/v1/generate", content=body)
        except (httpx.TransportError, RuntimeError) as error:  # RuntimeError: the connection was closed meanwhile
            raise _AttemptFailedError("unreachable", transport_fault(error)) from None
        status = response.status_code
        if status == 200:
            return _read(response.content, record.name)
        why = f"HTTP {status}: {response.text[:300]}"
        if status == 503:
            raise _AttemptFailedError("busy", why, _seconds(response.headers.get("Retry-After", "")))
        if _kind(response) == EngineDiedError.kind:
            raise _AttemptFailedError("engine_died", why)
        if status >= 500 or status in PASSING:
            raise _AttemptFailedError("failed", why)
        raise CallRejectedError(f"{record.name} refused a call of {len(body)} bytes: {why}")


def _kind(response: httpx.Response) -> str:
    """Of one of Penstock's errors; empty for another answer."""
    try:
        return msgspec.json.decode(response.content, type=_Error).error
    except msgspec.DecodeError:
        return ""


def _seconds(retry_after: str) -> float:
    return min(LONGEST_REST_SECONDS, float(retry_after)) if retry_after.isdecimal() else 0.0


def _read(content: bytes, server: str) -> Generated:
    try:
        (completion,) = from_body(content, GenerateAnswer).completions
        return _generated(completion, server)
    except (MalformedMessageError, ValueError) as error:
        raise _AttemptFailedError("malformed", f"its answer is {content[:200]!r}: {error}") from error


def _generated(completion: GeneratedCompletion, server: str) -> Generated:
    """ValueError if its parts disagree."""
    num_tokens = len(completion.token_ids)
    if len(completion.logprobs) != num_tokens:
        raise ValueError(f"{num_tokens} tokens and {len(completion.logprobs)} log-probabilities")
    spans = completion.version_spans()
    require_cover(spans, num_tokens)
    return Generated(
        token_ids=pack_int32(completion.token_ids),
        logprobs=pack_float32(completion.logprobs),
        spans=spans,
        finish_reason=completion.finish_reason,
        num_cached_tokens=completion.cached_tokens,
        server=server,
    )
