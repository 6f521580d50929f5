"""Folders of runs as launches leave them, small."""

from pathlib import Path
from typing import Any

import yaml

from tests.unit.common.records.run_files import write_lines, write_summary
from tests.unit.common.records.test_figures import evaluation, step


def make_run(
    folder: Path, rewards: list[float], *, code: int | None = 0, started_at: float = 1e9, **config: Any
) -> Path:
    """A run of 2 s a step; code: with which its last launch ended; None: it left no end."""
    lines = (step(n, reward, started_at=started_at + 2 * n) for n, reward in enumerate(rewards))
    write_lines(folder / "steps.jsonl", *lines)
    write_lines(folder / "evals.jsonl", evaluation(0, 0.25), evaluation(len(rewards), 0.75))
    if code is not None:
        write_summary(folder, code, "stopped by Ctrl-C" if code > 128 else "because")
    document = {"run": {"name": folder.name}, "actor": {"path": "models/tiny"}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    return folder


def write_log(folder: Path, name: str, *lines: str) -> None:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with (folder / "logs" / f"{name}.log").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)
