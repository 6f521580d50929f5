"""Rows from JSONL and reasoning-gym: their content, and one clear error for every bad row."""

import gzip
import json
import os
import re
from pathlib import Path

import msgspec
import pytest

from penstock.config import ColumnsSection, DatasetSection
from penstock.errors import DataError
from penstock_trainer.data.datasets import load_rows
from penstock_trainer.data.rows import Row, require_rewards


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


def test_a_name_with_dots_leads_into_objects_unless_a_column_has_it(tmp_path: Path) -> None:
    section = write(
        tmp_path,
        {"prompt": "a", "reward_model": {"ground_truth": {"value": 4}, "style": "rule"}, "extra_info": {"index": 0}},
        {"prompt": "b", "reward_model.ground_truth.value": 5, "reward_model": {"style": "numeric"}},
    )
    columns = ColumnsSection(
        answer="reward_model.ground_truth.value", reward="reward_model.function", metadata="extra_info"
    )
    first, second = load_rows(section.model_copy(update={"columns": columns}))
    assert (first.prompt, first.answer, first.reward, first.metadata) == ("a", "4", "", {"index": 0})
    assert (second.prompt, second.answer, second.metadata) == ("b", "5", {})


@pytest.mark.parametrize(
    ("row", "seen"),
    [
        ({"info": {"a": 1, "b": 2}}, "no `info.answer.text` among `info.a`, `info.b`"),
        ({"info": {"answer": {}}}, "no `info.answer.text` among no columns in it"),
        ({"info": {"answer": "4"}}, "no `info.answer.text`: `info.answer` is '4' (str)"),
        ({"info": None}, "no `info.answer.text`: `info` is null"),
        ({"inf": {}}, "no `info.answer.text` among `prompt`, `inf`"),
        ({"info": {"answer": {"text": None}}}, "`info.answer.text` is null"),
        ({"info": {"answer": {"text": [1]}}}, "`info.answer.text` is [1] (list)"),
    ],
)
def test_a_column_within_others_that_is_not_there_shows_what_is(tmp_path: Path, row: object, seen: str) -> None:
    assert isinstance(row, dict)
    section = write(tmp_path, {"prompt": "a", **row})
    columns = ColumnsSection(answer="info.answer.text")
    with pytest.raises(DataError) as caught:
        load_rows(section.model_copy(update={"columns": columns}))
    assert str(caught.value).startswith(f"{section.path} line 1: {seen}: expected text")
    assert str(caught.value).endswith("correct the row or set data.train.columns.answer")


def test_an_answer_of_more_than_64_bits_is_text(tmp_path: Path) -> None:
    assert load_rows(write(tmp_path, {"prompt": "a", "answer": 2**70}))[0].answer == str(2**70)


def test_a_byte_order_mark_is_tolerated(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": "b"}\n')
    assert load_rows(DatasetSection(path=str(path)))[0].prompt == "a"


@pytest.mark.parametrize(
    ("row", "seen"),
    [
        ({"promt": "a", "answer": "b"}, "no `prompt` among `promt`, `answer`"),
        ({}, "no `prompt` among no columns"),
        ({"prompt": None, "answer": "b"}, "`prompt` is null"),
        ({"prompt": "  ", "answer": "b"}, "`prompt` is empty"),
        ({"prompt": 7, "answer": "b"}, "`prompt` is 7 (int)"),
        ({"prompt": [], "answer": "b"}, "`prompt` is an empty list"),
        ({"prompt": ["hi"], "answer": "b"}, "`prompt[0]` is 'hi' (str)"),
        ({"prompt": [{"role": "user"}], "answer": "b"}, "`prompt[0]` has no `content`"),
        ({"prompt": [{"role": "user", "content": 7}], "answer": "b"}, "`prompt[0].content` is 7 (int)"),
        ({"prompt": "a"}, "no `answer` among `prompt`"),
        ({"prompt": "a", "answer": ["b"]}, "`answer` is ['b'] (list)"),
        ({"prompt": "a", "answer": True}, "`answer` is True (bool)"),
        ({"prompt": "a", "answer": "b", "reward": 1}, "`reward` is 1 (int)"),
        ({"prompt": "a", "answer": "b", "metadata": [1]}, "`metadata` is [1] (list)"),
        ({"prompt": "a", "answer": "b", "metadata": {"n": 2**70}}, "`metadata.n` is beyond 64 bits"),
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


DEEP = "[" * 100_000 + "]" * 100_000
DEEP_IN_PYTHON = "[" * 500 + "]" * 500

BAD_LINES = [
    (r'{"prompt": "a\ud83d", "answer": "1"}', "`prompt` has a lone surrogate"),
    (r'{"prompt": "a", "answer": "\ud83d"}', "`answer` has a lone surrogate"),
    (r'{"prompt": "a", "answer": "1", "reward": "\udc00"}', "`reward` has a lone surrogate"),
    (r'{"prompt": "a", "answer": "1", "metadata": {"k": ["\ud83d"]}}', "`metadata.k[0]` has a lone surrogate"),
    (r'{"prompt": "a", "answer": "1", "metadata": {"\ud83d": 1}}', "`metadata` has a key with a lone surrogate"),
    (r'{"prompt": [{"role": "user", "content": "\ud83d"}], "answer": "1"}', "`prompt[0].content` has a lone"),
    (r'{"prompt": [{"role": "\ud83d", "content": "x"}], "answer": "1"}', "`prompt[0].role` has a lone"),
    (
        r'{"prompt": [{"role": "user", "content": "x", "n": {"a": "\ud83d"}}], "answer": ""}',
        "`prompt[0].n.a` has a",
    ),
    ('{"prompt": "a", "answer": NaN}', "`answer` is nan"),
    ('{"prompt": "a", "answer": 1e999}', "`answer` is inf"),
    ('{"prompt": "a", "answer": -Infinity}', "`answer` is -inf"),
    ('{"prompt": "a", "answer": "1", "metadata": {"k": NaN}}', "`metadata.k` is nan"),
    ('{"prompt": [{"role": "user", "content": "x", "n": 1e999}], "answer": "1"}', "`prompt[0].n` is inf"),
    ('{"prompt": "a", "answer": "1", "reward": NaN}', "`reward` is nan"),
    ('{"prompt": "a", "answer": null}', "`answer` is null"),
    ('{"prompt": null, "answer": "1"}', "`prompt` is null"),
    ('{"prompt": [null], "answer": "1"}', "`prompt[0]` is null"),
    ('{"prompt": [{"role": null, "content": "x"}], "answer": "1"}', "`prompt[0].role` is null"),
    ('{"prompt": [{"role": "assistant", "content": null, "n": []}], "answer": "1"}', "`prompt[0].content` is null"),
    ('{"prompt": [{"role": "user", "content": " "}], "answer": "1"}', "`prompt[0].content` is empty"),
    ('{"prompt": "a", "answer": "1", "reward": 0}', "`reward` is 0 (int)"),
    ('{"prompt": "a", "answer": "1", "metadata": ""}', "`metadata` is '' (str)"),
    ('{"prompt": "a", "answer": "1", "metadata": []}', "`metadata` is [] (list)"),
    ('{"prompt": "a", "prompt": "b", "answer": "1"}', "`prompt` twice"),
    ('{"prompt": "a", "answer": "1", "metadata": {"k": 1, "k": 2}}', "`k` twice"),
    ('{"prompt": "a", "answer": ' + "9" * 5000 + "}", "digits"),
    ('{"prompt": "a", "answer": "1", "metadata": {"k": 18446744073709551616}}', "`metadata.k` is beyond 64 bits"),
    (
        '{"prompt": [{"role": "user", "content": "a", "id": 18446744073709551616}], "answer": "1"}',
        "`prompt[0].id` is beyond 64 bits",
    ),
    ('{"prompt": "a", "answer": ' + DEEP + "}", "nested"),
    ('{"prompt": "a", "answer": ' + DEEP_IN_PYTHON + "}", "`answer` is [[["),
    ('{"prompt": ' + DEEP_IN_PYTHON + ', "answer": "1"}', "`prompt[0]` is [[["),
    ('{"prompt": "a", "answer": "1", "metadata": {"k": ' + DEEP_IN_PYTHON + "}}", "deeper than"),
    ('{"prompt": "a", "answer": "1", "metadata": {"k": ' + '{"k":' * 500 + "1" + "}" * 500 + "}}", "deeper than"),
    (DEEP, "nested"),
    ("null", "null: expected an object"),
    ('"text"', "'text' (str): expected an object"),
    ('{"prompt": "a", "answer": "1"} {"prompt": "b"}', "not JSON (Extra data"),
    ("\0\0\0", "not JSON ("),
]


@pytest.mark.parametrize(("line", "seen"), BAD_LINES)
def test_every_fault_of_a_line_names_file_and_line(tmp_path: Path, line: str, seen: str) -> None:
    section = write(tmp_path, {"prompt": "a", "answer": "b"}, "", line)
    with pytest.raises(DataError) as caught:
        load_rows(section)
    message = str(caught.value)
    assert message.startswith(f"{section.path} line 3: ")
    assert seen in message
    assert "expected" in message
    assert len(message) < 400
    message.encode()  # it can be printed


def test_bytes_that_are_no_text_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "b"}\r\n{"prompt": "\xe9", "answer": "b"}\r\n')
    with pytest.raises(DataError, match=r"rows\.jsonl line 2: not UTF-8 .*0xe9.*: expected"):
        load_rows(DatasetSection(path=str(path)))


def test_what_is_unusual_but_right_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "hi", "tool_calls": None}, {"role": "system", "content": ""}]
    lines = (
        r'{"prompt": "a\u2028\ud83d\ude00", "answer": 1' + "0" * 400 + ', "x": NaN, "reward": null, "metadata": null}',
        json.dumps({"prompt": chat, "answer": 0}),
        '{"prompt": "\x85\u2028\u2029x", "answer": "", "metadata": {"a": {"b": [null, true, 1.5]}}}',
    )
    path.write_bytes("\r\n\r\n".join(lines).encode("utf-8-sig"))
    assert load_rows(DatasetSection(path=str(path))) == [
        Row("a\u2028\U0001f600", "1" + "0" * 400, "", {}, f"{path} line 1"),
        Row([{"role": "user", "content": "hi"}, {"role": "system", "content": ""}], "0", "", {}, f"{path} line 3"),
        Row("\x85\u2028\u2029x", "", "", {"a": {"b": [None, True, 1.5]}}, f"{path} line 5"),
    ]


@pytest.mark.parametrize(
    ("reward", "near"), [("vowel", "own.vowels:count"), ("exact_mach", "exact_match"), ("Numeric", "numeric")]
)
def test_a_reward_that_does_not_exist_is_refused_with_the_nearest_name(reward: str, near: str) -> None:
    functions = {"own.vowels:count": 1.0, "numeric": 0.0}
    known = [Row("a", "1", name) for name in ("", "exact_match", *functions)]
    require_rewards(known, functions)
    with pytest.raises(DataError) as caught:
        require_rewards([*known, Row("a", "1", reward, place="r line 4")], functions)
    assert str(caught.value).startswith(f"r line 4: the reward {reward!r}")
    assert f"did you mean {near!r}?" in str(caught.value)
    assert "reward.functions" in str(caught.value)


def test_a_task_that_pays_for_nothing_is_refused_at_the_start() -> None:
    section = DatasetSection(kind="reasoning_gym", path="propositional_logic", size=1)
    with pytest.raises(DataError, match=r"reasoning_gym propositional_logic row 0: .*premise.*expected another task"):
        require_rewards(load_rows(section), {"exact_match": 1.0})


def test_a_task_takes_its_parameters_and_names_those_that_it_lacks() -> None:
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    section = DatasetSection(kind="reasoning_gym", path="chain_sum", size=20, options=options)
    rows = load_rows(section)
    assert all(re.search(r": \d [+-] \d =$", str(row.prompt)) for row in rows)
    with pytest.raises(DataError, match=r"chain_sum \(data\.eval\.path\).*'terms'.*correct data\.eval\.options"):
        load_rows(section.model_copy(update={"options": {"terms": 2}}), "data.eval")
    with pytest.raises(DataError, match=r"max_terms must be >= min_terms.*correct data\.train\.options"):
        load_rows(section.model_copy(update={"options": {"min_terms": 9}}))


def test_a_row_without_a_reward_needs_a_function_with_a_weight() -> None:
    require_rewards([Row("a", "1", "numeric")], {"exact_match": 0.0})
    with pytest.raises(DataError, match=r"r line 1: .* every weight in reward\.functions is 0"):
        require_rewards([Row("a", "1", "", place="r line 1")], {"exact_match": 0.0})


def test_a_path_that_is_no_file_of_rows_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "rows.gz").write_bytes(gzip.compress(b'{"prompt": "a", "answer": "b"}'))
    wanted = {"folder": "directory", "loop": "symbolic links", "pipe": "not a regular file", "empty": "no rows"}
    for name, reason in {**wanted, "rows.gz": "not UTF-8", "a\0b": "null byte", "x" * 300: "too long"}.items():
        with pytest.raises(DataError, match=rf"{reason}.*data\.train\.path|data\.train\.path.*{reason}"):
            load_rows(DatasetSection(path=str(tmp_path / name)))


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
