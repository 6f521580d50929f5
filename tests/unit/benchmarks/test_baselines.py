"""The baselines: what is measured is what the page says, and the page is what was measured."""

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from benchmarks.baselines import page as pages
from benchmarks.baselines.__main__ import PAGE
from benchmarks.baselines.cells import Cell, grid
from benchmarks.baselines.lines import Line, add_line, read_lines
from benchmarks.baselines.measure import measured
from benchmarks.baselines.objectives import OBJECTIVES, loss_keys
from benchmarks.baselines.scores import area, final_score, interval, worst_fall
from benchmarks.baselines.sorting.model import make_model
from benchmarks.baselines.sorting.sampler import Sampler
from benchmarks.baselines.sorting.task import END, draw_demonstration, ids_of, score, text_of
from penstock.config.loss import LossSection

CELL = Cell("ppo", 2, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that was not warmed up: its answers are noise, and its update is one like any other."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def line(model: Path) -> Line:
    return measured(CELL, model, num_steps=6)


def test_a_run_trains_as_late_as_its_cell_says(line: Line) -> None:
    assert line.mean_lag == 2
    assert len(line.reward) == len(line.effective_sample_size) == 6


def test_a_run_can_be_repeated(model: Path, line: Line) -> None:
    again = measured(CELL, model, num_steps=6)
    assert msgspec.structs.replace(again, cpu_seconds=0.0) == msgspec.structs.replace(line, cpu_seconds=0.0)


def test_the_sampler_reports_the_log_probabilities_of_the_model() -> None:
    """Prompts of unequal length are padded on the left; each alone, whole and without a cache, says the same."""
    torch.manual_seed(1)
    model = make_model().eval()
    prompts = [ids_of("312="), ids_of("9018273645="[-7:])]
    for prompt, sampled in zip(prompts, Sampler(model, seed=3).sample(prompts), strict=True):
        with torch.inference_mode():
            logits_TV = model(input_ids=torch.tensor([[*prompt, *sampled.ids]])).logits[0]
        expected = logits_TV.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(sampled.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sampled.logprobs), expected, atol=1e-5, rtol=1e-5)
        assert END not in sampled.ids[:-1]


def test_only_ascending_is_right() -> None:
    texts = ("1223.", "3221.", "3122.", "1223", "123.", "1223..")
    assert [score("3122=", text) for text in texts] == [1, 0, 0, 0, 0, 0]


def test_demonstrations_show_each_order_about_as_often_as_is_said() -> None:
    generator = np.random.default_rng(0)
    pairs = [draw_demonstration(generator) for _ in range(2000)]
    assert 0.28 < sum(score(*pair) for pair in pairs) / len(pairs) < 0.37  # 0.30, and copies that are in order


def test_a_text_survives_its_ids() -> None:
    assert text_of(ids_of("610=016.")) == "610=016."


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_is_one_that_the_configuration_takes(objective: str) -> None:
    assert LossSection.model_validate(loss_keys(objective)).num_minibatches == 4


def test_lines_are_added_once_and_in_order(tmp_path: Path, line: Line) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    other = msgspec.structs.replace(line, cell=Cell("cispo", 0, 1))
    changed = msgspec.structs.replace(line, cpu_seconds=9.0)
    for each in (line, other, changed):
        add_line(path, each)
    assert list(read_lines(path, Line).values()) == [other, changed]


def test_scores_and_intervals(line: Line) -> None:
    measured_line = msgspec.structs.replace(line, held_out=(0.3, 0.9, 0.6, 0.9, 0.9), reward=(0.0, 0.5, 1.0))
    assert final_score(measured_line) == pytest.approx(0.8)
    assert worst_fall(measured_line) == pytest.approx(0.3)
    assert area(measured_line) == pytest.approx(0.5)
    found = interval([0.7, 0.8, 0.9, 0.9, 1.0])
    assert (found.mean, found.half_width) == pytest.approx((0.86, 2.776 * 0.1140175 / 5**0.5), rel=1e-4)


def test_the_page_is_what_the_raw_lines_draw() -> None:
    assert pages.drifted(PAGE, pages.read_measured(PAGE)) == []


def test_every_mark_of_the_page_is_drawn() -> None:
    text = PAGE.read_text(encoding="utf-8")
    emptied = re.sub(r"(<!-- drawn: .*? -->\n).*?(?=<!-- end -->)", r"\1", text, flags=re.DOTALL)
    assert emptied.count("-->\n<!-- end -->") == text.count("<!-- drawn:") > 0
    assert pages.drawn_page(emptied, pages.read_measured(PAGE)) == text
    with pytest.raises(KeyError, match="unknown"):
        pages.drawn_page("<!-- drawn: unknown -->\n<!-- end -->", pages.Measured())


def test_a_figure_that_was_edited_is_seen(tmp_path: Path, line: Line) -> None:
    page = tmp_path / "baselines.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    lines = pages.Measured({CELL: msgspec.structs.replace(line, held_out=(0.25, 0.25, 0.25))})
    pages.write_page(page, lines)
    assert pages.drifted(page, lines) == []
    page.write_text(page.read_text(encoding="utf-8").replace("0.25 \u00b1 nan", "0.99 \u00b1 nan"), encoding="utf-8")
    (tmp_path / "baselines" / "scores.svg").write_text("<svg/>")
    assert pages.drifted(page, lines) == ["baselines.md", "baselines/scores.svg"]


def test_the_grid_has_each_cell_once() -> None:
    cells = list(grid())
    assert len(set(cells)) == len(cells) == len(OBJECTIVES) * 5 * 5
