"""Whether the servers of `teacher.urls` have a teacher for this policy, as `check_teacher` asks of a folder.

Owns the questions: the text of each token, the size of the vocabulary, the longest sequence. The server's own tokenizer
answers, so that its folder need not be visible here. Log-probabilities are the reward service's to ask. Synchronous.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from penstock.engine_limits import longest_sequence
from penstock.errors import ConfigError
from penstock.runtime.requests import transport_fault

log = logging.getLogger(__name__)

TOKENS_AT_ONCE = 8192
TIMEOUT_SECONDS = 30.0  # a server that computes for others answers later than at once


class TeacherAwayError(ConfigError):
    """A server that gives no answer now, or is too busy for one. It may be back later."""


@dataclass(frozen=True)
class TeacherInfo:
    """A server's description of itself. model: the path or name that it was started with; longest: tokens it reads."""

    model: str
    longest: int


def describe(url: str) -> TeacherInfo:
    """ConfigError unless a server answers there as SGLang does."""
    with _client(url) as http:
        return _describe(http, url)


def check_servers(
    urls: Sequence[str], policy_path: str, texts: Sequence[str], size: int, longest: int, *, has_begun: bool = False
) -> None:
    """ConfigError if one of them is absent, or its teacher reads other tokens than the policy writes, or fewer.

    texts: of the policy's tokens, one by one. size: of its embeddings. longest: tokens of the longest sequence of the
    run. has_begun: whether the run has: then one that is away is passed over with a warning, since a trainer may start
    again at any time.
    """
    for url in urls:
        try:
            _check_server(url, policy_path, texts, size, longest)
        except TeacherAwayError as error:
            if not has_begun:
                raise
            log.warning("%s. The run has begun: groups wait for it, and its tokens are not compared now", error)


def _check_server(url: str, policy_path: str, texts: Sequence[str], size: int, longest: int) -> None:
    with _client(url) as http:
        info = _describe(http, url)
        seen = f"teacher.urls names {url}, which serves {info.model!r}, and actor.path is {policy_path!r}"
        _require_tokens(http, url, seen, texts)
        _require_embeddings(http, url, seen, size)
    if info.longest < longest:
        raise ConfigError(
            f"{seen}: the teacher reads up to {info.longest} tokens there, and a sequence of this run may have "
            f"{longest}; expected a server with as long a context (--context-length, --max-total-tokens), or a "
            "lower rollout.engine.context_length"
        )


def _require_tokens(http: httpx.Client, url: str, seen: str, texts: Sequence[str]) -> None:
    differing = [
        (token, theirs, own)
        for token, (theirs, own) in enumerate(zip(_texts(http, url, len(texts)), texts, strict=True))
        if theirs != own
    ]
    if differing:
        token, theirs, own = differing[0]
        raise ConfigError(
            f"{seen}, whose tokenizers differ in {len(differing)} of {len(texts)} tokens, first {token}: {theirs!r} "
            f"there, {own!r} here. Expected one vocabulary, since the teacher reads the ids that the policy sampled; "
            "choose a teacher of the policy's family"
        )


def _texts(http: httpx.Client, url: str, num_tokens: int) -> Iterator[str]:
    for start in range(0, num_tokens, TOKENS_AT_ONCE):
        ids = [[token] for token in range(start, min(start + TOKENS_AT_ONCE, num_tokens))]
        answer = _json(_send(http, url, "/detokenize", {"tokens": ids, "skip_special_tokens": False}), url)
        found = answer.get("text") if isinstance(answer, dict) else None
        if not isinstance(found, list) or len(found) != len(ids):
            raise _no_sglang(url, f"it answered /detokenize with {str(answer)[:200]}")
        yield from map(str, found)


def _require_embeddings(http: httpx.Client, url: str, seen: str, size: int) -> None:
    """SGLang refuses to give log-probabilities of a token that it has not; of its input it would die."""
    body = {
        "input_ids": [0, 0],
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "token_ids_logprob": [size - 1],
    }
    response = _send(http, url, "/generate", body)
    if response.status_code == 400 and "vocabulary" in response.text:
        raise ConfigError(
            f"{seen}, which has embeddings of {size} tokens: expected no fewer of the teacher, which must read "
            f"whatever the policy samples, and it says {response.text[:200]}; choose another teacher"
        )
    _json(response, url)


def _describe(http: httpx.Client, url: str) -> TeacherInfo:
    server, model, models = (
        _json(_send(http, url, path), url) for path in ("/server_info", "/model_info", "/v1/models")
    )
    try:
        context_length, cache_tokens = int(models["data"][0]["max_model_len"]), int(server["max_total_num_tokens"])
        page_size = int(server.get("page_size") or 1)
        return TeacherInfo(str(model["model_path"]), longest_sequence(context_length, cache_tokens, page_size))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _no_sglang(url, f"it does not describe itself as SGLang 0.5.21 does ({error!r})") from error


def _client(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS, trust_env=False, verify=url.startswith("https"))


def _send(http: httpx.Client, url: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
    try:
        if body is None:
            return http.get(path)
        return http.post(path, content=msgspec.json.encode(body), headers={"Content-Type": "application/json"})
    except httpx.TransportError as error:
        raise TeacherAwayError(
            f"teacher.urls names {url}, which gave no answer to {path}: {transport_fault(error)}. Expected an SGLang "
            "server of the teacher: start it before the run"
        ) from None


def _json(response: httpx.Response, url: str) -> Any:
    if response.status_code != 200:
        seen = f"it answered {response.url.path} with {response.status_code}: {response.text[:200]}"
        raise _no_sglang(url, seen, TeacherAwayError if response.status_code >= 500 else ConfigError)
    try:
        return response.json()
    except ValueError:
        raise _no_sglang(url, f"it answered {response.url.path} with {response.text[:200]!r}") from None


def _no_sglang(url: str, seen: str, kind: type[ConfigError] = ConfigError) -> ConfigError:
    return kind(f"teacher.urls names {url}, and {seen}; expected an SGLang server of the teacher")
