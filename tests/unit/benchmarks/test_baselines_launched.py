"""The launched tasks of the baselines: each cell has a configuration, and a run's folder becomes its line."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.baselines import page as pages
from benchmarks.baselines.__main__ import PAGE
from benchmarks.baselines.cells import SEEDS, Cell, lags_grid, launched_grid
from benchmarks.baselines.launched import tables
from benchmarks.baselines.launched.measure import CPU_SECONDS, DIGEST, digest, folder_name, line_of
from benchmarks.baselines.launched.tasks import OWN_LOSS, REASONING, TASKS, configuration
from benchmarks.baselines.lines import LaunchedLine, TrlLine, add_keys, add_line, read_keys, read_lines
from benchmarks.baselines.trl import NUM_STEPS, measure, trl_cells
from penstock.config.identity import identifying_keys
from penstock.records.files import EVALUATIONS_FILE, STEPS_FILE
from penstock_trainer.data.datasets import load_rows
from penstock_trainer.data.tokenizer import load_vocabulary
from tests.real_model import real_model

CELL = Cell(OWN_LOSS, 1, 1, "addition")
GRID = [*launched_grid(), *lags_grid()]


def step(number: int, **statistics: float) -> dict[str, Any]:
    shown = {"effective_sample_size_ratio": 0.9, "behaviour_kl": 0.01, **statistics}
    return {
        "step": number,
        "reward_mean": number / 10,
        "staleness_mean": float(number > 0),
        "generated_tokens": 100,
        "statistics": shown,
    }


def evaluation(steps: int, accuracy: float) -> dict[str, Any]:
    return {"steps": steps, "accuracy": accuracy, "rewards": {"exact_match": {"mean": accuracy, "num_failed": 0}}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of three steps, stopped once; one step had no gradient."""
    run = tmp_path / folder_name(CELL)
    run.mkdir()
    steps = [step(0), step(1, behaviour_kl=float("nan")), step(2)]
    evaluations = [evaluation(3, 0.75), evaluation(0, 0.25)]  # in the order in which they ended
    for name, lines in ((STEPS_FILE, steps), (EVALUATIONS_FILE, evaluations)):
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.with_suffix(CPU_SECONDS).write_text("[10.5, 2.0]")
    run.with_suffix(DIGEST).write_text("0123456789abcdef")
    return run


def test_a_runs_folder_becomes_its_line(run: Path) -> None:
    line = line_of(CELL, run, "1", shared=True)
    assert line.reward == (0.0, 0.1, 0.2)
    assert line.configuration == "0123456789abcdef"  # of the run, which may not be today's
    assert line.held_out == ((0, 0.25), (3, 0.75))
    assert line.held_out_rewards == {"exact_match": (0.25, 0.75)}
    assert line.behaviour_kl == (0.01, None, 0.01)
    assert (line.tokens, line.cpu_seconds, line.mean_lag, line.beside_other_work) == (300, 12.5, 0.667, True)


def test_a_line_survives_its_file(run: Path, tmp_path: Path) -> None:
    line = line_of(CELL, run, "1", shared=False)
    add_line(tmp_path / "lines.jsonl", line)
    assert read_lines(tmp_path / "lines.jsonl", LaunchedLine) == {CELL: line}


def test_a_table_says_what_was_measured_and_what_was_not(run: Path) -> None:
    line = line_of(CELL, run, "1", shared=True)
    other = msgspec.structs.replace(line, cell=Cell(OWN_LOSS, 1, 2, "addition"), held_out=((0, 0.35), (3, 1.0)))
    rows = {row.split(" | ")[0]: row for row in tables.learning({CELL: line, other.cell: other}).splitlines()[2:]}
    assert rows["| addition"].startswith("| addition | 2 of 5 | 3 | 0.30 (0.25 to 0.35) | 0.88 (0.75 to 1.00) |")
    assert f"0 of 5 | {tables.NOT_MEASURED}" in rows["| calculator"]
    assert "2 of them beside other work" in tables.state({CELL: line, other.cell: other})


def test_trl_stands_beside_the_runs_of_its_task(run: Path, tmp_path: Path) -> None:
    line = line_of(CELL, run, "1", shared=True)
    (cell,) = trl_cells([1])
    trl = TrlLine(cell, 3, (0.2, 0.3, 0.4), ((0, 0.5), (2, 0.95), (3, 1.0)), 9.0, True, {"trl": "1.16.0"}, "AMD")
    add_line(tmp_path / "trl.jsonl", trl)
    path = tmp_path / "trl.jsonl"
    assert measure([cell], path, print, shared=True) == 0  # nothing is trained twice
    rows = tables.beside_trl({CELL: line}, read_lines(path, TrlLine)).splitlines()
    assert rows[2] == "| Penstock | 1 of 5 | 0.25 | 0.75 | 0.10 | 0.10 | not by all | 12 |"
    assert rows[3] == "| TRL, code | 1 of 5 | 0.50 | 1.00 | 0.30 | 0.30 | 2 | 9 |"
    assert rows[-1] == "TRL's runs: trl 1.16.0."
    assert tables.beside_trl({}, {}).count(tables.NOT_MEASURED) == 2


def test_lags_that_were_reached_stand_beside_their_bounds(run: Path) -> None:
    cell = Cell("ppo", 2, 1, "addition")
    line = msgspec.structs.replace(line_of(CELL, run, "1", shared=True), cell=cell)
    rows = [row for row in tables.lags({cell: line, CELL: line}).splitlines() if tables.NOT_MEASURED not in row]
    assert rows[2:] == ["| ppo | 2 | 1 of 5 | 0.67 | 0.75 | 0.10 | 0.90 | 0.010 |"]
    assert "1 of 1 |" not in tables.learning({cell: line})


def test_trl_is_trained_as_long_as_penstock_is() -> None:
    measured = pages.read_measured(PAGE)
    own = [line for cell, line in measured.launched.items() if (cell.task, cell.objective) == ("addition", OWN_LOSS)]
    assert {line.num_steps for line in own} == {NUM_STEPS}
    assert set(measured.trl) <= set(trl_cells(SEEDS))


@pytest.mark.parametrize("cell", GRID, ids=folder_name)
def test_each_cell_has_its_configuration(cell: Cell) -> None:
    config = configuration(cell.task, cell.objective, cell.lag, cell.seed)
    assert (config.run.seed, config.staleness.max_staleness) == (cell.seed, cell.lag)


def test_no_two_cells_have_the_same_configuration() -> None:
    assert len({digest(cell) for cell in GRID}) == len(GRID)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if REASONING in task.files])
def test_no_held_out_question_of_reasoning_gym_is_trained(name: str) -> None:
    config = configuration(name, OWN_LOSS, 1, 1)
    assert config.data.eval is not None
    train, held_out = load_rows(config.data.train), load_rows(config.data.eval, "data.eval")
    assert (len(train), len(held_out)) == (320, 64)
    assert config.run.max_steps * config.data.batch_size == len(train)
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    tokenizer = load_vocabulary(str(real_model())).tokenizer
    longest = max(len(tokenizer.encode(row.answer)) for row in (*train, *held_out))
    assert longest < config.sampling.max_new_tokens  # and the end of the turn


def test_an_objective_of_the_study_takes_the_place_of_the_tasks_own() -> None:
    own = configuration("addition", OWN_LOSS, 4, 1)
    other = configuration("addition", "gspo", 4, 1)
    assert (own.loss.surrogate, other.loss.surrogate, other.staleness.max_staleness) == ("ppo", "gspo", 4)


def test_rows_of_a_folder_change_no_digest_but_the_seed_does() -> None:
    cell = Cell(OWN_LOSS, TASKS["gsm8k"].lag, 1, "gsm8k")
    assert configuration(*("gsm8k", OWN_LOSS, 1, 1), rows="/rows").data.train.path == "/rows"
    assert digest(cell) != digest(msgspec.structs.replace(cell, seed=2))


def test_a_line_outlives_keys_that_came_later_but_no_change_of_its_own(tmp_path: Path) -> None:
    today = sorted(identifying_keys(configuration(CELL.task, CELL.objective, CELL.lag, CELL.seed)))
    earlier = [name for name in today if name != "data.prompt_template"]
    assert [add_keys(tmp_path, names) for names in (earlier, today, reversed(earlier))] == ["1", "2", "1"]
    assert read_keys(tmp_path) == {"1": earlier, "2": today}
    assert digest(CELL, today) == digest(CELL) != digest(CELL, earlier)
    assert digest(CELL, earlier) != digest(msgspec.structs.replace(CELL, seed=2), earlier)
    assert digest(CELL, [*earlier, "gone"]) != digest(CELL, earlier)


def test_each_committed_line_was_measured_with_the_configuration_of_today() -> None:
    """One of another configuration is measured again, or its task keeps its keys."""
    launched, names = pages.read_measured(PAGE).launched, read_keys(PAGE.with_suffix(""))
    changed = [str(cell) for cell, line in launched.items() if line.configuration != digest(cell, names[line.keys])]
    assert changed == []
    assert set(launched) <= set(GRID)
