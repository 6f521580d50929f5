"""A trajectory as paths: what the policy is shown, and which of its tokens are trained.

Owns which path trains which tokens. Invariant: every token of a trained node is a loss token of exactly one path of its
episode, and the tokens before it on that path are those before it in the tree. Pure.

A completion is one path. An episode has one for each leaf; a leaf whose path has nothing left to train gives none:

    system+user -> call -> result -> answer                 1st leaf: trains call, answer
                               '---> answer (edited) ...    2nd leaf: call is context there; trains the other answer

The prompt of a path is what comes before the first sampled token, whoever trains that one: all paths that begin with
the same context have the same prompt, so that packing keeps them together. A path ends with the last token that it may
train.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.contracts import Completion, Node, Trajectory
from penstock_trainer.batching.masking import token_lags, trained_mask


class TrainedPath(NamedTuple):
    """T tokens after a prompt: the first fields of a `Sample`."""

    prompt_ids: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    behaviour: npt.NDArray[np.float32]
    lags: npt.NDArray[np.int32]


def trained_paths(
    trajectory: Trajectory, prompt_ids: npt.NDArray[np.int32], version: int, max_lag: int | None = None
) -> Iterator[TrainedPath]:
    """The paths that have a loss token. prompt_ids: of the ticket, before a completion."""
    if isinstance(trajectory, Completion):
        yield _of_completion(trajectory, prompt_ids, version, max_lag)
        return
    for path, own in trajectory.owned_nodes():
        nodes, is_own = [trajectory.nodes[index] for index in path], [index in own for index in path]
        found = _of_nodes(nodes, is_own, version, max_lag)
        if found.loss_mask.any():
            yield found


def loss_places(trajectory: Trajectory, version: int, max_lag: int | None = None) -> Iterator[npt.NDArray[np.int64]]:
    """Of each of `trained_paths`, in their order: where its loss tokens are among the trajectory's sampled tokens."""
    if isinstance(trajectory, Completion):
        yield np.flatnonzero(trained_mask(trajectory, version, max_lag))
        return
    sizes = [node.num_tokens if node.is_sampled else 0 for node in trajectory.nodes]
    starts = np.cumsum([0, *sizes])
    for path, own in trajectory.owned_nodes():
        nodes = [index for index in path if index in own]
        places = [
            starts[index] + np.flatnonzero(trained_mask(trajectory.nodes[index], version, max_lag)) for index in nodes
        ]
        if any(each.size for each in places):
            yield np.concatenate(places)


def _of_completion(
    completion: Completion, prompt_ids: npt.NDArray[np.int32], version: int, max_lag: int | None
) -> TrainedPath:
    return TrainedPath(
        prompt_ids=prompt_ids,
        token_ids=np.frombuffer(completion.token_ids, dtype="<i4"),
        loss_mask=trained_mask(completion, version, max_lag),
        behaviour=np.frombuffer(completion.logprobs, dtype="<f4"),
        lags=token_lags(completion, version),
    )


def _of_nodes(nodes: Sequence[Node], is_own: Sequence[bool], version: int, max_lag: int | None) -> TrainedPath:
    """Log-probabilities and lags of tokens without a loss are 0."""
    first = next(number for number, node in enumerate(nodes) if node.is_sampled)
    token_ids = np.frombuffer(b"".join(node.token_ids for node in nodes[first:]), dtype="<i4")
    loss_mask = np.zeros(token_ids.size, dtype=np.bool_)
    behaviour = np.zeros(token_ids.size, dtype=np.float32)
    lags = np.zeros(token_ids.size, dtype=np.int32)
    start = 0
    for node, own in zip(nodes[first:], is_own[first:], strict=True):
        place = slice(start, start + node.num_tokens)
        if own:
            loss_mask[place] = trained_mask(node, version, max_lag)
            behaviour[place] = np.frombuffer(node.logprobs or b"", dtype="<f4")
            lags[place] = token_lags(node, version)
        start = place.stop
    prompt_ids = np.frombuffer(b"".join(node.token_ids for node in nodes[:first]), dtype="<i4")
    return TrainedPath(prompt_ids, token_ids, loss_mask, behaviour, lags)
