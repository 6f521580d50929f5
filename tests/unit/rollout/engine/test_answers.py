"""Reading SGLang's answers, and which of them may be handed over."""

import math

import pytest

from penstock.contracts import PolicyIdentity, unpack_float32
from penstock.errors import ConfigError, EngineError, WeightsError
from penstock_rollout.engine.sglang.answers import read_group, read_info
from penstock_rollout.engine.types import completions

KNOWN = {"default": PolicyIdentity(0, "0" * 16)}


def answer(finish: str = "stop", spans: object = None, logprobs: object = None) -> dict[str, object]:
    return {
        "text": "x",
        "output_ids": [4, 5],
        "meta_info": {
            "finish_reason": {"type": finish},
            "weight_versions": spans or [{"version": "default", "start": 0, "end": 2}],
            "output_token_logprobs": logprobs or [[-1, 4, None], [-2, 5, None]],
        },
    }


def test_a_server_of_several_replicas_is_refused_with_the_keys() -> None:
    server = {"version": "0.5.21", "tp_size": 2, "dp_size": 1, "max_total_num_tokens": 64}
    model, models = {"weight_version": "default", "model_path": "absent"}, {"data": [{"max_model_len": 64}]}
    assert read_info(server, model, models).num_ranks == 2
    with pytest.raises(ConfigError, match=r"2 replicas.*rollout\.engine\.extra_args.*rollout\.num_servers"):
        read_info(server | {"dp_size": 2}, model, models)


def test_the_cached_tokens_of_the_prompt_are_read() -> None:
    (said,) = read_group([answer()], 1)
    assert said.num_cached_tokens == 0  # an engine that does not tell
    counted = answer()
    counted["meta_info"] = {"cached_tokens": 7, **counted["meta_info"]}  # type: ignore[dict-item]
    assert read_group([counted], 1)[0].num_cached_tokens == 7


def test_spans_of_unknown_weights_are_refused() -> None:
    with pytest.raises(WeightsError, match="9-abc"):
        completions(read_group([answer(spans=[{"version": "9-abc", "start": 0, "end": 2}])], 1), KNOWN)


def test_spans_must_cover_the_tokens() -> None:
    with pytest.raises(EngineError, match="spans"):
        completions(read_group([answer(spans=[{"version": "default", "start": 0, "end": 1}])], 1), KNOWN)


def test_a_logprob_that_json_cannot_hold_stays_visible() -> None:
    (completion,) = completions(read_group([answer(logprobs=[[None, 4, None], [-2, 5, None]])], 1), KNOWN)
    assert math.isnan(unpack_float32(completion.logprobs)[0])


def test_tokens_and_logprobs_must_agree() -> None:
    with pytest.raises(EngineError, match="log-probabilities"):
        read_group([answer(logprobs=[[-1, 4, None]])], 1)


def test_of_an_aborted_completion_what_is_whole_is_kept() -> None:
    (cut,) = read_group([answer("abort", logprobs=[[-1, 4, None]])], 1)
    assert (cut.finish_reason, cut.token_ids, cut.logprobs) == ("abort", (4,), (-1.0,))
    assert [(span.start, span.end) for span in cut.spans] == [(0, 1)]
