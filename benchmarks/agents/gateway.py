"""Measures what the gateway adds to a call of the model, and what two thousand sessions cost.

Owns the load and the tables. The gateway is the real one, in a process of its own, with the model's tokenizer; only the
rollout servers are replaced, by ones that answer at once. The client counts the milliseconds of each call, its own
included, and the CPU seconds of the service's process. Each turn sends the full history, as OpenAI's clients do. Start
it alone on a quiet machine, from the repository's root, after `make demo` has loaded the model:

    .venv/bin/python -m benchmarks.agents.gateway                    # two minutes
    .venv/bin/python -m benchmarks.agents.gateway --sessions 500     # fewer at once

The second table opens all sessions at once, each with a connection and with calls that take a second, ends them, and
does so again: is memory flat?
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from benchmarks.tickets import make_ticket
from penstock.config.agent import AgentSection
from penstock.contracts import PolicyIdentity, Sampling, VersionSpan, pack_float32, pack_int32
from penstock.runtime.connections import raise_file_limit
from penstock.runtime.http import make_app
from penstock.runtime.service import Service
from penstock_agent.capture.make import make_rendering
from penstock_agent.gateway.routes import BODY_BYTES, OWN_KEYS, add_gateway
from penstock_agent.gateway.sessions import Sessions
from penstock_agent.generation.call import Call, Generated

MODEL = "models/SmolLM2-135M-Instruct"
TURNS = (2, 16, 64)
EPISODES = 8  # per length, one after the other
ANSWER_TOKENS = 50
WORDS = ["the", "tool", "says", "that", "seven", "apples", "and", "two", "pears", "are", "in", "my", "basket"]
PROMPT_WORDS = 300  # of the system message
TURN_WORDS = 40
WAVES = 3
WAVE_TURNS = 4
CALL_SECONDS = 1.0  # in the waves
TICKET = make_ticket(0, [7], Sampling(1.0, ANSWER_TOKENS, ()), environment="benchmark:agent")


@dataclass
class Instant:
    """Rollout servers that answer after `seconds`, and what the gateway measures of itself."""

    words: list[int]
    stop: int
    seconds: float = 0.0
    own_seconds: list[float] = field(default_factory=list)

    async def generate(self, call: Call) -> Generated:
        if self.seconds:
            await asyncio.sleep(self.seconds)
        draw = random.Random(call.seed)
        token_ids = [*draw.choices(self.words, k=ANSWER_TOKENS - 1), self.stop]
        return Generated(
            token_ids=pack_int32(token_ids),
            logprobs=pack_float32([-1.0] * len(token_ids)),
            spans=(VersionSpan(PolicyIdentity(0, "0" * 16), 0, len(token_ids)),),
            finish_reason="stop",
            num_cached_tokens=0,
            server="instant",
        )

    def call_answered(self, seconds: float, own_seconds: float) -> None:
        self.own_seconds.append(own_seconds)

    def call_repeated(self) -> None: ...

    def request_refused(self, code: str) -> None: ...


async def serve() -> None:
    """The service's process: prints its address, and ends with its parent."""
    raise_file_limit()
    section = AgentSection(environment="benchmark:agent", max_turns=10**6, max_tokens=10**6)
    rendering = make_rendering(section, MODEL)
    words = [token for token in rendering.render([{"role": "user", "content": " ".join(WORDS)}], []) if token > 100]
    servers = Instant(words, rendering.stop_token_ids[0])
    service = Service("127.0.0.1", 0, "agent.port", num_clients=4096)
    sessions = Sessions(section, url=service.url, rendering=rendering, servers=servers, metrics=servers)
    app = make_app(
        "benchmark", not_ready=lambda: None, metrics=CollectorRegistry(), body_bytes=BODY_BYTES, own_keys=OWN_KEYS
    )
    add_gateway(app, sessions, model="benchmark", text_of=str, metrics=servers)
    async with asyncio.TaskGroup() as group:
        _add_controls(app, sessions, servers, group)
        print(service.url, flush=True)
        await service.run(app, loop=_until(service.stop))


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()


def _add_controls(app: FastAPI, sessions: Sessions, servers: Instant, group: asyncio.TaskGroup) -> None:
    """Requests of the benchmark itself."""
    ends: dict[str, asyncio.Event] = {}

    async def live(opened: "asyncio.Future[str]") -> None:
        async with sessions.open(TICKET, episode=0, attempt=0, lease=0) as session:
            ends[session.key] = asyncio.Event()
            opened.set_result(session.key)
            await ends[session.key].wait()
            assert session.nodes()
        del ends[session.key]

    @app.post("/open")
    async def open_session() -> str:
        opened: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        group.create_task(live(opened))
        return await opened

    @app.post("/close")
    async def close_session(key: str) -> None:
        ends[key].set()

    @app.post("/pace")
    async def pace(seconds: float) -> list[float]:
        servers.seconds, measured = seconds, servers.own_seconds
        servers.own_seconds = []
        return measured


class Connection:
    """A connection to the service, without the cost of a client library."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def post(self, path: str, body: bytes = b"", key: str = "") -> Any:
        """The answer to a request, which must be a success."""
        head = f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        data = await self._reader.readexactly(length)
        assert answer.startswith(b"HTTP/1.1 200"), data
        return json.loads(data)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]), limit=2**24)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


def text(draw: random.Random, num_words: int) -> str:
    return " ".join(draw.choices(WORDS, k=num_words))


async def episode(connection: Connection, num_turns: int, draw: random.Random) -> list[float]:
    """Seconds of each call of one episode."""
    key = await connection.post("/open")
    messages: list[dict[str, Any]] = [{"role": "system", "content": text(draw, PROMPT_WORDS)}]
    seconds = []
    for _ in range(num_turns):
        messages.append({"role": "user", "content": text(draw, TURN_WORDS)})
        body = json.dumps({"model": "any", "messages": messages}).encode()
        began = time.perf_counter()
        answer = await connection.post("/v1/chat/completions", body, key)
        seconds.append(time.perf_counter() - began)
        messages.append(answer["choices"][0]["message"])
    await connection.post(f"/close?key={key}")
    return seconds


async def overhead(url: str, service: psutil.Process) -> None:
    """Print the cost of a call, by the length of its episode."""
    print("turns | ms per call: median, first turn, last turn | of these its own, median | CPU ms per call")
    async with connected(url) as connection:
        await episode(connection, 4, random.Random(0))
        for num_turns in TURNS:
            await connection.post("/pace?seconds=0")
            before = _cpu(service)
            episodes = [await episode(connection, num_turns, random.Random(seed)) for seed in range(EPISODES)]
            cpu = (_cpu(service) - before) / (EPISODES * num_turns)
            own = await connection.post("/pace?seconds=0")
            calls = [each for seconds in episodes for each in seconds]
            first, last = median(each[0] for each in episodes), median(each[-1] for each in episodes)
            of_calls = " ".join(f"{1e3 * each:.2f}" for each in (median(calls), first, last))
            print(f"{num_turns:5} | {of_calls} | {1e3 * median(own):.2f} | {1e3 * cpu:.2f}")


async def waves(url: str, service: psutil.Process, num_sessions: int) -> None:
    """Print the service's memory while that many sessions are open, again and again."""
    print(f"\nwave of {num_sessions} sessions | seconds | resident MB while they are open, most | after their end")
    await _pace(url, CALL_SECONDS)
    print(f"before | | | {service.memory_info().rss / 1e6:.0f}")
    for wave in range(WAVES):
        began, most = time.perf_counter(), 0
        playing = asyncio.gather(*(_alone(url, seed) for seed in range(num_sessions)))
        while not playing.done():
            await asyncio.wait([playing], timeout=0.2)
            most = max(most, service.memory_info().rss)
        await playing
        await _pace(url, CALL_SECONDS)
        seconds = time.perf_counter() - began
        print(f"{wave} | {seconds:.1f} | {most / 1e6:.0f} | {service.memory_info().rss / 1e6:.0f}", flush=True)


async def _pace(url: str, seconds: float) -> None:
    async with connected(url) as connection:
        await connection.post(f"/pace?seconds={seconds}")


async def _alone(url: str, seed: int) -> None:
    async with connected(url) as connection:
        await episode(connection, WAVE_TURNS, random.Random(seed))


def _cpu(service: psutil.Process) -> float:
    times = service.cpu_times()
    return times.user + times.system


async def measure(num_sessions: int) -> None:
    raise_file_limit()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.agents.gateway", "--serve", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        url = (await child.stdout.readline()).decode().strip()
        service = psutil.Process(child.pid)
        await overhead(url, service)
        await waves(url, service, num_sessions)
    finally:
        child.terminate()
        await child.wait()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="the cost of the gateway")
    parser.add_argument("--sessions", type=int, default=2000, help="open at once in the second table")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    asyncio.run(serve() if arguments.serve else measure(arguments.sessions))


if __name__ == "__main__":
    main()
