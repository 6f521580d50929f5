"""Turns SGLang's JSON into the engine's neutral types. Pure functions.

An answer whose parts disagree is an EngineError, never a completion.
"""

import base64
import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from penstock.contracts import FinishReason
from penstock.contracts.trajectories import RoutedExperts
from penstock.engine_limits import longest_sequence
from penstock.errors import ConfigError, EngineError
from penstock_rollout.engine.types import Answer, AnsweredSpan, EngineInfo, GroupAnswer

FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


def read_info(server: Mapping[str, Any], model: Mapping[str, Any], models: Mapping[str, Any]) -> EngineInfo:
    """The engine's description, from /server_info, /model_info and /v1/models.

    ConfigError for a server of several replicas.
    """
    try:
        context_length = int(models["data"][0]["max_model_len"])
        cache_tokens = int(server["max_total_num_tokens"])
        num_replicas = int(server.get("dp_size") or 1)
        if num_replicas > 1:
            raise ConfigError(
                f"rollout.engine is an SGLang server of {num_replicas} replicas (--dp-size): expected one, since a "
                "canary is answered by one of them and the weights of the others would not be verified; take it out of "
                "rollout.engine.extra_args (or of the server at rollout.engine.url) and raise rollout.num_servers"
            )
        return EngineInfo(
            name=f"sglang {server['version']}",
            weight_version=str(model["weight_version"]),
            context_length=context_length,
            cache_tokens=cache_tokens,
            longest_sequence=longest_sequence(context_length, cache_tokens, int(server.get("page_size") or 1)),
            vocabulary_size=_vocabulary_size(Path(str(model["model_path"]))),
            device=str(server.get("device")),
            num_ranks=int(server.get("tp_size") or 1),
        )
    except (KeyError, IndexError, TypeError) as error:
        raise EngineError(f"the server does not describe itself as SGLang 0.5.21 does: {error!r}") from error


def _vocabulary_size(folder: Path) -> int | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return None if size is None else int(size)


class _Pair(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A sampled token, with its log-probability before it; its text, the third element, is not read.

    One of them is made for each token, so the collector does not track them.
    """

    logprob: float | None
    token: int


class _Span(msgspec.Struct, frozen=True):
    version: Any
    start: int
    end: int


class _FinishReason(msgspec.Struct, frozen=True):
    type: str


class _Meta(msgspec.Struct, frozen=True):
    finish_reason: _FinishReason
    output_token_logprobs: list[_Pair] | None = None
    weight_versions: list[_Span] | None = None
    weight_version: Any = ""
    cached_tokens: int | None = None
    routed_experts: str | None = None


class _Item(msgspec.Struct, frozen=True):
    output_ids: list[int]
    text: str
    meta_info: _Meta


_group_decoder = msgspec.json.Decoder(list[_Item])


def read_group(body: bytes, num_completions: int, num_prompt_tokens: Sequence[int] | None = None) -> GroupAnswer:
    """The completions, from the answer of /generate to a list of prompts.

    `num_prompt_tokens`: of each prompt, if the experts of all tokens were asked for.
    """
    try:
        items = _group_decoder.decode(body)
        if len(items) != num_completions:
            raise EngineError(f"SGLang answered {len(items)} times to a request for {num_completions} completions")
        answers = tuple(map(_read, items))
        if num_prompt_tokens is None:
            return answers
        found = zip(answers, items, num_prompt_tokens, strict=True)
        return tuple(_with_experts(answer, item.meta_info.routed_experts, num) for answer, item, num in found)
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError) as error:
        raise EngineError(f"SGLang's answer lacks a part: {error}; expected version 0.5.21 or newer") from error


def _read(item: _Item) -> Answer:
    meta = item.meta_info
    finish, pairs = meta.finish_reason.type, meta.output_token_logprobs or []
    token_ids = array("i", item.output_ids)
    spans = tuple(AnsweredSpan(str(each.version), each.start, each.end) for each in meta.weight_versions or ())
    if finish not in FINISH_REASONS:
        raise EngineError(f"SGLang ended a completion with {finish!r}; expected one of {sorted(FINISH_REASONS)}")
    if finish == "abort":  # keep the tokens that are complete; the rest is sampled again
        num_tokens = min(len(pairs), len(token_ids))
        pairs, token_ids = pairs[:num_tokens], token_ids[:num_tokens]
        spans = tuple(replace(span, end=min(span.end, num_tokens)) for span in spans if span.start < num_tokens)
    if array("i", [pair.token for pair in pairs]) != token_ids:
        raise EngineError(f"SGLang answered {len(token_ids)} tokens but log-probabilities of {len(pairs)} others")
    return Answer(
        token_ids,
        _logprobs(pairs),
        spans,
        item.text,
        FINISH_REASONS[finish],
        str(meta.weight_version),
        meta.cached_tokens or 0,
    )


def _with_experts(answer: Answer, encoded: str | None, num_prompt_tokens: int) -> Answer:
    """The answer with the experts of its sequence: SGLang's int32[tokens but the last, layers, top-k] in base64.

    An answer that an abort cut may lack them, or those of its last tokens: the request that continues it has them.
    """
    num_rows = num_prompt_tokens + len(answer.token_ids) - 1
    if num_rows < 1:  # nothing was sampled, after one token
        return answer
    if not encoded:
        if answer.finish_reason == "abort":
            return answer
        raise EngineError(
            "SGLang answered without routed experts: expected a mixture of experts, and a server that was started with "
            "--enable-return-routed-experts; set actor.router_replay to false"
        )
    try:
        experts = _packed_experts(base64.b64decode(encoded, validate=True), num_rows)
    except ValueError as error:
        raise EngineError(f"SGLang's routed experts cannot be read: {error}") from error
    return replace(answer, experts=experts)


def _packed_experts(data: bytes, num_rows: int) -> RoutedExperts:
    """int32 as uint8 or uint16, if all fit. ValueError if they are of other rows."""
    count, rest = divmod(len(data), 4)
    if rest or num_rows < 1 or not count or count % num_rows:
        raise ValueError(f"{len(data)} bytes for {num_rows} tokens: expected int32, as many for each token")
    lowest, second, *highest = (data[byte::4] for byte in range(4))
    if any(each.count(0) != count for each in highest):
        raise ValueError("it has a number below 0, or above 65535")
    if second.count(0) == count:
        return RoutedExperts(count // num_rows, "uint8", lowest)
    pairs = bytearray(2 * count)
    pairs[::2], pairs[1::2] = lowest, second
    return RoutedExperts(count // num_rows, "uint16", bytes(pairs))


def _logprobs(pairs: Sequence[_Pair]) -> "array[float]":
    """None is nan, which JSON does not have."""
    try:
        return array("f", [pair.logprob for pair in pairs])  # type: ignore[misc]
    except TypeError:
        return array("f", [math.nan if pair.logprob is None else pair.logprob for pair in pairs])


def read_prompt_logprobs(answer: Any, num_tokens: int) -> tuple[float, ...]:
    """Log-probabilities of all tokens of a prompt but the first, from /generate with one prompt."""
    try:
        pairs = answer["meta_info"]["input_token_logprobs"]
        logprobs = tuple(math.nan if pair[0] is None else float(pair[0]) for pair in pairs[1:])
    except (KeyError, TypeError, IndexError) as error:
        raise EngineError(f"SGLang's answer has no log-probabilities of the prompt: {error!r}") from error
    if len(logprobs) != num_tokens - 1:
        raise EngineError(f"SGLang answered log-probabilities of {len(pairs)} prompt tokens: expected {num_tokens}")
    return logprobs
