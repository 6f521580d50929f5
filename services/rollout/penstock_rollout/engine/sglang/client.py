"""SGLang's HTTP protocol: what is sent, and how its answers and failures become Penstock's.

Owns the connection and the checks that must come before a request: a token id outside the vocabulary ends SGLang, a
prompt that is too long is refused.

    transport error -> EngineDiedError (EngineAbsentError: it was not even reached)
    no answer in time -> TimeoutError      400, 422 -> EngineRejectedError      other statuses -> EngineError
"""

import base64
import secrets
from collections.abc import Sequence
from typing import Any, Literal

import httpx

from penstock.config import EngineSection
from penstock.contracts import Sampling, unpack_int32
from penstock.contracts.weight_sources import GroupRequest, SharedBucket, TensorSpec
from penstock.errors import EngineDiedError, EngineError, EngineRejectedError
from penstock_rollout.engine.draft import CompletionRequest
from penstock_rollout.engine.sglang.answers import EngineInfo, GroupAnswer, read_group, read_info, read_prompt_logprobs
from penstock_rollout.engine.sglang.prefix import PrefixWaves, Prompt, common_beginning
from penstock_rollout.engine.sglang.read_ahead import read_ahead
from penstock_rollout.engine.sglang.tensor_pickle import pickled_tensors

CONTROL_TIMEOUT_SECONDS = 30.0  # pause in mode abort takes more than a second while requests run
KEEPALIVE_SECONDS = 2.0  # below the 5 s after which the server closes: a request must not meet a closing connection
PauseMode = Literal["retract", "in_place", "abort"]


class EngineAbsentError(EngineDiedError):
    """There is no engine: the request never reached one."""


class EngineClient:
    """One SGLang server. `connect` it after every start: its URL and its limits may have changed."""

    def __init__(self, section: EngineSection) -> None:
        self.control_timeout_seconds = CONTROL_TIMEOUT_SECONDS
        self._section = section
        self._http: httpx.AsyncClient | None = None
        self._info: EngineInfo | None = None
        self._cache_key = ""  # marks the prefixes that may be reused
        self._prefixes = PrefixWaves(self._fill_cache)
        self._is_hooked = False  # a server on a CPU that our launcher has started

    @property
    def info(self) -> EngineInfo:
        """What the server said of itself when it was connected."""
        if self._info is None:
            raise EngineDiedError("the engine is not connected yet; expected it to be started first")
        return self._info

    async def connect(self, url: str) -> EngineInfo:
        """Talk to the server at `url` from now on; returns what it says of itself."""
        await self.close()
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=self.control_timeout_seconds,
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_SECONDS),
            trust_env=False,
            verify=url.startswith("https"),  # loading certificates takes longer than all that is asked here
        )
        server, model, models = [
            await self._call("GET", path) for path in ("/server_info", "/model_info", "/v1/models")
        ]
        self._info = read_info(server, model, models)
        self.serves(self._info.weight_version)
        self._is_hooked = self._prefixes.computes_equal_once = self._info.device == "cpu" and not self._section.url
        await self._call("POST", "/freeze_gc")  # else each flush walks everything that SGLang has imported
        return self._info

    async def close(self) -> None:
        http, self._http = self._http, None
        self._info = None
        await self._prefixes.close()
        if http is not None:
            await http.aclose()

    def serves(self, weight_version: str) -> None:
        """From now on only prefixes that are computed from now on are reused; others stay until they are evicted.

        Not by the version alone: requests of it that went on under another one have cached that one's prefixes.
        """
        self._cache_key = f"{weight_version}.{secrets.token_hex(4)}"
        self._prefixes.forget()

    async def generate(self, prompt_ids: bytes, seeds: tuple[int, ...], sampling: Sampling) -> GroupAnswer:
        """One completion per seed, in one request, with log-probabilities of the sampled tokens."""
        prompt = tuple(unpack_int32(prompt_ids))
        requests = [CompletionRequest(prompt, seed, sampling.max_new_tokens) for seed in seeds]
        return await self.complete(requests, sampling)

    async def complete(self, requests: Sequence[CompletionRequest], sampling: Sampling) -> GroupAnswer:
        """The completions, or their rest; how many tokens each may have is its own."""
        for request in requests:
            self._check(request, sampling)
        if len(requests) > 1:
            await self._prefixes.fill(common_beginning([request.prompt_ids for request in requests]))
        shared = {"temperature": sampling.temperature, "stop_token_ids": list(sampling.stop_token_ids)}
        body = {
            "input_ids": [list(request.prompt_ids) for request in requests],
            "sampling_params": [
                {**shared, "max_new_tokens": request.max_new_tokens, "sampling_seed": request.seed}
                for request in requests
            ],
            "return_logprob": True,
            "extra_key": self._cache_key,
        }
        answer = await self._call("POST", "/generate", body, self._section.request_timeout_seconds)
        return read_group(answer, len(requests))

    async def prompt_logprobs(self, token_ids: Sequence[int], timeout_seconds: float) -> tuple[float, ...]:
        """log p of each token but the first, given those before it, at temperature 1; samples nothing.

        Prompts that begin with these tokens find them in the cache.
        """
        cache_key = self._cache_key
        self._check(CompletionRequest(tuple(token_ids), 0, 0), Sampling(1.0, 0, ()))
        body = {
            "input_ids": list(token_ids),
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "extra_key": cache_key,
        }
        answer = await self._call("POST", "/generate", body, timeout_seconds)
        logprobs = read_prompt_logprobs(answer, len(token_ids))
        if cache_key == self._cache_key:
            self._prefixes.computed(tuple(token_ids))
        return logprobs

    async def detokenize(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """The texts of token sequences, without special tokens, as an uncut completion shows them."""
        body = {"tokens": [list(each) for each in tokens], "skip_special_tokens": True}
        texts = (await self._call("POST", "/detokenize", body)).get("text")
        if not isinstance(texts, list) or len(texts) != len(tokens):
            raise EngineError(f"SGLang answered {str(texts)[:200]!r} for the texts of {len(tokens)} completions")
        return [str(text) for text in texts]

    def _check(self, request: CompletionRequest, sampling: Sampling) -> None:
        """EngineRejectedError for a request that the server would refuse, or die of."""
        vocabulary = self.info.vocabulary_size
        tokens = (*request.prompt_ids, *sampling.stop_token_ids)
        outside = [token for token in tokens if token < 0 or (vocabulary is not None and token >= vocabulary)]
        if outside:
            raise EngineRejectedError(
                f"token id {outside[0]} is outside the vocabulary of {vocabulary} tokens of the engine's model; "
                "expected trainer and engine to have the same actor.path"
            )
        length = len(request.prompt_ids) + request.max_new_tokens
        if length > self.info.context_length:
            raise EngineRejectedError(
                f"a prompt of {len(request.prompt_ids)} tokens and {request.max_new_tokens} new ones need {length}; "
                f"the engine holds {self.info.context_length}: lower sampling.max_new_tokens or raise "
                "rollout.engine.context_length"
            )

    async def pause(self, mode: PauseMode, timeout_seconds: float) -> None:
        """Stop generating; requests wait until `resume`. Returns when the pass that ran has ended.

        SGLang answers a pause that keeps requests when it is on its way to the scheduler. What is asked next, and
        changes no setting, the scheduler answers itself, after the pause.
        """
        await self._call("POST", "/pause_generation", {"mode": mode})
        if mode != "abort":
            await self._call("POST", "/set_internal_state", {"server_args": {}}, timeout_seconds)

    async def resume(self) -> None:
        """Go on generating."""
        await self._call("POST", "/continue_generation", {})

    async def flush(self) -> None:
        """Free the memory of cached prefixes. Refused while requests run, or wait in a pause that keeps their cache."""
        self._prefixes.forget()
        await self._call("POST", "/flush_cache", {})

    # No way of loading flushes the cache by itself: where that cannot be done, SGLang ends.

    async def read_ahead(self, path: str, timeout_seconds: float) -> None:
        """Let the engine read the folder while it generates; where it cannot, `load` does all of it."""
        if self._is_hooked and self._http is not None:
            await read_ahead(self._http.base_url.port or 0, path, timeout_seconds)

    async def load(self, path: str, weight_version: str, timeout_seconds: float) -> None:
        """Replace the weights by those in the folder; pause first. EngineError when only some were."""
        body = {"model_path": path, "weight_version": weight_version, "flush_cache": False}
        answer = await self._call("POST", "/update_weights_from_disk", body, timeout_seconds)
        if not answer.get("success"):
            raise EngineError(f"SGLang did not load {path}: {answer.get('message')}")

    async def join_group(self, request: GroupRequest) -> None:
        """Join a process group as its ranks from 1 on. While the engine waits there, it does nothing else."""
        body = {
            "master_address": request.address,
            "master_port": request.port,
            "rank_offset": 1,
            "world_size": request.num_ranks,
            "group_name": request.group,
            "backend": request.backend,
        }
        await self._call("POST", "/init_weights_update_group", body)

    async def leave_group(self, name: str) -> None:
        """Forget a group that is not used any more."""
        await self._call("POST", "/destroy_weights_update_group", {"group_name": name})

    async def begin_update(self) -> None:
        """Before weights come in pieces; pause first."""
        await self._call("POST", "/begin_weight_update", {})

    async def receive(
        self, group: str, tensors: Sequence[TensorSpec], weight_version: str | None, timeout_seconds: float
    ) -> None:
        """Replace these weights by the next broadcast in the group. `weight_version`: with the last ones."""
        body = {
            "names": [tensor.name for tensor in tensors],
            "dtypes": [tensor.dtype for tensor in tensors],
            "shapes": [tensor.shape for tensor in tensors],
            "group_name": group,
            "load_format": "flattened_bucket",
            "weight_version": weight_version,
            "flush_cache": False,
        }
        await self._call("POST", "/update_weights_from_distributed", body, timeout_seconds)

    async def load_shared(
        self, manager: str, bucket: SharedBucket, weight_version: str | None, timeout_seconds: float
    ) -> None:
        """Replace these weights by what lies in shared memory. `weight_version`: with the last ones."""
        data = base64.b64encode(pickled_tensors(manager, bucket)).decode()
        body = {
            "serialized_named_tensors": [data] * self.info.num_ranks,
            "weight_version": weight_version,
            "flush_cache": False,
        }
        await self._call("POST", "/update_weights_from_tensor", body, timeout_seconds)

    async def end_update(self, timeout_seconds: float) -> None:
        """After the last piece."""
        await self._call("POST", "/end_weight_update", {}, timeout_seconds)

    async def weight_version(self) -> str:
        """The version string that the server has now."""
        return str((await self._call("GET", "/model_info"))["weight_version"])

    async def checksums(self, timeout_seconds: float) -> dict[str, str]:
        """Of each tensor that the engine holds, by its own names; also while paused. Empty for one of several parts."""
        answer = await self._call("POST", "/weights_checker", {"action": "checksum"}, timeout_seconds)
        ranks: list[dict[str, Any]] = answer.get("ranks") or []
        return dict(ranks[0]["checksums"]) if len(ranks) == 1 else {}

    async def abort_all(self) -> None:
        """End every running request; their answers say `abort`."""
        await self._call("POST", "/abort_request", {"abort_all": True})

    async def _fill_cache(self, prompts: Sequence[Prompt]) -> None:
        body = {
            "input_ids": [list(prompt) for prompt in prompts],
            "sampling_params": {"max_new_tokens": 0},
            "extra_key": self._cache_key,
        }
        await self._call("POST", "/generate", body, self._section.request_timeout_seconds)

    async def _call(self, method: str, path: str, body: Any = None, timeout_seconds: float | None = None) -> Any:
        if timeout_seconds is None:
            timeout_seconds = self.control_timeout_seconds
        if self._http is None:
            raise EngineAbsentError(f"SGLang is not running; expected it to answer {path}")
        url = str(self._http.base_url)
        try:
            response = await self._http.request(method, path, json=body, timeout=timeout_seconds)
        except httpx.ConnectError as error:
            raise EngineAbsentError(f"nothing listens at {url} for {path}: {error}") from None
        except httpx.TimeoutException:
            raise TimeoutError(f"SGLang at {url} did not answer {path} in {timeout_seconds:g} s") from None
        except (httpx.TransportError, RuntimeError) as error:  # RuntimeError: the client was closed meanwhile
            raise EngineDiedError(f"the connection to SGLang broke during {path}: {error!r}") from None
        if response.status_code in (400, 422):
            raise EngineRejectedError(f"SGLang refused {path}: {response.text[:500]}")
        if response.status_code != 200:
            raise EngineError(f"SGLang answered {path} with {response.status_code}: {response.text[:500]}")
        return response.json() if "json" in response.headers.get("content-type", "") else response.text
