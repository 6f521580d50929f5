"""The experts that the engine routed the tokens of a sequence through, for router replay.

Owns which rows they are of. Row i is the pass over token i of the sequence, by which token i + 1 is sampled, so the
last token has none. The rows of a prompt are one array for all completions of a group: those of the first completion,
since the engine computes a prompt once for all. Arrays are views of the messages, and so read-only. Pure.

    prompt  p0 p1 p2 | completion  t0 t1 t2          rows  p0 p1 p2 t0 t1
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.contracts import Completion, RolloutGroup, Trajectory
from penstock.contracts.trajectories import RoutedExperts

OWN_ROUTE = -1  # of a row: the trainer's router chooses

Experts = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Routes:
    """prompt [P, W], completion [T - 1, W]: W numbers of experts a row, all layers of it."""

    prompt: Experts
    completion: Experts

    @property
    def row_length(self) -> int:
        return int(self.prompt.shape[1])

    def rows(self, start: int, stop: int) -> npt.NDArray[np.int16]:
        """[stop - start, W] of rows of the sequence."""
        num_prompt = len(self.prompt)
        prompt = self.prompt[start:stop]
        completion = self.completion[max(0, start - num_prompt) : max(0, stop - num_prompt)]
        return np.concatenate([prompt, completion]).astype(np.int16)

    def num_shared(self, other: "Routes", length: int) -> int:
        """How many of the first `length` rows both have in common, up to the first that differs."""
        start = min(length, len(self.prompt)) if self.prompt is other.prompt else 0
        differs = (self.rows(start, length) != other.rows(start, length)).any(axis=1)
        return start + (int(differs.argmax()) if differs.any() else length - start)


def group_routes(group: RolloutGroup) -> Experts | None:
    """The rows of the group's prompt; None: it has none."""
    return None if group.prompt_experts is None else _rows(group.prompt_experts)


def routes_of(trajectory: Trajectory, prompt: Experts | None) -> Routes | None:
    """Those of a completion after a prompt with these rows; None if either has none."""
    if prompt is None or not isinstance(trajectory, Completion) or trajectory.experts is None:
        return None
    return Routes(prompt, _rows(trajectory.experts))


def _rows(experts: RoutedExperts) -> Experts:
    return np.frombuffer(experts.data, dtype=np.dtype(experts.dtype).newbyteorder("<")).reshape(-1, experts.row_length)
