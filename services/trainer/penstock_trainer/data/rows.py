"""One row: its columns as a prompt and the inputs of its reward; or, in a run of episodes, as what starts an episode.

Owns the checks of a row. Invariant: a row that comes out can be sent as UTF-8 text and finite numbers. A bad one is a
DataError with its place, the value seen and the key to change.
"""

import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import msgspec
import numpy as np

from penstock.config import ColumnsSection
from penstock.contracts.vocabulary import BUILTIN_REWARDS, UNUSABLE_TASKS
from penstock.errors import DataError

Message = dict[str, Any]
COLUMNS = tuple(ColumnsSection.model_fields)
ABSENT: Any = object()
MAX_DEPTH = 64  # lists and objects in each other; what reads a row, here and in other services, works by recursion
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt, as text or as chat messages, and the inputs of its reward. The row of an episode may have none: "".

    reward: "" for the run's `reward.functions`, the name of one function, or the key of a held-out set with its own.
    place: of the row in its source, for messages. dataset: the name of its set; "" if the run has one, or held out.
    """

    prompt: str | list[Message]
    answer: str
    reward: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    dataset: str = ""


def read_row(record: object, place: str, columns: ColumnsSection, key: str, *, of_episode: bool = False) -> Row:
    """A mapping of columns as a Row; DataError if it has a fault. `key`: the dataset's section, for messages.

    of_episode: prompt and answer may be absent, and all further columns become metadata.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{place}: {seen(record)}: expected an object with `{columns.prompt}` and `{columns.answer}`")
    if of_episode:
        record = _with_defaults(record, columns)

    found = {column: column_of(record, getattr(columns, column)) for column in COLUMNS}

    def fail(problem: str, expected: str, column: str) -> DataError:
        return DataError(f"{place}: {problem}: expected {expected}; correct the row or set {key}.columns.{column}")

    def require(column: str, expected: str) -> Any:
        value = found[column]
        if value is None or value is ABSENT:
            problem = _absence(record, getattr(columns, column))
            raise fail(problem, expected, column)
        return value

    def optional(column: str) -> Any:
        return None if found[column] is ABSENT else found[column]

    texts = 'text or a list of {"role": ..., "content": ...}'
    prompt = _without_nulls(require("prompt", texts))
    if (prompt or not of_episode) and (problem := _problem_of_prompt(prompt, columns.prompt)):
        raise fail(problem, texts, "prompt")
    answer = require("answer", 'text ("" if the reward needs none)')
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise fail(f"`{columns.answer}` is {seen(answer)}", "text or a number", "answer")
    answer = str(answer) if isinstance(answer, int) else answer  # which is sent as text, of any size
    if problem := next(_faults(answer, columns.answer), ""):
        raise fail(problem, "text or a finite number", "answer")
    reward = optional("reward")
    if not isinstance(reward, str | None):
        raise fail(f"`{columns.reward}` is {seen(reward)}", "the name of a reward function", "reward")
    if problem := next(_faults(reward, columns.reward), ""):
        raise fail(problem, "the name of a reward function", "reward")
    metadata = optional("metadata")
    if not isinstance(metadata, Mapping | None):
        raise fail(f"`{columns.metadata}` is {seen(metadata)}", "an object", "metadata")
    if problem := next(_faults(metadata, columns.metadata), ""):
        raise fail(problem, "lists, objects, finite numbers and text", "metadata")
    if of_episode:
        metadata = _all_columns(record, metadata or {}, place, columns, key)
    return Row(prompt, str(answer), reward or "", plain(metadata or {}, place), place)


def column_of(record: Mapping[Any, Any], name: str) -> Any:
    """The value of a column: that of this name, else with dots the value within objects; `ABSENT` if there is none.

    >>> column_of({"extra_info": {"answer": "4"}}, "extra_info.answer"), column_of({"a.b": 1, "a": {"b": 2}}, "a.b")
    ('4', 1)
    """
    if name in record:
        return record[name]
    inner: Any = record
    for part in name.split("."):
        if not isinstance(inner, Mapping) or part not in inner:
            return ABSENT
        inner = inner[part]
    return inner


def _absence(record: Mapping[Any, Any], name: str) -> str:
    """Why a column has no value: it is null, or what there is instead, down to where a name with dots ends."""
    if column_of(record, name) is None:
        return f"`{name}` is null"
    outer, inner = "", record
    for part in name.split(".")[:-1]:
        value = inner.get(part)
        if not isinstance(value, Mapping):
            if part in inner:
                return f"no `{name}`: `{outer}{part}` is {seen(value)}"
            break
        outer, inner = f"{outer}{part}.", value
    present = ", ".join(f"`{outer}{_printable(each)}`" for each in inner) or f"no columns{outer and ' in it'}"
    return f"no `{name}` among {present}"


def _with_defaults(record: Mapping[Any, Any], columns: ColumnsSection) -> dict[Any, Any]:
    """The record with "" for a prompt or an answer that is absent or null."""
    absent = {name: "" for name in (columns.prompt, columns.answer) if column_of(record, name) in (None, ABSENT)}
    return {**record, **absent}


def _all_columns(
    record: Mapping[Any, Any], metadata: Mapping[Any, Any], place: str, columns: ColumnsSection, key: str
) -> dict[str, Any]:
    """Further columns and the entries of `metadata`: with prompt and answer, the arguments of an environment."""
    used = {columns.prompt, columns.answer, columns.reward, columns.metadata}
    found = {name: value for name, value in record.items() if name not in used}
    for name in (*found, *metadata):
        whose = next((one for one in ("prompt", "answer") if name == one), "")
        if whose or (name in found and name in metadata):
            other = f"{key}.columns.{whose} is `{getattr(columns, whose)}`" if whose else "it is a column too"
            where = "" if name in found else f" in `{columns.metadata}`"
            raise DataError(
                f"{place}: `{_printable(name)}`{where} and another value would have one name, since {other}: expected "
                "each name once, because an environment gets all columns by name; rename one of them"
            )
    for name, value in found.items():
        if not isinstance(name, str):
            raise DataError(f"{place}: a column is named {seen(name)}: expected text")
        if problem := next(_faults(value, name), ""):
            raise DataError(f"{place}: {problem}: expected lists, objects, finite numbers and text; correct the row")
    return {**found, **metadata}


def require_rewards(rows: Iterable[Row], functions: Mapping[str, float], key: str = "reward.functions") -> None:
    """DataError for a row whose reward no function gives. key: of `functions` in the configuration."""
    for _ in with_rewards(rows, functions, key):
        pass


def with_rewards(rows: Iterable[Row], functions: Mapping[str, float], key: str = "reward.functions") -> Iterator[Row]:
    """The rows as they come; DataError as by `require_rewards`."""
    known = {*BUILTIN_REWARDS, *functions}
    has_weight = any(functions.values())
    for row in rows:
        if not row.reward and not has_weight:
            raise DataError(
                f"{row.place}: the row names no reward, and every weight in {key} is 0: expected a function with "
                "another weight, or a reward in each row"
            )
        task = task_of(row)
        if task in UNUSABLE_TASKS:
            raise DataError(
                f"{row.place}: reasoning-gym's task {task!r} cannot be trained on: {UNUSABLE_TASKS[task]}; expected "
                "another task"
            )
        if row.reward and row.reward not in known:
            near = _nearest_name(row.reward, known)
            raise DataError(
                f"{row.place}: the reward {seen(row.reward)} does not exist: expected {', '.join(BUILTIN_REWARDS)} or "
                f"a function in {key} (weight 0: only for rows that name it)"
                + (f"; did you mean {near!r}?" if near else "")
            )
        yield row


def task_of(row: Row) -> str | None:
    """The task of reasoning-gym that a row's reward scores; None for other rewards."""
    task = row.metadata.get("task") if row.reward == "reasoning_gym" else None
    return task if isinstance(task, str) else None


def _nearest_name(name: str, known: set[str]) -> str:
    """The known name of which all, or a part between dots and colon, is nearest to `name`; "" if none is near."""
    parts = {part: each for each in sorted(known) for part in (*re.split("[.:]", each), each)}
    return next((parts[part] for part in difflib.get_close_matches(name, parts, n=1)), "")


def _without_nulls(prompt: object) -> Any:
    """Messages without keys that are null, which mean nothing: tables have each key in every message.

    Role and content stay: they must be there.
    """
    if not isinstance(prompt, list):
        return prompt
    required = ("role", "content")
    return [
        {key: value for key, value in message.items() if value is not None or key in required}
        if isinstance(message, Mapping)
        else message
        for message in prompt
    ]


def _problem_of_prompt(prompt: object, name: str) -> str:
    """The fault of a prompt; "" if there is none."""
    if isinstance(prompt, str):
        return f"`{name}` is empty" if not prompt.strip() else next(_faults(prompt, name), "")
    if not isinstance(prompt, list):
        return f"`{name}` is {seen(prompt)}"
    if not prompt:
        return f"`{name}` is an empty list"
    for number, message in enumerate(prompt):
        place = f"{name}[{number}]"
        if not isinstance(message, Mapping):
            return f"`{place}` is {seen(message)}"
        for key in ("role", "content"):
            if key not in message:
                return f"`{place}` has no `{key}`"
            if not isinstance(message[key], str):
                return f"`{place}.{key}` is {seen(message[key])}"
        if message["role"] == "user" and not message["content"].strip():
            return f"`{place}.content` is empty"
        if problem := next(_faults(message, place), ""):
            return problem
    return ""


def _faults(value: object, name: str, depth: int = 0) -> Iterator[str]:
    """What of a value cannot be sent: lone surrogates, numbers that are not finite or too large, deep nesting."""
    if isinstance(value, str):
        if LONE_SURROGATE.search(value):
            yield f"`{name}` has a lone surrogate"
    elif isinstance(value, float):
        if not isfinite(value):
            yield f"`{name}` is {value}"
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            yield f"`{name}` is beyond 64 bits"
    elif isinstance(value, Mapping | list | tuple):
        if depth == MAX_DEPTH:
            yield f"`{name[:60]}...` is deeper than {MAX_DEPTH} lists and objects"
            return
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            if isinstance(key, str) and LONE_SURROGATE.search(key):
                yield f"`{name}` has a key with a lone surrogate"
            yield from _faults(inner, f"{name}.{key}" if isinstance(value, Mapping) else f"{name}[{key}]", depth + 1)


_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 60


def seen(value: object) -> str:
    """A value and its type, short enough for a message."""
    if value is None:
        return "null"
    text = _shown.repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _printable(text: object) -> str:
    return str(text).encode("utf-8", "backslashreplace").decode()


def plain(metadata: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Metadata as plain lists, mappings, numbers and text, the types that the queue can carry."""
    try:
        # Sorted, because sets have no order: the dataset's digest must be the same in every process.
        ordered = msgspec.to_builtins(metadata, order="deterministic", enc_hook=_from_numpy)
        decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(ordered))
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as error:
        raise DataError(
            f"{place}: metadata cannot be sent ({error}): expected lists, mappings, numbers, text"
        ) from error
    if not isinstance(decoded, dict):
        raise DataError(f"{place}: metadata is {seen(decoded)}: expected an object")
    return decoded


def _from_numpy(value: object) -> object:
    """NumPy's scalars and arrays, which some reasoning-gym entries hold, as Python's own values."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")
