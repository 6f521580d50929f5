"""What the check says of one group that was generated and scored."""

from array import array

import pytest

from penstock.config.loss import AdvantageSection
from penstock.contracts import Score
from penstock_launch.check.generation import engine_failed, lengths_line, rewards_line, shown
from penstock_rollout.engine.types import Answer


def answers(*lengths: int, text: str = "") -> list[Answer]:
    """Those of 8 tokens were cut."""
    return [
        Answer(array("i", [1] * n), array("f", [-0.1] * n), (), text or str(place), "length" if n == 8 else "stop")
        for place, n in enumerate(lengths)
    ]


def scores(*values: float | None) -> list[Score]:
    return [Score(value, "boom" if value is None else "") for value in values]


def test_rewards_that_differ_are_a_signal() -> None:
    line = rewards_line(answers(1, 1, 1), scores(0, 1, 0.5), AdvantageSection())
    assert (line.verdict, line.seen) == ("ok", "3 from 0 to 1, mean 0.5")


@pytest.mark.parametrize(("text", "same"), [("7", "; the completions are the same, too"), ("", "")])
def test_rewards_that_are_all_equal_are_a_warning(text: str, same: str) -> None:
    line = rewards_line(answers(1, 1, text=text), scores(0.25, 0.25), AdvantageSection())
    assert (line.verdict, line.seen) == ("warning", f"all 2 are 0.25{same}: such a group has no gradient")
    assert "reward.functions" in line.advice


def test_equal_rewards_are_no_warning_if_advantages_are_not_relative_to_the_group() -> None:
    assert rewards_line(answers(1, 1), scores(1, 1), AdvantageSection(baseline="none", scale="none")).verdict == "ok"
    near = rewards_line(answers(1, 1), scores(1, 1.25), AdvantageSection(tolerance=0.25))
    assert near.verdict == "warning"
    assert "within loss.advantage.tolerance 0.25" in near.seen


def test_failed_rewards_are_counted_with_the_first_reason() -> None:
    some = rewards_line(answers(1, 1, 1), scores(None, 1, 0), AdvantageSection())
    none = rewards_line(answers(1, 1), scores(None, None), AdvantageSection())
    assert (some.verdict, none.verdict) == ("warning", "problem")
    assert some.seen == "1 of 3 rewards failed; the first: boom; the others: 0 to 1, mean 0.5"
    assert none.seen == "all 2 rewards failed; the first: boom"


@pytest.mark.parametrize(("lengths", "verdict"), [((8, 8, 3), "warning"), ((8, 3, 3), "ok"), ((8, 3), "ok")])
def test_completions_that_were_cut_are_counted(lengths: tuple[int, ...], verdict: str) -> None:
    line = lengths_line(answers(*lengths), 8)
    assert line.verdict == verdict
    assert f"{lengths.count(8)} of {len(lengths)} cut at sampling.max_new_tokens = 8" in line.seen


def test_the_middle_of_a_long_text_is_left_out() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 5000)) < 400
    assert "characters ...]" in shown("x" * 5000)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "SGLang did not answer"),
        ("; the end of e.log:\n  a\nValueError: no memory\n  b", "SGLang did not answer: ValueError: no memory"),
        ("; the end of e.log:\n  killed\n\n", "SGLang did not answer: killed"),
    ],
)
def test_an_engine_that_failed_is_named_by_the_last_exception_in_its_log(log: str, reason: str) -> None:
    found = engine_failed(f"SGLang did not answer{log}")
    assert [(line.verdict, line.seen) for line in found.lines] == [("problem", reason)]
    assert list(found.log) == log.splitlines()[1:]
