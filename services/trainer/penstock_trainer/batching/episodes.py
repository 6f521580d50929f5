"""The figures of the episodes of a batch: turns, tool calls, branches, tokens, failures, versions.

Owns their definitions. Invariant: a batch of completions has none; means over conduct leave failed episodes out, which
would count as short ones. Pure.

| Figure | Meaning |
| --- | --- |
| `episode_turns`, `episode_turns_max` | calls of the model within the conversation |
| `episode_tool_calls`, `episode_failed_tool_calls_ratio` | calls of tools; share of them that failed |
| `episode_branches_<reason>` | calls that could not continue the node before |
| `episode_auxiliary_calls` | calls outside of the conversation |
| `episode_sampled_tokens`, `episode_context_tokens` | distinct tokens that the model sampled, and that it only read |
| `episode_cached_tokens_ratio` | share of the tokens sent that the engine had in its cache |
| `episode_version_spread`, `episode_version_spread_max` | newest minus oldest version in an episode |
| `episode_failed_ratio`, `episode_ended_<end>` | of all: share that failed, and shares by how they ended |
| `episode_attempts` | of all |
"""

import math
from collections.abc import Iterable, Sequence

from penstock.contracts import Episode, ScoredGroup
from penstock.contracts.outcomes import rewards_of

BRANCHES, ENDED = "episode_branches_", "episode_ended_"


def episode_figures(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Means per episode unless the table says otherwise; empty without episodes."""
    pairs = [
        (each, reward)
        for group in groups
        if group.group.ticket.environment
        for each, reward in zip(group.group.episodes, rewards_of(group), strict=True)
    ]
    if not pairs:
        return {}
    episodes = [episode for episode, _ in pairs]
    ends = sorted({episode.end for episode in episodes})
    return {
        **_conduct([episode for episode, reward in pairs if reward is not None]),
        "episode_failed_ratio": _mean(reward is None for _, reward in pairs),
        "episode_attempts": _mean(episode.counts.num_attempts for episode in episodes),
        **{ENDED + end: _mean(episode.end == end for episode in episodes) for end in ends},
    }


def _conduct(episodes: Sequence[Episode]) -> dict[str, float]:
    counts = [episode.counts for episode in episodes]
    reasons = sorted({reason for each in counts for reason in each.branches})
    spreads = [_spread(episode) for episode in episodes]
    return {
        "episode_turns": _mean(each.num_turns for each in counts),
        "episode_turns_max": max((each.num_turns for each in counts), default=0),
        "episode_tool_calls": _mean(each.num_tool_calls for each in counts),
        "episode_failed_tool_calls_ratio": _ratio(
            sum(each.num_failed_tool_calls for each in counts), sum(each.num_tool_calls for each in counts)
        ),
        "episode_auxiliary_calls": _mean(each.num_auxiliary for each in counts),
        "episode_sampled_tokens": _mean(episode.num_tokens for episode in episodes),
        "episode_context_tokens": _mean(episode.num_context_tokens for episode in episodes),
        "episode_cached_tokens_ratio": _ratio(
            sum(each.num_cached_tokens for each in counts), sum(each.num_prompt_tokens for each in counts)
        ),
        "episode_version_spread": _mean(spreads),
        "episode_version_spread_max": max(spreads, default=0),
        **{BRANCHES + reason: _mean(each.branches.get(reason, 0) for each in counts) for reason in reasons},
    }


def _spread(episode: Episode) -> int:
    """Newest minus oldest version."""
    versions = [span.policy.number for span in episode.spans]
    return max(versions) - min(versions)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found) if found else 0.0


def _ratio(part: int, of: int) -> float:
    return part / of if of else 0.0
