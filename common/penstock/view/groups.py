"""The groups of a step as answers: each in figures, and one with its completions next to each other.

Pure. Invariant: no text is longer than the limits here; whatever was cut says so, and the tokens have the rest.
"""

import math
from collections.abc import Sequence
from typing import Any

from penstock.contracts import Completion, Score, ScoredGroup, Trajectory, unpack_int32
from penstock.contracts.outcomes import failure_of, rewards_of, values_by_function
from penstock.readable import cut, question_of
from penstock.view.pieces import Pieces

QUESTION_CHARACTERS = 240
PROMPT_CHARACTERS = 20_000
REASON_CHARACTERS = 2000
METADATA_CHARACTERS = 2000
TEXT_TOKENS = 1500  # of a completion among others; its own page has all
MIN_VALID = 2


def summary(index: int, group: ScoredGroup, version: int | None) -> dict[str, Any]:
    """A group in figures.

    version: that its step trained. mean, std: of the rewards that did not fail; std: None for fewer than two.
    """
    made, ticket = group.group, group.group.ticket
    rewards = rewards_of(group)
    valid = [reward for reward in rewards if reward is not None]
    lengths = [each.num_tokens for each in made.trajectories]
    versions = [span.policy.number for each in made.trajectories for span in each.spans]
    return {
        "index": index,
        "ticket": ticket.number,
        "attempt": ticket.attempt,
        "prompt": cut(question_of(ticket.prompt), QUESTION_CHARACTERS),
        "answer": cut(ticket.answer, QUESTION_CHARACTERS),
        "environment": ticket.environment,
        "server": made.server,
        "started_at": made.started_at,
        "ended_at": made.ended_at,
        "rewards": rewards,
        "mean": math.fsum(valid) / len(valid) if valid else None,
        "std": _deviation(valid) if len(valid) >= MIN_VALID else None,
        "num_failed": len(rewards) - len(valid),
        "is_failed": len(valid) < MIN_VALID,
        "is_flat": len(valid) >= MIN_VALID and max(valid) == min(valid),
        "num_truncated": sum(each.is_truncated for each in made.trajectories),
        "length_min": min(lengths),
        "length_mean": math.fsum(lengths) / len(lengths),
        "length_max": max(lengths),
        "oldest_version": min(versions, default=None),
        "newest_version": max(versions, default=None),
        "staleness": version - min(versions) if version is not None and versions else None,
    }


def _deviation(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((each - mean) ** 2 for each in values) / len(values))


def prompt_of(group: ScoredGroup) -> dict[str, Any]:
    """What all completions of a group were asked."""
    ticket = group.group.ticket
    return {
        "text": cut(ticket.prompt, PROMPT_CHARACTERS),
        "answer": cut(ticket.answer, PROMPT_CHARACTERS),
        "metadata": cut(str(ticket.metadata), METADATA_CHARACTERS) if ticket.metadata else "",
        "num_tokens": ticket.num_prompt_tokens,
        "seeds": ticket.seeds,
        "temperature": ticket.sampling.temperature,
        "max_new_tokens": ticket.sampling.max_new_tokens,
        "functions": group.functions,
        "issued_version": ticket.policy_version,
    }


def beside(
    group: ScoredGroup,
    shaped: Sequence[float | None],
    row: Sequence[float | None] | None,
    base: int | None,
    pieces: Pieces,
) -> dict[str, Any]:
    """The completions of a group, each cut where it first differs from the completion `base`.

    base: None: the one with the highest reward. shaped: rewards as trained. row: advantages. Each has `same`, the
    number of tokens that it has in common with the base from the start, and its text in three: before, at and behind
    the first token that differs.
    """
    rewards = rewards_of(group)
    trajectories = group.group.trajectories
    if base is None or not 0 <= base < len(trajectories):
        base = max(range(len(rewards)), key=lambda index: _or_lowest(rewards[index]))
    base_ids = sampled_ids(trajectories[base])
    values = values_by_function(group)
    completions = []
    for index, each in enumerate(trajectories):
        ids = sampled_ids(each)
        same = common_prefix(base_ids, ids)
        completions.append(
            {
                "index": index,
                "reward": rewards[index],
                "shaped_reward": shaped[index],
                "values": values[index],
                "advantage": None if row is None else row[index],
                **_figures(each, group.scores[index]),
                "same": same,
                "is_base": index == base,
                **_texts(ids, same, index == base, pieces),
            }
        )
    return {"base": base, "completions": completions, "no_text": pieces.reason}


def _or_lowest(reward: float | None) -> float:
    return -math.inf if reward is None else reward


def _figures(trajectory: Trajectory, score: Score) -> dict[str, Any]:
    return {
        "failure": cut(failure_of(trajectory, score), REASON_CHARACTERS),
        "num_tokens": trajectory.num_tokens,
        "num_loss_tokens": trajectory.num_loss_tokens,
        "end": trajectory.finish_reason if isinstance(trajectory, Completion) else trajectory.end,
        "is_truncated": trajectory.is_truncated,
        "versions": sorted({span.policy.number for span in trajectory.spans}),
    }


def _texts(ids: Sequence[int], same: int, is_base: bool, pieces: Pieces) -> dict[str, Any]:
    shown = pieces.of(ids[:TEXT_TOKENS])
    if shown is None:
        shown = [f"{each} " for each in ids[:TEXT_TOKENS]]
    at = len(shown) if is_base else min(same, len(shown))
    return {
        "before": "".join(shown[:at]),
        "at": "".join(shown[at : at + 1]),
        "behind": "".join(shown[at + 1 :]),
        "num_left_out": max(0, len(ids) - TEXT_TOKENS),
    }


def sampled_ids(trajectory: Trajectory) -> list[int]:
    """The ids of a completion; of an episode those of all nodes behind the first prompt, in their order."""
    if isinstance(trajectory, Completion):
        return unpack_int32(trajectory.token_ids)
    first = next((place for place, node in enumerate(trajectory.nodes) if node.is_sampled), len(trajectory.nodes))
    return [each for node in trajectory.nodes[first:] for each in unpack_int32(node.token_ids)]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many elements both begin with.

    >>> common_prefix([5, 6, 7], [5, 6, 8, 9]), common_prefix([5], [5, 6])
    (2, 1)
    """
    differing = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
