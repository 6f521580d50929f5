"""The tree with a rendering of one token per character; its properties with random conversations."""

import itertools
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.contracts.trajectories import Episode, EpisodeCounts, PolicyIdentity, Score, VersionSpan
from penstock.contracts.vocabulary import FinishReason
from penstock.contracts.wire import pack_float32, pack_int32, unpack_int32
from penstock.errors import CallRefusedError
from penstock_agent.capture.messages import Message, Tool
from penstock_agent.capture.rendering import Parsed
from penstock_agent.capture.tree import EpisodeTree
from tests.unit.agent.capture.toy import END, ToyRendering

POLICY = PolicyIdentity(3, "9f86d081884c7d65")
SYSTEM = {"role": "system", "content": "S"}
TOOL: Tool = {"type": "function", "function": {"name": "add", "parameters": {}}}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


class Episodes:
    """Calls of one episode; each answer is given by the test."""

    def __init__(self, rendering: ToyRendering | None = None, **options: Any) -> None:
        self.tree = EpisodeTree(rendering or ToyRendering(), **options)
        self.sent: list[bytes] = []
        self.returned: list[bytes] = []

    def call(
        self,
        messages: list[Message],
        answer: str,
        tools: tuple[Tool, ...] = (),
        finish: FinishReason = "stop",
        **how: Any,
    ) -> Message:
        prepared = self.tree.prepare(messages, tools, **how)
        tokens = pack_int32([ord(letter) for letter in answer] + ([END] if finish == "stop" else []))
        size = len(tokens) // 4
        parsed: Parsed = self.tree.add(
            prepared, tokens, pack_float32([-0.5] * size), (VersionSpan(POLICY, 0, size),), finish
        )
        self.sent.append(prepared.prompt_ids)
        self.returned.append(tokens)
        return parsed.message

    def episode(self) -> Episode:
        return Episode(self.tree.nodes(), Score(1.0), "done", EpisodeCounts(), 0.0, 1.0)

    def text(self, number: int) -> str:
        """What a call was sent, as text."""
        return "".join("." if token == END else chr(token) for token in unpack_int32(self.sent[number]))

    def require_exact(self) -> None:
        """Every call's tokens are those of a path, the sampled ones in a node of their own."""
        episode = self.episode()
        paths: dict[tuple[bytes, bytes], list[int]] = {}
        for index, node in enumerate(episode.nodes):
            if node.is_sampled:
                above = b"".join(episode.nodes[each].token_ids for each in episode.path(node.parent))
                paths.setdefault((above, node.token_ids), []).append(index)
        assert sorted((sent, returned) for sent, returned in zip(self.sent, self.returned, strict=True)) == sorted(
            key for key, found in paths.items() for _ in found
        )


def test_a_conversation_that_grows_is_one_path_with_the_tokens_of_the_model() -> None:
    calls = Episodes()
    first = calls.call([SYSTEM, user("a")], "BIG")
    second = calls.call([SYSTEM, user("a"), first, user("b")], "c")
    calls.call([SYSTEM, user("a"), first, user("b"), second, user("d")], "e")
    assert first["content"] == "big"  # a rendering of the message would write it so
    assert calls.text(2) == "system:S.user:a.assistant:BIG.user:b.assistant:c.user:d.assistant:"
    assert calls.episode().leaves == [5]
    assert [node.role for node in calls.tree.nodes()] == ["user", "assistant", "user", "assistant", "user", "assistant"]
    assert calls.tree.counts() == EpisodeCounts(
        num_turns=3, num_prompt_tokens=sum(len(each) for each in calls.sent) // 4
    )
    assert calls.tree.transcript() == "BIG|b|c|d|e"
    calls.require_exact()


def test_a_turn_that_was_cut_is_closed() -> None:
    calls = Episodes()
    first = calls.call([user("a")], "b", finish="length")
    calls.call([user("a"), first, user("c")], "d")
    assert calls.text(1) == "user:a.assistant:b.user:c.assistant:"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([SYSTEM, user("a"), {"role": "assistant", "content": "else"}, user("c")], "edited"),
        ([SYSTEM, user("a"), {"role": "assistant", "content": "b"}, user("else"), user("x")], "edited"),
        ([SYSTEM, user("a"), user("what was before was left out")], "compacted"),
        ([user("other")], "subagent"),
        ([{"role": "system", "content": "T"}, user("a")], "subagent"),
        ([SYSTEM, user("a")], "sibling"),
    ],
)
def test_what_continues_nothing_is_a_branch_with_a_reason(messages: list[Message], reason: str) -> None:
    calls = Episodes()
    first = calls.call([SYSTEM, user("a")], "b")
    calls.call([SYSTEM, user("a"), first, user("c")], "d")
    assert calls.tree.prepare(messages, ()).branch in (reason, None)  # None: where it shows only with the answer
    calls.call(messages, "e")
    assert calls.tree.counts().branches == {reason: 1}
    assert len(calls.episode().leaves) == 2
    calls.require_exact()


def test_a_branch_shares_what_is_equal() -> None:
    calls = Episodes()
    calls.call([SYSTEM, user("abc")], "x")
    calls.call([SYSTEM, user("abd")], "y")
    nodes = calls.tree.nodes()
    assert [node.parent for node in nodes] == [-1, 0, 1, 0, 3]
    assert calls.episode().num_context_tokens == len("system:S.user:ab" + "c.assistant:" + "d.assistant:")
    calls.require_exact()


def test_a_rendered_whole_call_shares_a_sampled_turn_that_it_has_whole() -> None:
    calls = Episodes()
    first = calls.call([user("a")], "b")
    second = calls.call([user("a"), first, user("c")], "d")
    calls.call([user("a"), first, user("c"), second, user("e")], "f", (TOOL,))
    calls.call([user("a"), {"role": "assistant", "content": "b", "name": "n"}, user("z")], "f")
    assert len(calls.episode().leaves) == 3
    assert sum(node.is_sampled for node in calls.tree.nodes()) == 4
    assert calls.tree.counts().branches == {"edited": 1, "compacted": 1}
    calls.require_exact()


def test_a_retry_of_a_call_is_a_sibling_below_the_same_tokens() -> None:
    calls = Episodes()
    first = calls.call([user("a")], "b")
    other = calls.call([user("a")], "B")
    assert first == other
    calls.call([user("a"), other, user("c")], "d")
    assert calls.text(2) == "user:a.assistant:B.user:c.assistant:"  # of the one that was given last
    assert calls.tree.counts().branches == {"sibling": 1}
    calls.require_exact()


def test_a_retry_has_the_tokens_of_the_call_though_the_turn_before_was_drawn_again() -> None:
    calls = Episodes()
    first = calls.call([user("a")], "b")
    for answer in ("B", "x"):
        calls.call([user("a"), first, user("c")], "d")
        calls.call([user("a")], answer)
    assert calls.text(2) == calls.text(0)
    assert calls.sent[1] == calls.sent[3]
    assert calls.tree.counts().branches == {"sibling": 3}
    calls.require_exact()


@pytest.mark.parametrize("history", ["exact", "template"])
def test_a_template_that_writes_earlier_turns_in_another_way(history: Literal["exact", "template"]) -> None:
    calls = Episodes(ToyRendering(strips=True), history=history)
    first = calls.call([user("a")], "think!b")
    calls.call([user("a"), first, user("c")], "d")
    assert calls.text(1) == f"user:a.assistant:{'think!' if history == 'exact' else ''}b.user:c.assistant:"
    assert calls.tree.counts().branches == ({} if history == "exact" else {"template": 1})
    calls.require_exact()


def test_an_unknown_continuation_is_a_branch_only_if_the_tokens_differ() -> None:
    calls = Episodes(ToyRendering(known=False))
    first = calls.call([user("a")], "b")
    second = calls.call([user("a"), first, user("c")], "BIG")
    calls.call([user("a"), first, user("c"), second, user("d")], "e")
    assert calls.text(1) == "user:a.assistant:b.user:c.assistant:"
    assert calls.text(2) == "user:a.assistant:b.user:c.assistant:big.user:d.assistant:"
    assert calls.tree.counts().branches == {"template": 1}
    calls.require_exact()


@pytest.mark.parametrize("shows_tools", [True, False])
def test_other_tools_are_a_branch_if_the_prompt_shows_them(shows_tools: bool) -> None:
    calls = Episodes(ToyRendering(shows_tools=shows_tools))
    first = calls.call([user("a")], "b", (TOOL,))
    calls.call([user("a"), first, user("c")], "d", ())
    assert calls.tree.counts().branches == ({"edited": 1} if shows_tools else {})
    calls.require_exact()


def test_auxiliary_calls_have_paths_of_their_own() -> None:
    calls = Episodes()
    first = calls.call([user("a")], "b")
    title = calls.call([user("a"), first, user("title?")], "T", auxiliary=True)
    calls.call([user("a"), first, user("title?"), title, user("shorter")], "U", auxiliary=True)
    calls.call([user("a"), first, user("c")], "d")
    assert [node.auxiliary for node in calls.tree.nodes() if node.is_sampled] == [False, True, True, False]
    counts = calls.tree.counts()
    assert (counts.num_turns, counts.num_auxiliary, counts.branches) == (2, 2, {})
    assert calls.tree.transcript() == "b|c|d"
    calls.call([user("a"), first, user("title?")], "V")
    assert not calls.tree.nodes()[-1].auxiliary
    assert calls.tree.counts().branches == {"edited": 1}
    calls.require_exact()
    trained = Episodes(train_auxiliary=True)
    trained.call([user("a")], "b", auxiliary=True)
    assert trained.tree.nodes()[-1].is_trained
    assert trained.tree.transcript() == ""


def test_the_client_may_say_whose_conversation_a_call_is_of() -> None:
    calls = Episodes()
    first = calls.call([user("a")], "b", session="main")
    calls.call([user("a"), first, user("c")], "d", session="main")
    calls.call([user("other")], "b", session="helper")
    calls.call([user("summary")], "c", session="main")
    assert calls.tree.counts().branches == {"subagent": 1, "compacted": 1}
    calls.call([user("else")], "x", session="helper")
    assert calls.tree.transcript() == "summary|c"


def test_a_transcript_has_at_least_what_the_model_wrote() -> None:
    calls = Episodes()
    shot = [user("a"), {"role": "assistant", "content": "b"}]
    calls.call([*shot, user("c")], "d")
    assert calls.tree.transcript() == "d"
    calls.call([user("a")], "b")
    assert calls.tree.transcript() == "b"
    assert EpisodeTree(ToyRendering()).transcript() == ""


def test_answers_without_their_thinking_are_the_same_answers() -> None:
    class Thinking(ToyRendering):
        def parse(self, *args: Any) -> Parsed:
            parsed = super().parse(*args)
            thinking, _, content = parsed.message["content"].partition("!")
            return Parsed({**parsed.message, "content": content, "reasoning_content": thinking}, parsed.text)

    calls = Episodes(Thinking())
    first = calls.call([user("a")], "so!b")
    for back in (first, {"role": "assistant", "content": "b"}, {**first, "reasoning_content": None}):
        assert calls.tree.prepare([user("a"), back, user("c")], ()).context_ids == pack_int32(
            [ord(letter) if letter != "." else END for letter in "user:c.assistant:"]
        )
    assert calls.tree.prepare([user("a"), {**first, "reasoning_content": "no"}, user("c")], ()).branch == "edited"


def test_calls_that_overlap_are_counted_as_they_end() -> None:
    tree = EpisodeTree(ToyRendering())
    answer = (pack_int32([98, END]), pack_float32([-0.5] * 2), (VersionSpan(POLICY, 0, 2),), "stop")
    asked: list[list[Message]] = [[user("a")], [user("a")], [user("other")]]
    prepared = [tree.prepare(messages, ()) for messages in asked]
    assert [each.branch for each in prepared] == [None] * 3
    first, *_ = [tree.add(each, *answer).message for each in prepared]  # type: ignore[arg-type]
    assert tree.counts().branches == {"sibling": 1, "subagent": 1}
    after = [tree.prepare([user("a"), first, user(text)], ()) for text in ("b", "bc")]
    for each in after:
        tree.add(each, *answer)  # type: ignore[arg-type]
    assert tree.counts().branches == {"sibling": 1, "subagent": 1, "edited": 1}
    leaves = set(range(len(tree.nodes()))) - {node.parent for node in tree.nodes()}
    assert len(leaves) == 4


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([], (), "no messages"),
        (["x"], (), r"messages\[0\] is no message"),
        ([{"content": "x"}], (), r"messages\[0\] is no message"),
        ([{"role": "user", "content": 3}], (), r"messages\[0\]\.content is int"),
        ([{"role": "user", "content": "\ud800"}], (), "UTF-8"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], (), r"tool_calls\[0\] is no call"),
        ([{"role": "assistant", "tool_calls": "x"}], (), "tool_calls is str"),
        ([{"role": "tool", "tool_call_id": 3}], (), "tool_call_id is no text"),
        ([user("x")], ({"name": "add"},), r"tools\[0\] is no tool"),
    ],
)
def test_what_is_no_call_is_refused(messages: Any, tools: Any, message: str) -> None:
    with pytest.raises(CallRefusedError, match=message):
        EpisodeTree(ToyRendering()).prepare(messages, tools)


TEXTS = st.text("abAB!", min_size=1, max_size=4)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["go on", "edit", "retry", "compact", "sub-agent", "tools", "back"]),
        TEXTS,
        TEXTS,
        st.sampled_from(["stop", "length"]),
        st.integers(0, 9),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(STEPS, st.booleans(), st.booleans(), st.sampled_from(["exact", "template"]))
def test_every_call_is_a_path_of_the_tree(
    steps: list[tuple[str, str, str, FinishReason, int]],
    known: bool,
    strips: bool,
    history: Literal["exact", "template"],
) -> None:
    calls = Episodes(ToyRendering(known=known, strips=strips), history=history)
    tools: tuple[Tool, ...] = ()
    asked: list[Message] = [SYSTEM, user("q")]
    messages = [*asked, calls.call(asked, "b", tools)]
    for kind, text, answer, finish, number in steps:
        if kind == "tools":
            tools = () if tools else (TOOL,)
        if kind == "edit":
            place = number % len(messages)
            messages = [*messages[:place], {**messages[place], "content": text}, *messages[place + 1 :]]
        elif kind == "compact":
            messages = [SYSTEM, user(text)]
        elif kind == "sub-agent":
            calls.call([{"role": "system", "content": text}, user(answer)], answer, tools, finish)
        elif kind == "back":
            messages = messages[: 2 + number % len(messages)]
        if kind != "retry":
            asked = messages if messages[-1]["role"] == "user" else [*messages, user(text)]
        messages = [*asked, calls.call(asked, answer, tools, finish)]
    calls.require_exact()
    episode, counts = calls.episode(), calls.tree.counts()
    assert len(episode.leaves) == 1 + sum(counts.branches.values())
    assert counts.num_turns == len(calls.sent)
    siblings: dict[int, set[bytes]] = {}
    for node in episode.nodes:
        if not node.is_sampled:
            first = siblings.setdefault(node.parent, set())
            assert node.token_ids[:4] not in first  # nothing is stored twice
            first.add(node.token_ids[:4])


def test_a_longer_episode_renders_no_more_for_a_call() -> None:
    class Counting(ToyRendering):
        written = 0

        def _written(self, messages: Any) -> list[int]:
            Counting.written += len(messages)
            return super()._written(messages)

    calls = Episodes(Counting())
    messages = [user("a")]
    written = []
    for number in range(30):
        messages = [*messages, calls.call(messages, str(number)), user("b")]
        written.append(Counting.written)
    assert len({after - before for before, after in itertools.pairwise(written)}) == 1
