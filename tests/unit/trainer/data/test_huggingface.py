"""Hugging Face datasets from a folder or file, without a network."""

import gzip
import math
import os
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.config import ColumnsSection, DatasetSection
from penstock.errors import DataError
from penstock_trainer.data.datasets import load_rows

COLUMNS = ColumnsSection(prompt="question", answer="solution")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the library's cache out of the user's home, and off the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def section(path: Path, split: str = "train") -> DatasetSection:
    return DatasetSection(kind="huggingface", path=str(path), split=split, columns=COLUMNS)


def table() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"question": ["1+1=", "2+2="], "solution": ["2", "4"], "level": [1, 2]})


def test_a_saved_folder_of_splits(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(), "test": table().select([1])}).save_to_disk(str(tmp_path / "saved"))
    assert [row.prompt for row in load_rows(section(tmp_path / "saved"))] == ["1+1=", "2+2="]
    rows = load_rows(section(tmp_path / "saved", "test"))
    assert [(row.prompt, row.answer, row.reward, row.metadata) for row in rows] == [("2+2=", "4", "", {})]
    assert rows[0].place == f"{tmp_path / 'saved'}[test] row 0"


def test_a_saved_folder_of_one_dataset(tmp_path: Path) -> None:
    table().save_to_disk(str(tmp_path / "saved"))
    assert len(load_rows(section(tmp_path / "saved"))) == 2


@pytest.mark.parametrize("held", ["test", "test[:1]"])
def test_a_saved_folder_of_one_split_gives_that_split_and_no_other(tmp_path: Path, held: str) -> None:
    table().to_parquet(tmp_path / "table.parquet")
    files = {"test": str(tmp_path / "table.parquet")}
    one = datasets.load_dataset("parquet", data_files=files, split=held)
    one.save_to_disk(str(tmp_path / "saved"))
    assert len(load_rows(section(tmp_path / "saved", "test"))) == len(one)
    assert len(load_rows(section(tmp_path / "saved", held))) == len(one)
    with pytest.raises(
        DataError, match=rf"saved \(data\.eval\.path\) holds one split, '{re.escape(held)}'.*data\.eval\.split"
    ):
        load_rows(section(tmp_path / "saved", "train"), "data.eval")


def test_a_source_without_splits_takes_no_other_than_the_default(tmp_path: Path) -> None:
    """Else a run would be evaluated on the prompts that it trains on, and nobody would notice."""
    table().save_to_disk(str(tmp_path / "saved"))
    table().to_parquet(tmp_path / "table.parquet")
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1=", "solution": "2"}\n')
    lines = section(tmp_path / "rows.jsonl", "test").model_copy(update={"kind": "jsonl"})
    task = DatasetSection(kind="reasoning_gym", path="basic_arithmetic", size=2, split="test")
    for without in (section(tmp_path / "saved", "test"), section(tmp_path / "table.parquet", "test"), lines, task):
        with pytest.raises(DataError, match=r"\(data\.eval\.path\) has no splits, and data\.eval\.split is 'test'"):
            load_rows(without, "data.eval")
        assert load_rows(without.model_copy(update={"split": "train"}), "data.eval")


def test_a_file_and_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    table().to_parquet(tmp_path / "files" / "train.parquet")
    assert len(load_rows(section(tmp_path / "files" / "train.parquet"))) == 2
    assert len(load_rows(section(tmp_path / "files"))) == 2


def test_a_missing_dataset_or_split_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\(data\.train\.path\), split 'train' .* cannot be loaded"):
        load_rows(section(tmp_path / "nowhere"))
    datasets.DatasetDict({"test": table()}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"split 'train' \(data\.train\.split\), cannot be loaded"):
        load_rows(section(tmp_path / "saved"))


def test_a_missing_column_names_the_key(tmp_path: Path) -> None:
    table().save_to_disk(str(tmp_path / "saved"))
    unmapped = section(tmp_path / "saved").model_copy(update={"columns": ColumnsSection()})
    with pytest.raises(DataError, match=r"no `prompt` among `question`.*data\.train\.columns\.prompt"):
        load_rows(unmapped)


def test_a_path_that_is_no_dataset_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "empty.json").touch()
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(b"{}")[:-9])
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "rows.json").write_text('{"question": "a", "solution": \n')
    for name in ("folder", "loop.json", "pipe.json", "empty.json", "rows.json.gz", "rows.parquet", "rows.json", "a\0b"):
        with pytest.raises(DataError, match=r"\(data\.train\.path\)"):
            load_rows(section(tmp_path / name))


def test_rows_of_tables_are_checked_as_others(tmp_path: Path) -> None:
    questions = [[{"role": "user", "content": "a", "name": None}], [{"role": "user", "content": "b", "name": "x"}]]
    datasets.Dataset.from_dict({"question": questions, "solution": [1.5, None]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet\[train\] row 1: `solution` is null"):
        load_rows(section(tmp_path / "rows.parquet"))
    limited = section(tmp_path / "rows.parquet").model_copy(update={"size": 1})
    assert load_rows(limited)[0].prompt == [{"role": "user", "content": "a"}]
    table = pa.table({"question": ["a"], "solution": pa.array([math.nan])})
    pq.write_table(table, tmp_path / "nan.parquet")
    with pytest.raises(DataError, match=r"row 0: `solution` is nan"):
        load_rows(section(tmp_path / "nan.parquet"))


def test_verls_layout_is_read_by_names_with_dots(tmp_path: Path) -> None:
    rows = {
        "data_source": ["gsm8k"] * 2,
        "prompt": [[{"role": "user", "content": f"{n}+1="}] for n in range(2)],
        "reward_model": [{"style": "rule", "ground_truth": str(n + 1)} for n in range(2)],
        "extra_info": [{"index": n, "split": "train"} for n in range(2)],
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    columns = ColumnsSection(answer="reward_model.ground_truth", metadata="extra_info")
    found = load_rows(section(tmp_path / "train.parquet").model_copy(update={"columns": columns}))
    assert [(row.answer, row.metadata["index"]) for row in found] == [("1", 0), ("2", 1)]
    assert found[1].prompt == [{"role": "user", "content": "1+1="}]


def test_text_of_a_table_that_is_no_unicode_names_its_row(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"question": texts, "solution": ["1", "2"]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet\[train\] row [01]: cannot be read .*utf-8"):
        load_rows(section(tmp_path / "rows.parquet"))
