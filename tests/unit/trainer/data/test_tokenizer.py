"""The text side of a model folder, and folders that have none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock_trainer.data.tokenizer import check_teacher, load_vocabulary


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


def changed(folder: Path, tiny_model: Path, **values: object) -> str:
    """A copy of the model whose config.json has other values."""
    shutil.copytree(tiny_model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return str(folder)


def with_vocabulary(folder: Path, tiny_model: Path, change: Callable[[dict[str, int]], object]) -> str:
    shutil.copytree(tiny_model, folder)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    change(document["model"]["vocab"])
    path.write_text(json.dumps(document))
    return str(folder)


def swapped(vocabulary: dict[str, int]) -> None:
    vocabulary["3"], vocabulary["7"] = vocabulary["7"], vocabulary["3"]


def test_a_teacher_of_the_same_tokenizer_may_have_more_embeddings_and_another_shape(
    tiny_model: Path, tmp_path: Path
) -> None:
    policy = load_vocabulary(str(tiny_model))
    check_teacher(str(tiny_model), str(tiny_model), policy, 256)
    check_teacher(changed(tmp_path / "larger", tiny_model, vocab_size=64), str(tiny_model), policy, 256)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swapped, r"differ in 2 tokens \(of \d+ and \d+\), first '3': \d+ there, \d+ here"),
        (lambda vocabulary: vocabulary.update(ab=43), r"differ in 1 tokens \(.*\), first 'ab': 43 there, absent here"),
        (lambda vocabulary: vocabulary.pop("9"), r"differ in 1 tokens \(.*\), first '9': absent there, \d+ here"),
    ],
    ids=["swapped", "more", "fewer"],
)
def test_a_teacher_of_another_tokenizer_is_refused_and_both_models_are_named(
    tiny_model: Path, tmp_path: Path, change: Callable[[dict[str, int]], object], words: str
) -> None:
    policy = load_vocabulary(str(tiny_model))
    folder = with_vocabulary(tmp_path / "teacher", tiny_model, change)
    with pytest.raises(ConfigError, match=words) as error:
        check_teacher(folder, str(tiny_model), policy, 256)
    assert str(error.value).startswith(
        f"teacher.path is {folder!r} and actor.path {str(tiny_model)!r}, whose tokenizers"
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"vocab_size": 42}, "embeddings of 42 and 43 tokens"),
        ({"max_position_embeddings": 100}, "reads up to 100 tokens, and a sequence of this run may have 101"),
    ],
)
def test_a_teacher_that_cannot_read_all_that_the_policy_writes_is_refused(
    tiny_model: Path, tmp_path: Path, values: dict[str, object], words: str
) -> None:
    policy = load_vocabulary(str(tiny_model))
    with pytest.raises(ConfigError, match=words):
        check_teacher(changed(tmp_path / "teacher", tiny_model, **values), str(tiny_model), policy, 101)


def test_a_teacher_without_a_tokenizer_is_named_by_its_key(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^teacher\.path is "):
        check_teacher(str(tmp_path), str(tiny_model), load_vocabulary(str(tiny_model)), 101)
