"""Builds episodes and groups of them, by hand and at random."""

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import strategies as st

from penstock.contracts import (
    Episode,
    EpisodeCounts,
    EpisodeEnd,
    Node,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    Ticket,
    VersionSpan,
    pack_float32,
    pack_int32,
)

ENVIRONMENT = "my_envs:Guess"
NEWEST = 6
FAILED = Score(None, "the sandbox is gone")


def context(parent: int, token_ids: Sequence[int], role: str = "user") -> Node:
    return Node(parent, pack_int32(token_ids), role=role)


def sampled(
    parent: int,
    token_ids: Sequence[int],
    logprobs: Sequence[float] | None = None,
    versions: Sequence[int] | None = None,
    *,
    auxiliary: bool = False,
) -> Node:
    """`versions`: of each token; 0 for all without them. `logprobs`: -1 for all without them."""
    numbers = list(versions) if versions is not None else [0] * len(token_ids)
    cuts = [at for at in range(len(numbers) + 1) if at in (0, len(numbers)) or numbers[at] != numbers[at - 1]]
    return Node(
        parent,
        pack_int32(token_ids),
        pack_float32(logprobs if logprobs is not None else [-1.0] * len(token_ids)),
        tuple(VersionSpan(PolicyIdentity(numbers[start], "0" * 16), start, end) for start, end in pairwise(cuts)),
        "assistant",
        auxiliary=auxiliary,
    )


def episode(
    nodes: Sequence[Node], score: Score | None = None, *, end: EpisodeEnd = "done", counts: EpisodeCounts | None = None
) -> Episode:
    """`score`: of the environment; without one it is 1, or a failure if nothing was sampled."""
    own = score or (Score(1.0) if any(node.is_sampled for node in nodes) else FAILED)
    return Episode(tuple(nodes), own, end, counts or EpisodeCounts(), 0.0, 1.0)


def episode_group(
    number: int, episodes: Sequence[Episode], rewards: Sequence[float | None], purpose: str = "train"
) -> ScoredGroup:
    ticket = Ticket(
        purpose="train" if purpose == "train" else "eval",
        number=number,
        attempt=0,
        policy_version=0,
        prompt="Guess 1-7",
        prompt_ids=b"",
        seeds=tuple(range(len(episodes))),
        sampling=Sampling(1.0, 8, (2,)),
        answer="5",
        reward="",
        metadata={"level": 1},
        environment=ENVIRONMENT,
    )
    scores = tuple(FAILED if value is None else Score(value) for value in rewards)
    return ScoredGroup(RolloutGroup(ticket, (), "server", 0.0, 1.0, tuple(episodes)), scores)


TOKENS = st.integers(3, 6)  # few, so that paths share prefixes by chance too


@st.composite
def sampled_nodes(draw: st.DrawFn, parent: int) -> Node:
    token_ids = draw(st.lists(TOKENS, min_size=1, max_size=4))
    size = len(token_ids)
    oldest = draw(st.integers(0, NEWEST))
    newest = draw(st.integers(oldest, NEWEST))
    cut = draw(st.integers(0, size))
    return sampled(
        parent,
        token_ids,
        draw(st.lists(st.floats(-5, -0.0625, width=32), min_size=size, max_size=size)),
        [oldest] * cut + [newest] * (size - cut),
        auxiliary=draw(st.integers(0, 4)) == 0,
    )


@st.composite
def random_episodes(draw: st.DrawFn) -> Episode:
    """A tree: appended to, branched anywhere, with sub-agents (further roots), auxiliary calls and several versions."""
    nodes = [context(-1, draw(st.lists(TOKENS, min_size=1, max_size=4)))]
    for _ in range(draw(st.integers(1, 8))):
        last = len(nodes) - 1
        where = draw(st.sampled_from(("append", "append", "branch", "subagent")))
        parent = {"append": last, "branch": draw(st.integers(0, last)), "subagent": -1}[where]
        if parent == -1 or draw(st.booleans()):
            nodes.append(context(parent, draw(st.lists(TOKENS, min_size=1, max_size=3))))
        else:
            nodes.append(draw(sampled_nodes(parent)))
    return episode(nodes)


@st.composite
def random_episode_groups(draw: st.DrawFn) -> list[ScoredGroup]:
    groups = []
    for number in range(draw(st.integers(1, 3))):
        found = draw(st.lists(random_episodes(), min_size=2, max_size=3))
        values = [draw(st.sampled_from([0.0, 0.5, 1.0, None])) if each.num_tokens else None for each in found]
        groups.append(episode_group(number, found, values))
    return groups


def branching_group(number: int = 0, rewards: Sequence[float | None] = (1.0, 0.0)) -> ScoredGroup:
    """Two episodes of one first prompt: one of three turns and a branch, one of two turns with a sub-agent."""
    first = [
        context(-1, [4, 5, 6]),
        sampled(0, [7, 2], [-3.5, -0.5]),
        context(1, [9, 10], "tool"),
        sampled(2, [11, 12, 2], [-4.0, -3.0, -1.0]),
        context(3, [13]),
        sampled(4, [14], [-2.0]),
        context(1, [15]),  # history edited after the first turn
        sampled(6, [16, 17], [-3.0, -2.5]),
    ]
    second = [
        context(-1, [4, 5, 6]),
        sampled(0, [8, 2], [-3.0, -0.25]),
        context(-1, [20, 21]),
        sampled(2, [22, 23], [-4.5, -3.5]),
        context(1, [9, 24], "tool"),
        sampled(4, [25], [-3.75]),
        sampled(4, [26], [-1.0], auxiliary=True),
    ]
    counts = (
        EpisodeCounts(4, 2, 1, 0, {"edited": 1}, 60, 30, 1),
        EpisodeCounts(3, 1, 0, 1, {"subagent": 1}, 40, 20, 3),
    )
    trees = [episode(nodes, counts=own) for nodes, own in zip((first, second), counts, strict=True)]
    return episode_group(number, trees, rewards)
