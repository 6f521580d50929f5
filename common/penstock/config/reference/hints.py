"""The end of a message about an unknown key: which key was probably meant.

A name of another library comes first if it is used as it stands there, or is ours too, in another section; then a slip
of the pen; then the last part of such a name, in a section that it does not have there.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from penstock.config.keys import entry_keys, find_key, known_keys
from penstock.config.reference.other_names import OtherName, called, ending_like

SLIP = 0.8  # share of letters; two letters that changed places in a short key
SIMILAR = 0.5
SIMILAR_TAIL = 0.6
MOST_MEANT = 4
MOST_TRANSLATED = 2  # keys; a name such as `path` has more
SHOWN = 20  # unknown keys of one file


def unknown_keys(found: Iterable[tuple[str, Any]], source: str) -> list[str]:
    """A line for each unknown key and its value. Of a section of another library's, one for each known name in it."""
    lines = []
    for key, value in found:
        if find_key(key):
            lines.append(f"{key}: no such key in {source}; expected it nested, without dots: {_nested(key)}")
            continue
        theirs = [leaf for leaf in _leaves(key, value) if called(leaf)]
        lines += [f"{leaf}: no such key in {source}{hint(leaf)}" for leaf in theirs or [key]]
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"and {len(lines) - SHOWN} more"]
    return lines


def _nested(key: str) -> str:
    """As YAML. The value may be a secret, and is left out."""
    first, *rest = key.split(".")
    return f"{first}: {''.join(f'{{{name}: ' for name in rest)}...{'}' * len(rest)}"


def hint(key: str) -> str:
    """What to write instead of the unknown `key`, behind a semicolon."""
    if of_entry := list(entry_keys(key)):
        return _meant(difflib.get_close_matches(key, of_entry, n=1, cutoff=SIMILAR) or of_entry)
    known = list(known_keys())
    if theirs := called(key):
        return _translated(theirs)
    tail = key.rpartition(".")[2]
    if moved := [each for each in ending_like(key) if each.key.rpartition(".")[2] == tail]:
        return _translated(moved)
    if slip := difflib.get_close_matches(key, known, n=1, cutoff=SLIP):
        return _meant(slip)
    if theirs := ending_like(key):
        return _translated(theirs)
    close = _same_tail(key, known) if "." not in key else difflib.get_close_matches(key, known, n=1, cutoff=SIMILAR)
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=SIMILAR) or _same_tail(key, known)
    return _meant(close) if close else "; `penstock keys WORD` finds keys, docs/configuration.md lists all"


def _same_tail(key: str, known: list[str]) -> list[str]:
    """The keys whose last part is most like that of `key`."""
    tails: dict[str, list[str]] = {}
    for each in known:
        tails.setdefault(each.rpartition(".")[2], []).append(each)
    close = difflib.get_close_matches(key.rpartition(".")[2], tails, n=1, cutoff=SIMILAR_TAIL)
    return tails[close[0]] if close else []


def _meant(keys: Sequence[str]) -> str:
    shown = keys[:MOST_MEANT]
    return f"; did you mean {', '.join(shown[:-1])}{' or ' if shown[:-1] else ''}{shown[-1]}?"


def _translated(theirs: Sequence[OtherName]) -> str:
    """One text for each key of ours that is meant, with the libraries that mean it; or these keys alone, of many."""
    texts: dict[tuple[str, str], list[OtherName]] = {}
    for each in theirs:
        texts.setdefault((each.key, each.note), []).append(each)
    keys = list(dict.fromkeys(each.key for each in theirs))
    if len(keys) > MOST_TRANSLATED:
        return _meant(keys)
    parts = []
    for (key, note), names in texts.items():
        libraries = " and ".join(dict.fromkeys(f"{each.library}'s" for each in names))
        parts.append(f"{libraries} {names[0].name} is {key} here{f' ({note})' if note else ''}")
    return f"; {'; '.join(parts)}"


def _leaves(key: str, value: Any) -> Iterator[str]:
    """The dotted names of a value and of all that it holds, if it is a mapping."""
    yield key
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
