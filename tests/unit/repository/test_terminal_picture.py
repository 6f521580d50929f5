"""The picture of a terminal in README, drawn from the files of a run."""

import json
from dataclasses import replace
from pathlib import Path

import yaml

from docs.terminal_picture import drawn, shown
from penstock_trainer.telemetry.progress import Progress
from penstock_trainer.telemetry.records import EvalResult, EvalSample, StepLine

LINE = StepLine(0, 1, 0.1, (0, 1), 100.0, 102.0, {"step": 2.0}, 1.6, 32, 0.0, 1, 0.5, {"loss": 0.1})
EVAL = EvalResult(0, 0.25, 0.25, 4, 4, 0, 0, 0, (EvalSample("2+2=", "5", "4", 0.0),))


def test_the_picture_shows_a_run_after_some_of_its_steps(tmp_path: Path) -> None:
    run = tmp_path / "t"
    progress = Progress(run)
    for step in range(40):
        began = 100.0 + 2 * step
        progress.add_step(replace(LINE, step=step, reward_mean=step / 40, started_at=began, ended_at=began + 2))
    for steps in (0, 20, 40):
        progress.add_eval(replace(EVAL, steps=steps, accuracy=0.25 + steps / 100))
    given = {"run": {"name": "t"}, "actor": {"path": "m"}, "data": {"train": {"path": "d.jsonl"}}}
    (run / "config.yaml").write_text(yaml.safe_dump(given))
    (run / "summary.json").write_text(json.dumps({"seconds_setup": 26.0}))
    before = {path: path.read_bytes() for path in run.iterdir()}
    rows = shown(run, 30)
    text = "\n".join(row.plain for row in rows)
    assert "[  86.0 s] step 30/40    0.725" in text
    assert "held-out  accuracy 0.25 -> 0.45   reward 0.25 -> 0.25   after 0 -> 20 steps" in text
    assert "sample    2+2= -> '5'  reward 0" in text
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    picture = drawn(rows)
    assert picture.startswith("<svg")
    assert "font-face" not in picture  # which would load a font from elsewhere
