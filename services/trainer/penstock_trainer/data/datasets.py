"""Rows of prompts from JSONL files, Hugging Face datasets and reasoning-gym tasks.

Owns the sources of rows and the checks of a row; `prompts` turns rows into tokens. Every row that comes out is valid: a
bad one is a DataError with its place, the value seen and the key to change.

    kind            path                                        a row's place
    jsonl           a file with one JSON object per line         addition.jsonl line 3
    huggingface     folder, file or hub name; `name:subset`      openai/gsm8k:main[train] row 3
    reasoning_gym   name of a task                               reasoning_gym basic_arithmetic row 3
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from penstock.config import ColumnsSection, DatasetSection
from penstock.errors import DataError

Message = dict[str, Any]
# Suffix of a data file -> the builder of the `datasets` library that reads it.
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
DEFAULT_SPLIT = DatasetSection().split


@dataclass(frozen=True)
class Row:
    """One prompt, as text or as chat messages, and the inputs of its reward.

    reward: "" for the run's `reward.functions`, else the name of one function.
    place: of the row in its source, for messages.
    """

    prompt: str | list[Message]
    answer: str
    reward: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    place: str = ""


def load_rows(section: DatasetSection, key: str = "data.train") -> list[Row]:
    """All rows of a dataset, in its order; DataError if one is bad or there is none.

    key: the section's name in the configuration, for messages.
    """
    if not section.path:
        raise DataError(f"{key}.path is empty: expected a JSONL file, a dataset or the name of a reasoning-gym task")
    if section.kind != "huggingface":
        _require_no_split(section, key)
    if section.kind == "jsonl":
        records = _jsonl_records(section, key)
    elif section.kind == "huggingface":
        records = _huggingface_records(section, key)
    else:
        return list(_reasoning_gym_rows(section, key))
    limited = islice(records, section.size) if section.size else records
    rows = [_row(record, place, section.columns, key) for place, record in limited]
    if not rows:
        raise DataError(f"{section.path} ({key}.path) holds no rows: expected at least one prompt")
    return rows


def _row(record: object, place: str, columns: ColumnsSection, key: str) -> Row:
    """A mapping of columns as a Row."""

    def fail(seen: str, expected: str, column: str) -> DataError:
        return DataError(f"{place}: {seen}: expected {expected}; correct the row or set {key}.columns.{column}")

    if not isinstance(record, Mapping):
        raise DataError(f"{place}: {_seen(record)}: expected an object with `{columns.prompt}` and `{columns.answer}`")
    present = ", ".join(f"`{name}`" for name in record) or "no columns"
    if record.get(columns.prompt) is None:
        raise fail(f"no `{columns.prompt}` among {present}", "text or a list of chat messages", "prompt")
    prompt = record[columns.prompt]
    if isinstance(prompt, str):
        if not prompt.strip():
            raise fail(f"`{columns.prompt}` is empty", "text or a list of chat messages", "prompt")
    elif problem := _problem_of_messages(prompt):
        raise fail(f"`{columns.prompt}` {problem}", 'text or a list of {"role": ..., "content": ...}', "prompt")
    answer = record.get(columns.answer)
    if answer is None:
        raise fail(f"no `{columns.answer}` among {present}", 'text ("" if the reward needs none)', "answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise fail(f"`{columns.answer}` is {_seen(answer)}", "text or a number", "answer")
    reward = record.get(columns.reward) or ""
    if not isinstance(reward, str):
        raise fail(f"`{columns.reward}` is {_seen(reward)}", "the name of a reward function", "reward")
    metadata = record.get(columns.metadata) or {}
    if not isinstance(metadata, Mapping):
        raise fail(f"`{columns.metadata}` is {_seen(metadata)}", "an object", "metadata")
    return Row(prompt, str(answer), reward, _plain(metadata, place), place)


def _problem_of_messages(prompt: object) -> str:
    """The fault of a list of chat messages; "" if there is none."""
    if not isinstance(prompt, list):
        return f"is {_seen(prompt)}"
    if not prompt:
        return "is an empty list"
    for number, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            return f"has {_seen(message)} as message {number}"
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            return f"has a message {number} whose role or content is no text"
    return ""


def _seen(value: object) -> str:
    """A value and its type, short enough for a message."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _plain(metadata: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Metadata as plain lists, mappings, numbers and text, the types that the queue can carry."""
    try:
        # Sorted, because sets have no order: the dataset's digest must be the same in every process.
        ordered = msgspec.to_builtins(metadata, order="deterministic", enc_hook=_from_numpy)
        plain = msgspec.msgpack.decode(msgspec.msgpack.encode(ordered))
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise DataError(
            f"{place}: metadata cannot be sent ({error}): expected lists, mappings, numbers, text"
        ) from error
    if not isinstance(plain, dict):
        raise DataError(f"{place}: metadata is {_seen(plain)}: expected an object")
    return plain


def _from_numpy(value: object) -> object:
    """NumPy's scalars and arrays, which some reasoning-gym entries hold, as Python's own values."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def _jsonl_records(section: DatasetSection, key: str) -> Iterator[tuple[str, object]]:
    """(place, value) per line that is not blank."""
    path = Path(section.path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path} line {number}", _json_value(line, f"{path} line {number}")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8: {error}"
        raise DataError(f"{path} ({key}.path) cannot be read ({reason}): expected a JSONL file") from error


def _json_value(line: str, place: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        shown = line.strip()
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise DataError(
            f"{place}: not JSON ({error.msg}, column {error.colno}): expected one object, saw {shown}"
        ) from error


def _huggingface_records(section: DatasetSection, key: str) -> Iterator[tuple[str, object]]:
    """(place, value) per row of one split."""
    import datasets

    path = Path(section.path)
    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(section.path)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[section.split]
            elif loaded.split is None:
                _require_no_split(section, key)
            else:
                _require_held_split(section, key, str(loaded.split))
        elif path.suffix in FILE_BUILDERS:
            _require_no_split(section, key)
            loaded = datasets.load_dataset(FILE_BUILDERS[path.suffix], data_files={section.split: section.path})
            loaded = loaded[section.split]
        else:
            name, _, subset = (section.path, "", "") if path.exists() else section.path.partition(":")
            loaded = datasets.load_dataset(name, subset or None, split=section.split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{section.path} ({key}.path), split {section.split!r} ({key}.split), cannot be loaded: {reason}; "
            "expected a folder, a file or a hub name (name:subset if it has several)"
        ) from error
    for number, record in enumerate(loaded):
        yield f"{section.path}[{section.split}] row {number}", record


def _require_no_split(section: DatasetSection, key: str) -> None:
    """DataError if a split is asked for where there is none: it would be ignored."""
    if section.split != DEFAULT_SPLIT:
        raise DataError(
            f"{section.path} ({key}.path) has no splits, and {key}.split is {section.split!r}: leave {key}.split out, "
            f"and choose prompts by {key}.path"
        )


def _require_held_split(section: DatasetSection, key: str, held: str) -> None:
    """DataError unless a folder of one split holds the one that is asked for; `train` asks for `train[:80%]` too."""
    whole = held if "+" in held else held.partition("[")[0]
    if section.split not in (held, whole):
        raise DataError(
            f"{section.path} ({key}.path) holds one split, {held!r}, and {key}.split is {section.split!r}: expected "
            f"the split that it holds; set {key}.split to {held!r}, or give the path of other prompts"
        )


def _reasoning_gym_rows(section: DatasetSection, key: str) -> Iterator[Row]:
    """The rows of a task; the reward function `reasoning_gym` reads `task` and the full `entry` in their metadata."""
    import reasoning_gym

    if not section.size:
        raise DataError(f"{key}.size is 0: expected the number of rows that {section.path} must make")
    tasks: Iterable[str] = reasoning_gym.factory.DATASETS
    if section.path not in tasks:
        near = difflib.get_close_matches(section.path, tasks, n=3) or sorted(tasks)[:3]
        raise DataError(
            f"{section.path} ({key}.path) is no reasoning-gym task: expected a name such as {', '.join(near)}"
        )
    try:
        dataset = reasoning_gym.create_dataset(section.path, size=section.size, seed=section.seed)
    except (AssertionError, TypeError, ValueError) as error:
        expected = "expected a task that needs no settings of its own"
        raise DataError(f"{section.path} ({key}.path) cannot be made ({error}): {expected}") from error
    for number, entry in enumerate(dataset):
        place = f"reasoning_gym {section.path} row {number}"
        metadata = _plain({"task": section.path, "entry": entry}, place)
        answer = "" if entry["answer"] is None else str(entry["answer"])
        yield Row(entry["question"], answer, "reasoning_gym", metadata, place)
