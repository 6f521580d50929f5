"""Rows of prompts from JSONL files, Hugging Face datasets and reasoning-gym tasks.

Owns the sources of rows and the places of rows in them; `rows` checks a row, `prompts` turns rows into tokens. Every
row that comes out is valid. What cannot be read is a DataError with its place, the value seen and the key to change.

    kind            path                                        a row's place
    jsonl           a file with one JSON object per line         addition.jsonl line 3
    huggingface     folder, file or hub name; `name:subset`      openai/gsm8k:main[train] row 3
    reasoning_gym   name of a task                               reasoning_gym basic_arithmetic row 3
"""

import difflib
import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from penstock.absent_path import looked_for
from penstock.config import Config, DataSection, DatasetSection, TrainingSet
from penstock.errors import DataError
from penstock_trainer.data.rows import Row, plain, read_row

# Suffix of a data file -> the builder of the `datasets` library that reads it.
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
DEFAULT_SPLIT = DatasetSection().split
MOST_IN_MEMORY = 10_000  # rows of a run's training sets; more are kept on disk
SOURCE = "data_source"  # verl's name for what tells a reward function the set of a row


def load_training_rows(data: DataSection, *, of_episodes: bool = False, first: int = 0) -> list[Row]:
    """`training_rows`, all at once."""
    return list(training_rows(data, of_episodes=of_episodes, first=first))


def training_rows(data: DataSection, *, of_episodes: bool = False, first: int = 0) -> Iterator[Row]:
    """The rows of all training sets, one set after the other, as they are read; DataError as by `load_rows`.

    Of several sets, each row has the name of its set, also as metadata `data_source` unless the row has that itself,
    and the reward function of its set unless it names one. first: of each set, at most so many rows; 0: all.
    """
    for each in data.training_sets:
        yield from rows_of_set(each, of_episodes=of_episodes, first=first)


def rows_of_set(each: TrainingSet, *, of_episodes: bool = False, first: int = 0) -> Iterator[Row]:
    """Those of one training set, as `training_rows` has them."""
    section = each.section
    size = min(section.size or first, first) if first else section.size
    rows = iterate_rows(section.model_copy(update={"size": size}), each.key, of_episodes=of_episodes)
    return (_of_set(row, each.name, section.reward) for row in rows) if each.name else rows


class BegunRows:
    """The training rows of a run, of which the first are read: those of a small set are all in memory.

    Iterate over it once.
    """

    def __init__(self, rows: Iterator[Row], states: Sequence[Any], most: int = MOST_IN_MEMORY) -> None:
        """states: of the sources, from before the first row is read. most: rows that are read now.

        DataError if one of these is bad.
        """
        self.states = states
        self._first = list(islice(rows, most + 1))
        self._rest = rows
        self.are_many = len(self._first) > most

    def __iter__(self) -> Iterator[Row]:
        first, self._first = self._first, []
        return chain(first, self._rest)

    def close(self) -> None:
        """Forget what was read, and give up the file that is open."""
        self._first, self._rest = [], iter(())


def source_states(config: Config) -> list[Any]:
    """What tells that the sources of the training sets still have the same rows; DataError if one is not there."""
    return [_state(each.section, each.key) for each in config.data.training_sets]


def _state(section: DatasetSection, key: str) -> Any:
    if section.kind == "reasoning_gym" or not section.path:
        return ""  # they follow from the keys and the library; without a path there are none
    if section.kind == "huggingface":
        loaded = load_split(section, key)
        return [loaded._fingerprint, [_file_state(Path(each["filename"])) for each in loaded.cache_files]]
    try:
        path = Path(section.path)
        _require_file(path)
        return _file_state(path)
    except (OSError, ValueError) as error:
        raise _unreadable(section, key, error) from error


def _file_state(path: Path) -> list[str | int]:
    """Not its bytes: reading all of a large file takes minutes. A file that changes gets another time."""
    found = path.stat()
    return [os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def source_of(data: DataSection) -> str:
    """Where the training prompts come from, for messages: `train.jsonl (data.train.path)`."""
    return " and ".join(f"{each.section.path} ({each.key}.path)" for each in data.training_sets)


def _of_set(row: Row, name: str, reward: str) -> Row:
    return replace(row, dataset=name, reward=row.reward or reward, metadata={SOURCE: name, **row.metadata})


def load_rows(section: DatasetSection, key: str = "data.train", *, of_episodes: bool = False) -> list[Row]:
    """All rows of a dataset, in its order; DataError if one is bad or there is none.

    key: the section's name in the configuration, for messages. of_episodes: each row starts episodes (`read_row`), and
    those of reasoning-gym name no reward: their environment, or another of the run's functions, scores them.
    """
    return list(iterate_rows(section, key, of_episodes=of_episodes))


def iterate_rows(section: DatasetSection, key: str, *, of_episodes: bool = False) -> Iterator[Row]:
    """`load_rows`, one row after the other: the errors of a row come when it is reached."""
    if not section.path:
        raise DataError(f"{key}.path is empty: expected a JSONL file, a dataset or the name of a reasoning-gym task")
    if section.kind != "huggingface":
        _require_no_split(section, key)
    if section.kind == "reasoning_gym":
        for row in _reasoning_gym_rows(section, key):
            yield replace(row, reward="") if of_episodes else row
        return
    records = _jsonl_records(section, key) if section.kind == "jsonl" else _huggingface_records(section, key)
    is_empty = True
    for place, record in islice(records, section.size) if section.size else records:
        is_empty = False
        yield read_row(record, place, section.columns, key, of_episode=of_episodes)
    if is_empty:
        raise DataError(f"{section.path} ({key}.path) holds no rows: expected at least one prompt")


def _jsonl_records(section: DatasetSection, key: str) -> Iterator[tuple[str, object]]:
    """(place, value) per line that is not blank."""
    path = Path(section.path)
    try:
        _require_file(path)
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"{path} line {number}"
                    yield place, _json_value(_text(line, number, place, key), place)
    except (OSError, ValueError) as error:
        raise _unreadable(section, key, error) from error


def _unreadable(section: DatasetSection, key: str, error: OSError | ValueError) -> DataError:
    """What is wrong with a JSONL file. ValueError: a path with a zero byte."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    where = f"; {looked_for(section.path)}" if isinstance(error, FileNotFoundError | NotADirectoryError) else ""
    return DataError(f"{section.path} ({key}.path) cannot be read ({reason}): expected a JSONL file{where}")


def _require_file(path: Path) -> None:
    """OSError unless `path` is a file or a folder: a pipe would be read once, and waited for without end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "not a regular file")


def _text(line: bytes, number: int, place: str, key: str) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 (byte 0x{line[error.start]:02x} at {error.start}): expected a JSONL file in UTF-8 as "
            f"{key}.path, not compressed"
        ) from error


def _json_value(line: str, place: str) -> object:
    try:
        return json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, column {error.colno}"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # an integer with more digits than Python reads, or a name that stands twice
        reason = str(error).partition(";")[0]
    shown = line.strip()
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise DataError(f"{place}: not JSON ({reason}): expected one object, saw {shown}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a name that stands twice, of which only one value would be used."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`{twice[:40]}` twice")
    return found


def load_split(section: DatasetSection, key: str) -> Any:
    """One split of a Hugging Face dataset, a `datasets.Dataset` whose rows stay on disk; DataError if there is none."""
    import datasets

    path = Path(section.path)
    try:
        if path.exists():
            _require_file(path)
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
    # StopIteration: it raises that for an empty JSON file.
    except (OSError, ValueError, KeyError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(f"{error or type(error).__name__} {error.__cause__ or ''}".split())[:300]
        raise DataError(
            f"{section.path} ({key}.path), split {section.split!r} ({key}.split), cannot be loaded: {reason}; "
            "expected a folder, a file or a hub name (name:subset if it has several)"
        ) from error
    return loaded


def _huggingface_records(section: DatasetSection, key: str) -> Iterator[tuple[str, object]]:
    """(place, value) per row of one split."""
    import datasets

    loaded = load_split(section, key)
    rows = enumerate(loaded)
    for number in range(len(loaded)):
        place = f"{section.path}[{section.split}] row {number}"
        try:
            record = next(rows)[1]
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # text that is not UTF-8, and others
            raise DataError(f"{place}: cannot be read ({error}): expected a row of text and numbers") from error
        yield place, record


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
        dataset = reasoning_gym.create_dataset(section.path, size=section.size, seed=section.seed, **section.options)
    except (AssertionError, TypeError, ValueError) as error:
        expected = f"expected parameters that the task takes; correct {key}.options"
        raise DataError(f"{section.path} ({key}.path) cannot be made ({error}): {expected}") from error
    for number, entry in enumerate(dataset):
        place = f"reasoning_gym {section.path} row {number}"
        metadata = plain({"task": section.path, "entry": entry}, place)
        answer = "" if entry["answer"] is None else str(entry["answer"])
        yield Row(entry["question"], answer, "reasoning_gym", metadata, place)
