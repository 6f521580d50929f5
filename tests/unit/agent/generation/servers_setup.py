"""Rollout services over fake engines, with their HTTP on loopback, and the agent's side of their calls.

The registry is a list in memory: a test decides what it shows, and so what a heartbeat would.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import SecretStr

from penstock.contracts import Sampling, ServerState, ServiceKind, pack_int32, unpack_float32, unpack_int32
from penstock.contracts.services import ServiceRecord
from penstock.runtime.service import Service
from penstock_agent.generation.call import Call, Generated
from penstock_agent.generation.servers import Servers
from penstock_agent.metrics import AskAgainReason
from tests.unit.rollout.fake_model import next_token, token_logprob
from tests.unit.rollout.weights.updater_setup import MAX_CALLS, Rollout, updating_rollout

TOKEN = SecretStr("secret")
PROMPT = (1, 2)


class KillableService(Service):
    """A service whose connections a test can break."""

    def _server(self, app: FastAPI) -> Any:
        self._uvicorn = super()._server(app)
        return self._uvicorn

    def break_connections(self) -> None:
        for connection in list(self._uvicorn.server_state.connections):
            connection.transport.abort()


@dataclass
class Server:
    """One rollout service. `state`: what its record shows; empty: what it is in."""

    name: str
    rollout: Rollout
    service: KillableService
    state: str = ""
    listed: bool = True
    serving: "asyncio.Task[None] | None" = None

    @property
    def record(self) -> ServiceRecord:
        return ServiceRecord(
            ServiceKind.ROLLOUT, self.name, self.service.url, 1, self.state or str(self.rollout.weights.state)
        )

    async def load(self, version: int, lease: int = 1) -> None:
        await self.rollout.weights.update(self.rollout.staged(version, lease))

    async def kill(self) -> None:
        """End its HTTP as a kill does: connections break, nothing listens."""
        assert self.serving is not None
        self.serving.cancel()
        await asyncio.gather(self.serving, return_exceptions=True)
        self.service.break_connections()


@dataclass
class Room:
    """The servers, and their caller."""

    rollouts: list[Server]
    servers: Servers
    others: list[ServiceRecord] = field(default_factory=list)
    asked_again: list[AskAgainReason] = field(default_factory=list)

    async def services(self) -> list[ServiceRecord]:
        return [*self.others, *(each.record for each in self.rollouts if each.listed)]

    def named(self, name: str) -> Server:
        return next(each for each in self.rollouts if each.name == name)


def call(session: str = "0", seed: int = 3, num_tokens: int = 4, number: int = 1, lease: int = 1) -> Call:
    return Call(pack_int32(PROMPT), seed, Sampling(1.0, num_tokens, ()), session, number, lease)


def check(generated: Generated, *ends: tuple[int, int], seed: int = 3) -> None:
    """It is what was never cut, made by these (version, end)."""
    assert [(span.policy.number, span.end) for span in generated.spans] == list(ends)
    tokens: list[int] = []
    logprobs = unpack_float32(generated.logprobs)
    for token, logprob in zip(unpack_int32(generated.token_ids), logprobs, strict=True):
        made_by = next(version for version, end in ends if len(tokens) < end)
        assert token == next_token([*PROMPT, *tokens], seed)
        assert abs(logprob - token_logprob(token, f"{made_by}-")) < 1e-6
        tokens.append(token)


@contextlib.asynccontextmanager
async def calling_room(root: Path, num_servers: int = 2, *, follows: bool = True) -> AsyncIterator[Room]:
    """Servers that serve version 1, and a caller that knows the token."""
    async with contextlib.AsyncExitStack() as stack:
        rollouts = []
        for number in range(num_servers):
            rollout = await stack.enter_async_context(updating_rollout(root / str(number)))
            stack.callback(rollout.fake.open)
            server = Server(f"rollout-{number}", rollout, KillableService("127.0.0.1", 0, "rollout.port"))
            await server.load(1)
            server.serving = asyncio.create_task(
                server.service.run(rollout.app(TOKEN), until=_until(server.service.stop))
            )
            stack.push_async_callback(server.kill)
            rollouts.append(server)
        room = Room(rollouts, _unmade())
        room.servers = Servers(lambda: room.services(), TOKEN, MAX_CALLS, room.asked_again.append)
        stack.push_async_callback(room.servers.close)
        if follows:
            following = asyncio.create_task(room.servers.follow())
            stack.callback(following.cancel)
        yield room


def _unmade() -> Servers:
    async def none() -> list[ServiceRecord]:
        return []

    return Servers(none, None, 1, lambda reason: None)


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()


SERVING, FENCED = ServerState.SERVING, ServerState.FENCED
