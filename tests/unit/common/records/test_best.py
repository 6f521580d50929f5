"""The best evaluation and the patience after it, against transformers' own early stopping and against brute force."""

from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from penstock.records.best import Judged, Patience, best_of, judged, patience_of
from tests.unit.common.records.test_figures import evaluation


def line(steps: int, accuracy: float, version: int | None = None, **changes: Any) -> dict[str, Any]:
    made = steps if version is None else version
    scored = {"accuracy": accuracy, "num_scored": 4, "oldest_version": made, "newest_version": made}
    return evaluation(steps, 0.1, **{**scored, **changes})


def of(*values: float) -> list[Judged]:
    return [Judged(8 * n, value, 8 * n) for n, value in enumerate(values)]


def test_only_evaluations_of_one_set_that_ask_the_same_are_compared() -> None:
    lines = [
        line(16, 0.5, set="main"),
        line(0, 0.75),
        line(8, 0.25, newest_version=9),
        line(4, 1.0, prompts="others"),
        line(12, 1.0, success=0.5),
        line(14, 0.9, num_failed=4, num_scored=0),
        line(16, 1.0, set="hard"),
    ]
    assert judged(lines, "main", "accuracy") == [Judged(0, 0.75, 0), Judged(8, 0.25, None), Judged(16, 0.5, 16)]
    assert judged(lines, "main", "reward") == [Judged(0, 0.1, 0), Judged(8, 0.1, None), Judged(16, 0.1, 16)]
    assert judged(lines, "hard", "accuracy") == [Judged(16, 1.0, 16)]
    assert judged(lines, "none", "accuracy") == []


def test_of_equal_ones_the_earliest_is_the_best() -> None:
    assert best_of(of(0.5, 0.75, 0.75, 0.25)) == Judged(8, 0.75, 8)
    assert best_of(of(0.5, 0.75, 0.75), lambda each: each.steps > 8) == Judged(16, 0.75, 16)
    assert best_of([]) is None


def stops_at(values: list[float], patience: int) -> int | None:
    """Where transformers ends: the place of the evaluation after which its trainer would train no further."""
    callback, control = EarlyStoppingCallback(early_stopping_patience=patience), TrainerControl()
    arguments = SimpleNamespace(metric_for_best_model="accuracy", greater_is_better=True)
    state = TrainerState()
    for place, value in enumerate(values):
        callback.on_evaluate(cast(TrainingArguments, arguments), state, control, {"eval_accuracy": value})
        if control.should_training_stop:
            return place
        if state.best_metric is None or value > state.best_metric:  # as its Trainer does
            state.best_metric = value
    return None


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_without_a_least_difference_a_run_ends_where_transformers_ends_it(patience: int) -> None:
    random = Random(patience)
    ends = []
    for _ in range(200):
        values = [random.randrange(9) / 8 for _ in range(12)]
        found = (patience_of(of(*values[: n + 1]), 0.0) for n in range(len(values)))
        end = next((n for n, each in enumerate(found) if each is not None and each.waited >= patience), None)
        assert end == stops_at(values, patience)
        ends.append(end)
    assert len(set(ends)) > 3


def test_better_is_what_exceeds_the_best_by_more_than_the_least_difference() -> None:
    """Small gains do not add up while the best stays, and a gain of exactly the difference is none."""
    assert patience_of(of(0.5, 0.625), 0.125) == Patience(Judged(0, 0.5, 0), 1)
    assert patience_of(of(0.5, 0.5625, 0.625, 0.75), 0.125) == Patience(Judged(24, 0.75, 24), 0)
    assert patience_of([], 0.0) is None
    random = Random(0)
    for _ in range(200):
        values = [random.randrange(17) / 16 for _ in range(10)]
        best, waited = values[0], 0
        for value in values[1:]:
            best, waited = (value, 0) if value > best + 0.125 else (best, waited + 1)
        found = patience_of(of(*values), 0.125)
        assert found is not None
        assert (found.best.value, found.waited) == (best, waited)
