"""Checks the queue's Lua scripts without a server: .venv/bin/python -m tests.check_lua (part of `make lint`).

Owns what makes a script wrong: text that Lua 5.1, the language of Redis, does not compile; a name that is neither local
nor provided by Redis, such as a misspelt key; a name in the header that the script never uses. Lua cannot list the
global names of a function, so they are read from its compiled form, in the format of Lua 5.1's ldump.c.
"""

import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from lupa import lua51

from penstock.broker.scripts import Script, script_paths

GIVEN_BY_REDIS = {"ARGV", "KEYS", "ipairs", "math", "redis", "string", "tonumber", "unpack"}  # only those that we use
COMPILE = "function(text) local code, fault = loadstring(text, '=line') return code and string.dump(code), fault end"
HEADER_BYTES = 12
GET_GLOBAL, SET_GLOBAL = 5, 7  # lopcodes.h; the opcode is the lowest 6 bits, the constant that it names the highest 18
NIL, BOOLEAN, NUMBER, TEXT = 0, 1, 3, 4  # lua.h


def faults(text: str) -> list[str]:
    """The faults of a script, each with its line."""
    code, fault = lua51.LuaRuntime(encoding=None).eval(COMPILE.encode())(text.encode())
    if code is None:
        message = fault.decode()
        number = re.match(r"line:(\d+)", message)
        return [f"{message}: {_line(text, int(number[1]) if number else 1)}"]
    found = sorted({(line, name) for name, line in _Reader(code, HEADER_BYTES).globals()})
    return [f"{name} is no name here: {_line(text, line)}" for line, name in found if name not in GIVEN_BY_REDIS]


def unused(script: Script) -> list[str]:
    """The names in the header that neither the script nor the shared code that it uses mentions."""
    code = re.sub(r"--.*", "", script.body)
    names = [name for each in (*script.keys, *script.arguments) for name in (each.name, *each.fields)]
    return [f"{name} is never used" for name in names if not re.search(rf"\b{name}\b", code)]


def _line(text: str, number: int) -> str:
    return text.splitlines()[number - 1].strip()


@dataclass
class _Reader:
    """Reads what string.dump wrote on this machine: native sizes, 4 bytes for int and instruction, 8 for a number."""

    data: bytes
    at: int

    def globals(self) -> Iterator[tuple[str, int]]:
        """The global names that a function and its inner functions read or write, with the line of each."""
        self._text()
        self._numbers(2)
        self.at += 4
        code = self._numbers(self._number())
        constants = [self._constant() for _ in range(self._number())]
        for _ in range(self._number()):
            yield from self.globals()
        lines = self._numbers(self._number())
        for _ in range(self._number()):
            self._text()
            self._numbers(2)
        for _ in range(self._number()):
            self._text()
        for instruction, line in zip(code, lines, strict=True):
            if instruction & 0x3F in (GET_GLOBAL, SET_GLOBAL):
                yield constants[instruction >> 14], line

    def _constant(self) -> str:
        kind = self._read("B")
        if kind == TEXT:
            return self._text()
        self.at += {NIL: 0, BOOLEAN: 1, NUMBER: 8}[kind]
        return ""

    def _text(self) -> str:
        size = self._read("N")
        self.at += size
        return self.data[self.at - size : self.at].rstrip(b"\0").decode()

    def _number(self) -> int:
        return self._read("I")

    def _numbers(self, count: int) -> list[int]:
        return [self._number() for _ in range(count)]

    def _read(self, kind: str) -> int:
        [value] = struct.unpack_from(f"@{kind}", self.data, self.at)
        self.at += struct.calcsize(f"@{kind}")
        return int(value)


def main() -> int:
    num_faults = 0
    for path in script_paths():
        script = Script(path)
        for fault in faults(script.text) + unused(script):
            num_faults += 1
            print(f"{path}.lua: {fault}", file=sys.stderr)
    return int(num_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
