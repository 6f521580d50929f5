"""A gateway without engines: one token per letter, and rollout servers that answer from the seed."""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from penstock.config.agent import AgentSection
from penstock.contracts import (
    FinishReason,
    PolicyIdentity,
    Sampling,
    Ticket,
    VersionSpan,
    pack_float32,
    pack_int32,
    unpack_int32,
)
from penstock.runtime.http import make_app
from penstock_agent.capture.messages import Message, Tool, text_of
from penstock_agent.capture.rendering import Parsed
from penstock_agent.gateway.routes import BODY_BYTES, OWN_KEYS, add_gateway
from penstock_agent.gateway.session import Session
from penstock_agent.gateway.sessions import Sessions
from penstock_agent.generation.call import Call, Generated

END = 3
POLICY = PolicyIdentity(3, "9f86d081884c7d65")
CALL = re.compile(r"<call>(.*?)</call>", re.DOTALL)
TOOL: Any = {
    "type": "function",
    "function": {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}},
}


def ids_of(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def text_of_ids(packed: bytes) -> str:
    """The letters of tokens, without those that end a turn."""
    return "".join(chr(token) for token in unpack_int32(packed) if token != END)


class LetterRendering:
    """`role: content` per message; a call of a tool is `<call>{"name", "arguments"}</call>`."""

    stop_token_ids: tuple[int, ...] = (END,)
    separator = "\n"

    def count(self, text: str) -> int:
        return len(text)

    def render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        shown = ids_of("".join(f"[{tool['function']['name']}]" for tool in tools))
        return shown + self._written(messages) + ids_of("assistant: ")

    def continuation(
        self,
        path_ids: Sequence[int],
        turn_start: int,
        before: Sequence[Message],
        new: Sequence[Message],
        tools: Sequence[Tool],
    ) -> list[int] | None:
        return ([] if path_ids[-1] == END else [END]) + self._written(new) + ids_of("assistant: ")

    def parse(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int], finish_reason: FinishReason, tools: Sequence[Tool]
    ) -> Parsed:
        text = "".join(chr(token) for token in token_ids if token != END)
        written = CALL.findall(text) if tools else []
        content = CALL.sub("", text) if written else text
        message: Message = {"role": "assistant", "content": content or None}
        if written:
            message["tool_calls"] = [
                {"id": f"call_{number}", "type": "function", "function": _function(each)}
                for number, each in enumerate(written)
            ]
        return Parsed(message, text)

    def token_text(self, token_id: int) -> str:
        return "<end>" if token_id == END else chr(token_id)

    def _written(self, messages: Sequence[Message]) -> list[int]:
        token_ids: list[int] = []
        for message in messages:
            calls = "".join(_written(call["function"]) for call in message.get("tool_calls") or ())
            token_ids += [*ids_of(f"{message['role']}: {text_of(message.get('content'))}{calls}"), END]
        return token_ids


def _written(function: dict[str, str]) -> str:
    return f"<call>{json.dumps({**function, 'arguments': json.loads(function['arguments'])})}</call>"


def _function(written: str) -> dict[str, str]:
    read = json.loads(written)
    return {"name": read["name"], "arguments": json.dumps(read["arguments"])}


@dataclass
class PretendServers:
    """Answers each call with what `reply` makes of its prompt and seed, once `gate` is open."""

    reply: Callable[[str, Call], str] = lambda prompt, call: f"a{call.seed % 10**9}"
    encode: Callable[[str], list[int]] = ids_of
    decode: Callable[[bytes], str] = text_of_ids
    stop: int = END
    calls: list[Call] = field(default_factory=list)
    answered: list[tuple[Call, Generated]] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    num_cancelled: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    async def generate(self, call: Call) -> Generated:
        self.calls.append(call)
        self.begun.set()
        try:
            await asyncio.sleep(0)
            await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.failures:
            raise self.failures.pop(0)
        token_ids = [*self.encode(self.reply(self.decode(call.prompt_ids), call)), self.stop]
        finish: FinishReason = "stop"
        if len(token_ids) > call.sampling.max_new_tokens:
            token_ids, finish = token_ids[: call.sampling.max_new_tokens], "length"
        generated = Generated(
            token_ids=pack_int32(token_ids),
            logprobs=pack_float32([-token / 128 for token in token_ids]),
            spans=(VersionSpan(POLICY, 0, len(token_ids)),),
            finish_reason=finish,
            num_cached_tokens=len(call.prompt_ids) // 8,
            server="pretend",
        )
        self.answered.append((call, generated))
        return generated


@dataclass
class CallCounts:
    """What the gateway counted."""

    num_answered: int = 0
    num_repeated: int = 0
    refused: list[str] = field(default_factory=list)
    own_seconds: list[float] = field(default_factory=list)

    def call_answered(self, seconds: float, own_seconds: float) -> None:
        self.num_answered += 1
        self.own_seconds.append(own_seconds)

    def call_repeated(self) -> None:
        self.num_repeated += 1

    def request_refused(self, code: str) -> None:
        self.refused.append(code)


def ticket(number: int = 12, **changed: Any) -> Ticket:
    fields: dict[str, Any] = {
        "purpose": "train",
        "number": number,
        "attempt": 0,
        "policy_version": 3,
        "prompt": "2 + 2 =",
        "prompt_ids": b"",
        "seeds": (7, 8),
        "sampling": Sampling(1.0, 64, ()),
        "answer": "4",
        "reward": "",
        "metadata": {},
        "environment": "my_envs:Guess",
    }
    return Ticket(**{**fields, **changed})


class PretendGateway:
    """The gateway's objects, and its app."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:1",
        *,
        token: SecretStr | None = None,
        keep_alive_seconds: float = 10.0,
        rendering: Any = None,
        **section: Any,
    ) -> None:
        self.servers = PretendServers()
        self.rendering = rendering or LetterRendering()
        self.counts = CallCounts()
        self.sessions = Sessions(
            AgentSection(environment="my_envs:Guess", **{"max_tokens": 2**20, "max_turns": 1000, **section}),
            url=url,
            rendering=self.rendering,
            servers=self.servers,
            metrics=self.counts,
        )
        self.app: FastAPI = make_app(
            "test",
            not_ready=lambda: None,
            metrics=CollectorRegistry(),
            token=token,
            body_bytes=BODY_BYTES,
            own_keys=OWN_KEYS,
        )
        add_gateway(
            self.app,
            self.sessions,
            model="tiny",
            text_of=self.rendering.token_text,
            metrics=self.counts,
            keep_alive_seconds=keep_alive_seconds,
        )

    def open(self, episode: int = 0, **changed: Any) -> Session:
        """A new session, to be entered."""
        return self.sessions.open(ticket(**changed), episode=episode, attempt=0, lease=5)


def check_record(session: Session, servers: PretendServers) -> None:
    """Each answer of an engine is one node, below a path of exactly the tokens that the engine was sent."""
    nodes = session.nodes()
    recorded = []
    for index, node in enumerate(nodes):
        if node.is_sampled:
            path: list[bytes] = []
            above = node.parent
            while above != -1:
                path.insert(0, nodes[above].token_ids)
                above = nodes[above].parent
            recorded.append((b"".join(path), node.token_ids, node.logprobs, node.spans))
            assert node.parent < index
    answered = [
        (call.prompt_ids, generated.token_ids, generated.logprobs, generated.spans)
        for call, generated in servers.answered
    ]
    assert sorted(recorded, key=repr) == sorted(answered, key=repr)
