"""A group is split and joined: nothing is lost, and parts that do not fit each other are malformed."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.contracts import MalformedMessageError, RolloutGroup, Score, ScoredGroup, decode, encode
from penstock.contracts.stored_groups import (
    CompletionsPart,
    EpisodesPart,
    Part,
    RolloutHeader,
    ScoredHeader,
    Taught,
    TeacherPart,
    TextsPart,
    group_of,
    scored_group,
    stored,
    texts_of,
)
from tests.unit.common.contracts.test_groups import patient, scored_groups
from tests.unit.trainer.trainer_groups import completion
from tests.unit.trainer.trainer_groups import scored_group as trainer_group


@given(scored_groups())
@settings(patient, max_examples=50)
def test_a_group_survives_being_taken_apart(scored: ScoredGroup) -> None:
    group = scored.group
    form = stored(group)
    header = decode(form.header, RolloutHeader)
    assert texts_of(header, form.parts[Part.TEXTS]) == tuple(each.text for each in group.trajectories)
    is_training = group.ticket.purpose == "train"
    whole = group.without_text() if is_training else group
    assert group_of(header, form.parts) == whole
    again = stored(ScoredHeader(header, scored.scores, scored.functions))
    assert (again.parts, again.unread) == ({}, (Part.TEXTS,) if is_training else ())
    left: dict[Part, bytes | None] = {**form.parts, **dict.fromkeys(again.unread)}
    assert scored_group(decode(again.header, ScoredHeader), left) == msgspec.structs.replace(scored, group=whole)


def teacher_logprobs(scored: ScoredGroup) -> tuple[bytes, ...]:
    """One of each sampled token of a trajectory with a score."""
    found = zip(scored.group.trajectories, scored.scores, strict=True)
    return tuple(b"" if score.value is None else bytes(4 * each.num_tokens) for each, score in found)


@given(scored_groups())
@settings(patient, max_examples=30)
def test_what_a_teacher_adds_is_joined_with_its_group(scored: ScoredGroup) -> None:
    form = stored(scored.group)
    header = ScoredHeader(decode(form.header, RolloutHeader), scored.scores, scored.functions)
    logprobs = teacher_logprobs(scored)
    added = stored(Taught(header, logprobs))
    assert (list(added.parts), added.unread) == ([Part.TEACHER], stored(header).unread)
    whole = scored_group(decode(added.header, ScoredHeader), {**form.parts, **added.parts})
    assert (whole.teacher_logprobs, whole.is_taught) == (logprobs, True)
    assert decode(encode(whole), ScoredGroup) == whole
    plain = scored_group(header, form.parts)
    assert (plain.teacher_logprobs, plain.is_taught) == ((), False)
    assert b"teacher_logprobs" not in encode(plain)
    one = [bytes(4 * each.num_tokens + 4) for each in scored.group.trajectories]
    for wrong in (logprobs[1:], one):
        if wrong:
            damaged = {**form.parts, Part.TEACHER: encode(TeacherPart(tuple(wrong)))}
            with pytest.raises(MalformedMessageError, match="teacher's log-probabilities"):
                scored_group(header, damaged)


def test_a_group_is_taught_only_if_each_trajectory_with_a_score_and_a_trained_token_is() -> None:
    made = [completion(each, [-1.0] * len(each)) for each in ([5, 6], [7], [])]
    group = trainer_group(0, [4], made, [1.0, None, 0.0])
    for logprobs, is_taught in (((bytes(8), b"", b""), True), ((b"", bytes(4), b""), False), ((), False)):
        assert msgspec.structs.replace(group, teacher_logprobs=logprobs).is_taught is is_taught


@given(scored_groups(), st.sampled_from((Part.COMPLETIONS, Part.TEXTS)), st.data())
@settings(patient, max_examples=60)
def test_damaged_parts_are_malformed_or_consistent(scored: ScoredGroup, part: Part, data: st.DataObject) -> None:
    form = stored(scored.group)
    header = decode(form.header, RolloutHeader)
    whole = form.parts[part]
    cut = data.draw(st.integers(0, len(whole) - 1))
    for damaged in (
        None,
        whole[:cut],
        data.draw(st.binary(max_size=99)),
        form.parts[next(p for p in form.parts if p != part)],
    ):
        with pytest.raises(MalformedMessageError):
            read(header, {**form.parts, part: damaged})
    flipped = bytearray(whole)
    flipped[cut] ^= data.draw(st.integers(1, 255))
    try:
        found = read(header, {**form.parts, part: bytes(flipped)})
    except MalformedMessageError:
        return
    assert len(found.trajectories) == len(header.ticket.seeds)


def read(header: RolloutHeader, parts: dict[Part, bytes | None]) -> RolloutGroup:
    """Do what all services do together."""
    texts_of(header, parts[Part.TEXTS])
    return group_of(header, parts)


def part_of(group: RolloutGroup, extra: int = 0) -> bytes:
    """What a service writes that keeps texts; `extra`: its first trajectories once more."""
    if group.ticket.environment:
        return encode(EpisodesPart((*group.episodes, *group.episodes[:extra])))
    return encode(CompletionsPart((*group.completions, *group.completions[:extra]), group.prompt_experts))


@given(scored_groups())
@settings(patient, max_examples=20)
def test_the_environment_s_scores_travel_in_the_header(scored: ScoredGroup) -> None:
    header = decode(stored(scored.group).header, RolloutHeader)
    assert header.environment_scores == tuple(each.score for each in scored.group.episodes)
    wrong = (*header.environment_scores, Score(1.0))
    with pytest.raises(ValueError, match=f"{len(wrong)} scores of an environment: expected {len(wrong) - 1}"):
        msgspec.structs.replace(header, environment_scores=wrong)


@given(scored_groups())
@settings(patient, max_examples=20)
def test_counts_of_seeds_scores_texts_and_completions_agree(scored: ScoredGroup) -> None:
    form = stored(scored.group)
    header = decode(form.header, RolloutHeader)
    bare = scored.group.without_text()
    more = {**form.parts, Part.COMPLETIONS: part_of(bare, extra=1)}
    count = len(header.ticket.seeds)
    with pytest.raises(MalformedMessageError, match=rf"{count + 1} (completions|episodes) for {count} seeds"):
        group_of(header, more)
    with pytest.raises(MalformedMessageError, match=f"0 texts for {count} seeds"):
        texts_of(header, encode(TextsPart(())))
    with pytest.raises(ValueError, match=f"{count + 1} scores for {count} seeds"):
        ScoredHeader(header, (Score(1.0),) * (count + 1))


@given(scored_groups())
@settings(patient, max_examples=20)
def test_a_text_among_the_completions_of_a_training_group_is_not_kept(scored: ScoredGroup) -> None:
    """Step files hold no texts, whichever service wrote the part."""
    group = msgspec.structs.replace(scored.group, ticket=msgspec.structs.replace(scored.group.ticket, purpose="train"))
    form = stored(group)
    parts = {**form.parts, Part.COMPLETIONS: part_of(group)}
    assert group_of(decode(form.header, RolloutHeader), parts) == group.without_text()
