"""The present state of the run: the registry in the queue, `/ready` of starting services, `/v1/status` of the trainer.

Invariant: it only reads. A service or queue that does not answer is shown, and never raises an error: the supervisor
decides whether anything ends.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import SecretStr

from penstock.broker import Queue
from penstock.contracts import MalformedMessageError, ServiceKind, from_body
from penstock.contracts.services import ServiceRecord
from penstock.contracts.status import TrainerStatus
from penstock.errors import PenstockError
from penstock.runtime.process import parent_pid
from penstock.runtime.requests import auth_headers
from penstock_launch.supervise.child import Child, ChildState
from penstock_launch.supervise.supervisor import QUEUE, TRAINER
from penstock_launch.watch.sample import NewestSample, Sample

READY = "ready"  # the state of agent and reward services that nothing keeps from their work
REQUEST_TIMEOUT_SECONDS = 2.0  # an answer from memory, on this host or near it


@dataclass(frozen=True)
class ServiceView:
    """One service.

    detail: the step of its start, or how it ended. seconds: since its last start. trouble: what keeps a service that is
    ready from its work, in its own words; empty: nothing. open_breakers: of its reward functions, with why.
    """

    name: str
    state: str
    detail: str
    restarts: int
    seconds: float
    url: str
    trouble: str = ""
    open_breakers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSnapshot:
    """Everything that the view shows at one moment.

    status: the last one that the trainer gave; answers: whether it is of now. ending: what the launcher waits for at
    the end of the run; empty before it. why_dropped: the reason of the last failed reward of a dropped group.
    """

    services: tuple[ServiceView, ...]
    status: TrainerStatus | None
    answers: bool = True
    ending: str = ""
    sample: Sample | None = None
    why_dropped: str = ""


async def ask_status(client: httpx.AsyncClient, url: str) -> TrainerStatus | None:
    """The trainer's status; None if it does not answer with one."""
    try:
        answer = await client.get(f"{url}/v1/status")
        if answer.status_code != httpx.codes.OK:
            return None
        return from_body(answer.content, TrainerStatus)
    except (httpx.HTTPError, MalformedMessageError):
        return None


async def read_ready(client: httpx.AsyncClient, url: str) -> str | None:
    """None if the service is ready, else the reason why it is not."""
    try:
        answer = await client.get(f"{url}/ready")
    except httpx.HTTPError:
        return "does not answer: it is starting or ending"
    if answer.status_code == httpx.codes.OK:
        return None
    try:
        body: Any = answer.json()
    except ValueError:
        return f"answers {answer.status_code}"
    return str(body.get("detail", body)) if isinstance(body, dict) else f"answers {answer.status_code}"


def make_client(token: SecretStr | None) -> httpx.AsyncClient:
    """For requests to the services of one run."""
    return httpx.AsyncClient(timeout=REQUEST_TIMEOUT_SECONDS, headers=auth_headers(token), trust_env=False)


class RunFollower:
    """Reads the state of the children of a launch."""

    def __init__(
        self,
        queue: Queue,
        client: httpx.AsyncClient,
        children: Sequence[Child],
        samples: NewestSample,
        ending: Callable[[], str],
    ) -> None:
        """`ending`: what the supervision waits for at its end, or nothing."""
        self._queue = queue
        self._client = client
        self._children = children
        self._samples = samples
        self._ending = ending
        self._status: TrainerStatus | None = None
        self._urls: dict[str, str] = {}
        self._troubles: dict[str, str] = {}
        self._open_breakers: dict[str, Mapping[str, str]] = {}

    async def look(self) -> RunSnapshot:
        """The state of everything now; marks children that report ready as ready."""
        records = await self._records()
        status: TrainerStatus | None = None
        for child in self._children:
            record = _record_of(child, records)
            if record is not None:
                self._urls[child.name] = record.url
                self._troubles[child.name] = _trouble(record)
                self._open_breakers[child.name] = record.open_breakers
                if child.state is ChildState.STARTING:
                    await self._ask_ready(child, record)
                if record.kind is ServiceKind.TRAINER:
                    status = await ask_status(self._client, record.url)
        self._status = status or self._status
        services, sample = tuple(map(self._view, self._children)), await asyncio.to_thread(self._samples.read)
        return RunSnapshot(
            services, self._status, status is not None, self._ending(), sample, self._samples.why_dropped
        )

    async def _records(self) -> list[ServiceRecord]:
        queue_child = next((child for child in self._children if child.name == QUEUE), None)
        try:
            records = await self._queue.services()
        except PenstockError as error:
            if queue_child is not None:
                queue_child.detail = str(error)
            return []
        if queue_child is not None:
            queue_child.ready()
        return records

    async def _ask_ready(self, child: Child, record: ServiceRecord) -> None:
        pid = child.pid
        reason = await read_ready(self._client, record.url)
        if child.pid != pid:
            return
        if reason is None:
            child.ready()
        elif child.state is ChildState.STARTING:
            child.detail = reason

    def _view(self, child: Child) -> ServiceView:
        is_ready = child.state is ChildState.READY
        return ServiceView(
            name=child.name,
            state=str(child.state),
            detail=child.waits_for if child.state is ChildState.STARTING else child.detail,
            restarts=child.restarts,
            seconds=time.monotonic() - child.started_at,
            url=self._urls.get(child.name, ""),
            trouble=self._troubles.get(child.name, "") if is_ready else "",
            open_breakers=self._open_breakers.get(child.name, {}) if is_ready else {},
        )


def _trouble(record: ServiceRecord) -> str:
    """What a service that needs users' code says of it; the others' states are phases."""
    says = record.kind in (ServiceKind.AGENT, ServiceKind.REWARD) and record.state != READY
    return record.state if says else ""


def _record_of(child: Child, records: Sequence[ServiceRecord]) -> ServiceRecord | None:
    """What the child's process has registered, or the first rank of it: torchrun's child."""
    if child.pid is None:
        return None
    own = next((each for each in records if each.pid == child.pid and _is_of(child.host, each)), None)
    if own is not None or child.name != TRAINER:
        return own
    trainers = [each for each in records if each.kind is ServiceKind.TRAINER]
    if child.host:  # whose child a process elsewhere is cannot be seen; the newest lease is of this life, or of none
        return max(trainers, key=lambda each: (len(each.name), each.name), default=None)
    return next((each for each in trainers if parent_pid(each.pid) == child.pid), None)


def _is_of(host: str, record: ServiceRecord) -> bool:
    """Whether a service is on a host, by its address or by what it calls itself: elsewhere ids of processes recur."""
    return host in ("", urlsplit(record.url).hostname) or f"-{host}-" in record.name
