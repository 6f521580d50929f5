"""The text side of a model folder, and folders that have none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock_trainer.data.tokenizer import load_vocabulary


def with_text(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def with_wrong_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": "many"}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a pointer of git lfs": with_text("tokenizer.json", "version https://git-lfs.github.com/spec/v1"),
    "a list": with_text("tokenizer.json", "[]"),
    "a text as number": with_wrong_config,
}


def test_a_folder_with_a_tokenizer(tiny_model: Path) -> None:
    vocabulary = load_vocabulary(str(tiny_model))
    assert (vocabulary.end_of_text_ids, vocabulary.context_length, vocabulary.size) == ((1,), 256, 43)


@pytest.mark.parametrize(("generation", "expected"), [("{}", (1,)), ('{"eos_token_id": [1, 2]}', (1, 2))])
def test_end_tokens_are_the_configurations_if_that_of_generation_names_none(
    generation: str, expected: tuple[int, ...], tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text(generation)
    assert load_vocabulary(str(folder)).end_of_text_ids == expected


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_one_clear_error(
    damage: Callable[[Path], object], tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    with pytest.raises(ConfigError, match=r"^actor\.path is .*expected a model folder with a tokenizer"):
        load_vocabulary(str(folder))
