"""Requests as clients send them, checked and read.

Owns what a request may hold (the list for users: docs/agents-gateway.md). Invariant: an accepted request gets what it
asks for. What would change how the model samples is refused by name, for the log-probabilities would no longer be the
policy's; fields that change nothing are ignored. The shape of calls of tools is checked where they are rendered. Pure.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import xxhash

from penstock.contracts import Sampling
from penstock_agent.capture.messages import Message, Tool
from penstock_agent.gateway.refusals import RequestRefusedError

ROLES = ("system", "developer", "user", "assistant", "tool")

# By field: the values that ask for nothing. Others would change what is sampled, or cannot be had.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "top_p": (None, 1),
    "top_k": (None, -1, 0),
    "min_p": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "length_penalty": (None, 1),
    "logit_bias": (None, {}),
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
    "echo": (None, False),
    "use_beam_search": (None, False),
    "continue_final_message": (None, False),
    "add_generation_prompt": (None, True),
    "stop_token_ids": (None, []),
    "bad_words": (None, []),
    "allowed_token_ids": (None, []),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
    "functions": (None, []),
    "function_call": (None, "none"),
    "top_logprobs": (None, 0),
}


@dataclass(frozen=True)
class ChatRequest:
    """A request for the next message of a conversation.

    max_new_tokens: the client's limit; None: the run's. auxiliary: a call outside of the conversation. idempotency_key:
    requests with the same one are one call; empty: none. is_retry: the client says that an earlier try got no answer.
    session: the client's own id of the conversation, if it sends one; it tells a sub-agent from the main one.
    """

    messages: list[Message]
    tools: list[Tool]
    max_new_tokens: int | None = None
    auxiliary: bool = False
    idempotency_key: str = ""
    is_retry: bool = False
    session: str = ""

    @property
    def digest(self) -> bytes:
        """16 bytes: equal for requests that ask for the same."""
        asked = (self.messages, self.tools, self.max_new_tokens, self.auxiliary, self.session)
        return xxhash.xxh3_128_digest(msgspec.json.encode(asked, order="deterministic"))


@dataclass(frozen=True)
class Presentation:
    """How an HTTP client asks to be answered; it changes nothing about the call."""

    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Body(msgspec.Struct):
    """The fields with a meaning; others are ignored."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    logprobs: bool | None = None


def read_chat(
    data: bytes, headers: Mapping[str, str], sampling: Sampling, stops: frozenset[str]
) -> tuple[ChatRequest, Presentation]:
    """The body of `POST /v1/chat/completions`, and what its headers add.

    sampling: the ticket's. stops: the texts of its stop tokens. RequestRefusedError with what was seen and what was
    expected.
    """
    fields = _decoded(data)
    for name, neutral in NEUTRAL.items():
        if fields.get(name) not in neutral:
            raise _refused_value(name, fields[name])
    try:
        body = msgspec.convert(fields, _Body)
    except msgspec.ValidationError as error:
        raise RequestRefusedError(f"the body cannot be read: {error}") from None
    _require_the_runs_own(body, sampling, stops)
    request = ChatRequest(
        messages=[_message(index, each) for index, each in enumerate(body.messages)],
        tools=_offered(body.tools or [], body.tool_choice),
        max_new_tokens=_limit(body),
        auxiliary=headers.get("x-penstock-auxiliary", "") not in ("", "0", "false"),
        idempotency_key=headers.get("idempotency-key", ""),
        is_retry=headers.get("x-stainless-retry-count", "0") != "0",
        session=headers.get("x-session-id", ""),
    )
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    return request, Presentation(bool(body.stream), with_usage, bool(body.logprobs))


def read_reward(data: bytes) -> float:
    """The body of `PUT /v1/reward`: {"reward": a finite number}; RequestRefusedError otherwise."""
    fields = _decoded(data)
    if "reward" not in fields:
        raise RequestRefusedError(f'the body has the fields {sorted(fields)}; expected {{"reward": number}}', "reward")
    value = fields["reward"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise RequestRefusedError(f"reward is {_shown(value)}; expected a finite number", "reward")
    return float(value)


def _decoded(data: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestRefusedError(
            f"the body is no JSON that can be used ({error}); expected an object in UTF-8, and no NaN or infinity"
        ) from None


def _refused_value(name: str, value: Any) -> RequestRefusedError:
    neutral = NEUTRAL[name][-1]
    hints = {
        "n": "send one request for each answer",
        "functions": "send `tools`",
        "function_call": "send `tools`",
        "top_logprobs": "only the sampled token's log-probability is recorded",
    }
    why = hints.get(name, "the run samples freely, so that what it records is the policy's own")
    absent = "no such field" if neutral is None else f"{_shown(neutral)} or no such field"
    return RequestRefusedError(f"{name} is {_shown(value)}; expected {absent}: {why}", name)


def _require_the_runs_own(body: _Body, sampling: Sampling, stops: frozenset[str]) -> None:
    """Refuse a temperature and stop strings that are not those of the run."""
    if body.temperature is not None and body.temperature != sampling.temperature:
        raise RequestRefusedError(
            f"temperature is {body.temperature:g}; expected the run's {sampling.temperature:g}, or none: what is "
            "trained must be sampled as the run says (sampling.temperature; evaluation has its own)",
            "temperature",
        )
    asked = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if foreign := [each for each in asked if each not in stops]:
        raise RequestRefusedError(
            f"stop has {_shown(foreign[0])}; expected some of {_shown(sorted(stops))}, or none: an answer ends at "
            "tokens, and those that end it are the run's (sampling.stop); text is never cut off what was sampled",
            "stop",
        )


def _limit(body: _Body) -> int | None:
    given = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if given is not None and given < 1:
        raise RequestRefusedError(f"max_tokens is {given}; expected at least 1", "max_tokens")
    return given


def _offered(tools: list[dict[str, Any]], choice: str | dict[str, Any] | None) -> list[Tool]:
    """The tools that the model is shown."""
    for tool in tools:
        if tool.get("type") != "function":
            raise RequestRefusedError(f"tools has {_shown(tool)}; expected only the type function", "tools")
    if choice == "none":
        return []
    if choice in (None, "auto"):
        return tools
    raise RequestRefusedError(
        f"tool_choice is {_shown(choice)}; expected auto or none: the run samples freely, and cannot force a call",
        "tool_choice",
    )


def _message(index: int, given: dict[str, Any]) -> Message:
    """A message with text as its content, and without the fields that the client's library fills with null."""
    role = given.get("role")
    if role not in ROLES:
        expected = ", ".join(ROLES)
        raise RequestRefusedError(f"messages[{index}].role is {_shown(role)}; expected one of {expected}", "messages")
    message = {name: value for name, value in given.items() if value is not None or name == "content"}
    if role == "developer":  # OpenAI's newer word
        message["role"] = "system"
    content = given.get("content")
    if isinstance(content, list):
        message["content"] = "".join(_text(index, part) for part in content)
    elif not (isinstance(content, str) or (content is None and role == "assistant")):
        raise RequestRefusedError(
            f"messages[{index}].content is {_shown(content)}; expected text, or a list of text parts", "messages"
        )
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    return message


def _text(index: int, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else part
        raise RequestRefusedError(
            f"messages[{index}].content has a part of type {_shown(kind)}; expected only text parts", "messages"
        )
    return str(part["text"])


def _shown(value: Any) -> str:
    """A value in an error: not longer than a line."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."
