"""What the quick part of the check advises on rows: each problem has its own advice."""

import json
from pathlib import Path

import pytest

from penstock.config import Config
from penstock_launch.check.paths import rows_line

ROW: dict[str, object] = {"prompt": "1+1=", "answer": "2"}


@pytest.mark.parametrize(
    ("rows", "data", "advice"),
    [
        (None, {}, "Set data.train.path to a JSONL file that is there, or data.train.kind to what it names."),
        ([{"question": "1"}], {}, "Correct {file}, or set data.train.path and data.train.columns to what it holds."),
        ([{**ROW, "reward": "none"}], {}, "Correct the rewards that {file} names, or reward.functions."),
        ([ROW] * 3, {"batch_size": 500}, "Set data.batch_size to at most 3, or add rows to {file}."),
        ([ROW] * 9, {"batch_size": 5, "size": 4}, "Set data.batch_size to at most 4, or raise data.train.size."),
        ([ROW] * 9, {"batch_size": 5}, ""),
    ],
)
def test_each_problem_of_rows_has_its_own_advice(
    tmp_path: Path, rows: list[dict[str, object]] | None, data: dict[str, int], advice: str
) -> None:
    file = tmp_path / "train.jsonl"
    if rows is not None:
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    train = {"path": str(file), "size": data.get("size", 0)}
    sections = {"data": {"train": train, "batch_size": data.get("batch_size", 1)}, "actor": {"path": "m"}}
    config = Config.model_validate({**sections, "reward": {"functions": {"exact_match": 1.0}}})
    assert rows_line(config, config.data.train, "data.train").advice == advice.format(file=file)
