"""The benchmark of the page runs, on a small run, and says what it measured."""

import sys
from pathlib import Path

import pytest

from benchmarks import view


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
