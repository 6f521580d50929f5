"""Hugging Face datasets from a folder or file, without a network."""

import re
from pathlib import Path

import datasets
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
