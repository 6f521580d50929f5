"""The figures of each reward function, and what a failure does to them."""

import msgspec
import pytest

from penstock.contracts import Score, ScoredGroup
from penstock.contracts.outcomes import rewards_of, values_by_function
from penstock_trainer.batching.rewards import function_figures
from tests.unit.trainer.episode_groups import FAILED, context, episode, episode_group, sampled
from tests.unit.trainer.trainer_groups import completion, scored_group


def group(scores: list[Score], *functions: str) -> ScoredGroup:
    made = scored_group(0, [3], [completion([4], [-1.0])] * len(scores), [0.0] * len(scores))
    return msgspec.structs.replace(made, scores=tuple(scores), functions=functions)


def test_a_failed_function_is_no_value_of_its_own_and_leaves_those_of_the_others() -> None:
    scores = [
        Score(1.5, values=(1.0, 1.0)),
        Score(None, "slow: no answer", values=(0.0, None)),
        Score(0.5, values=(0.5, 0.0)),
    ]
    mixed = group(scores, "math", "slow")
    assert rewards_of(mixed) == [1.5, None, 0.5]
    assert values_by_function(mixed)[1] == {"math": 0.0, "slow": None}
    assert function_figures([mixed]) == {
        "math": {"mean": 0.5, "std": pytest.approx((1 / 6) ** 0.5), "num_failed": 0},
        "slow": {"mean": 0.5, "std": 0.5, "num_failed": 1},
    }


def test_rows_that_name_their_function_have_figures_of_their_own() -> None:
    groups = [group([Score(1.0), Score(0.0)], "math"), group([Score(0.5), Score(None, "gone")], "numeric")]
    assert function_figures(groups) == {
        "math": {"mean": 0.5, "std": 0.5, "num_failed": 0},
        "numeric": {"mean": 0.5, "std": 0.0, "num_failed": 1},
    }


def test_a_function_that_always_failed_has_no_mean_and_a_huge_value_ends_nothing() -> None:
    assert function_figures([group([Score(None, "gone")] * 2, "math")]) == {"math": {"num_failed": 2}}
    huge = [Score(0.0, values=(1e308, -1e308)), Score(0.0, values=(-1e308, 1e308))]
    assert function_figures([group(huge, "a", "b")])["a"]["std"] == float("inf")


def test_scores_of_a_release_that_named_no_function_have_no_figures() -> None:
    assert function_figures([group([Score(1.0), Score(0.0)])]) == {}


def test_an_episode_that_does_not_count_gives_no_function_a_value() -> None:
    tree = [context(-1, [3]), sampled(0, [4])]
    trees = [episode(tree), episode(tree, end="failure"), episode([], FAILED)]
    made = episode_group(0, trees, [1.0, 1.0, None])
    alone = msgspec.structs.replace(made, functions=("environment",))
    assert values_by_function(alone) == [{"environment": 1.0}, {}, {"environment": None}]
    scores = (Score(1.5, values=(1.0, 0.5)), Score(1.5, values=(1.0, 0.5)), FAILED)
    both = msgspec.structs.replace(made, functions=("environment", "format_regex"), scores=scores)
    assert values_by_function(both) == [{"environment": 1.0, "format_regex": 0.5}, {}, {}]
