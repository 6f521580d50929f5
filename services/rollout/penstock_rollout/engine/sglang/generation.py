"""Completions from SGLang, and pausing them.

Owns the key that marks the prefixes which may be reused, and the checks that must come before a request: a token id
outside the vocabulary ends SGLang, a prompt that is too long is refused.
"""

import secrets
from collections.abc import Sequence

from penstock.contracts import PauseMode, Sampling
from penstock.errors import EngineError, EngineRejectedError
from penstock_rollout.engine.sglang.answers import read_group, read_prompt_logprobs
from penstock_rollout.engine.sglang.connection import Connection
from penstock_rollout.engine.sglang.prefix import PrefixWaves, Prompt, common_beginning
from penstock_rollout.engine.types import CompletionRequest, GroupAnswer


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
        """With a server that has just been opened. `computes_equal_once`: the equal prompts of a batch."""
        self._prefixes.computes_equal_once = computes_equal_once
        self._renew_cache_key(weight_version)

    async def close(self) -> None:
        """Give up what is computed ahead of requests."""
        await self._prefixes.close()

    async def complete(self, requests: Sequence[CompletionRequest], sampling: Sampling) -> GroupAnswer:
        for request in requests:
            self._check(request, sampling)
        if len(requests) > 1:
            await self._prefixes.fill(common_beginning([request.prompt_ids for request in requests]))
        shared = {
            "temperature": sampling.temperature,
            "stop_token_ids": list(sampling.stop_token_ids),
            "skip_special_tokens": self._skip_special_tokens,
        }
        body = {
            "input_ids": [list(request.prompt_ids) for request in requests],
            "sampling_params": [
                {**shared, "max_new_tokens": request.max_new_tokens, "sampling_seed": request.seed}
                for request in requests
            ],
            "return_logprob": True,
            "extra_key": self._cache_key,
        }
        answer = await self._connection.call("POST", "/generate", body, self._request_timeout_seconds)
        return read_group(answer, len(requests))

    async def prompt_logprobs(self, token_ids: Sequence[int], timeout_seconds: float) -> tuple[float, ...]:
        """Prompts that begin with these tokens find them in the cache."""
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
        """SGLang answers a pause that keeps requests when it is on its way to the scheduler.

        What is asked next, and changes no setting, the scheduler answers itself, after the pause.
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
        """Not by the version alone: requests of it that went on under another one have cached that one's prefixes."""
        self._cache_key = f"{weight_version}.{secrets.token_hex(4)}"
        self._prefixes.forget()

    def _check(self, request: CompletionRequest, sampling: Sampling) -> None:
        """EngineRejectedError for a request that the server would refuse, or die of."""
        info = self._connection.info
        vocabulary = info.vocabulary_size
        tokens = (*request.prompt_ids, *sampling.stop_token_ids)
        outside = [token for token in tokens if token < 0 or (vocabulary is not None and token >= vocabulary)]
        if outside:
            raise EngineRejectedError(
                f"token id {outside[0]} is outside the vocabulary of {vocabulary} tokens of the engine's model; "
                "expected trainer and engine to have the same actor.path"
            )
        length = len(request.prompt_ids) + request.max_new_tokens
        if length > info.context_length:
            raise EngineRejectedError(
                f"a prompt of {len(request.prompt_ids)} tokens and {request.max_new_tokens} new ones need {length}; "
                f"the engine holds {info.context_length}: lower sampling.max_new_tokens or raise "
                "rollout.engine.context_length"
            )

    async def _fill_cache(self, prompts: Sequence[Prompt]) -> None:
        body = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": {"max_new_tokens": 0},
            "extra_key": self._cache_key,
        }
        await self._connection.call("POST", "/generate", body, self._request_timeout_seconds)
