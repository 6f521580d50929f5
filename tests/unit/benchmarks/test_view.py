"""The benchmarks of the page and of what it shows run, on a small run, and say what they measured."""

import sys
from pathlib import Path

import pytest

from benchmarks import log_ratios, view


@pytest.mark.slow
def test_it_measures_two_runs_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.view.shutil.which", lambda name: None)  # the paint is measured where a browser is
    monkeypatch.setattr(sys, "argv", ["view", "--steps", "40", "--gigabytes", "0.001", "--folder", str(tmp_path)])
    view.main()
    said = capsys.readouterr().out
    for what in ("first overview", "a refresh of an open page", "a step, slowest", "tokens, median", "memory, long"):
        assert what in said
    assert list(tmp_path.iterdir()) == []


def test_what_recording_log_ratios_costs_is_a_ratio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["log_ratios", "--groups", "2", "--completions", "4", "--tokens", "300"])
    log_ratios.main()
    said = capsys.readouterr().out
    assert "2,400 sampled tokens" in said
    assert "place and write the log-ratios" in said
    share = float(said.rpartition(" = ")[2].partition(",")[0])
    assert 0.2 < share < 0.3
