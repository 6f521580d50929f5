"""Answers in OpenAI's shape: one JSON object, or the events of a stream.

Owns the shapes. Both hold the same; a stream begins only when its answer is complete. Pure.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from penstock.contracts import unpack_float32, unpack_int32
from penstock_agent.capture.messages import Message
from penstock_agent.gateway.requests import Presentation

KEEP_ALIVE = b": the model is not done yet\n\n"  # a comment: clients skip it
DONE = b"data: [DONE]\n\n"

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class ChatAnswer:
    """The assistant's next message, and the tokens that it was read from.

    id: of the call. created: Unix seconds. token_ids int32[T], logprobs float32[T]: as the engine answered.
    """

    id: str
    created: int
    message: Message
    finish_reason: Finish
    token_ids: bytes
    logprobs: bytes
    num_prompt_tokens: int
    num_cached_tokens: int

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) // 4


TokenText = Callable[[int], str]
"""The text of one token."""


def usage(answer: ChatAnswer) -> dict[str, Any]:
    """How many tokens were sent, of them from the engine's cache, and sampled."""
    return {
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": answer.num_tokens,
        "total_tokens": answer.num_prompt_tokens + answer.num_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.num_cached_tokens},
    }


def body(answer: ChatAnswer, model: str, shown: Presentation, text_of: TokenText) -> bytes:
    """The answer as one JSON object."""
    message = {"content": None, "refusal": None, **answer.message}
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _logprobs(answer, text_of) if shown.logprobs else None,
        "finish_reason": answer.finish_reason,
    }
    return msgspec.json.encode({**_head(answer, model, "chat.completion"), "choices": [choice], "usage": usage(answer)})


def events(answer: ChatAnswer, model: str, shown: Presentation, text_of: TokenText) -> Iterator[bytes]:
    """The answer as server-sent events: role, thinking, content, tool calls, why it ended, usage if asked for."""
    head = _head(answer, model, "chat.completion.chunk")
    message = answer.message
    logprobs = _logprobs(answer, text_of) if shown.logprobs else None

    def chunk(delta: dict[str, Any], finish: Finish | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return _event({**head, "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    if thinking := message.get("reasoning_content"):
        yield chunk({"reasoning_content": thinking})
    if content := message.get("content"):
        yield chunk({"content": content})
    for index, call in enumerate(message.get("tool_calls") or ()):
        yield chunk({"tool_calls": [{"index": index, **call}]})
    yield chunk({}, answer.finish_reason, logprobs)
    if shown.include_usage:
        yield _event({**head, "choices": [], "usage": usage(answer)})
    yield DONE


def error_event(error: dict[str, Any]) -> bytes:
    """An error after a stream has begun."""
    return _event(error)


def _head(answer: ChatAnswer, model: str, kind: str) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": answer.created, "model": model}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _logprobs(answer: ChatAnswer, text_of: TokenText) -> dict[str, Any]:
    """Of each sampled token, the one that ends the answer included."""
    tokens = zip(unpack_int32(answer.token_ids), unpack_float32(answer.logprobs), strict=True)
    return {"content": [_token(text_of(token), logprob) for token, logprob in tokens], "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
