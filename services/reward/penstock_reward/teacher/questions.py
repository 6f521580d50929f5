"""What a teacher is asked about a group, and how its answers become the group's log-probabilities.

Owns both directions. Invariants: every trained token of a trajectory with a score is asked exactly once, given all
tokens before it; a trajectory has all of its log-probabilities or none. Pure.

A completion is one question; an episode has one for each path that trains a node, as the trainer trains it:

    prompt | completion                              asked: the completion
    system+user -> call -> result -> answer          asked: call and answer; what is between them is read, not used
"""

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from penstock.contracts import Completion, Episode, RolloutGroup, Trajectory, pack_float32, unpack_int32

Logprobs = Sequence[float]


@dataclass(frozen=True)
class Question:
    """log p of the tokens from `start` on, each given all before it: `start` >= 1.

    trajectory: whose tokens they are. places: where each run of wanted tokens is: (its first token in the sequence, its
    first one among the sampled tokens of the trajectory, number of tokens).

    The question for the completion [8, 9] of the prompt [5, 6, 7]:
    Question(0, array("i", [5, 6, 7, 8, 9]), 3, ((3, 0, 2),)), whose answer has two numbers
    """

    trajectory: int
    token_ids: "array[int]"
    start: int
    places: tuple[tuple[int, int, int], ...]

    @property
    def num_answers(self) -> int:
        return len(self.token_ids) - self.start


def questions_of(group: RolloutGroup, is_asked: Sequence[bool]) -> list[Question]:
    """Those about the trajectories for which `is_asked` is true, in their order."""
    prompt_ids = unpack_int32(group.ticket.prompt_ids)
    return [
        question
        for index, each in enumerate(group.trajectories)
        if is_asked[index]
        for question in _questions(index, each, prompt_ids)
    ]


def _questions(index: int, trajectory: Trajectory, prompt_ids: Sequence[int]) -> Iterator[Question]:
    if isinstance(trajectory, Completion):
        if trajectory.num_tokens:
            start, ids = len(prompt_ids), array("i", [*prompt_ids, *unpack_int32(trajectory.token_ids)])
            yield Question(index, ids, start, ((start, 0, trajectory.num_tokens),))
        return
    starts = _sampled_before(trajectory)
    for path, own in trajectory.owned_nodes():
        ids, places = array("i"), []
        for node in path:
            if node in own:
                places.append((len(ids), starts[node], trajectory.nodes[node].num_tokens))
            ids.extend(unpack_int32(trajectory.nodes[node].token_ids))
        yield Question(index, ids, places[0][0], tuple(places))


def _sampled_before(episode: Episode) -> list[int]:
    """Of each node, the number of sampled tokens in the nodes before it."""
    counts, total = [], 0
    for node in episode.nodes:
        counts.append(total)
        total += node.num_tokens if node.is_sampled else 0
    return counts


def packed(
    group: RolloutGroup, answers: Sequence[tuple[Question, Logprobs]], failed: Mapping[int, str]
) -> tuple[bytes, ...]:
    """`teacher_logprobs` of the scored group. failed: trajectories of which an answer is missing."""
    values: dict[int, list[float]] = {}
    for question, logprobs in answers:
        if question.trajectory in failed:
            continue
        num_tokens = group.trajectories[question.trajectory].num_tokens
        of_tokens = values.setdefault(question.trajectory, [math.nan] * num_tokens)
        for first, sampled, count in question.places:
            of_tokens[sampled : sampled + count] = logprobs[first - question.start :][:count]
    return tuple(pack_float32(values.get(index, ())) for index in range(len(group.trajectories)))
