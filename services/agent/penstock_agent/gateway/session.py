"""The session of one episode: its calls of the model, its limits, its reward.

Owns the way of a call. Invariants: each call is prepared, generated and recorded once, however many requests ask for it
and whatever becomes of them; a session that has ended answers nothing more.

    request -> the call that it repeats, or: limits -> tree.prepare -> servers.generate -> tree.add -> answer

Calls of one session may overlap. A call is not stopped when its client leaves: the client may come back for its answer.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import NoReturn, Protocol, Self

import msgspec

from penstock.config.agent import AgentSection
from penstock.contracts import Node, Sampling, Ticket
from penstock.contracts.trajectories import EpisodeCounts
from penstock.contracts.vocabulary import Cut
from penstock.errors import CallRefusedError
from penstock_agent.capture.tree import EpisodeTree, Prepared
from penstock_agent.gateway.answers import ChatAnswer, Finish
from penstock_agent.gateway.calls import Call, Calls
from penstock_agent.gateway.refusals import (
    ContextTooLongError,
    EpisodeCutError,
    SessionClosedError,
)
from penstock_agent.gateway.requests import ChatRequest
from penstock_agent.gateway.seeds import Seeds
from penstock_agent.generation.call import Call as EngineCall
from penstock_agent.generation.call import CallRejectedError, Generated
from penstock_agent.generation.waits import Waits

log = logging.getLogger(__name__)


class Generates(Protocol):
    """The rollout servers."""

    async def generate(self, call: EngineCall) -> Generated:
        """CallRejectedError for a fault of the call; waits for a server otherwise."""


class CallMetrics(Protocol):
    """What the gateway counts."""

    def call_answered(self, seconds: float, own_seconds: float) -> None:
        """A call was recorded; `own_seconds` of its time were the gateway's."""

    def call_repeated(self) -> None:
        """A request joined a call that another request had begun."""

    def request_refused(self, code: str) -> None:
        """A request was answered with an error."""


@dataclass(frozen=True)
class EpisodeOf:
    """Which episode a session is for.

    index: of its seed in the ticket. attempt: how many attempts at it failed before. lease: number of the trainer's
    lease under which its ticket was taken.
    """

    ticket: Ticket
    index: int
    attempt: int
    lease: int

    @property
    def seed(self) -> int:
        return self.ticket.seeds[self.index]

    def __str__(self) -> str:
        return f"{self.ticket.key}-{self.ticket.attempt}-{self.index}-{self.attempt}"


class Session:
    """One episode's calls; `async with` bounds its life."""

    def __init__(
        self,
        episode: EpisodeOf,
        *,
        key: str,
        url: str,
        limits: AgentSection,
        tree: EpisodeTree,
        stop_token_ids: tuple[int, ...],
        servers: Generates,
        metrics: CallMetrics,
        on_close: Callable[["Session"], None],
    ) -> None:
        """url: of the service. stop_token_ids: those of the rendering; the ticket's are added."""
        self.episode = episode
        self.key = key
        self.base_url = f"{url}/v1"
        """For a client that sends `key` as its API key."""
        self.own_base_url = f"{url}/s/{key}/v1"
        """For a client whose API key is any."""
        self.reward: float | None = None
        """What the agent reported last."""
        self.end: Cut | None = None
        """The limit at which the episode ended, if it did."""
        self.num_turns = 0
        """Answers of the model within the conversation so far."""
        self.asked_tools: tuple[str, ...] = ()
        """Names of the tools that the last answer within the conversation asked for."""
        self.waits = Waits()
        """For answers of the model."""
        self.sampling = _sampling(episode.ticket.sampling, stop_token_ids)
        self.closed = False
        self._limits = limits
        self._tree = tree
        self._servers = servers
        self._metrics = metrics
        self._on_close = on_close
        self._calls = Calls()
        self._seeds = Seeds(episode.seed)
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_begun = 0
        self._num_turns_begun = 0  # and not failed
        self._num_recorded = 0

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        await self._group.__aexit__(None, None, None)  # with the error it would wrap it into a group

    def close(self) -> None:
        """End the session: running calls are cancelled, and later requests refused."""
        if not self.closed:
            self.closed = True
            self._on_close(self)
            for task in self._tasks:
                task.cancel()

    def end_turns(self) -> None:
        """No further answer: the calls that run and all later ones are refused as beyond `agent.max_turns`."""
        self.end = self.end or "max_turns"
        for task in self._tasks:
            task.cancel()

    async def chat(self, request: ChatRequest) -> ChatAnswer:
        """The next message. EpisodeCutError at a limit; SessionClosedError if the session ends; CallRefusedError."""
        call = self.ask(request)
        with call.waited_for():
            answer = await asyncio.shield(call.answer)
        self.delivered(call)
        return answer

    def ask(self, request: ChatRequest) -> Call:
        """The call that answers a request; it is running, or done. Whoever sends its answer on reports `delivered`."""
        if self.closed:
            raise SessionClosedError("the episode has ended; expected no further request with its key")
        digest = request.digest
        call = self._calls.find(request, digest)
        if call is not None:
            self._metrics.call_repeated()
            return call
        return self._begin(request, digest)

    def delivered(self, call: Call) -> None:
        """A client has got the answer of a call."""
        self._calls.delivered(call)

    def set_reward(self, value: float) -> None:
        """Take the agent's own reward, a finite number; the last one counts. SessionClosedError after the end."""
        if self.closed:
            raise SessionClosedError("the episode has ended; its reward cannot be changed any more")
        self.reward = value

    def nodes(self) -> tuple[Node, ...]:
        """What was recorded. An answer that reached nobody, and that nothing continues, is marked as auxiliary."""
        nodes = self._tree.nodes()
        undelivered = self._calls.undelivered()
        if not undelivered:
            return nodes
        parents = {node.parent for node in nodes}
        sampled = [index for index, node in enumerate(nodes) if node.is_sampled]
        lost = {sampled[number] for number in undelivered} - parents
        return tuple(
            msgspec.structs.replace(node, auxiliary=True) if index in lost else node for index, node in enumerate(nodes)
        )

    def counts(self) -> EpisodeCounts:
        """What happened in the episode."""
        return self._tree.counts()

    def transcript(self) -> str:
        """The text of the episode's main path."""
        return self._tree.transcript()

    def _begin(self, request: ChatRequest, digest: bytes) -> Call:
        began = time.perf_counter()
        self._require_turn(request)
        if self._tree.exceeds(request.messages, self._limits.max_tokens):
            self._too_long(request, f"one message alone has more than {self._limits.max_tokens} tokens")
        prepared = self._tree.prepare(
            request.messages, request.tools, auxiliary=request.auxiliary, session=request.session
        )
        sampling = self._fitting(request, prepared)
        call = self._calls.begin(request, digest)
        self._num_begun += 1
        self._num_turns_begun += not request.auxiliary
        seed = self._seeds.take(prepared.prompt_ids, self._num_begun)
        to_send = EngineCall(
            prompt_ids=prepared.prompt_ids,
            seed=seed,
            sampling=sampling,
            session=self.episode.ticket.key,
            at_least_number=self.episode.ticket.policy_version,
            at_least_lease=self.episode.lease,
        )
        running = _Running(call, prepared, to_send, number=self._num_begun, auxiliary=request.auxiliary)
        running.own_seconds = time.perf_counter() - began
        task = self._group.create_task(self._answer(running))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(running, task))
        return call

    def _require_turn(self, request: ChatRequest) -> None:
        if self.end is not None:
            raise _cut_before(self.end)
        if not request.auxiliary and self._num_turns_begun >= self._limits.max_turns:
            self._cut(
                "max_turns", f"this would be turn {self._num_turns_begun + 1} of at most {self._limits.max_turns}"
            )

    def _fitting(self, request: ChatRequest, prepared: Prepared) -> Sampling:
        """The sampling of a call, if prompt and answer fit."""
        most = self.sampling.max_new_tokens
        budget = most if request.max_new_tokens is None else min(most, request.max_new_tokens)
        num_tokens = prepared.num_prompt_tokens
        if num_tokens + budget > self._limits.max_tokens:
            why = f"{num_tokens} tokens of prompt and up to {budget} of answer are more than {self._limits.max_tokens}"
            self._too_long(request, why)
        return self.sampling if budget == most else msgspec.structs.replace(self.sampling, max_new_tokens=budget)

    def _too_long(self, request: ChatRequest, why: str) -> NoReturn:
        if request.auxiliary:
            raise ContextTooLongError(f"{why} (agent.max_tokens); expected a shorter auxiliary request", "messages")
        self._cut("max_tokens", why)

    def _cut(self, end: Cut, why: str) -> NoReturn:
        self.end = end
        raise EpisodeCutError(end, f"{why} (agent.{end}): the episode has ended")

    async def _answer(self, running: "_Running") -> None:
        """Generate and record; whatever goes wrong goes to those who wait."""
        call = running.call
        try:
            with self.waits.one():
                generated = await self._servers.generate(running.to_send)
            began = time.perf_counter()
            answer = self._record(running, generated)
        except CallRejectedError as error:
            self._failed(running, CallRefusedError(str(error)))
        except Exception as error:
            log.exception("episode %s: call %d failed by a defect", self.episode, running.number)
            self._failed(running, error)
        else:
            call.answer.set_result(answer)
            own = running.own_seconds + time.perf_counter() - began
            self._metrics.call_answered(time.perf_counter() - running.began, own)

    def _ended(self, running: "_Running", task: "asyncio.Task[None]") -> None:
        """Whoever still waits then gets an error: a task may be cancelled before its first step."""
        self._tasks.discard(task)
        if running.call.answer.done():
            return
        if self.end is not None and not self.closed:
            self._failed(running, _cut_before(self.end))
        else:
            self._failed(running, SessionClosedError("the episode ended before the model had answered"))

    def _failed(self, running: "_Running", error: Exception) -> None:
        self._calls.failed(running.call)
        self._seeds.give_back(running.to_send.prompt_ids, running.number)
        self._num_turns_begun -= not running.auxiliary
        running.call.answer.set_exception(error)

    def _record(self, running: "_Running", generated: Generated) -> ChatAnswer:
        parsed = self._tree.add(
            running.prepared,
            generated.token_ids,
            generated.logprobs,
            generated.spans,
            generated.finish_reason,
            num_cached_tokens=generated.num_cached_tokens,
        )
        running.call.recorded = self._num_recorded
        self._num_recorded += 1
        if not running.auxiliary:
            self.num_turns += 1
            self.asked_tools = tuple(call["function"]["name"] for call in parsed.message.get("tool_calls") or ())
        cut = generated.finish_reason != "stop"
        finish: Finish = "length" if cut else "tool_calls" if parsed.message.get("tool_calls") else "stop"
        return ChatAnswer(
            id=f"chatcmpl-{self.episode}-{running.number}",
            created=int(time.time()),
            message=parsed.message,
            finish_reason=finish,
            token_ids=generated.token_ids,
            logprobs=generated.logprobs,
            num_prompt_tokens=running.prepared.num_prompt_tokens,
            num_cached_tokens=generated.num_cached_tokens,
        )


@dataclass
class _Running:
    """A call on its way to an engine."""

    call: Call
    prepared: Prepared
    to_send: EngineCall
    number: int
    auxiliary: bool
    began: float = field(default_factory=time.perf_counter)
    own_seconds: float = 0.0


def _cut_before(end: Cut) -> EpisodeCutError:
    return EpisodeCutError(end, f"the episode has ended at agent.{end}; expected no further call")


def _sampling(given: Sampling, stop_token_ids: tuple[int, ...]) -> Sampling:
    merged = tuple(dict.fromkeys((*given.stop_token_ids, *stop_token_ids)))
    return msgspec.structs.replace(given, stop_token_ids=merged)
