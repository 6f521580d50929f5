"""Lines and commands folded at words, so that a terminal breaks none of them in the middle of a word.

Invariant: nothing is lost, and a word that is longer than the width stays whole, so that it can be copied. A folded
command still works as it stands. Pure.
"""

import re

from rich.cells import cell_len

_SHELL_WORD = re.compile(r"(?:[^\s'\"\\]|\\.|'[^']*'|\"[^\"]*\")+")


def folded(line: str, width: int | None, indent: int) -> list[str]:
    """The line in rows of at most `width` columns, all but the first indented; as it is if the width is None.

    >>> folded("  tickets  40 issued = 38 trained + 2 dropped", 30, 11)
    ['  tickets  40 issued = 38', '           trained + 2 dropped']
    """
    if width is None or cell_len(line) <= width:
        return [line]
    rows, row = [], line[: len(line) - len(line.lstrip())]
    for word in re.findall(r"\S+\s*", line):
        if row.strip() and cell_len(row + word.rstrip()) > width:
            rows.append(row.rstrip())
            row = " " * indent
        row += word
    return [*rows, row.rstrip()]


def folded_command(command: str, width: int | None, indent: int) -> list[str]:
    """A command for a shell in rows that end with a backslash but for the last one; a flag keeps its value.

    >>> folded_command("penstock launch local --config a.yaml --run.max_steps 80", 40, 4)
    ['penstock launch local --config a.yaml \\\\', '    --run.max_steps 80']
    """
    if width is None or cell_len(command) <= width:
        return [command]
    parts: list[str] = []
    for word in _SHELL_WORD.findall(command):
        is_value = not word.startswith("-") and parts and parts[-1].startswith("--") and " " not in parts[-1]
        if is_value:
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    rows = [parts[0]]
    for part in parts[1:]:
        if cell_len(f"{rows[-1]} {part} \\") > width:
            rows.append(" " * indent + part)
        else:
            rows[-1] += f" {part}"
    return [*(f"{row} \\" for row in rows[:-1]), rows[-1]]
