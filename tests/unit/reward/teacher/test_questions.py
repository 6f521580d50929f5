"""What a teacher is asked about a group, and what becomes of its answers."""

import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from penstock.contracts import Episode, RolloutGroup, unpack_float32, unpack_int32
from penstock_reward.teacher.questions import packed, questions_of
from tests.unit.reward.teacher.teacher_setup import logprob
from tests.unit.trainer.episode_groups import episode_group, random_episodes
from tests.unit.trainer.trainer_groups import completion, scored_group


def answered(group: RolloutGroup, is_asked: Sequence[bool] = (), failed: Sequence[int] = ()) -> list[list[float]]:
    """The log-probabilities of each trajectory, if the fake's rule answers all questions."""
    questions = questions_of(group, is_asked or [True] * len(group.trajectories))
    answers = [
        (each, [logprob(each.token_ids, place) for place in range(each.start, len(each.token_ids))])
        for each in questions
    ]
    return [unpack_float32(each) for each in packed(group, answers, dict.fromkeys(failed, "gone"))]


def test_each_token_of_a_completion_is_asked_given_all_before_it() -> None:
    group = scored_group(0, [4, 5, 6], [completion(each, [-1.0] * len(each)) for each in ([7, 8], [], [9])], [1, 1, 0])
    expected = [[logprob([4, 5, 6, 7, 8], 3), logprob([4, 5, 6, 7, 8], 4)], [], [logprob([4, 5, 6, 9], 3)]]
    assert answered(group.group) == expected
    assert answered(group.group, [True, True, False]) == [expected[0], [], []]
    assert answered(group.group, failed=[0]) == [[], [], expected[2]]


@given(found=st.lists(random_episodes(), min_size=2, max_size=3))
def test_each_trained_token_of_an_episode_is_asked_once_given_its_path(found: list[Episode]) -> None:
    group = episode_group(0, found, [1.0] * len(found)).group
    for each, values in zip(found, answered(group), strict=True):
        expected: list[float] = []
        for index, node in enumerate(each.nodes):
            if not node.is_sampled:
                continue
            before = [token for at in each.path(index)[:-1] for token in unpack_int32(each.nodes[at].token_ids)]
            path = [*before, *unpack_int32(node.token_ids)]
            own = [logprob(path, place) for place in range(len(before), len(path))]
            expected += own if node.is_trained else [math.nan] * node.num_tokens
        if not each.num_loss_tokens:
            assert values == []
            continue
        assert len(values) == each.num_tokens
        assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(values, expected, strict=True))
    asked = sum(count for each in questions_of(group, [True] * len(found)) for _, _, count in each.places)
    assert asked == sum(each.num_loss_tokens for each in found)
