"""Messages: what is encoded decodes to the same; any other bytes are refused with one error, by name."""

import math
import struct
from collections.abc import Callable
from typing import get_args

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.contracts import (
    Completion,
    Contract,
    Episode,
    EpisodeCounts,
    EpisodeEnd,
    MalformedMessageError,
    Node,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    Ticket,
    VersionSpan,
    decode,
    encode,
    pack_float32,
    pack_int32,
    read_ticket_key,
    unpack_float32,
    unpack_int32,
)
from penstock.contracts.trajectories import RoutedExperts

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # other tests share the cores

token_ids = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=6)
floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
metadata = st.dictionaries(
    st.text(max_size=5), st.none() | st.booleans() | st.integers(0, 2**40) | st.text(max_size=5), max_size=3
)


@st.composite
def tickets(draw: st.DrawFn, group_size: int, environment: str = "") -> Ticket:
    return Ticket(
        purpose=draw(st.sampled_from(("train", "eval"))),
        number=draw(st.integers(0, 2**40)),
        attempt=draw(st.integers(0, 9)),
        policy_version=draw(st.integers(0, 10**6)),
        prompt=draw(st.text(max_size=9)),
        prompt_ids=b"" if environment else pack_int32(draw(token_ids)),
        seeds=tuple(range(group_size)),
        sampling=Sampling(draw(floats), draw(st.integers(1, 99)), tuple(draw(token_ids))),
        answer=draw(st.text(max_size=5)),
        reward=draw(st.text(max_size=5)),
        metadata=draw(metadata),
        environment=environment,
    )


def spans_of(draw: st.DrawFn, num_tokens: int) -> tuple[VersionSpan, ...]:
    cut = draw(st.integers(0, num_tokens))
    spans = VersionSpan(PolicyIdentity(3, "a" * 16), 0, cut), VersionSpan(PolicyIdentity(4, "b" * 16), cut, num_tokens)
    return spans if num_tokens else ()


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    ids = draw(st.lists(st.integers(0, 9), max_size=6))
    return Completion(
        token_ids=pack_int32(ids),
        loss_mask=draw(st.none() | st.binary(min_size=len(ids), max_size=len(ids))),
        logprobs=pack_float32([draw(floats) for _ in ids]),
        spans=spans_of(draw, len(ids)),
        text=draw(st.text(max_size=5)),
        finish_reason=draw(st.sampled_from(("stop", "length", "abort"))),
        experts=draw(st.none() | routed_experts(max(0, len(ids) - 1))),
    )


@st.composite
def routed_experts(draw: st.DrawFn, num_rows: int) -> RoutedExperts:
    size = draw(st.sampled_from((1, 2)))
    data = draw(st.binary(min_size=num_rows * 3 * size, max_size=num_rows * 3 * size))
    return RoutedExperts(3, "uint8" if size == 1 else "uint16", data)


scores = st.builds(Score, floats) | st.builds(Score, st.none(), st.text(min_size=1, max_size=5))


@st.composite
def nodes(draw: st.DrawFn, index: int) -> Node:
    ids = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    if index == 0 or draw(st.booleans()):
        return Node(draw(st.integers(-1, index - 1)), pack_int32(ids), role=draw(st.sampled_from(("user", "tool"))))
    return Node(
        parent=draw(st.integers(0, index - 1)),
        token_ids=pack_int32(ids),
        logprobs=pack_float32([draw(floats) for _ in ids]),
        spans=spans_of(draw, len(ids)),
        role="assistant",
        auxiliary=draw(st.booleans()),
    )


@st.composite
def episodes(draw: st.DrawFn) -> Episode:
    tree = tuple(draw(nodes(index)) for index in range(draw(st.integers(0, 6))))
    sampled = any(node.is_sampled for node in tree)
    return Episode(
        nodes=tree,
        score=draw(scores) if sampled else Score(None, "the environment did not start"),
        end=draw(st.sampled_from(("done", "max_turns", "max_tokens", "timeout", "failure"))),
        counts=EpisodeCounts(num_turns=draw(st.integers(0, 9)), branches=draw(st.just({}) | st.just({"edited": 2}))),
        started_at=1.0,
        ended_at=2.0,
        text=draw(st.text(max_size=5)),
    )


@st.composite
def scored_groups(draw: st.DrawFn) -> ScoredGroup:
    size = draw(st.integers(1, 3))
    if draw(st.booleans()):
        members = tuple(draw(completions()) for _ in range(size))
        ticket = draw(tickets(size))
        prompt = draw(st.none() | routed_experts(ticket.num_prompt_tokens))
        group = RolloutGroup(ticket, members, "http://server", 1.0, 2.0, prompt_experts=prompt)
    else:
        made = tuple(draw(episodes()) for _ in range(size))
        group = RolloutGroup(draw(tickets(size, "envs:Guess")), (), "agent-1", 1.0, 2.0, episodes=made)
    functions = tuple(draw(st.lists(st.text(max_size=5), unique=True, max_size=3)))
    values = st.just(()) | st.tuples(*[st.none() | floats] * len(functions))
    scored = [msgspec.structs.replace(draw(scores), values=draw(values)) for _ in range(size)]
    return ScoredGroup(group, tuple(scored), functions)


@given(scored_groups())
@settings(patient, max_examples=50)
def test_a_message_survives_the_wire(scored: ScoredGroup) -> None:
    assert decode(encode(scored), ScoredGroup) == scored
    assert decode(encode(scored.group), RolloutGroup) == scored.group
    assert decode(encode(scored.group.ticket), Ticket) == scored.group.ticket


@given(tickets(2))
@settings(patient)
def test_a_ticket_is_found_by_its_key(ticket: Ticket) -> None:
    assert ticket.key == ("e" if ticket.purpose == "eval" else "") + str(ticket.number)
    assert read_ticket_key(ticket.key) == (ticket.purpose, ticket.number)


@pytest.mark.parametrize("key", ["", "e", "x7", "ee7", "-7", "7.0", "\u00b2"])
def test_a_key_of_no_ticket_is_none(key: str) -> None:
    assert read_ticket_key(key) is None


@given(token_ids, st.lists(floats, max_size=6))
@settings(patient)
def test_arrays_survive_packing(ids: list[int], values: list[float]) -> None:
    assert unpack_int32(pack_int32(ids)) == ids
    assert unpack_float32(pack_float32(values)) == values
    assert pack_int32(ids) == struct.pack(f"<{len(ids)}i", *ids)


@given(st.binary(max_size=200), st.sampled_from((Ticket, RolloutGroup, ScoredGroup)))
@settings(patient)
def test_random_bytes_are_malformed(data: bytes, expected: type[Contract]) -> None:
    with pytest.raises(MalformedMessageError, match=expected.__name__):
        decode(data, expected)


@given(scored_groups(), st.data())
@settings(patient, max_examples=60)
def test_damaged_messages_are_malformed_or_consistent(scored: ScoredGroup, data: st.DataObject) -> None:
    whole = encode(scored)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(MalformedMessageError):
        decode(whole[:cut], ScoredGroup)
    flipped = bytearray(whole)
    flipped[cut] ^= data.draw(st.integers(1, 255))
    try:
        found = decode(bytes(flipped), ScoredGroup)
    except MalformedMessageError:
        return
    assert len(found.scores) == len(found.group.trajectories) == len(found.group.ticket.seeds)


@pytest.mark.parametrize("depth", [2_000, 200_000])
def test_bytes_that_nest_without_end_are_malformed(depth: int) -> None:
    ticket = msgspec.to_builtins(example_ticket())
    ticket["prompt_ids"] = b"1234"
    ticket["metadata"] = {"a": msgspec.Raw(b"\x91" * depth + b"\x01")}
    with pytest.raises(MalformedMessageError):
        decode(msgspec.msgpack.encode(ticket), Ticket)


def example_ticket(group_size: int = 1) -> Ticket:
    sampling = Sampling(1.0, 4, (2,))
    return Ticket("train", 7, 0, 0, "p", pack_int32([1]), tuple(range(group_size)), sampling, "a", "", {})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt_ids": b"123"}, "prompt_ids holds 3 bytes"),
        ({"prompt_ids": b""}, "prompt_ids holds 0 bytes"),
        ({"seeds": []}, "seeds is empty"),
        ({"number": -1}, "number -1"),
        ({"purpose": "test"}, "purpose"),
        ({"schema": "ticket/2"}, "ticket/2"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_wrong_ticket_says_what_is_wrong(changes: dict[str, object], reason: str) -> None:
    fields = {**msgspec.msgpack.decode(encode(example_ticket())), **changes}
    with pytest.raises(MalformedMessageError, match=reason):
        decode(msgspec.msgpack.encode(fields), Ticket)


SPAN = VersionSpan(PolicyIdentity(0, "0" * 16), 0, 2)


@pytest.mark.parametrize(
    ("ids", "mask", "logprobs", "spans", "reason"),
    [
        (b"1234", b"\x01\x01", b"12345678", (SPAN,), "lengths differ"),
        (b"12345678", b"\x01\x01", b"1234567", (SPAN,), "lengths differ"),
        (b"12345678", b"\x01\x01", b"12345678", (), "spans cover 0 of 2"),
        (b"1234", b"\x01", b"1234", (SPAN,), "spans cover 2 of 1"),
        (b"12345678", b"\x01\x01", b"12345678", (VersionSpan(SPAN.policy, 1, 2),), "does not continue at token 0"),
    ],
)
def test_a_completion_is_consistent(
    ids: bytes, mask: bytes, logprobs: bytes, spans: tuple[VersionSpan, ...], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Completion(ids, mask, logprobs, spans, "", "stop")


@pytest.mark.parametrize(("value", "failure"), [(None, ""), (1.0, "late"), (math.nan, ""), (math.inf, "")])
def test_a_score_is_a_finite_value_or_a_failure(value: float | None, failure: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Score(value, failure)


def test_counts_of_completions_seeds_and_scores_agree() -> None:
    with pytest.raises(ValueError, match="0 completions for 1 seeds"):
        RolloutGroup(example_ticket(), (), "s", 0.0, 1.0)
    empty = Completion(b"", b"", b"", (), "", "abort")
    group = RolloutGroup(example_ticket(), (empty,), "s", 0.0, 1.0)
    assert empty.oldest_version is None
    with pytest.raises(ValueError, match="2 scores for 1 seeds"):
        ScoredGroup(group, (Score(1.0), Score(1.0)))


def test_a_score_has_a_value_of_each_function_or_none() -> None:
    group = RolloutGroup(example_ticket(), (Completion(b"", b"", b"", (), "", "abort"),), "s", 0.0, 1.0)
    with pytest.raises(ValueError, match="a score has 1 values: expected none, or one of each of 2 functions"):
        ScoredGroup(group, (Score(1.0, values=(1.0,)),), ("a", "b"))
    with pytest.raises(ValueError, match="value inf: expected a finite number"):
        Score(1.0, values=(math.inf,))


def test_a_score_of_an_earlier_release_is_read_and_one_function_costs_nothing() -> None:
    """Recorded steps hold such scores."""
    earlier = msgspec.msgpack.encode({"value": 1.0, "failure": ""})
    assert decode(earlier, Score) == Score(1.0)
    assert len(encode(Score(1.0))) < len(earlier)
    group = RolloutGroup(example_ticket(), (Completion(b"", b"", b"", (), "", "abort"),), "s", 0.0, 1.0)
    fields = {**msgspec.msgpack.decode(encode(ScoredGroup(group, (Score(1.0),)))), "scores": [{"value": 0.5}]}
    assert not {"functions", "teacher_logprobs"} & fields.keys()
    assert decode(msgspec.msgpack.encode(fields), ScoredGroup) == ScoredGroup(group, (Score(0.5),))


def test_a_group_of_an_earlier_release_is_read_and_no_experts_cost_nothing() -> None:
    """Recorded steps hold such groups."""
    group = RolloutGroup(example_ticket(), (Completion(b"", b"", b"", (), "", "abort"),), "s", 0.0, 1.0)
    fields = msgspec.msgpack.decode(encode(group))
    assert not {"experts", "prompt_experts"} & {*fields, *fields["completions"][0]}
    earlier = msgspec.msgpack.encode({**fields, "episodes": []})
    assert decode(earlier, RolloutGroup) == group


def test_experts_are_of_the_tokens_that_they_are_beside() -> None:
    rows = RoutedExperts(2, "uint8", bytes(4))
    with pytest.raises(ValueError, match="experts of 2 tokens: expected all of 2 but the last"):
        Completion(b"12345678", None, b"12345678", (SPAN,), "", "stop", rows)
    empty = Completion(b"", b"", b"", (), "", "abort")
    with pytest.raises(ValueError, match="experts of 2 tokens of a prompt of"):
        RolloutGroup(example_ticket(), (empty,), "s", 0.0, 1.0, prompt_experts=rows)
    with pytest.raises(ValueError, match="3 bytes of experts: expected rows of 2 uint8"):
        RoutedExperts(2, "uint8", bytes(3))


def sampled(ids: bytes = b"12345678", spans: tuple[VersionSpan, ...] = (SPAN,), parent: int = 0) -> Node:
    return Node(parent, ids, b"12345678", spans, "assistant")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Node(-1, b""), "token_ids holds 0 bytes"),
        (lambda: Node(-1, b"123"), "token_ids holds 3 bytes"),
        (lambda: Node(-1, b"12345678", spans=(SPAN,)), "without log-probabilities has spans"),
        (lambda: Node(-1, b"1234", auxiliary=True), "expected a sampled one"),
        (lambda: sampled(ids=b"1234"), "lengths differ"),
        (lambda: sampled(spans=()), "spans cover 0 of 2"),
    ],
)
def test_a_node_is_consistent(make: Callable[[], Node], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


ROOT = Node(-1, b"1234", role="user")


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ((ROOT, sampled(parent=1)), "node 1 has parent 1"),
        ((ROOT, sampled(parent=-2)), "node 1 has parent -2"),
        ((sampled(parent=-1),), "is sampled and has no parent"),
        ((ROOT,), "without a sampled token"),
    ],
)
def test_an_episode_is_a_tree_with_something_to_score(tree: tuple[Node, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Episode(tree, Score(1.0), "done", EpisodeCounts(), 0.0, 1.0)


@given(episodes())
@settings(patient)
def test_the_paths_of_an_episode_cover_its_nodes(episode: Episode) -> None:
    paths = [episode.path(leaf) for leaf in episode.leaves]
    assert {index for path in paths for index in path} == set(range(len(episode.nodes)))
    for path in paths:
        assert [episode.nodes[index].parent for index in path] == [-1, *path[:-1]]
    assert episode.num_tokens >= episode.num_loss_tokens == sum(n.num_tokens for n in episode.nodes if n.is_trained)


@pytest.mark.parametrize("end", get_args(EpisodeEnd))
def test_an_episode_is_truncated_at_a_limit_of_length(end: EpisodeEnd) -> None:
    tree = (ROOT, sampled(parent=0))
    assert Episode(tree, Score(1.0), end, EpisodeCounts(), 0.0, 1.0).is_truncated == end.startswith("max_")


@pytest.mark.parametrize("environment", ["", "envs:Guess"])
def test_a_ticket_has_episodes_or_completions(environment: str) -> None:
    ticket = msgspec.structs.replace(
        example_ticket(), environment=environment, prompt_ids=b"" if environment else b"1234"
    )
    empty = Completion(b"", None, b"", (), "", "abort")
    failed = Episode((), Score(None, "lost"), "failure", EpisodeCounts(), 0.0, 1.0)
    with pytest.raises(ValueError, match=r"expected (episodes|completions) only"):
        RolloutGroup(ticket, (empty,), "s", 0.0, 1.0, episodes=(failed,))
    with pytest.raises(ValueError, match="expected one of them"):
        msgspec.structs.replace(ticket, environment="" if environment else "envs:Guess")


def test_keys_tell_training_from_evaluation() -> None:
    assert example_ticket().key == "7"
    assert msgspec.structs.replace(example_ticket(), purpose="eval").key == "e7"
