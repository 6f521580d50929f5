"""The figures of a step as they are reported: what no token was trained to measure is in none of them."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from penstock_trainer.learner.learner import Learner
from penstock_trainer.reports import figures_of
from penstock_trainer.telemetry.progress import Progress
from penstock_trainer.telemetry.samples import SampleFile
from penstock_trainer.telemetry.status import step_figures
from penstock_trainer.telemetry.tracker_feed import TrackerPosition
from penstock_trainer.telemetry.tracking import step_entry
from tests.unit.trainer.telemetry.tracked_life import LINE
from tests.unit.trainer.trainer_groups import completion, config_for, example_groups, save_tiny_model, scored_group

UNMEASURED = {
    *("loss", "loss_policy", "loss_kl", "loss_sampler_kl", "loss_entropy", "entropy", "behaviour_kl", "reference_kl"),
    *("ratio_min", "ratio_mean", "ratio_max", "clipped_ratio", "clipped_ratio_low", "clipped_ratio_high"),
    *("effective_sample_size_ratio", "masked_non_finite", "length_trained", "length_bias"),
}


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    return Learner(config_for(save_tiny_model(tmp_path / "model")))


@pytest.fixture
def flat(learner: Learner) -> dict[str, float]:
    """The figures of a step whose groups have no signal."""
    answers = [completion([7, 8], [-3.0, -3.0]), completion([9], [-3.0])]
    return figures_of(learner.update([scored_group(0, [4], answers, [1.0, 1.0])], version=0))


def test_figures_of_tokens_are_absent_if_no_token_was_trained(learner: Learner, flat: dict[str, float]) -> None:
    measured = figures_of(learner.update(example_groups(), version=0))
    assert measured.keys() - flat.keys() == UNMEASURED
    assert (flat["num_tokens"], flat["grad_norm"], flat["no_signal_ratio"]) == (0, 0.0, 1.0)
    json.dumps([flat, measured], allow_nan=False)


def test_the_divergence_from_a_teacher_is_a_figure_if_there_is_one(tmp_path: Path, learner: Learner) -> None:
    assert "teacher_kl" not in figures_of(learner.update(example_groups(), version=0))
    teacher = {"path": str(save_tiny_model(tmp_path / "teacher", "qwen3"))}
    taught = Learner(config_for(tmp_path / "model", teacher=teacher)).update(example_groups(), version=0)
    line = replace(LINE, statistics=figures_of(taught))
    assert step_figures(line, "teacher").kl == taught.statistics.teacher_kl != 0
    assert step_figures(LINE, "teacher").kl is None


def test_a_loss_of_tokens_that_are_all_left_out_is_one(learner: Learner) -> None:
    answers = [completion([7], [float("nan")]), completion([9], [float("nan")])]
    found = figures_of(learner.update([scored_group(0, [4], answers, [1.0, 0.0])], version=0))
    assert (found["loss"], found["loss_policy"]) == (0.0, 0.0)
    assert (found["num_non_finite"], found["masked_non_finite"]) == (2, 1.0)
    assert "entropy" not in found


def test_what_was_not_measured_is_unknown_in_the_status_and_no_point_in_trackers(
    tmp_path: Path, flat: dict[str, float]
) -> None:
    progress = Progress(tmp_path / "run")
    progress.add_step(replace(LINE, statistics=flat))
    (line,) = Progress(tmp_path / "run").kept
    shown = step_figures(line, "behaviour")
    assert (shown.loss, shown.kl, shown.entropy, shown.is_finite) == (None, None, None, True)
    assert not line.has_gradient
    entry = step_entry(asdict(line), TrackerPosition(), SampleFile(tmp_path / "run"))
    assert "statistics/num_tokens" in entry.values
    assert not {f"statistics/{name}" for name in UNMEASURED} & entry.values.keys()
