"""The closing report: it says what the figures show, and nothing else."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.config import Config
from penstock_launch.command_line import make_parser
from penstock_launch.typed import Typed, program_of
from penstock_launch.watch.next_commands import next_commands
from penstock_launch.watch.report import closing_report
from tests.unit.common.records.run_files import write_lines
from tests.unit.common.records.test_figures import step

FAILED = {"code": 4, "reason": "the trainer ended", "lines": ["engine died"]}


@pytest.fixture
def summary() -> dict[str, Any]:
    return {
        **{"steps": 40, "steps_of_launch": 40, "seconds_setup": 31.5, "seconds_training": 72.0, "non_finite_steps": 2},
        **{"reward_window_steps": 5, "reward_mean_first": 0.28, "reward_mean_last": 0.98},
        **{"heldout_steps_start": 0, "heldout_steps_end": 40, "heldout_prompts": 20, "heldout_prompts_trained": 0},
        **{"heldout_reward_start": 0.25, "heldout_reward_end": 0.95, "heldout_success": 1.0},
        **{"heldout_accuracy_start": 0.25, "heldout_accuracy_end": 0.95},
        **{"staleness_max": 1, "max_staleness": 1, "generation_tokens_per_second": 310.4, "gap_to_ideal": 0.12},
        "tickets": {"issued": 323, "trained": 320, "dropped": {"poison": 1, "reward_failed": 2}, "outstanding": 0},
        "samples_before": [{"prompt": "2+5=7\n8+4=12\n3+9=\n", "completion": "11\n", "answer": "12", "reward": 0.0}],
        "samples_after": [{"prompt": "3+9=", "completion": "x" * 500, "answer": "12", "reward": None}],
        **{"peak_rss_bytes": {"total": 2 * 10**9}, "restarts": {"trainer": 0, "rollout": 2}, "given_up": {}},
        "exit": {"code": 0, "reason": "finished", "lines": []},
    }


def report_of(summary: dict[str, Any], **changes: Any) -> str:
    return "\n".join(closing_report({**summary, **changes}, Path("runs/demo"), []))


def test_report_shows_completions_rewards_and_results(summary: dict[str, Any]) -> None:
    report = report_of(summary)
    assert report.index("Completions before training (the last line of each prompt):") < report.index(
        "Completions after training:"
    )
    assert "3+9= -> '11\\n'   expected '12'   reward 0" in report
    assert f"3+9= -> '{'x' * 36} [428 characters] {'x' * 36}'   expected '12'   reward failed" in report
    assert "Finished: 40 steps in 1:12 of training, after 0:32 of set-up." in report
    assert "  reward      0.28 in the first 5 steps of training, 0.98 in the last 5" in report
    assert "  held-out    reward 0.25 before, 0.95 after, on 20 prompts that it never trained on" in report
    assert "  accuracy    0.25 before, 0.95 after: the share with a reward of at least 1 (eval.success)" in report
    assert "loss or gradient of 2 of 40 steps" in report
    assert "323 issued = 320 trained + 3 dropped (2 reward_failed, 1 poison) + 0 outstanding" in report
    assert "rollout 2" in report
    assert "2000 MB" in report
    assert "runs/demo/summary.json" in report


def test_a_graded_reward_that_never_reaches_success_has_no_accuracy(summary: dict[str, Any]) -> None:
    report = report_of(
        summary,
        heldout_accuracy_start=0.0,
        heldout_accuracy_end=0.0,
        heldout_reward_start=0.17,
        heldout_reward_end=0.98,
    )
    assert "reward 0.17 before, 0.98 after" in report
    assert "accuracy" not in report


@pytest.mark.parametrize(
    ("num_trained", "words"),
    [
        (20, "; its 20 prompts are training prompts: it says nothing about others"),
        (3, "; of its 20 prompts 3 are training prompts too"),
        (None, ", on 20 prompts"),
    ],
)
def test_report_says_how_many_held_out_prompts_were_trained(
    summary: dict[str, Any], num_trained: int | None, words: str
) -> None:
    report = report_of(summary, heldout_prompts_trained=num_trained)
    assert f"reward 0.25 before, 0.95 after{words}\n" in report
    assert "never trained on" not in report


@pytest.mark.parametrize(
    ("start", "end", "words"),
    [
        (0, 30, "0.25 before, 0.95 after 30 steps"),
        (20, 40, "0.25 after 20 steps, 0.95 after"),
        (0, 0, "0.95 before, and no evaluation later"),
        (30, 30, "0.95 after 30 steps, and no evaluation before"),
    ],
)
def test_report_says_when_the_evaluations_were(summary: dict[str, Any], start: int, end: int, words: str) -> None:
    assert f"reward {words}, on" in report_of(summary, heldout_steps_start=start, heldout_steps_end=end)


def test_report_counts_what_failed_and_why(summary: dict[str, Any]) -> None:
    report = report_of(
        summary,
        completions={"num": 7680, "of_steps": 7500, "failed": 25, "truncated": 900},
        failures={"judge: TimeoutError": 20, "judge: ValueError: " + "x" * 300: 5},
        groups={"num": 320, "no_signal": 104},
        heldout_failed=3,
        heldout_failures={"judge: TimeoutError": 3},
        lost_messages={"no ScoredHeader": 1},
    )
    assert "  no reward   25 of 7,680 completions (0.3%)\n              20 x judge: TimeoutError\n" in report
    assert "  no reward   3 of 20 prompts of the last evaluation\n              3 x judge: TimeoutError\n" in report
    assert "  no signal   104 of 320 groups (32%): their rewards were equal, or too few" in report
    assert "  cut off     12% of the completions of all steps, by sampling.max_new_tokens" in report
    assert "outstanding\n              1 x no ScoredHeader\n" in report
    assert max(map(len, report.splitlines())) < 150


def test_report_shows_the_episodes(summary: dict[str, Any]) -> None:
    episodes = {"turns": 2.26, "tool_calls": 1.5, "branches_edited": 0.5, "branches_template": 0.25}
    episodes |= {"failed_ratio": 0.0125, "cached_tokens_ratio": 0.8}
    report = report_of(
        summary, episodes=episodes, completions={"num": 80, "of_steps": 80, "failed": 1, "truncated": 40}
    )
    assert (
        "2.3 turns, 1.5 tool calls and 0.8 branches each; 1.2% failed; 80% of the prompt tokens were cached" in report
    )
    assert "1 of 80 episodes (1.2%)" in report
    assert "50% of the episodes of all steps, by agent.max_turns or agent.max_tokens" in report
    assert "episodes" not in report_of(summary)


def test_report_of_a_run_that_failed_has_its_figures(summary: dict[str, Any]) -> None:
    del summary["max_staleness"], summary["seconds_setup"]
    summary["tickets"] = {"trained": 96, "dropped": {}}
    report = report_of(summary, exit=FAILED, steps=12, steps_of_launch=2, heldout_steps_end=10)
    assert "Ended with exit code 4: the trainer ended\n    engine died\n" in report
    assert "It has 12 steps in 1:12 of training (2 of them in this launch)." in report
    assert "reward 0.25 before, 0.95 after 10 steps" in report
    assert "  tickets     96 trained + 0 dropped\n" in report
    nothing = {"steps": 0, "exit": FAILED, "restarts": {}, "given_up": {}, "peak_rss_bytes": {}}
    assert "It has no step.\n  summary" in report_of(nothing)


def config_of(**run: Any) -> Config:
    document = {"run": run, "actor": {"path": "m"}, "data": {"train": {"path": "d"}}, "total_train_epochs": 4}
    return Config.model_validate(document)


TYPED = Typed("penstock", "local", ("--config", "my run.yaml", "--run.max_steps", "3"))


def commands(folder: Path, config: Config, typed: Typed | None = TYPED, **summary: Any) -> dict[str, str]:
    document = {"exit": {"code": 0}, "steps": 40, "epochs": 4.0, **summary}
    return dict(next_commands(config, folder, document, typed))


def test_a_finished_run_can_be_trained_longer_compared_and_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "config.json").write_text("{}")
    write_lines(tmp_path / "other" / "steps.jsonl", step(0, 0.5))
    write_lines(tmp_path / "empty" / "steps.jsonl")
    found = commands(folder, config_of(existing="replace"))
    assert list(found) == ["compare runs", "train longer", "load in Python"]
    assert shlex.split(found["compare runs"]) == ["penstock", "compare", str(folder), str(tmp_path / "other")]
    assert shlex.split(found["train longer"])[3:] == [
        *TYPED.settings,
        *("--total_train_epochs", "8", "--run.existing", "resume"),
    ]
    assert found["load in Python"].startswith(f"AutoModelForCausalLM.from_pretrained('{folder}/final')")
    (folder / "samples.jsonl").write_text("")
    found = commands(folder, config_of())
    assert shlex.split(found["see in a browser"]) == ["penstock", "view", str(folder)]
    assert shlex.split(found["see completions"]) == ["penstock", "samples", str(folder)]


@pytest.mark.parametrize(
    ("max_steps", "epochs", "more"),
    [
        (40, 1.5, ["--run.max_steps", "80"]),
        (40, 4.0, ["--run.max_steps", "80", "--total_train_epochs", "8"]),
        (0, 4.0, ["--total_train_epochs", "8"]),
        (50, 4.0, ["--total_train_epochs", "8"]),
    ],
)
def test_what_ended_the_run_is_doubled(tmp_path: Path, max_steps: int, epochs: float, more: list[str]) -> None:
    found = commands(tmp_path, config_of(max_steps=max_steps), epochs=epochs)
    assert shlex.split(found["train longer"])[-len(more) :] == more


def test_a_run_that_failed_can_be_looked_at_resumed_and_exported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "00000000.1").mkdir(parents=True)
    found = commands(tmp_path, config_of(), exit={"code": 4})
    assert list(found) == ["what went wrong", "go on"]
    assert found["go on"] == "penstock launch local --config 'my run.yaml' --run.max_steps 3"
    (tmp_path / "checkpoints" / "00000010.1").mkdir()
    export = commands(tmp_path, config_of(), exit={"code": 4})["export the model"]
    assert shlex.split(export)[:2] == ["penstock", "export"]
    assert shlex.split(export)[2:] == [*TYPED.settings, "--out", f"{tmp_path}-model-1"]
    assert list(commands(tmp_path, config_of(), None, exit={"code": 4})) == ["what went wrong", "go on"]
    assert list(commands(tmp_path, config_of(), exit={"code": 130})) == ["go on", "export the model"]


@pytest.mark.parametrize("code", [0, 4])
def test_every_command_that_is_shown_exists(tmp_path: Path, code: int) -> None:
    (tmp_path / "checkpoints" / "00000010.1").mkdir(parents=True)
    write_lines(tmp_path.parent / "other" / "steps.jsonl", step(0, 0.5))
    for words in commands(tmp_path, config_of(), exit={"code": code}).values():
        make_parser().parse_known_args(shlex.split(words)[1:])


def test_a_setting_that_was_typed_is_replaced(tmp_path: Path) -> None:
    typed = Typed(
        "penstock", "local", ("--run.max_steps", "3", "--config", "c", "--run.max_steps=4", "--run.name", "x")
    )
    assert typed.launch("--run.max_steps", "8") == "penstock launch local --config c --run.name x --run.max_steps 8"
    assert typed.launch() == "penstock launch local --run.max_steps 3 --config c --run.max_steps=4 --run.name x"


def test_the_program_is_shown_as_the_shell_starts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "my env" / "penstock"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert program_of(str(program)) == f"'{program}'"
    monkeypatch.setenv("PATH", str(program.parent))
    assert program_of(str(program)) == "penstock"
    assert program_of("/x/penstock_launch/__main__.py") == f"{sys.executable} -m penstock_launch"
