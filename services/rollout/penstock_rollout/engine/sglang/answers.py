"""Turns SGLang's JSON into the engine's neutral types. Pure functions.

An answer whose parts disagree is an EngineError, never a completion.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.contracts import FinishReason
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


def read_group(answer: Any, num_completions: int) -> GroupAnswer:
    """The completions, from /generate with a list of prompts."""
    if not isinstance(answer, list) or len(answer) != num_completions:
        seen = f"{len(answer)} answers" if isinstance(answer, list) else f"a {type(answer).__name__}"
        raise EngineError(f"SGLang answered {seen} to a request for {num_completions} completions")
    return tuple(_read(item) for item in answer)


def _read(item: Mapping[str, Any]) -> Answer:
    try:
        meta = item["meta_info"]
        finish = meta["finish_reason"]["type"]
        pairs = [(entry[0], entry[1]) for entry in meta.get("output_token_logprobs") or ()]
        spans = tuple(AnsweredSpan(str(s["version"]), s["start"], s["end"]) for s in meta.get("weight_versions") or ())
        token_ids, text, version = tuple(item["output_ids"]), item["text"], str(meta.get("weight_version", ""))
        num_cached_tokens = int(meta.get("cached_tokens") or 0)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise EngineError(f"SGLang's answer lacks a part: {error!r}; expected version 0.5.21 or newer") from error
    if finish not in FINISH_REASONS:
        raise EngineError(f"SGLang ended a completion with {finish!r}; expected one of {sorted(FINISH_REASONS)}")
    if finish == "abort":  # keep the tokens that are complete; the rest is sampled again
        num_tokens = min(len(pairs), len(token_ids))
        pairs, token_ids = pairs[:num_tokens], token_ids[:num_tokens]
        spans = tuple(replace(span, end=min(span.end, num_tokens)) for span in spans if span.start < num_tokens)
    if tuple(token for _, token in pairs) != token_ids:
        raise EngineError(f"SGLang answered {len(token_ids)} tokens but log-probabilities of {len(pairs)} others")
    logprobs = tuple(math.nan if value is None else float(value) for value, _ in pairs)  # JSON has no nan
    return Answer(token_ids, logprobs, spans, text, FINISH_REASONS[finish], version, num_cached_tokens)


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
