"""Rows from JSONL and reasoning-gym: their content, and one clear error for every bad row."""

import json
from pathlib import Path

import msgspec
import pytest

from penstock.config import ColumnsSection, DatasetSection
from penstock.errors import DataError
from penstock_trainer.data.datasets import Row, load_rows


def write(folder: Path, *lines: object) -> DatasetSection:
    path = folder / "rows.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return DatasetSection(path=str(path))


def test_reads_text_messages_and_optional_columns(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    section = write(
        tmp_path,
        {"prompt": "1+1=", "answer": 2},
        "",
        {"prompt": messages, "answer": "hello", "reward": "exact_match", "metadata": {"a": [1, {"b": None}]}},
    )
    assert load_rows(section) == [
        Row("1+1=", "2", "", {}, f"{section.path} line 1"),
        Row(messages, "hello", "exact_match", {"a": [1, {"b": None}]}, f"{section.path} line 3"),
    ]


def test_columns_are_mapped_and_size_limits(tmp_path: Path) -> None:
    section = write(tmp_path, *({"question": f"{n}?", "solution": f"{n}!"} for n in range(5)))
    columns = ColumnsSection(prompt="question", answer="solution")
    rows = load_rows(section.model_copy(update={"columns": columns, "size": 2}))
    assert [(row.prompt, row.answer) for row in rows] == [("0?", "0!"), ("1?", "1!")]


def test_a_byte_order_mark_is_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": "b"}\n')
    assert load_rows(DatasetSection(path=str(path)))[0].prompt == "a"


@pytest.mark.parametrize(
    ("row", "seen"),
    [
        ({"promt": "a", "answer": "b"}, "no `prompt` among `promt`, `answer`"),
        ({}, "no `prompt` among no columns"),
        ({"prompt": None, "answer": "b"}, "no `prompt`"),
        ({"prompt": "  ", "answer": "b"}, "`prompt` is empty"),
        ({"prompt": 7, "answer": "b"}, "`prompt` is 7 (int)"),
        ({"prompt": [], "answer": "b"}, "`prompt` is an empty list"),
        ({"prompt": ["hi"], "answer": "b"}, "`prompt` has 'hi' (str) as message 0"),
        ({"prompt": [{"role": "user"}], "answer": "b"}, "as message 0"),
        ({"prompt": [{"role": "user", "content": 7}], "answer": "b"}, "message 0 whose role or content is no text"),
        ({"prompt": "a"}, "no `answer` among `prompt`"),
        ({"prompt": "a", "answer": ["b"]}, "`answer` is ['b'] (list)"),
        ({"prompt": "a", "answer": True}, "`answer` is True (bool)"),
        ({"prompt": "a", "answer": "b", "reward": 1}, "`reward` is 1 (int)"),
        ({"prompt": "a", "answer": "b", "metadata": [1]}, "`metadata` is [1] (list)"),
        ({"prompt": "a", "answer": "b", "metadata": {"n": 2**70}}, "metadata cannot be sent"),
        ("[1]", "[1] (list): expected an object with `prompt` and `answer`"),
        ('{"prompt": "a",', "not JSON ("),
    ],
)
def test_a_bad_row_names_its_line_and_what_was_seen(tmp_path: Path, row: object, seen: str) -> None:
    section = write(tmp_path, {"prompt": "a", "answer": "b"}, row)
    with pytest.raises(DataError) as caught:
        load_rows(section)
    message = str(caught.value)
    assert message.startswith(f"{section.path} line 2: ")
    assert seen in message
    assert "expected" in message


def test_a_bad_row_names_the_key_of_its_column(tmp_path: Path) -> None:
    section = write(tmp_path, {"question": "a", "answer": "b"})
    with pytest.raises(DataError, match=r"set data\.eval\.columns\.prompt"):
        load_rows(section, "data.eval")


def test_missing_empty_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl \(data\.train\.path\) cannot be read \(No such file"):
        load_rows(DatasetSection(path=str(tmp_path / "nowhere.jsonl")))
    with pytest.raises(DataError, match=r"\(data\.train\.path\) holds no rows"):
        load_rows(write(tmp_path, "", "  "))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_rows(DatasetSection(path=str(tmp_path / "binary.jsonl")))
    with pytest.raises(DataError, match=r"data\.train\.path is empty"):
        load_rows(DatasetSection())


def test_reasoning_gym_rows_are_reproducible_and_carry_their_entry() -> None:
    section = DatasetSection(kind="reasoning_gym", path="graph_color", size=3, seed=7)
    rows = load_rows(section)
    assert rows == load_rows(section)
    assert rows != load_rows(section.model_copy(update={"seed": 8}))
    assert [row.reward for row in rows] == ["reasoning_gym"] * 3
    assert rows[0].place == "reasoning_gym graph_color row 0"


def test_reasoning_gym_entries_reach_the_reward_function_whole() -> None:
    from penstock_reward.functions.registry import load

    row = load_rows(DatasetSection(kind="reasoning_gym", path="basic_arithmetic", size=1))[0]
    reward = load("reasoning_gym")
    given = {"prompt": row.prompt, "answer": row.answer, "metadata": row.metadata}
    assert reward(completion=row.answer, **given) == 1.0
    assert reward(completion="no number", **given) < 1.0


@pytest.mark.parametrize("task", ["graph_color", "knights_knaves"])
def test_reasoning_gym_metadata_with_number_keys_and_numpy_values_travels(task: str) -> None:
    metadata = load_rows(DatasetSection(kind="reasoning_gym", path=task, size=2, seed=1))[1].metadata
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(metadata)) == metadata


def test_reasoning_gym_errors_name_the_key() -> None:
    with pytest.raises(DataError, match=r"basic_arithmetics \(data\.train\.path\) .* such as basic_arithmetic"):
        load_rows(DatasetSection(kind="reasoning_gym", path="basic_arithmetics", size=1))
    with pytest.raises(DataError, match=r"data\.train\.size is 0"):
        load_rows(DatasetSection(kind="reasoning_gym", path="basic_arithmetic"))
    with pytest.raises(DataError, match=r"composite .* cannot be made"):
        load_rows(DatasetSection(kind="reasoning_gym", path="composite", size=1))
