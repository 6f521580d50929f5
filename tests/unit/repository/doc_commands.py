"""The commands that documents show: lines of fenced blocks, and commands within sentences."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath

FENCE = re.compile(r"^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:\.venv/bin/)?(?:penstock|make|python -m|pip install) [^`\n]+)`")
SHELLS = ("", "sh", "bash", "console")
# What a line of a block without a language begins with if it is a command and no figure, file or output.
PROGRAMS = (
    "penstock|make|python|pip|docker|ray|curl|prometheus|cd|export|echo|cp|mkdir|tail|less|tensorboard|tmux|watch"
)
COMMAND = re.compile(rf"^(?:\$ )?(?:[A-Z_]+=\S* )*(?:\.venv/bin/)?(?:{PROGRAMS})(?= |$)")
PLACEHOLDERS = re.compile(r"\.\.\.|[\[\]|]")  # of a form rather than a command: `[--flag]`, `list|show`


@dataclass(frozen=True)
class Command:
    """One command, the words as a shell splits them; `in_block` if a reader is meant to copy it."""

    place: str
    words: tuple[str, ...]
    in_block: bool

    def __str__(self) -> str:
        return f"{self.place}: {' '.join(self.words)}"

    @property
    def text(self) -> str:
        """Without the folder of its environment: `penstock ...`, `python -m ...`."""
        return " ".join((PurePath(self.words[0]).name, *self.words[1:]))

    @property
    def penstock(self) -> tuple[str, ...] | None:
        """The arguments of `penstock`, also of one that another command runs, in a container or on a cluster."""
        names = [PurePath(word).name for word in self.words]
        starts = names.index("penstock") if "penstock" in names else None
        return None if starts is None or self.words[0] == "pip" else self.words[starts + 1 :]


def commands_of(documents: Mapping[str, str]) -> Iterator[Command]:
    for name, text in documents.items():
        for block in FENCE.finditer(text):
            if block["language"] in SHELLS:
                yield from _in_block(name, text.count("\n", 0, block.start()) + 2, block["text"], block["language"])
        for found in INLINE.finditer(FENCE.sub(lambda block: "\n" * block[0].count("\n"), text)):
            if not PLACEHOLDERS.search(found[1]):
                yield from _split(f"{name}:{text.count(chr(10), 0, found.start()) + 1}", found[1], in_block=False)


def _in_block(name: str, number: int, text: str, language: str) -> Iterator[Command]:
    """All lines, if the language is a shell's or the first line is a command; those after `$`, if that has one."""
    lines = text.replace("\\\n", " " * 2).splitlines()
    first = next((line.strip() for line in lines if line.strip()), "")
    if not language and not COMMAND.match(first):
        return
    for line in lines:
        if first.startswith("$ ") and not line.startswith("$ "):
            continue
        yield from _split(f"{name}:{number}", line.strip().removeprefix("$ "), in_block=True)


def _split(place: str, line: str, *, in_block: bool) -> Iterator[Command]:
    """The commands of one line: around `&&` and `|`, without comments, settings of variables and redirections."""
    words: list[str] = []
    rest = [*shlex.split(line, comments=True), "&&"]
    while rest:
        word = rest.pop(0)
        if word == ">":
            rest.pop(0)
        elif word in ("&&", "|"):
            if words:
                yield Command(place, tuple(words), in_block)
            words = []
        elif words or not re.fullmatch(r"[A-Z_]+=.*", word):
            words.append(word)
