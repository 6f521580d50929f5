"""What the check says of the scores of one function, and that its worker processes end in time."""

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.config import Config
from penstock.errors import RewardError
from penstock_launch.check import command, few_rows
from penstock_launch.check.paths import FEW_ROWS, quick, rows_line
from penstock_launch.check.rewards import ANSWER, EMPTY, RANDOM, Sample, Scored, function_line, reward_lines, score
from penstock_launch.doctor.report import problems
from penstock_reward.processes.messages import Outcome


def scored(*values: float | None) -> list[Scored]:
    texts = (EMPTY, ANSWER, RANDOM)
    outcomes = [Outcome(value, 0.0, "exception" if value is None else None, "boom") for value in values]
    return [Scored("f", "d.jsonl line 1", texts[n % 3], outcome) for n, outcome in enumerate(outcomes)]


def config(folder: Path, source: str, **reward: object) -> Config:
    (folder / "mine.py").write_text(source)
    section = {"functions": {"mine:f": 1.0}, "modules_path": str(folder), **reward}
    document = {"actor": {"path": "m"}, "data": {"train": {"path": "d.jsonl"}}, "reward": section}
    return Config.model_validate(document)


ROWS = [Sample(f"d.jsonl line {n}", f"{n}+1=", str(n + 1), "", {}) for n in range(4)]


def test_means_are_shown_by_kind_of_text() -> None:
    line = function_line("f", scored(0, 1, 0.5, 0, 0, 0.25))
    assert (line.verdict, line.seen) == ("ok", "f: no text 0.00, the row's answer 0.50, random words 0.38")


def test_a_score_that_never_differs_is_a_warning() -> None:
    line = function_line("f", scored(1, 1, 1))
    assert (line.verdict, line.seen.partition(" (")[0]) == ("warning", "f gives 1 to each of 3 texts")
    assert "no gradient" in line.advice


def test_calls_that_fail_are_counted_by_their_reasons_with_the_first_row_of_each() -> None:
    some, all_of_them = function_line("f", scored(None, 1, 0)), function_line("f", scored(None, None, None))
    assert (some.verdict, all_of_them.verdict) == ("warning", "problem")
    assert some.seen.startswith("f: 1 of 3 calls failed: 1 x boom (on no text of d.jsonl line 1). The others: ")
    assert "3 of 3 calls failed" in all_of_them.seen


async def test_a_function_sees_what_the_reward_service_gives_it(tmp_path: Path) -> None:
    source = (
        "def f(prompt, completion, answer, metadata):\n"
        "    return float(completion == answer) + 10 * float(prompt == metadata['prompt'])\n"
    )
    rows = [Sample("line 1", "1+1=", "2", "", {"prompt": "1+1="})]
    scores = await score(config(tmp_path, source), rows, 60)
    assert [(each.text, each.outcome.value) for each in scores.calls] == [(EMPTY, 10), (ANSWER, 11), (RANDOM, 10)]


async def test_one_call_that_hangs_says_little_of_a_function_that_asks_a_service(tmp_path: Path) -> None:
    source = (
        "import time\n"
        "def f(prompt, completion, answer, metadata):\n"
        "    if prompt == '1+1=' and not completion:\n"
        "        time.sleep(600)\n"
        "    return float(completion == answer)\n"
    )
    scores = await score(config(tmp_path, source, timeout_seconds=2), ROWS, 60)
    assert len(scores.calls) == 3 * len(ROWS)
    line = function_line("f", scores.calls)
    assert (line.verdict, line.seen.partition(" calls failed: 1 x ")[0]) == ("warning", "f: 1 of 12")
    assert "killed after 2 s" in line.seen


async def test_a_function_that_is_too_slow_is_called_twice(tmp_path: Path) -> None:
    source = "import time\ndef f(prompt, completion, answer, metadata):\n    time.sleep(600)\n"
    scores = await score(config(tmp_path, source, timeout_seconds=0.2), ROWS, 60)
    assert [each.outcome.kind for each in scores.calls] == ["timeout", "timeout"]
    assert function_line("f", scores.calls).verdict == "problem"


async def test_without_an_answer_in_time_there_is_an_error(tmp_path: Path) -> None:
    source = "import time\ntime.sleep(600)\n"
    with pytest.raises(RewardError, match=r"no reward function answered within 0\.5 s"):
        await score(config(tmp_path, source), ROWS, 0.5)


def test_rows_that_choose_their_reward_are_scored_by_it(tmp_path: Path) -> None:
    source = "def f(prompt, completion, answer, metadata):\n    return 1.0\n"
    rows = [Sample("line 1", "1+1=", "2", "exact_match", {})]
    [line] = reward_lines(config(tmp_path, source), rows)
    assert (line.verdict, line.seen) == ("ok", "exact_match: no text 0.00, the row's answer 1.00, random words 0.00")


def several(folder: Path, source: str, *, of_rows: int = 12) -> Config:
    """Two training sets and two held-out ones; each row says of which it is."""
    (folder / "mine.py").write_text(source)

    def written(name: str) -> str:
        rows = [{"prompt": f"{name} {number}", "answer": name} for number in range(of_rows)]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return str(folder / f"{name}.jsonl")

    return Config.model_validate(
        {
            "actor": {"path": "m"},
            "data": {
                "train_sets": {
                    "easy": {"path": written("easy")},
                    "hard": {"path": written("hard"), "reward": "mine:g"},
                },
                "eval": {"path": written("main")},
            },
            "eval": {"sets": {"own": {"path": written("own"), "functions": {"mine:h": 1.0}}}},
            "reward": {"functions": {"mine:f": 1.0, "mine:g": 0.0}, "modules_path": str(folder)},
        }
    )


OF_SETS = """
def f(prompt, completion, answer, metadata):
    assert answer in ("easy", "main"), answer
    return float(completion == answer)
def g(prompt, completion, answer, metadata):
    assert answer == "hard", answer
    return float(completion == answer)
def h(prompt, completion, answer, metadata):
    assert answer == "own", answer
    return 0.5
"""


def test_each_set_is_scored_by_its_own_functions(tmp_path: Path) -> None:
    """Held-out sets, too; a function that never differs on one set is named with the set."""
    made = several(tmp_path, OF_SETS)
    lines = command.reward_lines(made)
    assert {line.verdict for line in lines[:3]} == {"ok"}
    assert [line.seen.partition(": no text")[0] for line in lines[:3]] == [
        "mine:f on data.train_sets.easy",
        "mine:g on data.train_sets.hard",
        "mine:f on data.eval",
    ]
    assert lines[3].verdict == "warning"
    assert lines[3].seen.startswith("mine:h on eval.sets.own gives 0.5 to each of 30 texts")
    assert len(lines) == 4


def test_a_function_that_fails_on_one_set_is_named_with_it(tmp_path: Path) -> None:
    made = several(tmp_path, OF_SETS.replace('answer in ("easy", "main")', 'answer == "easy"'))
    [failed] = [line for line in command.reward_lines(made) if line.verdict == "problem"]
    assert failed.seen.startswith("mine:f on data.eval: 30 of 30 calls failed")
    assert "main.jsonl line 1" in failed.seen


def test_when_time_runs_out_every_set_has_been_tried(tmp_path: Path) -> None:
    made = several(tmp_path, OF_SETS)
    samples = few_rows.samples(made, few_rows.of_sets(made))
    assert [sample.key for sample in samples[:5]] == [
        "data.train_sets.easy",
        "data.train_sets.hard",
        "data.eval",
        "eval.sets.own",
        "data.train_sets.easy",
    ]
    assert len(samples) == 4 * FEW_ROWS


def test_a_set_with_a_problem_keeps_no_other_from_being_tried(tmp_path: Path) -> None:
    made = several(tmp_path, OF_SETS)
    (tmp_path / "easy.jsonl").unlink()
    (tmp_path / "own.jsonl").write_text("not JSON")
    wrong = {line.what for line in problems(quick(made).lines)} & {*few_rows.set_keys(made)}
    assert wrong == {"data.train_sets.easy", "eval.sets.own"}
    assert [line.seen.partition(": no text")[0] for line in command.reward_lines(made, wrong)] == [
        "mine:g on data.train_sets.hard",
        "mine:f on data.eval",
    ]
    [line] = command.reward_lines(made, {*few_rows.set_keys(made)})
    assert line.seen.startswith("first correct data.eval and data.train_sets.easy and data.train_sets.hard")


def test_the_first_rows_of_a_set_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = several(tmp_path, OF_SETS)
    opened: list[str] = []
    real = Path.open

    def counted(path: Path, *arguments: Any, **named: Any) -> Any:
        opened.append(path.name)
        return real(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", counted)
    for each in made.held_out_sets:
        assert rows_line(made, each.dataset, each.key, each).verdict == "ok"
    assert [name for name in opened if name.endswith(".jsonl")] == ["main.jsonl", "own.jsonl"]
