"""What a refresh costs is found from blocks of steps, though steps cost more or less by what they compute."""

import random

import pytest

from benchmarks.view_beside import Mark, fit, is_asked

STEP, ROW, REFRESH = 0.5, 0.002, 0.004
NOISE = 0.01


def test_the_cost_of_a_refresh_is_told_apart_from_that_of_the_steps_beside_it() -> None:
    generator = random.Random(3)
    num_rows = [round(800 * 0.97**step) for step in range(60)]
    marks, cpu, num_asked = [Mark(0, 1.0, 0)], 1.0, 0
    for end in range(3, 61, 3):
        asked = generator.randint(20, 60) if is_asked(end + 1) else 0
        num_asked += asked
        cpu += 3 * STEP + ROW * sum(num_rows[end - 3 : end]) + REFRESH * asked + generator.gauss(0, NOISE)
        marks.append(Mark(end, cpu, num_asked))
    found = fit(marks, num_rows)
    assert found.refresh_seconds == pytest.approx(REFRESH, abs=4 * found.error_seconds)
    assert 0 < found.error_seconds < REFRESH / 4
    assert found.step_seconds == pytest.approx(STEP + ROW * sum(num_rows) / 60, rel=0.02)


def test_blocks_are_asked_by_turns() -> None:
    assert [is_asked(first) for first in (4, 7, 10, 13)] == [False, True, False, True]
