"""`penstock samples`: which completions it shows, and that no text of theirs does anything to a terminal."""

import io
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.cells import cell_len
from rich.console import Console

from penstock.errors import ConfigError, DataError
from penstock.records.samples import DroppedLine, SampleLine
from penstock_launch.__main__ import run
from penstock_launch.command_line import make_parser
from penstock_launch.commands.samples import show_samples
from tests.unit.common.records.run_files import write_lines
from tests.unit.common.records.test_figures import step

LINE = SampleLine(
    step=0,
    version=3,
    ticket=7,
    index=1,
    prompt="2 + 2 =",
    completion="4",
    answer="4",
    reward=1.0,
    advantage=0.5,
    num_tokens=2,
)


def write_run(folder: Path, *lines: SampleLine) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("run: {}\n")
    (folder / "samples.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    return folder


def sample(step: int, **changes: Any) -> SampleLine:
    return msgspec.structs.replace(LINE, step=step, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two steps of three completions; that of the second step that failed comes first, as the trainer writes it."""
    judged = {"math": 0.0, "judge": None}
    return write_run(
        tmp_path / "runs" / "mine",
        sample(0, completion="four", reward=0.25),
        sample(0, completion="4"),
        sample(0, completion="FIVE", reward=-1.0, truncated=True),
        sample(1, completion="?", reward=None, rewards=judged, failure="judge: gone", advantage=None),
        sample(1, completion="five", reward=0.0),
        sample(1, completion="4 ", reward=1.0),
    )


def shown(*words: str, width: int = 100, height: int = 25, terminal: bool = False) -> tuple[str, int]:
    console = Console(width=width, height=height, force_terminal=terminal, file=io.StringIO(), color_system=None)
    return show_samples(make_parser().parse_args(["samples", *words]), console)


def completions(text: str) -> list[str]:
    return [line.split()[1] for line in text.splitlines() if line.startswith("  completion")]


def test_the_last_step_is_shown_with_all_that_is_known(folder: Path) -> None:
    text, exit_code = shown(str(folder))
    assert exit_code == 0
    assert text.splitlines()[:6] == [
        "step 2  ticket 7.1  reward failed  (math 0, judge failed)  2 tokens  version 3",
        "  prompt      2 + 2 =",
        "  completion  ?",
        "  answer      4",
        "  failed      judge: gone",
        "",
    ]
    assert text.splitlines()[6:8] == [
        "step 2  ticket 7.1  reward 0  advantage +0.5  2 tokens  version 3",
        "  completion  five",
    ]
    assert "  completion  4 (+ ' ')\n" in text, "white space at the end may be why a match failed"
    assert text.endswith(f"3 of 3 samples of {folder}\n")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--step", "1"], ["four", "4", "FIVE"]),
        (["--steps", ":2"], ["?", "five", "4", "four", "4", "FIVE"]),  # the newest step first
        (["--steps", "2:", "--limit", "2"], ["?", "five"]),
        (["--worst", "--limit", "3"], ["FIVE", "five", "four"]),
        (["--best", "--limit", "1"], ["4"]),
        (["--best", "--step", "1"], ["4", "four", "FIVE"]),
        (["--failed"], ["?"]),
        (["--search", "Five"], ["five", "FIVE"]),
        (["--search", "GONE"], ["?"]),
    ],
)
def test_steps_order_and_texts_can_be_chosen(folder: Path, words: list[str], expected: list[str]) -> None:
    text, exit_code = shown(str(folder), *words)
    assert (completions(text), exit_code) == (expected, 0)


def test_how_many_failed_is_said_if_fewer_were_kept(folder: Path) -> None:
    """Figures are of the whole run, samples a selection."""
    write_lines(folder / "steps.jsonl", step(0, 0.5), step(1, 0.5))
    kept = "2 completions failed in the run, and 1 of them were kept (tracking.samples_per_step)"
    assert shown(str(folder), "--failed")[0].endswith(f"1 of 1 samples of {folder}; {kept}\n")
    assert "kept" not in shown(str(folder), "--failed", "--step", "2")[0]
    assert "kept" not in shown(str(folder), "--worst")[0]
    write_lines(folder / "steps.jsonl", step(0, 0.5))
    assert "kept" not in shown(str(folder), "--failed")[0]


def test_what_was_left_out_is_said(folder: Path) -> None:
    text, _ = shown(str(folder), "--search", "five", "--limit", "1")
    assert text.endswith(f"1 of 2 samples of {folder}; --limit 2 shows all\n")
    text, _ = shown(str(folder), "--worst", "--limit", "1")
    assert "cut off by its limit" in text
    assert "1 of 5 samples" in text, "one that failed has no reward"


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 12), (120, 40)])
def test_a_terminal_gets_one_screen_however_long_the_texts_are(tmp_path: Path, width: int, height: int) -> None:
    long = "a word and a fullwidth \uff21\uff22 " * 300 + "\n" * 50 + "x" * 1000
    folder = write_run(tmp_path / "long", *[sample(0, prompt=long, completion=long)] * 9)
    text, _ = shown(str(folder), width=width, height=height, terminal=True)
    *lines, _ = text.splitlines()  # the last one, with the folder, may be wrapped by the terminal
    assert len(lines) <= height - 2
    assert max(map(cell_len, lines)) <= width
    assert len(shown(str(folder), "--limit", "1", width=width, height=height, terminal=True)[0].splitlines()) > height


def test_no_text_moves_hides_or_turns_what_the_terminal_shows(tmp_path: Path) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J\rfake\u202eevil\u2066\x9b1m [bold]not[/bold] :smile:"
    rewards = {"a": 1.0, hostile: 0.0}
    folder = write_run(
        tmp_path / "bad", sample(0, prompt=hostile, completion=hostile, failure=hostile, rewards=rewards)
    )
    text, _ = shown(str(folder))
    assert not set(text) & set("\x1b\x07\r\u202e\u2066\x9b")
    assert r"\x1b]0;owned\x07\x1b[2J\rfake\u202eevil\u2066\x9b1m [bold]not[/bold] :smile:" in text


def test_an_evaluation_is_shown_beside_the_first_one(folder: Path) -> None:
    rounds = [
        {
            "steps": steps,
            "samples": [
                {"prompt": "1 + 1 =", "completion": completion, "answer": "2", "reward": reward},
                {"prompt": f"only after {steps}", "completion": "?", "answer": "2", "reward": None},
            ],
        }
        for steps, completion, reward in ((10, "2", 1.0), (0, "eleven", 0.0), (5, "3", 0.5))
    ]
    (folder / "evals.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rounds))
    text, exit_code = shown(str(folder), "--evaluation")
    assert exit_code == 0
    assert text.splitlines()[:5] == [
        "evaluation after 10 steps  reward 0 -> 1",
        "  prompt          1 + 1 =",
        "  answer          2",
        "  after 0 steps   eleven",
        "  after 10 steps  2",
    ]
    assert "evaluation after 10 steps  reward failed\n" in text
    assert "reward 0 -> 0.5\n" in shown(str(folder), "--evaluation", "--step", "5")[0]
    assert shown(str(folder), "--evaluation", "--step", "0")[0].startswith("evaluation after 0 steps  reward 0\n")
    text, exit_code = shown(str(folder), "--evaluation", "--step", "7")
    assert (exit_code, text) == (
        1,
        f"no sample matches: {folder / 'evals.jsonl'} has evaluations after 0 to 10 steps\n",
    )


def test_every_failed_row_of_an_evaluation_is_shown_with_its_reason(folder: Path) -> None:
    kept = [{"prompt": f"p{n}", "completion": "c", "answer": "a", "reward": 1.0 if n else None} for n in range(4)]
    failed = [{**kept[0], "prompt": f"p{n}", "failure": f"gone {n}"} for n in (0, 5, 6)]
    line = {"steps": 3, "num_prompts": 20, "num_failed": 3, "samples": kept, "failed": failed}
    (folder / "evals.jsonl").write_text(json.dumps(line) + "\n")
    text, _ = shown(str(folder), "--evaluation", "--failed")
    assert [each.split()[1] for each in text.splitlines() if each.startswith("  prompt")] == ["p0", "p5", "p6"]
    assert "  failed         gone 6\n" in text
    assert text.endswith(f"3 of 3 samples of {folder}\n")
    assert len(shown(str(folder), "--evaluation")[0].split("evaluation after 3 steps")) == 7
    (folder / "evals.jsonl").write_text(json.dumps({**line, "num_failed": 9}) + "\n")
    assert shown(str(folder), "--evaluation", "--failed")[0].endswith("; 6 more failed, and were not recorded\n")


def test_failed_rewards_of_dropped_groups_are_shown_too(folder: Path) -> None:
    dropped = DroppedLine(
        **msgspec.structs.asdict(sample(2, completion="!", reward=None, failure="HTTP 503")), dropped="reward_failed"
    )
    (folder / "dropped.jsonl").write_bytes(msgspec.json.encode(dropped) + b"\n")
    text, _ = shown(str(folder), "--failed", width=120)
    assert completions(text) == ["!", "?"]
    assert "its group was dropped: failed rewards\n" in text
    assert "  failed      HTTP 503\n" in text
    assert completions(shown(str(folder))[0]) == ["?", "five", "4"], "the last step that was trained"
    assert completions(shown(str(folder), "--search", "503")[0]) == ["!"]
    (folder / "samples.jsonl").unlink()
    assert completions(shown(str(folder), "--failed")[0]) == ["!"], "no step has ended yet"


def test_a_line_that_is_being_written_is_no_line_and_a_broken_one_is_named(folder: Path) -> None:
    path = folder / "samples.jsonl"
    with path.open("ab") as file:
        file.write(b'{"step": 9')
    assert shown(str(folder))[0].startswith("step 2 ")
    path.write_bytes(b'{"step": 0}\n')
    with pytest.raises(DataError, match=r"samples\.jsonl cannot be read .*: expected lines as the trainer writes them"):
        shown(str(folder))


def test_a_run_without_samples_says_why(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "old")
    assert shown(str(folder)) == (f"{folder / 'samples.jsonl'} is empty\n", 1)
    (folder / "samples.jsonl").unlink()
    text, exit_code = shown(str(folder))
    assert exit_code == 1
    assert "no step has ended yet, or tracking.samples_per_step is 0" in text


def test_the_run_that_has_written_last_is_meant_if_none_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(folder.parent / "other", sample(5))
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    monkeypatch.chdir(folder.parent.parent)
    assert run(["samples"]) == 0
    assert f"1 of 1 samples of {other}" in capsys.readouterr().out.replace("\n", "")
    assert run(["samples", "mine", "--step", "4"]) == 1
    assert run(["samples", "nine"]) == 2
    assert run(["samples", "mine", "--steps", "x"]) == 2
    assert "saw 'x'; expected A:B" in capsys.readouterr().err


def test_without_any_run_the_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no run in .*: expected the name or folder of one"):
        shown("--root", str(tmp_path))


def test_an_evaluation_of_a_further_set_is_shown_by_its_name(folder: Path) -> None:
    rows = [
        {"steps": steps, "samples": [{"prompt": name, "completion": "c", "answer": "a", "reward": 1.0}], **of}
        for steps, name, of in ((0, "easy", {}), (4, "hard", {"set": "hard"}), (2, "easy", {"set": "main"}))
    ]
    (folder / "evals.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    for arguments, prompt, steps in (((), "easy", 2), (("--set", "hard"), "hard", 4), (("--set", "main"), "easy", 2)):
        text, exit_code = shown(str(folder), "--evaluation", *arguments)
        assert (exit_code, text.splitlines()[0].split("  ")[0]) == (0, f"evaluation after {steps} steps")
        assert {line.split()[1] for line in text.splitlines() if line.startswith("  prompt")} == {prompt}
    text, exit_code = shown(str(folder), "--evaluation", "--set", "none")
    assert exit_code == 1
    assert text.endswith("has no evaluation of a set 'none': expected --set hard or main\n")
    with pytest.raises(ConfigError, match="saw --set hard without --evaluation"):
        shown(str(folder), "--set", "hard")
