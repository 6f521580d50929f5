"""A text is found in any completion of the step files, in answers that are bounded and go on where they ended."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.synthetic_run import END, SyntheticRun, completion, group, write_tokenizer
from penstock.records import RunRecords
from penstock.view import step_search
from penstock.view.run import RunView
from penstock.view.search import Wanted
from tests.unit.common.view.conftest import Made

NUM_STEPS, NUM_GROUPS = 6, 3


@pytest.fixture
def view(tmp_path: Path) -> RunView:
    """Steps whose completions are "step <number> group <g> number <i>"; the file of step 2 is gone."""
    encode = write_tokenizer(tmp_path / "model")
    run = SyntheticRun(tmp_path / "run", str(tmp_path / "model"))
    run.begin(group_size=2, batch_size=NUM_GROUPS)
    for step in range(1, NUM_STEPS + 1):
        groups = []
        for g in range(NUM_GROUPS):
            texts = [f"step {step} group {g} number {i}" for i in (0, 1)]
            made = [completion([*encode(text), END], 0) for text in texts]
            groups.append(group(step * NUM_GROUPS + g, f"prompt {g}", encode("p"), made, [float(g), None]))
        run.add_step(groups, keep_file=step != 2)
    return RunView("run", RunRecords(run.folder))


def answers(view: RunView, wanted: Wanted, limit: int = 50) -> Iterator[dict[str, Any]]:
    start = None
    while True:
        found = view.search_steps(wanted, start, limit)
        yield found
        if found["next"] is None:
            return
        start = (found["next"]["step"], found["next"]["group"])


def found(view: RunView, limit: int = 50, **wanted: Any) -> list[str]:
    return [line.completion for each in answers(view, Wanted(**wanted), limit) for line in each["lines"]]


def test_every_completion_is_found_the_newest_step_first(view: RunView) -> None:
    everything = found(view)
    assert everything == [
        f"step {step} group {g} number {i}<|end|>" for step in (6, 5, 4, 3, 1) for g in range(3) for i in (0, 1)
    ]
    assert found(view, text="GROUP 1 number 1", step_max=4) == [
        f"step {step} group 1 number 1<|end|>" for step in (4, 3, 1)
    ]
    assert found(view, text="prompt 2", failed=False, step_min=5) == [
        f"step {step} group 2 number 0<|end|>" for step in (6, 5)
    ]
    assert found(view, text="nowhere") == []
    assert found(view, reward_min=2, reward_max=2, step_min=6) == ["step 6 group 2 number 0<|end|>"]
    assert len(found(view, failed=True)) == 15


def test_an_answer_names_the_place_of_a_completion(view: RunView) -> None:
    [line] = view.search_steps(Wanted(text="step 3 group 2 number 0"), None, 50)["lines"]
    assert (line.step, line.ticket, line.index, line.prompt, line.reward) == (3, 11, 0, "prompt 2", 2.0)


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_answers_go_on_where_the_one_before_ended(view: RunView, limit: int) -> None:
    some = list(answers(view, Wanted(text="number 0"), limit))
    assert [line.completion for each in some for line in each["lines"]] == found(view, text="number 0")
    assert all(len(each["lines"]) <= limit for each in some)
    assert sum(each["num_read"] for each in some) == 5 * NUM_GROUPS * 2
    assert sum(each["num_gone"] for each in some) == 1
    progress = [each["num_done"] for each in some]
    assert progress == sorted(progress)
    assert (progress[-1], {each["num_steps"] for each in some}) == (NUM_STEPS, {NUM_STEPS})


def test_an_answer_ends_in_time_and_always_comes_further(view: RunView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_search, "MOST_SECONDS", 0.0)
    some = list(answers(view, Wanted(text="nowhere")))
    assert len(some) == 5 * NUM_GROUPS + 1  # a group each, and the step without a file
    assert [each["num_read"] for each in some].count(2) == 5 * NUM_GROUPS


def test_what_is_found_in_a_long_text_is_shown_with_what_is_around_it(tmp_path: Path) -> None:
    encode = write_tokenizer(tmp_path / "model")
    run = SyntheticRun(tmp_path / "run", str(tmp_path / "model"))
    run.begin(group_size=2, batch_size=1)
    long = completion(encode("a" * 9000 + " needle " + "b" * 9000), 0)
    run.add_step([group(0, "p", encode("p"), [long, completion(encode("b"), 0)], [1.0, 0.0])])
    [line] = RunView("run", RunRecords(run.folder)).search_steps(Wanted(text="Needle"), None, 50)["lines"]
    assert " needle " in line.completion
    assert line.completion.startswith("[8,701 characters] aaa")
    assert line.completion.endswith("bbb [8,701 characters]")


def test_episodes_are_found_and_without_a_tokenizer_ids_are(made: Made, tmp_path: Path) -> None:
    assert [line.ticket for line in made.view.search_steps(Wanted(text="calc 12+3"), None, 50)["lines"]] == [4, 4]
    without = RunView("mine", RunRecords(made.run.folder), tmp_path)
    answer = without.search_steps(Wanted(text=" ".join(map(str, made.encode("five")))), None, 50)
    assert [(line.ticket, line.index) for line in answer["lines"]] == [(0, 2)]
    assert "tokenizer.json" in answer["no_text"]
