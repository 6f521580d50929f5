"""The figures of a run: steps and evaluations on disk, generation time, gap to ideal, status and summary."""

import json
import math
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.broker.trainer import Counters
from penstock.contracts import DropReason, RolloutGroup, from_body, to_body
from penstock.contracts.status import TrainerStatus
from penstock.errors import PenstockError
from penstock.records.extent import expected_steps
from penstock.records.figures import Timing
from penstock.records.run import RunRecords
from penstock_trainer.rollouts.generation_time import GenerationTime
from penstock_trainer.telemetry.metrics import TrainerMetrics
from penstock_trainer.telemetry.progress import KEPT_STEPS, NOTED_EVERY, RECENT_STEPS, Progress
from penstock_trainer.telemetry.records import EvalResult, Histogram, StepLine
from penstock_trainer.telemetry.status import Status
from penstock_trainer.telemetry.summary import make_summary, summary_bytes
from tests.small_disk import full_disk
from tests.unit.trainer.trainer_groups import completion, scored_group

LINE = StepLine(
    step=0,
    version=1,
    epoch=0.1,
    tickets=(0, 1),
    started_at=100.0,
    ended_at=102.0,
    seconds={"step": 2.0, "wait": 0.5, "forward_backward": 1.0, "optimizer": 0.25},
    generation_seconds=1.6,
    generated_tokens=32,
    reward_mean=0.0,
    staleness_max=1,
    staleness_mean=0.5,
    statistics={"loss": 0.1},
)
EVAL = EvalResult(0, 0.25, 0.25, 4, 4, 0, 0, 0, (), num_trained=1)


def add_steps(progress: Progress, rewards: list[float]) -> None:
    for step, reward in enumerate(rewards):
        ended_at = 102.0 + 2 * step
        progress.add_step(replace(LINE, step=step, reward_mean=reward, started_at=ended_at - 2, ended_at=ended_at))


def test_a_line_without_room_says_so_and_leaves_the_others(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "run")
    add_steps(progress, [0.0])
    with full_disk(), pytest.raises(PenstockError, match=r"steps\.jsonl cannot be written .* run\.root"):
        progress.add_step(replace(LINE, step=1))
    assert [line.step for line in Progress(tmp_path / "run").step_lines()] == [0]


def test_lines_survive_a_restart_and_a_step_is_written_once(tmp_path: Path) -> None:
    first = Progress(tmp_path / "run")
    add_steps(first, [0.0, 0.5])
    first.add_eval(EVAL)
    second = Progress(tmp_path / "run")
    assert second.recent == first.recent
    assert list(second.evals()) == json.loads(json.dumps([asdict(EVAL)]))
    second.add_step(replace(LINE, step=1, reward_mean=9.0))
    assert [line.reward_mean for line in second.step_lines()] == [0.0, 0.5]
    assert len((tmp_path / "run" / "steps.jsonl").read_text().splitlines()) == 2
    assert (first.last_eval.accuracy, second.last_eval.accuracy) == (0.25, 0.25)
    assert Progress(tmp_path / "other").last_eval.accuracy is None


def test_the_range_of_rewards_is_that_of_all_steps(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "run")
    progress.add_step(LINE)
    assert progress.reward_range() is None
    for step, rewards in enumerate(([0.25, 0.5], [1.0], *[[0.5]] * KEPT_STEPS), start=1):
        progress.add_step(replace(LINE, step=step, histograms={"reward": Histogram.of(rewards)}))
    assert Progress(tmp_path / "run").reward_range() == (0.25, 1.0)


def test_lines_that_the_ledger_lacks_are_forgotten(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "run")
    add_steps(progress, [0.0, 0.5, 1.0])
    progress.forget_from(1)
    assert [progress.has_step(step) for step in range(3)] == [True, False, False]
    progress.add_step(replace(LINE, step=1, reward_mean=9.0))
    assert [line.reward_mean for line in Progress(tmp_path / "run").recent] == [0.0, 9.0]


def test_evaluations_of_weights_that_the_ledger_lacks_are_forgotten(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "run")
    add_steps(progress, [0.0, 0.5, 1.0])
    for steps, accuracy in ((0, 0.1), (1, 0.2), (3, 0.9)):
        progress.add_eval(replace(EVAL, steps=steps, accuracy=accuracy))
    progress.forget_from(1)
    assert [line["steps"] for line in progress.evals()] == [0, 1]
    assert progress.last_eval.accuracy == 0.2
    progress.add_eval(replace(EVAL, steps=3, accuracy=0.4))
    assert Progress(tmp_path / "run").last_eval.accuracy == 0.4


def test_an_evaluation_is_written_once_for_a_number_of_steps(tmp_path: Path) -> None:
    Progress(tmp_path).add_eval(EVAL)
    again = Progress(tmp_path)
    assert (again.has_eval(0), again.has_eval(10)) == (True, False)
    again.add_eval(replace(EVAL, accuracy=1.0))
    assert [line["accuracy"] for line in again.evals()] == [EVAL.accuracy]


def test_an_evaluation_that_ends_late_is_not_the_last(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    add_steps(progress, [0.0])
    for steps, accuracy in ((20, 0.9), (10, 0.5), (0, 0.1)):
        progress.add_eval(replace(EVAL, steps=steps, accuracy=accuracy))
    summary = summary_of(tmp_path)
    assert (summary["heldout_accuracy_start"], summary["heldout_accuracy_end"]) == (0.1, 0.9)
    assert (summary["heldout_steps_start"], summary["heldout_steps_end"]) == (0, 20)
    for each in (progress, Progress(tmp_path)):
        assert each.last_eval.accuracy == 0.9


def test_a_line_that_a_crash_cut_off_is_removed(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    add_steps(progress, [0.0])
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('{"step": 1, "rew')
    again = Progress(tmp_path)
    assert [line.step for line in again.recent] == [0]
    again.add_step(replace(LINE, step=1))
    assert [json.loads(line)["step"] for line in (tmp_path / "steps.jsonl").read_text().splitlines()] == [0, 1]


def test_what_is_not_a_number_is_read_again(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    progress.add_step(replace(LINE, statistics={"loss": math.nan, "grad_norm": math.inf}))
    [line] = Progress(tmp_path).recent
    assert math.isnan(line.statistics["loss"])
    assert line.statistics["grad_norm"] == math.inf


@given(st.lists(st.integers(0, 12), max_size=30), st.integers(0, 13))
def test_which_steps_are_known(steps: list[int], num_steps: int) -> None:
    """The order does not matter: a replay may report an earlier step late."""
    with TemporaryDirectory() as folder:
        progress = Progress(Path(folder))
        for step in steps:
            progress.add_step(replace(LINE, step=step, staleness_max=step))
        expect(progress, set(steps))
        expect(Progress(Path(folder)), set(steps))
        progress.forget_from(num_steps)
        expect(progress, {step for step in steps if step < num_steps})


def expect(progress: Progress, steps: set[int]) -> None:
    assert {step for step in range(14) if progress.has_step(step)} == steps
    assert (progress.num_steps, progress.highest_step) == (len(steps), max(steps, default=-1))
    assert progress.staleness_max == max(steps, default=0)


def test_a_start_reads_only_the_lines_since_the_last_note(tmp_path: Path) -> None:
    """What is known of the lines before is in a file beside them; they are not looked at again."""
    write_lines(tmp_path / "steps.jsonl", NOTED_EVERY)
    Progress(tmp_path)
    lines = (tmp_path / "steps.jsonl").read_bytes().splitlines(keepends=True)
    lines[5] = lines[5].replace(b'"step": 5', b'"pets": 5')  # as long as before, and no line of a step
    (tmp_path / "steps.jsonl").write_bytes(b"".join(lines))
    again = Progress(tmp_path)
    again.add_step(replace(LINE, step=NOTED_EVERY, staleness_max=7))
    for progress in (again, Progress(tmp_path)):
        assert (progress.num_steps, progress.highest_step, progress.staleness_max) == (NOTED_EVERY + 1, NOTED_EVERY, 7)
        assert [line.step for line in progress.kept] == list(range(NOTED_EVERY + 1 - KEPT_STEPS, NOTED_EVERY + 1))
        assert progress.has_step(5)
        assert not progress.has_step(NOTED_EVERY + 1)


@pytest.mark.parametrize("change", ["shorter", "another", "no note", "broken note"])
def test_a_note_of_other_lines_is_not_used(tmp_path: Path, change: str) -> None:
    lines, note = tmp_path / "steps.jsonl", tmp_path / "steps_read.json"
    write_lines(lines, NOTED_EVERY)
    assert Progress(tmp_path).num_steps == NOTED_EVERY
    if change == "shorter":
        write_lines(lines, 10)
    elif change == "another":
        write_lines(lines, NOTED_EVERY, first=NOTED_EVERY)
    elif change == "no note":
        note.unlink()
    else:
        note.write_text('{"num_bytes": 3')
    progress, first = Progress(tmp_path), NOTED_EVERY if change == "another" else 0
    num_steps = 10 if change == "shorter" else NOTED_EVERY
    assert (progress.num_steps, progress.highest_step) == (num_steps, first + num_steps - 1)
    assert progress.has_step(first)
    assert not progress.has_step(first + num_steps)


def test_steps_that_the_ledger_lacks_are_forgotten_in_the_note_too(tmp_path: Path) -> None:
    write_lines(tmp_path / "steps.jsonl", NOTED_EVERY)
    progress = Progress(tmp_path)
    progress.forget_from(NOTED_EVERY - 5)
    for each in (progress, Progress(tmp_path)):
        assert (each.num_steps, each.highest_step) == (NOTED_EVERY - 5, NOTED_EVERY - 6)


def write_lines(path: Path, count: int, first: int = 0) -> None:
    line = json.dumps(asdict(LINE))
    steps = (line.replace('"step": 0', f'"step": {step}', 1) for step in range(first, first + count))
    path.write_text("".join(f"{each}\n" for each in steps))


def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    held = []
    for number in (1_000, 20_000):
        write_lines(tmp_path / "steps.jsonl", number)
        tracemalloc.start()
        progress = Progress(tmp_path)
        status = Status("r", 1, 2, 10, 20, progress)
        assert status.shown().staleness_max == 1
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert progress.has_step(number - 1)
        assert not progress.has_step(number)
        assert [each.step for each in progress.recent] == list(range(number - RECENT_STEPS, number))
    assert held[1] < held[0] + 40_000  # of the 19,000 lines more, each would be a hundred bytes or more


def test_the_moving_average_decides_when_a_reward_is_reached(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    assert progress.reward_average is None
    add_steps(progress, [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert progress.reward_average == 1.0
    assert summary_of(tmp_path)["seconds_to_reward_0_9"] == 14.0  # earlier windows of five steps are at 0.8
    progress.forget_from(6)
    assert summary_of(tmp_path)["seconds_to_reward_0_9"] is None


def test_the_gap_is_step_time_over_the_longer_of_generation_and_training(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    assert progress.gap_to_ideal is None
    progress.add_step(replace(LINE, seconds={"step": 9.0}))
    assert progress.gap_to_ideal == pytest.approx(9.0 / 1.6 - 1)  # there are no other steps
    for step in range(1, 4):
        progress.add_step(replace(LINE, step=step))
    assert progress.gap_to_ideal == pytest.approx(2.0 / 1.6 - 1)
    for step in range(4, 4 + RECENT_STEPS):
        progress.add_step(replace(LINE, step=step, generation_seconds=0.5))
    assert progress.gap_to_ideal == pytest.approx(2.0 / 1.25 - 1)
    times = [(line.seconds, line.generation_seconds) for line in progress.recent]
    assert Timing(times).mean_seconds["step"] == 2.0


def request(started_at: float, ended_at: float, num_tokens: int = 2) -> RolloutGroup:
    each = completion([5] * num_tokens, [-1.0] * num_tokens)
    group = scored_group(0, [1], [each, each], [0.0, 1.0]).group
    return msgspec.structs.replace(group, started_at=started_at, ended_at=ended_at)


def test_overlapping_requests_count_once(tmp_path: Path) -> None:
    generation = GenerationTime()
    for interval in [(10.0, 12.0), (14.0, 15.0), (11.0, 13.0), (11.5, 12.5)]:
        generation.add(request(*interval))
    assert generation.take_busy_seconds() == pytest.approx(4.0)
    assert generation.take_tokens() == 16
    assert (generation.take_busy_seconds(), generation.take_tokens()) == (0.0, 0)
    generation.add(request(12.0, 14.5))  # joins both intervals: one second is new
    assert generation.take_busy_seconds() == pytest.approx(1.0)
    assert generation.first_started_at == 10.0


def test_a_server_whose_clock_was_set_back_takes_no_seconds_away() -> None:
    generation, metrics = GenerationTime(), TrainerMetrics()
    for interval in [(100.0, 90.0), (120.0, 122.0), (121.0, 119.0)]:
        generation.add(request(*interval))
        seconds = generation.take_busy_seconds()
        metrics.observe_step(replace(LINE, generation_seconds=seconds), [], outcome="trained")
    assert metrics.registry.get_sample_value("penstock_trainer_generation_seconds_total") == 2.0


def make_status(folder: Path) -> Status:
    return Status("r", max_staleness=1, batch_size=2, num_prompts=10, total_steps=20, progress=Progress(folder))


def test_status_says_nothing_before_it_knows(tmp_path: Path) -> None:
    status = to_body(make_status(tmp_path).shown())
    assert status["phase"] == "loading the model"
    for name in ("reward_mean", "heldout_accuracy", "tokens_per_second", "gap_to_ideal", "step_seconds", "eta_seconds"):
        assert status[name] is None
    assert json.dumps(status)


def test_status_of_a_run(tmp_path: Path) -> None:
    status = make_status(tmp_path)
    add_steps(status.progress, [0.25, 0.75])
    status.progress.add_eval(EVAL)
    status.steps = 2
    found = status.shown()
    assert (found.step, found.total_steps, found.epoch) == (2, 20, 0.4)
    assert (found.reward_mean, found.reward_average) == (0.75, 0.5)
    assert (found.heldout_accuracy, found.staleness_max) == (0.25, 1)
    assert (found.tokens_per_second, found.step_seconds, found.eta_seconds) == (16.0, 2.0, 36.0)
    assert list(to_body(found)) == [  # the fields of `GET /v1/status`
        *("run", "phase", "step", "total_steps", "epoch", "policy_version", "outstanding", "oldest_waiting_seconds"),
        *("reward_mean", "reward_average", "heldout_accuracy", "staleness_max", "staleness_mean", "max_staleness"),
        *("dropped", "queue", "tokens_per_second", "gap_to_ideal", "step_seconds", "eta_seconds", "waiting_for"),
        *("fenced", "turn", "heldout_steps", "heldout_prompts", "heldout_failed"),
        *("heldout_accuracy_start", "heldout_prompts_start", "heldout_failed_start"),
        *("heldout_reward", "heldout_reward_start", "heldout_steps_start", "first_step", "steps", "kl_of"),
        "heldout_sets",
    ]


def test_status_has_the_figures_of_the_last_steps(tmp_path: Path) -> None:
    """A figure that is not a number is not known, nor is one that a line of another release lacks."""
    status = make_status(tmp_path)
    status.kl_of = "reference"
    counts = {"failed_reward_ratio": 0.25, "no_signal_ratio": 0.5}
    figures = {"loss": math.nan, "reward_mean": math.nan, "reference_kl": 0.5, "behaviour_kl": 0.25, "entropy": 1.5}
    lines = [LINE, replace(LINE, step=1, statistics={**counts, **figures, "length_generated": 7.0})]
    for line in lines:
        status.progress.add_step(line)
    for steps, accuracy in ((0, 0.25), (4, 0.75), (2, 0.5)):
        status.progress.add_eval(replace(EVAL, steps=steps, accuracy=accuracy, reward_mean=accuracy / 2))
    found = from_body(json.dumps(to_body(status.shown()), allow_nan=False).encode(), TrainerStatus)
    first, second = found.steps
    assert (first.number, first.loss, first.failed_ratio, first.no_signal_ratio) == (1, 0.1, None, None)
    assert (second.number, second.loss, second.reward, second.is_finite) == (2, None, None, False)
    assert (second.kl, second.entropy, second.length, second.seconds) == (0.5, 1.5, 7.0, 2.0)
    assert (second.failed_ratio, second.no_signal_ratio) == (0.25, 0.5)
    assert (found.heldout_steps_start, found.heldout_accuracy_start, found.heldout_reward_start) == (0, 0.25, 0.125)
    assert (found.heldout_steps, found.heldout_accuracy, found.heldout_reward) == (4, 0.75, 0.375)


def test_a_trainer_that_was_asked_to_end_says_so(tmp_path: Path) -> None:
    status = make_status(tmp_path)
    asked: list[bool] = []
    status.is_stopping = lambda: bool(asked)
    status.work = "training"
    assert status.shown().phase == "training"
    asked.append(True)
    assert status.shown().phase == "ending: finishing the step"
    status.work = "resuming"
    assert status.shown().phase == "ending: resuming"
    status.work = "ending: writing a checkpoint"
    assert status.shown().phase == "ending: writing a checkpoint"


def summary_of(folder: Path) -> dict[str, Any]:
    counters = Counters(next_number=14, issued=14, trained=12, dropped={DropReason.POISON: 1})
    return make_summary(
        RunRecords(folder), counters, engine="sglang 0.5", model="m", max_staleness=1, too_long={"data.train": 3}
    )


@pytest.mark.parametrize(
    ("num_draws", "batch_size", "max_steps", "steps"), [(80, 8, 0, 10), (81, 8, 0, 11), (80, 8, 4, 4), (8, 8, 4, 1)]
)
def test_expected_steps(num_draws: int, batch_size: int, max_steps: int, steps: int) -> None:
    assert expected_steps(num_draws, batch_size, max_steps) == steps


def test_the_summary_holds_the_whole_run(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    add_steps(progress, [0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    progress.add_eval(EVAL)
    progress.add_eval(replace(EVAL, steps=3, accuracy=0.95))
    summary = summary_of(tmp_path)
    assert json.loads(summary_bytes(summary)) == json.loads(json.dumps(summary))
    assert summary["tickets"] == {"issued": 14, "trained": 12, "dropped": {"poison": 1}, "outstanding": 1}
    assert (summary["steps"], summary["seconds_training"]) == (6, 12.0)
    assert (summary["seconds_to_reward_0_9"], summary["seconds_to_heldout_0_9"]) == (12.0, 6.0)
    assert (summary["heldout_accuracy_start"], summary["heldout_accuracy_end"]) == (0.25, 0.95)
    assert (summary["heldout_prompts"], summary["heldout_prompts_trained"]) == (4, 1)
    assert summary["prompts_too_long"] == {"data.train": 3}
    assert (summary["reward_mean_first"], summary["reward_mean_last"]) == (pytest.approx(2 / 3), 1.0)
    assert summary["generation_tokens_per_second"] == pytest.approx(20.0)


def test_the_summary_counts_the_steps_that_were_not_finite(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    figures: list[dict[str, float]] = [
        {"loss": 0.1, "grad_norm": 1.0, "reward_mean": math.nan},
        {"loss": math.nan, "grad_norm": math.nan},
        {"loss": 0.1, "grad_norm": math.inf},
    ]
    for step, statistics in enumerate(figures):
        progress.add_step(replace(LINE, step=step, statistics=statistics))
    assert (summary_of(tmp_path)["steps"], summary_of(tmp_path)["non_finite_steps"]) == (3, 2)


@given(st.lists(st.sampled_from(["finite", "nan", "zero"]), max_size=KEPT_STEPS + 8))
def test_the_row_of_steps_that_were_not_finite_is_that_of_all_lines(kinds: list[str]) -> None:
    norms = {"finite": 1.0, "nan": math.nan, "zero": 0.0}
    with TemporaryDirectory() as name:
        progress = Progress(Path(name))
        for step, kind in enumerate(kinds):
            progress.add_step(replace(LINE, step=step, statistics={"grad_norm": norms[kind]}))
        in_a_row = 0
        for kind in kinds:
            in_a_row = {"finite": 0, "nan": in_a_row + 1, "zero": in_a_row}[kind]
        assert Progress(Path(name)).non_finite_in_a_row == in_a_row


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(0, 9))
def test_the_first_and_the_last_evaluation_are_by_steps_whatever_their_order(steps: list[int], lost: int) -> None:
    with TemporaryDirectory() as name:
        progress = Progress(Path(name))
        for each in steps:
            progress.add_eval(replace(EVAL, steps=each, accuracy=each / 10))
        progress.forget_from(lost)
        left = [each for each in steps if each <= lost]
        for one in (progress, Progress(Path(name))):
            assert one.first_eval.accuracy == (min(left) / 10 if left else None)
            assert one.last_eval.accuracy == (max(left) / 10 if left else None)
            assert one.last_eval.steps == max(left, default=None)


def test_the_row_of_steps_that_were_not_finite_is_counted_over_all_lives(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    for step in range(12):  # more than are kept to be shown
        progress.add_step(replace(LINE, step=step, statistics={"loss": math.nan, "grad_norm": math.nan}))
    assert Progress(tmp_path).non_finite_in_a_row == 12
    progress.add_step(replace(LINE, step=12, statistics={"loss": 0.0, "grad_norm": 0.0}))
    assert Progress(tmp_path).non_finite_in_a_row == 12  # a step without a gradient proves nothing
    progress.add_step(replace(LINE, step=13, statistics={"loss": 0.1, "grad_norm": 1.0}))
    assert Progress(tmp_path).non_finite_in_a_row == 0


def test_the_summary_of_a_run_without_steps_is_still_one(tmp_path: Path) -> None:
    summary = summary_of(tmp_path)
    assert (summary["steps"], summary["seconds_training"], summary["heldout_accuracy_end"]) == (0, 0.0, None)
    assert summary_bytes(summary)


EPISODES = {"episode_turns": 2.0, "episode_turns_max": 4.0, "episode_branches_edited": 1.0, "episode_ended_done": 0.75}


def test_the_summary_holds_the_means_of_the_figures_of_episodes(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    other = {"episode_turns": 3.0, "episode_turns_max": 3.0, "episode_ended_done": 0.25}
    for step, statistics in enumerate((EPISODES, other)):
        progress.add_step(replace(LINE, step=step, statistics=statistics))
    expected = {"turns": 2.5, "turns_max": 4.0, "branches_edited": 0.5, "ended_done": 0.5}
    assert summary_of(tmp_path)["episodes"] == expected


def test_the_summary_of_a_run_of_completions_has_no_figures_of_episodes(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    add_steps(progress, [0.5])
    assert "episodes" not in summary_of(tmp_path)


def test_metrics_show_the_episodes_of_the_last_batch() -> None:
    metrics = TrainerMetrics()
    value = metrics.registry.get_sample_value
    assert math.isnan(value("penstock_trainer_episode_turns") or 0.0)
    metrics.observe_step(replace(LINE, statistics=EPISODES), [], outcome="trained")
    assert value("penstock_trainer_episode_turns") == 2.0
    assert value("penstock_trainer_episode_branches", {"reason": "edited"}) == 1.0
    metrics.observe_step(replace(LINE, statistics={"episode_branches_template": 2.0}), [], outcome="trained")
    assert value("penstock_trainer_episode_branches", {"reason": "edited"}) == 0.0
    assert value("penstock_trainer_episode_branches", {"reason": "template"}) == 2.0


def test_metrics_of_a_run_of_completions_have_no_episodes() -> None:
    names = [family.name for family in TrainerMetrics(of_episodes=False).registry.collect()]
    assert not [name for name in names if "episode" in name]


def test_each_set_has_its_own_evaluations(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    for steps, name, accuracy in ((10, "hard", 0.1), (0, "main", 0.5), (0, "hard", 0.2), (10, "hard", 0.9)):
        progress.add_eval(replace(EVAL, steps=steps, set=name, accuracy=accuracy))
    for one in (progress, Progress(tmp_path)):
        assert (one.first_eval.accuracy, one.last_eval.accuracy, one.last_eval.steps) == (0.5, 0.5, 0)
        assert [each.accuracy for each in one.ends_of("hard")] == [0.2, 0.1], "the second after 10 steps is not written"
        assert [each.accuracy for each in one.ends_of("none")] == [None, None]
        assert (one.has_eval(10), one.has_eval(10, "hard"), one.evaluated_sets) == (False, True, ("hard", "main"))
    progress.add_step(replace(LINE, step=9))
    progress.forget_from(9)
    assert [each.steps for each in progress.ends_of("hard")] == [0, 0]
