"""Generates completions with SGLang, and pauses generation.

Owns the key that marks the prefixes which may be reused, and the checks that must come before a request: a token id
outside the vocabulary ends SGLang, and it cuts the completion of a sequence that is too long. Invariant: a completion
that ends by its length has the length that was asked for.
"""

import secrets
from collections.abc import Sequence
from typing import Any

from penstock.contracts import PauseMode, Sampling
from penstock.errors import EngineError, EngineRejectedError
from penstock_rollout.engine.sglang.answers import read_group, read_prompt_logprobs
from penstock_rollout.engine.sglang.connection import Connection
from penstock_rollout.engine.sglang.prefix import PrefixWaves, Prompt, common_beginning
from penstock_rollout.engine.types import Answer, CompletionRequest, GroupAnswer


class SGLangGeneration:
    """`Generation` of one server."""

    def __init__(self, connection: Connection, request_timeout_seconds: float, *, skip_special_tokens: bool) -> None:
        """`skip_special_tokens`: whether texts leave them out; tokens are the same."""
        self._connection = connection
        self._skip_special_tokens = skip_special_tokens
        self._request_timeout_seconds = request_timeout_seconds
        self._cache_key = ""
        self._prefixes = PrefixWaves(self._fill_cache)

    def start(self, weight_version: str, *, computes_equal_once: bool) -> None:
        """Begin with a server that has just been opened. `computes_equal_once`: it computes the equal prompts of a
        batch only once.
        """
        self._prefixes.computes_equal_once = computes_equal_once
        self._renew_cache_key(weight_version)

    async def close(self) -> None:
        """Cancel the filling of the prefix cache."""
        await self._prefixes.close()

    async def complete(self, requests: Sequence[CompletionRequest], sampling: Sampling) -> GroupAnswer:
        for request in requests:
            self._check(request, sampling)
        if len(requests) > 1:
            await self._prefixes.fill(common_beginning([request.prompt_ids for request in requests]))
        shared = {**_parameters(sampling), "skip_special_tokens": self._skip_special_tokens}
        body = {
            "input_ids": [list(request.prompt_ids) for request in requests],
            "sampling_params": [
                {**shared, "max_new_tokens": request.max_new_tokens, "sampling_seed": request.seed}
                for request in requests
            ],
            "return_logprob": True,
            "extra_key": self._cache_key,
        }
        if with_experts := any(request.with_experts for request in requests):
            body["return_routed_experts"] = True
        answer = await self._connection.content("POST", "/generate", body, self._request_timeout_seconds)
        num_prompt_tokens = [len(request.prompt_ids) for request in requests] if with_experts else None
        group = read_group(answer, len(requests), num_prompt_tokens)
        for request, completion in zip(requests, group, strict=True):
            self._require_full_length(request, completion)
        return group

    async def prompt_logprobs(self, token_ids: Sequence[int], timeout_seconds: float) -> tuple[float, ...]:
        """See `Generation`. Afterwards the prefix cache has these tokens, for prompts that begin with them."""
        cache_key = self._cache_key
        self._check(CompletionRequest(tuple(token_ids), 0, 0), Sampling(1.0, 0, ()))
        body = {
            "input_ids": list(token_ids),
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "extra_key": cache_key,
        }
        answer = await self._connection.call("POST", "/generate", body, timeout_seconds)
        logprobs = read_prompt_logprobs(answer, len(token_ids))
        if cache_key == self._cache_key:
            self._prefixes.computed(tuple(token_ids))
        return logprobs

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        body = {"tokens": [list(each) for each in tokens], "skip_special_tokens": self._skip_special_tokens}
        texts = (await self._connection.call("POST", "/detokenize", body)).get("text")
        if not isinstance(texts, list) or len(texts) != len(tokens):
            raise EngineError(f"SGLang answered {str(texts)[:200]!r} for the texts of {len(tokens)} completions")
        return [str(text) for text in texts]

    async def pause(self, mode: PauseMode, timeout_seconds: float) -> None:
        """Pause, and wait until the scheduler has paused.

        For a mode that keeps requests, SGLang answers the first call before the scheduler has got it. The second call
        changes no setting; the scheduler answers it itself, so its answer comes after the pause has begun.
        """
        await self._connection.call("POST", "/pause_generation", {"mode": mode})
        if mode != "abort":
            await self._connection.call("POST", "/set_internal_state", {"server_args": {}}, timeout_seconds)

    async def resume(self) -> None:
        await self._connection.call("POST", "/continue_generation", {})

    async def abort_all(self) -> None:
        await self._connection.call("POST", "/abort_request", {"abort_all": True})

    async def drop_prefixes(self, weight_version: str, *, flush: bool) -> None:
        self._renew_cache_key(weight_version)
        if flush:
            await self._connection.call("POST", "/flush_cache", {})

    def _renew_cache_key(self, weight_version: str) -> None:
        """The version alone is no key: a request that survived an update has cached prefixes of both versions."""
        self._cache_key = f"{weight_version}.{secrets.token_hex(4)}"
        self._prefixes.forget()

    def _check(self, request: CompletionRequest, sampling: Sampling) -> None:
        """EngineRejectedError if the server would refuse the request, or die of it."""
        info = self._connection.info
        vocabulary = info.vocabulary_size
        tokens = (*request.prompt_ids, *sampling.stop_token_ids)
        lowest, highest = min(tokens), max(tokens)
        if lowest < 0 or (vocabulary is not None and highest >= vocabulary):
            wrong = lowest if lowest < 0 else highest
            raise EngineRejectedError(
                f"token id {wrong} is outside the vocabulary of {vocabulary} tokens of the engine's model; "
                "expected trainer and engine to have the same actor.path"
            )
        if len(request.prompt_ids) + request.max_new_tokens > info.longest_sequence:
            raise self._too_long(request, "")

    def _require_full_length(self, request: CompletionRequest, completion: Answer) -> None:
        """EngineRejectedError if the engine ended a completion by a limit of its own: it would count as a full one."""
        num_tokens = len(completion.token_ids)
        if completion.finish_reason == "length" and num_tokens < request.max_new_tokens:
            raise self._too_long(request, f"the engine cut the completion after {num_tokens} tokens: ")

    def _too_long(self, request: CompletionRequest, seen: str) -> EngineRejectedError:
        info, num_prompt = self._connection.info, len(request.prompt_ids)
        return EngineRejectedError(
            f"{seen}a prompt of {num_prompt} tokens and {request.max_new_tokens} new ones need "
            f"{num_prompt + request.max_new_tokens}; expected at most {info.longest_sequence}, which an engine with a "
            f"context of {info.context_length} and a cache of {info.cache_tokens} tokens generates to the end: lower "
            "sampling.max_new_tokens, or raise rollout.engine.context_length or rollout.engine.max_total_tokens"
        )

    async def _fill_cache(self, prompts: Sequence[Prompt]) -> None:
        body = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": {"max_new_tokens": 0},
            "extra_key": self._cache_key,
        }
        await self._connection.call("POST", "/generate", body, self._request_timeout_seconds)


def _parameters(sampling: Sampling) -> dict[str, Any]:
    """As SGLang names them; what changes nothing is left out, as it slows a batch down."""
    asked: dict[str, Any] = {"temperature": sampling.temperature, "stop_token_ids": list(sampling.stop_token_ids)}
    optional: dict[str, tuple[Any, Any]] = {
        "stop": (list(sampling.stop), []),
        "stop_regex": (_window(sampling.stop), []),
        "ignore_eos": (sampling.ignore_eos, False),
        "top_p": (sampling.top_p, 1.0),
        "top_k": (sampling.top_k, 0),
        "min_p": (sampling.min_p, 0.0),
        "repetition_penalty": (sampling.repetition_penalty, 1.0),
    }
    return asked | {name: value for name, (value, neutral) in optional.items() if value != neutral}


def _window(stop: Sequence[str]) -> list[str]:
    """A regular expression that matches nothing, so that SGLang finds strings in any tokens.

    It looks for strings in the last tokens alone: one more than the tokenizer makes of the longest string. A policy may
    write it with more, such as four newlines one by one. For an expression it counts a token for each character, and
    looks for strings there, too. A string has at most as many tokens as bytes.
    """
    longest = max((len(each.encode()) for each in stop), default=0)
    return [rf"\Zx{{{longest}}}"] if longest > 1 else []
