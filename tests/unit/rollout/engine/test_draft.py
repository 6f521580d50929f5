"""A completion that was cut equals one that was not: tokens, log-probabilities, versions."""

from array import array
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.contracts import FinishReason, Sampling
from penstock.errors import EngineError
from penstock.stop_strings import before_stop
from penstock_rollout.engine.draft import Draft
from penstock_rollout.engine.types import Answer, AnsweredSpan, CompletionRequest
from tests.unit.rollout.fake_model import next_token

PROMPT = (3, 4)
SEEDS = (5, 6, 7)
MAX_TOKENS = 12
STOP = 41


def engine(request: CompletionRequest, version: str, limit: int, *, spans: bool = True) -> Answer:
    """The answer of an engine that is stopped after `limit` tokens."""
    tokens: list[int] = []
    finish = "length"
    while len(tokens) < request.max_new_tokens:
        if len(tokens) == limit:
            finish = "abort"
            break
        tokens.append(next_token([*request.prompt_ids, *tokens], request.seed))
        if tokens[-1] == STOP:
            finish = "abort" if len(tokens) == limit else "stop"
            break
    made = (AnsweredSpan(version, 0, len(tokens)),) if spans else ()
    logprobs = array("f", [len(request.prompt_ids) + i for i in range(len(tokens))])
    text = " ".join(map(str, tokens))
    return Answer(array("i", tokens), logprobs, made, text, finish, version)  # type: ignore[arg-type]


def whole(seed: int) -> Answer:
    return engine(CompletionRequest(PROMPT, seed, MAX_TOKENS), "v", MAX_TOKENS + 1)


@given(cuts=st.lists(st.lists(st.integers(0, MAX_TOKENS), min_size=3, max_size=3), max_size=6), spans=st.booleans())
def test_cut_anywhere_it_is_the_completion_that_was_not_cut(cuts: list[list[int]], spans: bool) -> None:
    draft = Draft(PROMPT, SEEDS, Sampling(1.0, MAX_TOKENS, (STOP,)), one_version_per_answer=True)
    versions: dict[int, list[str]] = {seed: [] for seed in SEEDS}
    for number, limits in enumerate([*cuts, [MAX_TOKENS + 1] * 3]):
        if draft.finished:
            break
        asked = draft.requests()
        answers = tuple(engine(each, f"v{number}", limits[SEEDS.index(each.seed)], spans=spans) for each in asked)
        for each, answer in zip(asked, answers, strict=True):
            versions[each.seed] += [f"v{number}"] * len(answer.token_ids)
        draft.add(answers)
    assert draft.finished
    for seed, answer in zip(SEEDS, draft.group(), strict=True):
        expected = whole(seed)
        assert (answer.token_ids, answer.logprobs) == (expected.token_ids, expected.logprobs)
        assert answer.finish_reason == expected.finish_reason
        said = [span.weight_version for span in answer.spans for _ in range(span.end - span.start)]
        assert said == versions[seed]
        edges = [0, *(span.end for span in answer.spans)]
        assert [span.start for span in answer.spans] == edges[:-1]
        assert len({*edges}) == len(edges)  # none is empty


def test_texts_of_cut_completions_are_those_of_all_their_tokens_but_a_stop_token() -> None:
    draft = Draft(PROMPT, SEEDS, Sampling(1.0, MAX_TOKENS, (STOP,)), one_version_per_answer=False)
    draft.add(tuple(engine(each, "v0", 2) for each in draft.requests()))
    draft.add(tuple(engine(each, "v1", 99) for each in draft.requests()))
    assert draft.was_cut
    ends = {answer.finish_reason for answer in draft.group()}
    for answer, shown in zip(draft.group(), draft.shown_tokens(), strict=True):
        assert shown == list(answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids)
    assert ends <= {"stop", "length"}
    assert [answer.text for answer in draft.group(["a", "b", "c"])] == ["a", "b", "c"]


def test_the_cached_tokens_are_those_of_the_prompt_and_not_of_what_was_cut() -> None:
    draft = Draft(PROMPT, SEEDS, Sampling(1.0, MAX_TOKENS, (STOP,)), one_version_per_answer=False)
    draft.add(tuple(replace(engine(each, "v0", 2), num_cached_tokens=1) for each in draft.requests()))
    draft.add(tuple(replace(engine(each, "v1", 99), num_cached_tokens=4) for each in draft.requests()))
    assert {answer.num_cached_tokens for answer in draft.group()} == {1}


def test_without_spans_only_an_engine_that_is_emptied_before_updates_can_be_believed() -> None:
    draft = Draft(PROMPT, SEEDS, Sampling(1.0, MAX_TOKENS, (STOP,)), one_version_per_answer=False)
    with pytest.raises(EngineError, match=r"weights\.pause_mode abort"):
        draft.add(tuple(engine(each, "v0", 99, spans=False) for each in draft.requests()))


WORDS = st.text("ab", min_size=1, max_size=3)  # of a token: few letters, so that stop strings are found


def string_engine(tokens: Sequence[str], stop: Sequence[str], start: int, limit: int | None) -> Answer:
    """What SGLang answers to a request for tokens from `start` on: its strings are those of this request's tokens."""
    made: list[str] = []
    finish: FinishReason = "length"
    for token in tokens[start:]:
        if len(made) == limit:
            finish = "abort"
            break
        made.append(token)
        if any(each in "".join(made) for each in stop):
            finish = "stop"
            break
    ids = array("i", range(start, start + len(made)))
    logprobs = array("f", [-float(number) for number in ids])
    return Answer(ids, logprobs, (AnsweredSpan(f"v{start}", 0, len(made)),), "".join(made), finish)


@given(
    tokens=st.lists(WORDS, min_size=1, max_size=8),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=2),
    limits=st.lists(st.integers(0, 3), max_size=6),
)
def test_a_stop_string_ends_a_completion_wherever_it_was_cut(
    tokens: list[str], stop: list[str], limits: list[int]
) -> None:
    draft = Draft(PROMPT, (5,), Sampling(1.0, len(tokens), (), tuple(stop)), one_version_per_answer=False)
    for limit in [*limits, None]:
        if draft.finished:
            break
        start = len(draft.requests()[0].prompt_ids) - len(PROMPT)
        draft.add((string_engine(tokens, stop, start, limit),))

    def decoded(each: Sequence[int]) -> str:
        return "".join(tokens[number] for number in each)

    draft.end_at_seams([decoded(each) for each in draft.seams()])
    [found] = draft.group([decoded(each) for each in draft.shown_tokens()] if draft.was_cut else None)
    whole = string_engine(tokens, stop, 0, None)
    assert (found.token_ids, found.logprobs, found.finish_reason) == (
        whole.token_ids,
        whole.logprobs,
        whole.finish_reason,
    )
    assert found.spans[-1].end == len(found.token_ids)
    if draft.was_cut:
        assert found.text == before_stop(whole.text, stop)
