"""Reading SGLang's answers, and which of them may be handed over."""

import json
import math
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.contracts import PolicyIdentity, pack_float32, pack_int32, unpack_float32
from penstock.errors import ConfigError, EngineError, WeightsError
from penstock_rollout.engine.sglang import answers
from penstock_rollout.engine.sglang.answers import read_info
from penstock_rollout.engine.types import GroupAnswer, completions

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


def read_group(items: object, num_completions: int) -> GroupAnswer:
    return answers.read_group(json.dumps(items).encode(), num_completions)


LOGPROBS = st.none() | st.integers(-9, 0) | st.floats(-1e3, 0)


@st.composite
def items(draw: st.DrawFn) -> dict[str, Any]:
    """One completion as SGLang's server writes it; what is optional may be missing or null."""
    ids = draw(st.lists(st.integers(0, 2**31 - 1), max_size=6))
    finish = draw(st.sampled_from(["stop", "length", "abort"]))
    num_pairs = draw(st.integers(0, len(ids))) if finish == "abort" else len(ids)
    pairs = [[draw(LOGPROBS), token, draw(st.none() | st.text(max_size=2))] for token in ids[:num_pairs]]
    cut = draw(st.integers(0, len(ids)))
    spans = [{"version": "old", "start": 0, "end": cut}, {"version": "new", "start": cut, "end": len(ids)}]
    optional = {
        "weight_version": draw(st.text(max_size=3)),
        "weight_versions": draw(st.sampled_from([spans, [], None])),
        "cached_tokens": draw(st.none() | st.integers(0, 9)),
    }
    wanted = draw(st.sets(st.sampled_from(sorted(optional))))
    meta: dict[str, Any] = {name: value for name, value in optional.items() if name in wanted}
    meta |= {"finish_reason": {"type": finish, "matched": 2}, "output_token_logprobs": pairs, "id": "0"}
    return {"text": draw(st.text(max_size=5)), "output_ids": ids, "meta_info": meta, "index": 0}


def plainly_read(item: dict[str, Any]) -> tuple[object, ...]:
    """A second reader: one token at a time, from plain JSON."""
    meta = item["meta_info"]
    pairs = [(logprob, token) for logprob, token, _ in meta["output_token_logprobs"]]
    tokens = [token for _, token in pairs] if meta["finish_reason"]["type"] == "abort" else item["output_ids"]
    spans = []
    for each in meta.get("weight_versions") or ():
        if meta["finish_reason"]["type"] != "abort" or each["start"] < len(tokens):
            spans.append((each["version"], each["start"], min(each["end"], len(tokens))))
    return (
        pack_int32(tokens),
        pack_float32([math.nan if logprob is None else logprob for logprob, _ in pairs]),
        spans,
        item["text"],
        meta["finish_reason"]["type"],
        meta.get("weight_version", ""),
        meta.get("cached_tokens") or 0,
    )


@given(st.lists(items(), max_size=3))
def test_an_answer_is_read_as_plain_json_is(group: Sequence[dict[str, Any]]) -> None:
    found = [
        (
            each.token_ids.tobytes(),
            each.logprobs.tobytes(),
            [(span.weight_version, span.start, span.end) for span in each.spans],
            each.text,
            each.finish_reason,
            each.weight_version,
            each.num_cached_tokens,
        )
        for each in read_group(group, len(group))
    ]
    assert found == list(map(plainly_read, group))


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[1]", b'[{"text": "x"}]', b'"busy"', json.dumps([answer(), answer()]).encode(), b"[\xff]"]
)
def test_what_is_no_answer_to_the_request_is_an_error(body: bytes) -> None:
    with pytest.raises(EngineError, match="SGLang"):
        answers.read_group(body, 1)


def test_a_token_that_no_message_can_hold_is_an_error() -> None:
    item = answer(logprobs=[[-1, 4, None], [-2, 2**31, None]]) | {"output_ids": [4, 2**31]}
    with pytest.raises(EngineError, match="SGLang's answer"):
        read_group([item], 1)


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
    assert (cut.finish_reason, cut.token_ids, cut.logprobs) == ("abort", array("i", [4]), array("f", [-1]))
    assert [(span.start, span.end) for span in cut.spans] == [(0, 1)]
