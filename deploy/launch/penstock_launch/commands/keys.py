"""`penstock keys`: finds keys of the configuration by their name, their meaning, or what other libraries call them."""

import shutil
from collections.abc import Iterator, Sequence

from penstock.config.changes import change_of
from penstock.config.reference.described import DescribedKey, search
from penstock.config.reference.hints import hint
from penstock.config.reference.other_names import OtherName
from penstock.errors import PenstockError

NARROWEST = 40  # columns; a line that is cut shorter shows nothing


class NotFoundError(PenstockError):
    """No key was found."""

    kind = "not_found"


def show_keys(words: Sequence[str]) -> list[str]:
    """The lines of `penstock keys`: two for each key, everything of a single one. NotFoundError if there is none."""
    found = search(list(words))
    if not found:
        raise NotFoundError(f"no key has {' and '.join(map(repr, words))}{hint('_'.join(words))}")
    if len(found) == 1:
        return list(_in_full(found[0]))
    return [line for key in found for line in (_title(key), _cut(f"    {key.meaning}"))]


def _title(key: DescribedKey) -> str:
    return f"{key.name}: {_plain(key.kind)}; {_default(key)}"


def _default(key: DescribedKey) -> str:
    return key.default if key.default == "required" else f"default {_plain(key.default)}"


def _in_full(key: DescribedKey) -> Iterator[str]:
    yield _title(key)
    yield f"    {key.meaning}"
    yield f"    If it changes between two starts: {_lowered(change_of(key.name).value)}"
    yield from (f"    {_other(each)}" for each in key.other_names)


def _other(other: OtherName) -> str:
    return f"{other.library}: {other.name}{f' ({other.note})' if other.note else ''}"


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def _plain(text: str) -> str:
    """Without the backquotes of Markdown."""
    return text.replace("`", "")


def _cut(line: str) -> str:
    width = max(shutil.get_terminal_size((120, 24)).columns, NARROWEST)
    return line if len(line) <= width else f"{line[: width - 3]}..."
