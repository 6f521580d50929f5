"""The Lua scripts under `lua/`: each is one atomic change of a run's state in Redis.

Owns reading them, and the order of a call's named values. Invariant: after each script an outstanding ticket is in
exactly one place, the one that `live` names. The first write of a script is one that a full Redis refuses (XADD), so
that the script then changes nothing. No script receives the bytes of a part: Redis would hash and copy them on the way
into Lua, and copy them again on the way out. Entries hold: t ticket key, a attempt, p payload, n name of its parts,
x why there is no payload.

A script begins with the names of its keys and arguments, which become its local variables:

    -- KEYS lease scored parts...
    -- ARGV token group tickets(ticket entry)...
    -- USES require_lease unlink

`parts...` is a list. `tickets(ticket entry)...` is a list of records: mappings in a call, tables in Lua. Only the last
name can be a list. USES names files of `lua/shared`, which the loader puts before the script, after the files that they
use themselves. In a call True and False are 1 and 0. A longer header repeats its word on the next line. Example:

    END_TURN = Script("trainer/end_turn")
    await queue.run(END_TURN(lease="penstock:{demo}:lease", turn="penstock:{demo}:turn", token="3:9f86"))
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

Value = str | int | bytes
Given = Value | Sequence[Value | Mapping[str, Value]]

FOLDER = files("penstock.broker") / "lua"
HEADER = re.compile(r"^-- (KEYS|ARGV|USES)\b(.*)\n", re.MULTILINE)
NAME = re.compile(r"\s*([a-z]\w*)(?:\(([\w ]+)\))?(\.\.\.)?\s*")


@dataclass(frozen=True)
class Parameter:
    """One name of a header; `fields` are those of a record."""

    name: str
    is_list: bool
    fields: tuple[str, ...]

    def flat(self, given: Given) -> Iterator[Value]:
        """The values of a call under this name, in the script's order."""
        if not self.is_list:
            yield _value(self.name, given)
        elif isinstance(given, Value):
            raise TypeError(f"{self.name}: saw {given!r}, expected a list")
        elif not self.fields:
            for each in given:
                yield _value(self.name, each)
        else:
            for each in given:
                if not isinstance(each, Mapping) or each.keys() != set(self.fields):
                    raise TypeError(f"{self.name}: saw {each!r}, expected a mapping of {', '.join(self.fields)}")
                for field in self.fields:
                    yield _value(field, each[field])


class Script:
    """One file under `lua/`. Calling it with all its keys and arguments, by name, makes a call for `Queue.run`."""

    def __init__(self, path: str) -> None:
        """`path`: below `lua/`, without `.lua`."""
        self.path = path
        own = (FOLDER / f"{path}.lua").read_text()
        self.keys = _parameters(path, own, "KEYS")
        self.arguments = _parameters(path, own, "ARGV")
        names = [each.name for each in (*self.keys, *self.arguments)]
        if len(set(names)) < len(names):
            raise ValueError(f"{path}.lua: {', '.join(names)}; expected each name once in KEYS and ARGV")
        self._names = frozenset(names)
        self.body = "\n".join(HEADER.sub("", each) for each in (*_used(own, {}), own))
        self.text = "\n".join([*_locals("KEYS", self.keys), *_locals("ARGV", self.arguments), self.body])
        self.digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, **given: Given) -> "ScriptCall":
        if given.keys() != self._names:
            missing, unknown = sorted(self._names - given.keys()), sorted(given.keys() - self._names)
            raise TypeError(f"{self.path}.lua: missing {missing}, unknown {unknown}")
        try:
            keys, arguments = (
                [value for each in parameters for value in each.flat(given[each.name])]
                for parameters in (self.keys, self.arguments)
            )
        except TypeError as error:
            raise TypeError(f"{self.path}.lua: {error}") from None
        return ScriptCall(self, keys, arguments)


@dataclass(frozen=True)
class ScriptCall:
    """A script with its keys and arguments, in its order."""

    script: Script
    keys: list[Value]
    arguments: list[Value]


def script_paths() -> list[str]:
    """The path of every script, as `Script` takes it."""
    return sorted(
        f"{folder.name}/{file.name.removesuffix('.lua')}"
        for folder in FOLDER.iterdir()
        if folder.is_dir() and folder.name != "shared"
        for file in folder.iterdir()
    )


def _value(name: str, given: object) -> Value:
    if isinstance(given, bool):
        return int(given)
    if isinstance(given, Value):
        return given
    raise TypeError(f"{name}: saw {given!r}, expected text, an integer or bytes")


def _header(text: str, word: str) -> str:
    return " ".join(rest.strip() for found, rest in HEADER.findall(text) if found == word)


def _parameters(path: str, text: str, word: str) -> tuple[Parameter, ...]:
    header, at, found = _header(text, word), 0, list[Parameter]()
    while at < len(header):
        match = NAME.match(header, at)
        if match is None or (found and found[-1].is_list):
            raise ValueError(
                f"{path}.lua: saw {word} {header}, expected names, and at most one list, which is the last"
            )
        name, fields, dots = match.groups()
        if fields and not dots:
            raise ValueError(f"{path}.lua: saw {match.group().strip()} in {word}, expected ... after a record")
        found.append(Parameter(name, bool(dots), tuple((fields or "").split())))
        at = match.end()
    return tuple(found)


def _used(text: str, seen: dict[str, str]) -> list[str]:
    """The shared files that a file uses; each comes after those that it needs."""
    for name in _header(text, "USES").split():
        if name not in seen:
            used = (FOLDER / "shared" / f"{name}.lua").read_text()
            _used(used, seen)
            seen[name] = used
    return list(seen.values())


def _locals(table: str, parameters: Sequence[Parameter]) -> Iterator[str]:
    """Lua that assigns the values to the names. A loop reads a list: `unpack` fails above 8000."""
    for place, each in enumerate(parameters, 1):
        if not each.is_list:
            yield f"local {each.name} = {table}[{place}]"
        elif not each.fields:
            yield f"local {each.name} = {{}}"
            yield f"for i = {place}, #{table} do {each.name}[i - {place - 1}] = {table}[i] end"
        else:
            record = ", ".join(f"{field} = {table}[i + {offset}]" for offset, field in enumerate(each.fields))
            yield f"local {each.name} = {{}}"
            yield f"for i = {place}, #{table}, {len(each.fields)} do {each.name}[#{each.name} + 1] = {{{record}}} end"
