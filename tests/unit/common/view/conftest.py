"""A run's folder with a failed group, a flat one, a change of weights within a completion, and an episode."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.synthetic_run import END, STARTED_AT, SyntheticRun, completion, group, identity, write_tokenizer
from penstock.contracts import (
    Episode,
    EpisodeCounts,
    Node,
    PolicyIdentity,
    Score,
    VersionSpan,
    pack_float32,
    pack_int32,
)
from penstock.contracts.vocabulary import DropReason
from penstock.records import RunRecords
from penstock.view.run import RunView


class Made(NamedTuple):
    """A run that was made, its view, and how its tokenizer encodes."""

    run: SyntheticRun
    view: RunView
    encode: Callable[[str], list[int]]


def episode(encode: Callable[[str], list[int]], version: int) -> Episode:
    """A question, a call that ends with a special token, the tool's answer, and two continuations of it."""

    def sampled(parent: int, text: str) -> Node:
        ids = [*encode(text), END]
        span = VersionSpan(identity(version), 0, len(ids))
        return Node(parent, pack_int32(ids), pack_float32([-0.25] * len(ids)), (span,), "assistant")

    nodes = (
        Node(-1, pack_int32(encode("12+3?")), role="user"),
        sampled(0, "calc 12+3"),
        Node(1, pack_int32(encode("15")), role="tool"),
        sampled(2, "15"),
        sampled(2, "51"),
    )
    return Episode(nodes, Score(1.0), "done", EpisodeCounts(num_turns=2), STARTED_AT, STARTED_AT + 1)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    model = tmp_path / "model"
    encode = write_tokenizer(model)
    run = SyntheticRun(tmp_path / "runs" / "mine", str(model))
    run.begin(group_size=4, batch_size=3)
    texts = ["four", "four!", "five", ""]
    groups = [
        group(0, "2+2=", encode("2+2="), [completion(encode(text), 0) for text in texts], [1.0, 1.0, 0.0, None]),
        group(1, "1+1=", encode("1+1="), [completion(encode("2"), 0) for _ in range(4)], [1.0] * 4, server="rollout-1"),
        group(2, "3+3=", encode("3+3="), [completion(encode("6"), 0) for _ in range(4)], [None, None, None, 0.0]),
    ]
    run.evaluate(0.25, [("7+7=", "13", "14", 0.0)])
    ratios: list[list[list[float]]] = [[[0.0, -0.5, math.nan, 0.25], [0.125] * 5, [], []], [[]] * 4, [[]] * 4]
    run.add_step(groups, log_ratios=ratios)
    changed = [completion([*encode("f\N{LATIN SMALL LETTER U WITH DIAERESIS}nf"), END], 0, changes_at=3)]
    rest = [completion(encode("4"), 1) for _ in range(3)]
    agent = group(4, "", [], [episode(encode, 1), episode(encode, 1)], [1.0, 0.0])
    run.add_step([group(3, "2+2=", encode("2+2="), [*changed, *rest], [0.0, 1.0, 1.0, 1.0]), agent])
    run.drop(5, DropReason.POISON, "MalformedMessageError: its completions are not in the queue")
    run.drop(6, DropReason.DEGENERATE)
    run.evaluate(0.5, [("7+7=", "14", "14", 1.0)])
    return Made(run, RunView("mine", RunRecords(run.folder)), encode)


def other_weights(version: int) -> PolicyIdentity:
    """Weights of this number that are not the run's."""
    return PolicyIdentity(version, "f" * 16)
