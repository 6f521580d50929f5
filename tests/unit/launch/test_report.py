"""The closing report: it says what the figures show, and nothing else."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from penstock.config import Config
from penstock.config.keys import flat
from penstock.config.load import load_config
from penstock.contracts import DropReason
from penstock.contracts.ledger import DropRecord, Record, RunRecord, StepRecord, encode_record
from penstock.tickets import TicketBook, TicketLimits
from penstock_launch.command_line import make_parser
from penstock_launch.typed import Typed, program_of
from penstock_launch.watch.next_commands import next_commands
from penstock_launch.watch.report import closing_report
from tests.unit.common.records.run_files import write_lines
from tests.unit.common.records.test_figures import step

FAILED = {"code": 4, "reason": "the trainer ended", "lines": ["engine died"]}

SOLVED = {
    **{"steps": 38, "set": "", "metric": "reward", "best": 1.0, "best_steps": 38, "patience": 0, "min_delta": 0.0},
    **{"solved_tickets": 80, "success": 0.5},
}


@pytest.fixture
def summary() -> dict[str, Any]:
    return {
        **{"steps": 40, "steps_of_launch": 40, "seconds_setup": 31.5, "seconds_training": 72.0, "non_finite_steps": 2},
        **{"reward_window_steps": 5, "reward_mean_first": 0.28, "reward_mean_last": 0.98},
        **{"heldout_steps_start": 0, "heldout_steps_end": 40, "heldout_prompts": 20, "heldout_prompts_trained": 0},
        **{"heldout_reward_start": 0.25, "heldout_reward_end": 0.95, "heldout_success": 1.0},
        **{"heldout_accuracy_start": 0.25, "heldout_accuracy_end": 0.95},
        **{"staleness_max": 1, "max_staleness": 1, "gap_to_ideal": 0.12},
        **{"tokens_per_second": 120.2, "generation_tokens_per_second": 310.4},
        "tickets": {"issued": 323, "trained": 320, "dropped": {"poison": 1, "reward_failed": 2}, "outstanding": 0},
        "samples_before": [{"prompt": "2+5=7\n8+4=12\n3+9=\n", "completion": "11\n", "answer": "12", "reward": 0.0}],
        "samples_after": [{"prompt": "2+5=7\n8+4=12\n1+1=", "completion": "x" * 500, "answer": "12", "reward": None}],
        **{"peak_rss_bytes": {"total": 2 * 10**9}, "restarts": {"trainer": 0, "rollout": 2}, "given_up": {}},
        "exit": {"code": 0, "reason": "finished", "lines": []},
    }


def report_of(summary: dict[str, Any], width: int | None = None, **changes: Any) -> str:
    return "\n".join(closing_report({**summary, **changes}, Path("runs/demo"), [], width))


def test_report_shows_completions_rewards_and_results(summary: dict[str, Any]) -> None:
    report = report_of(summary)
    note = "(the part in which prompts differ)"
    assert report.index(f"Completions before training {note}:") < report.index(f"Completions after 40 steps {note}:")
    assert "3+9= -> '11\\n'   expected '12'   reward 0" in report
    assert f"1+1= -> '{'x' * 36} [428 characters] {'x' * 36}'   expected '12'   reward failed" in report
    assert "Finished: 40 steps in 1:12 of training, after 0:32 of set-up." in report
    assert "  reward      0.28 in the first 5 steps of training, 0.98 in the last 5" in report
    assert "  held-out    reward 0.25 before, 0.95 after 40 steps, on 20 prompts that it never trained on" in report
    assert (
        "  accuracy    0.25 before, 0.95 after 40 steps: the share with a reward of at least 1 (eval.success)" in report
    )
    assert "loss or gradient of 2 of 40 steps" in report
    assert "323 issued = 320 trained + 3 dropped (failed rewards 2, poison 1) + 0 outstanding" in report
    assert "rollout 2" in report
    assert "  speed       120 tokens/s, 310 while engines generated; gap to ideal 0.12" in report
    assert "2000 MB at the peak of the last launch, all processes together" in report
    assert "runs/demo/summary.json" in report


def test_prompts_of_several_completions_have_pass_at_k_with_intervals(summary: dict[str, Any]) -> None:
    passes = {"1": {"value": 0.5, "low": 0.25, "high": 0.75}, "4": {"value": 0.9, "low": 0.7, "high": 0.97}}
    report = report_of(summary, heldout_pass_at_end=passes)
    assert "  pass@k      after 40 steps, by k 1: 0.50 (0.25 to 0.75), 4: 0.90 (0.70 to 0.97)" in report
    assert "pass@k" not in report_of(summary, heldout_pass_at_end={})


def test_a_graded_reward_that_never_reaches_success_has_no_accuracy(summary: dict[str, Any]) -> None:
    report = report_of(
        summary,
        heldout_accuracy_start=0.0,
        heldout_accuracy_end=0.0,
        heldout_reward_start=0.17,
        heldout_reward_end=0.98,
    )
    assert "reward 0.17 before, 0.98 after 40 steps" in report
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
    assert f"reward 0.25 before, 0.95 after 40 steps{words}\n" in report
    assert "never trained on" not in report


@pytest.mark.parametrize(
    ("start", "end", "words"),
    [
        (0, 30, "0.25 before, 0.95 after 30 steps"),
        (20, 40, "0.25 after 20 steps, 0.95 after 40 steps"),
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
        heldout_failed_start=2,
        heldout_failed_end=3,
        heldout_failures={"judge: TimeoutError": 3},
        lost_messages={"no ScoredHeader": 1},
    )
    assert "  no reward   25 of 7,680 completions (0.3%)\n              20 x judge: TimeoutError\n" in report
    assert "  held-out    reward 0.25 (of 18; 2 failed) before, 0.95 (of 17; 3 failed) after 40 steps, on" in report
    assert "  accuracy    0.25 (of 18; 2 failed) before, 0.95 (of 17; 3 failed) after 40 steps: the share" in report
    assert "  no reward   3 of 20 prompts of the last evaluation\n              3 x judge: TimeoutError\n" in report
    assert "  no signal   104 of 320 groups (32%): their rewards were equal, or too few" in report
    assert "  cut off     12% of the completions of all steps, by sampling.max_new_tokens" in report
    assert "outstanding\n              1 x no ScoredHeader\n" in report
    assert max(map(len, report.splitlines())) < 200


def test_a_reason_of_ordinary_length_is_shown_whole(summary: dict[str, Any]) -> None:
    where = "(my_rewards.py:7; raised at urllib/request.py:643)"
    reason = f"my_rewards:judge: HTTPError: HTTP Error 500: judge overloaded {where}"
    completions = {"num": 1856, "of_steps": 1856, "failed": 14}
    assert f"14 x {reason}\n" in report_of(summary, completions=completions, failures={reason: 14})


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


def commands(
    folder: Path, config: Config, typed: Typed | None = TYPED, *, code: int = 0, final_steps: int | None = None
) -> dict[str, str]:
    return dict(next_commands(config, folder, {"exit": {"code": code}, "final_steps": final_steps}, typed))


def write_ledger(folder: Path, *, num_steps: int, num_dropped: int = 0) -> int:
    """A run of 80 prompts, 8 a step; the number of its tickets, which have all ended."""
    trained = range(num_dropped, num_dropped + 8 * num_steps)
    records: list[Record] = [
        RunRecord("d", 80, 8, 4, 0),
        *(DropRecord(number, DropReason.REWARD_FAILED) for number in range(num_dropped)),
        *(StepRecord(n, tuple(trained[8 * n : 8 * n + 8]), f"{n:08d}.1.pack", "e" * 16) for n in range(num_steps)),
    ]
    (folder / "steps").mkdir(parents=True, exist_ok=True)
    (folder / "steps" / "ledger.jsonl").write_bytes(b"".join(encode_record(each) + b"\n" for each in records))
    return trained.stop


def test_a_finished_run_can_be_trained_longer_compared_and_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "config.json").write_text("{}")
    write_lines(tmp_path / "other" / "steps.jsonl", step(0, 0.5))
    write_lines(tmp_path / "empty" / "steps.jsonl")
    write_ledger(folder, num_steps=40)
    found = commands(folder, config_of(existing="replace"), final_steps=40)
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
    ("max_steps", "num_steps", "num_dropped", "more"),
    [
        (0, 40, 0, {"total_train_epochs": 8}),
        (0, 38, 16, {"total_train_epochs": 8}),
        (0, 80, 0, {"total_train_epochs": 16}),  # an earlier launch had trained eight epochs
        (0, 75, 0, {"total_train_epochs": 16}),
        (50, 40, 0, {"total_train_epochs": 8}),
        (20, 20, 0, {"run.max_steps": 40}),
        (20, 30, 0, {"run.max_steps": 60}),
        (20, 80, 0, {"run.max_steps": 160, "total_train_epochs": 16}),
    ],
)
def test_a_longer_run_that_is_suggested_leads_to_further_steps(
    tmp_path: Path, max_steps: int, num_steps: int, num_dropped: int, more: dict[str, int]
) -> None:
    """The command is parsed and applied: its tickets are those that the trainer would issue."""
    num_ended = write_ledger(tmp_path, num_steps=num_steps, num_dropped=num_dropped)
    file = tmp_path / "config.yaml"
    file.write_text("actor: {path: m}\ndata: {train: {path: d}}\ntotal_train_epochs: 4\n")
    typed = Typed("penstock", "local", ("--config", str(file), "--run.max_steps", str(max_steps)))
    config = load_config(typed.settings)

    def issued(config: Config) -> list[int]:
        book = TicketBook(TicketLimits(8, 16, 80 * config.total_train_epochs, config.run.max_steps))
        book.restore(num_ended, (), num_steps)
        return book.issue()

    assert issued(config) == []
    program, launch, place, *words = shlex.split(commands(tmp_path, config, typed)["train longer"])
    assert (program, launch, place) == ("penstock", "launch", "local")
    longer = load_config(words)
    assert issued(longer)
    assert {key: value for key, value in flat(longer.model_dump()) if key in more} == more


def test_a_launch_that_was_stopped_after_its_last_step_is_finished_by_the_same_command(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    write_ledger(folder, num_steps=40)
    assert list(commands(folder, config_of(), code=130)) == ["finish"]
    write_ledger(folder, num_steps=39)
    assert list(commands(folder, config_of(), code=130)) == ["go on"]


@pytest.mark.parametrize(
    ("final_steps", "checkpoints", "expected"),
    [
        (25, ["00000025.2"], "load in Python"),
        (25, ["00000025.2", "00000029.3"], "export the model"),
        (29, ["00000025.2", "00000029.3"], "load in Python"),
        (None, ["00000025.2", "00000029.3"], "export the model"),  # an earlier release wrote final/
        (None, ["00000000.1"], ""),
    ],
)
def test_the_model_that_is_offered_is_the_newest(
    tmp_path: Path, final_steps: int | None, checkpoints: list[str], expected: str
) -> None:
    folder = tmp_path / "r"
    for name in checkpoints:
        (folder / "checkpoints" / name).mkdir(parents=True)
    found = commands(folder, config_of(), code=130, final_steps=final_steps)
    assert [each for each in found if each in ("load in Python", "export the model")] == [expected] * bool(expected)


def test_an_older_model_in_final_is_named_as_such(summary: dict[str, Any]) -> None:
    assert "  model       final/ is of step 25, and 40 steps are done\n" in report_of(summary, final_steps=25)
    assert "final/ is of an earlier launch, and 40 steps are done" in report_of(summary, final_steps=None)
    assert "final/" not in report_of(summary, final_steps=40)
    assert "final/" not in report_of(summary)


def test_without_a_ledger_nothing_is_suggested_that_may_do_nothing(tmp_path: Path) -> None:
    assert "train longer" not in commands(tmp_path / "r", config_of())


@pytest.mark.parametrize("width", [80, 120, None])
def test_the_ending_is_folded_at_words_and_its_commands_still_work(
    tmp_path: Path, summary: dict[str, Any], width: int | None
) -> None:
    """At the width of a terminal; in a pipe lines stay whole."""
    folder = tmp_path / "a run"
    write_ledger(folder, num_steps=40)
    (folder / "final").mkdir()
    (folder / "final" / "config.json").write_text("{}")
    (folder / "samples.jsonl").write_text("")
    settings = [word for n in range(9) for word in (f"--reward.modules_path{n}", "it's here")]
    typed = Typed("penstock", "local", ("--config", "my run.yaml", *settings))
    summary["final_steps"] = 40
    suggested = next_commands(config_of(), folder, summary, typed)
    reasons = {"judge: " + "a long reason " * 9: 20}
    summary |= {"completions": {"num": 7680, "of_steps": 7500, "failed": 25, "truncated": 900}, "failures": reasons}
    lines = closing_report(summary, folder, suggested, width)
    whole = closing_report(summary, folder, suggested)
    if width is not None:
        assert [line for line in lines if cell_len(line) > width and len(line.split()) > 2] == [
            line for line in lines if "from_pretrained" in line and cell_len(line) > width
        ]
    figures, found = lines[: lines.index("Next:")], "\n".join(lines[lines.index("Next:") :])
    assert " ".join(" ".join(figures).split()) == " ".join(" ".join(whole[: whole.index("Next:")]).split())
    for _, words in suggested[:-1]:
        assert words in found.replace(" \\\n", " ").replace("        ", "") or (width is None and words in found)
    assert (lines == whole) is (width is None)


def test_the_ending_says_why_there_are_fewer_steps(summary: dict[str, Any]) -> None:
    tickets = {"issued": 320, "trained": 304, "dropped": {"degenerate": 4, "reward_failed": 12}, "outstanding": 0}
    report = report_of(summary, steps=38, steps_of_launch=38, steps_planned=40, tickets=tickets)
    assert "Finished: 38 of 40 steps in" in report
    why = "2 batches' worth of tickets ended without training: failed rewards 12, no signal 4"
    assert f"  fewer steps {why}\n" in report
    assert "fewer" not in report_of(summary, steps_planned=40)
    assert "fewer" not in report_of(summary, steps_planned=60, exit={"code": 130, "reason": "Ctrl-C", "lines": []})
    nothing = report_of(summary, steps=80, steps_of_launch=0, steps_planned=40)
    assert "  this launch trained nothing: its configuration asks for 40 steps, and 80 are done" in nothing


def test_the_ending_names_the_step_of_each_evaluation_and_those_that_were_not_made(summary: dict[str, Any]) -> None:
    stopped = {"code": 130, "reason": "stopped by Ctrl-C", "lines": []}
    report = report_of(summary, exit=stopped, steps=38, heldout_steps_end=20, heldout_missing=[30, 38])
    assert "Completions after 20 of 38 steps (" in report
    assert "0.25 before, 0.95 after 20 steps" in report
    words = "not made after 30 steps, after 38 steps (the final one): the run ended before it was complete"
    assert f"  evaluation  {words}" in report
    assert "not made" not in report_of(summary, heldout_missing=[])


def test_a_run_that_failed_can_be_looked_at_resumed_and_exported(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    (folder / "checkpoints" / "00000000.1").mkdir(parents=True)
    found = commands(folder, config_of(), code=4)
    assert list(found) == ["what went wrong", "go on"]
    assert found["go on"] == "penstock launch local --config 'my run.yaml' --run.max_steps 3"
    (folder / "checkpoints" / "00000010.1").mkdir()
    export = commands(folder, config_of(), code=4)["export the model"]
    assert shlex.split(export)[:2] == ["penstock", "export"]
    assert shlex.split(export)[2:] == [*TYPED.settings, "--out", f"{folder}-model-1"]
    assert list(commands(folder, config_of(), None, code=4)) == ["what went wrong", "go on"]
    assert list(commands(folder, config_of(), code=130)) == ["go on", "export the model"]


@pytest.mark.parametrize("code", [0, 4])
def test_every_command_that_is_shown_exists(tmp_path: Path, code: int) -> None:
    (tmp_path / "checkpoints" / "00000010.1").mkdir(parents=True)
    write_ledger(tmp_path, num_steps=40)
    for words in commands(tmp_path, config_of(), code=code).values():
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


def test_a_run_that_stopped_early_says_why_and_misses_no_batch(summary: dict[str, Any]) -> None:
    early = {"steps": 34, "set": "main", "metric": "accuracy", "best": 0.8125, "best_steps": 20, "patience": 2}
    report = report_of(summary, steps=34, steps_planned=40, stopped_early={**early, "min_delta": 0.0})
    assert (
        "  stopped     early: in 2 evaluations the accuracy did not exceed 0.8125 (after 20 steps): eval.patience\n"
        in report
    )
    assert "fewer steps" not in report
    more = {**early, "set": "hard", "metric": "reward", "min_delta": 0.05}
    assert "the reward of hard did not exceed 0.8125 (after 20 steps) by more than 0.05" in report_of(
        summary, steps=34, steps_planned=40, stopped_early=more
    )


def test_a_run_that_has_solved_its_task_says_so(summary: dict[str, Any]) -> None:
    report = report_of(summary, steps=38, steps_planned=40, stopped_early=SOLVED)
    assert "Finished: 38 of 40 steps in" in report
    assert (
        "  stopped     solved: in the last 80 tickets no reward was below 1, the highest of the run, which reaches "
        "eval.success (0.5); no group had a gradient\n" in report
    )
    assert "fewer steps" not in report
    assert "Finished: 1 of 40 steps in" in report_of(summary, steps=1, steps_planned=40, stopped_early=SOLVED)


def test_further_held_out_sets_have_lines_of_their_own(summary: dict[str, Any]) -> None:
    hard: dict[str, Any] = {
        "steps_start": 0,
        "steps_end": 40,
        "reward_start": 0.0,
        "reward_end": 0.5,
        "accuracy_start": 0.0,
    }
    hard |= {"accuracy_end": 0.25, "prompts": 8, "prompts_trained": 0}
    hard |= {"pass_at_end": {k: {"value": 0.5, "low": 0.25, "high": 0.75} for k in "12"}}
    report = report_of(summary, heldout_sets={"hard": hard})
    assert (
        "  held-out    hard: reward 0.00 before, 0.50 after 40 steps; accuracy 0.00 before, 0.25 after 40 steps, on 8 "
        "prompts that it never trained on\n" in report
    )
    assert "  pass@k      hard: after 40 steps, by k 1: 0.50 (0.25 to 0.75), 2: 0.50 (0.25 to 0.75)\n" in report


def test_a_run_that_stopped_early_is_trained_longer_with_more_patience(tmp_path: Path) -> None:
    write_ledger(tmp_path, num_steps=2)
    summary = {"exit": {"code": 0}, "final_steps": 2, "stopped_early": {"steps": 2}}
    found = dict(next_commands(config_of(), tmp_path, summary, TYPED))
    assert " --eval.patience 0" in found["train longer"]
    for early in (None, SOLVED):
        assert "train longer" not in dict(
            next_commands(config_of(), tmp_path, {**summary, "stopped_early": early}, TYPED)
        )
