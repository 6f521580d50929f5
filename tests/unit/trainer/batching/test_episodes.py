"""The figures of episodes, and which episodes count as failed."""

import msgspec
import pytest

from penstock.contracts import EpisodeCounts, EpisodeEnd, Score
from penstock.contracts.outcomes import NOTHING_SAMPLED, rewards_of
from penstock_trainer.batching.episodes import episode_figures
from penstock_trainer.batching.rewards import (
    MOST_REASONS,
    OTHER_REASONS,
    failed_share,
    failures_of,
    first_failure,
    most_frequent,
)
from tests.unit.trainer.episode_groups import FAILED, branching_group, context, episode, episode_group, sampled
from tests.unit.trainer.trainer_groups import example_groups


def test_the_figures_of_two_episodes() -> None:
    assert episode_figures([branching_group()]) == {
        "episode_turns": 3.5,
        "episode_turns_max": 4,
        "episode_tool_calls": 1.5,
        "episode_failed_tool_calls_ratio": pytest.approx(1 / 3),
        "episode_auxiliary_calls": 0.5,
        "episode_sampled_tokens": 7.0,
        "episode_context_tokens": 7.0,
        "episode_cached_tokens_ratio": 0.5,
        "episode_version_spread": 0.0,
        "episode_version_spread_max": 0,
        "episode_branches_edited": 0.5,
        "episode_branches_subagent": 0.5,
        "episode_failed_ratio": 0.0,
        "episode_attempts": 2.0,
        "episode_ended_done": 1.0,
    }


def test_failed_episodes_count_as_failed_and_not_as_short_ones() -> None:
    tree = [context(-1, [3]), sampled(0, [4, 5], versions=[2, 4]), sampled(1, [6], versions=[5])]
    counts = EpisodeCounts(num_turns=2, num_attempts=1)
    gone = episode([], FAILED, end="failure", counts=EpisodeCounts(num_attempts=3))
    figures = episode_figures([episode_group(0, [episode(tree, counts=counts), gone], [1.0, None])])
    assert (figures["episode_turns"], figures["episode_version_spread"], figures["episode_version_spread_max"]) == (
        2.0,
        3.0,
        3,
    )
    assert (figures["episode_failed_ratio"], figures["episode_attempts"]) == (0.5, 2.0)
    assert (figures["episode_ended_done"], figures["episode_ended_failure"]) == (0.5, 0.5)


def test_a_batch_without_a_valid_episode_still_has_figures() -> None:
    figures = episode_figures([episode_group(0, [episode([])] * 2, [None, None])])
    assert (figures["episode_turns"], figures["episode_turns_max"], figures["episode_failed_ratio"]) == (0.0, 0, 1.0)


def test_completions_have_no_such_figures() -> None:
    assert episode_figures(example_groups()) == {}


@pytest.mark.parametrize(
    ("end", "own", "failure"),
    [
        ("failure", Score(None, "hung"), "hung"),
        ("failure", Score(1.0), "the episode failed"),
        ("max_turns", Score(0.0), ""),
        ("done", Score(None, "gave no reward"), ""),  # other functions may score it
    ],
)
def test_what_the_infrastructure_ended_has_no_reward(end: EpisodeEnd, own: Score, failure: str) -> None:
    """Whatever a reward function says of its transcript."""
    tree = [context(-1, [3]), sampled(0, [4])]
    group = episode_group(0, [episode(tree, own, end=end), episode(tree)], [0.0, 1.0])
    assert rewards_of(group) == [None if failure else 0.0, 1.0]
    assert (first_failure(group), failed_share(group)) == (failure, 0.5 if failure else 0.0)


def test_reasons_of_failures_are_counted_in_short() -> None:
    tree = [context(-1, [3]), sampled(0, [4])]
    scores = [None, None, 1.0, None]
    group = episode_group(0, [episode(tree)] * 3 + [episode([], FAILED)], scores)
    one, other = Score(None, "judge: TimeoutError"), Score(None, "judge:\n " + "x" * 500)
    group = msgspec.structs.replace(group, scores=(one, other, Score(1.0), Score(1.0)))
    assert failures_of([group, group]) == {"judge: TimeoutError": 2, f"judge: {'x' * 153}": 2, NOTHING_SAMPLED: 2}
    reasons = [f"row {n}" for n in range(30) for _ in range(2 if n else 1)]
    assert list(most_frequent(reasons).items())[-1] == (OTHER_REASONS, 59 - 2 * MOST_REASONS)
    assert most_frequent([]) == {}


def test_an_episode_without_a_sampled_token_has_no_reward() -> None:
    group = episode_group(0, [episode([context(-1, [3])], FAILED), episode([], FAILED)], [0.0, None])
    assert rewards_of(group) == [None, None]
    assert (first_failure(group), failed_share(group)) == (NOTHING_SAMPLED, 1.0)
