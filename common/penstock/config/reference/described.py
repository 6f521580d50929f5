"""What a person reads of a key: its type, limits, default and meaning, and which keys a word finds.

Owns the words for types. The texts are those of the docstrings in the sections.
"""

import json
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from penstock.config.keys import entry_section, section_type
from penstock.config.reference.other_names import OtherName, other_names_of
from penstock.config.tree import Config

LIMITS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}"}
POWER_OF_TWO_FROM = 2**20  # from here on a power of two is easier to read than its digits
ANY_NAME = "NAME"  # stands for the user's name of an entry
SHORTEST_PART = 3  # letters; a shorter word is looked for as a full word only: `n` is in almost every key


@dataclass(frozen=True)
class DescribedKey:
    """A key that holds a value: `optimizer.lr`, `number, > 0`, `1e-06`, what it means."""

    name: str
    kind: str
    default: str
    meaning: str

    @property
    def other_names(self) -> tuple[OtherName, ...]:
        """What other libraries call it."""
        return other_names_of(self.name)


def described_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[DescribedKey]:
    """Every key that holds a value, in the order of the tree; those of entries for one that is called NAME."""
    for name, field in model.model_fields.items():
        section = section_type(field.annotation)
        if section is None:
            yield described(f"{prefix}{name}", field)
            if (entry := entry_section(field.annotation)) is not None:
                yield from described_keys(entry, f"{prefix}{name}.{ANY_NAME}.")
        else:
            yield from described_keys(section, f"{prefix}{name}.")


def described(key: str, field: FieldInfo) -> DescribedKey:
    """A key by its field; ValueError if the field has no docstring."""
    if not field.description:
        raise ValueError(f"{key} has no docstring: expected one under the field in penstock.config")
    kind = ", ".join(part for part in (type_text(field.annotation), limits_text(field)) if part)
    return DescribedKey(key, kind, default_text(field), " ".join(field.description.split()))


def search(words: list[str]) -> list[DescribedKey]:
    """The keys that every word finds, the best first; the key of exactly this name alone."""
    wanted = [word.lower().replace("-", "_").strip(".") for word in words]
    ranked = []
    for key in described_keys():
        if wanted == [key.name.lower()]:
            return [key]
        ranks = [_rank(word, key) for word in wanted]
        if None not in ranks:
            ranked.append((max(rank for rank in ranks if rank is not None) if ranks else 0, key))
    return [key for _, key in sorted(ranked, key=lambda pair: pair[0])]


def _rank(word: str, key: DescribedKey) -> int | None:
    """How a word finds a key: its name (best), another one, letters of its name, of another one, its meaning."""
    others = key.other_names
    if word in re.split(r"[._]", key.name) or f".{key.name}".endswith(f".{word}"):
        return 0
    if any(other.is_called(word) for other in others):
        return 1
    if len(word) >= SHORTEST_PART:
        if word in key.name:
            return 2
        if any(word in other.name for other in others):
            return 3
    return 4 if re.search(rf"\b{re.escape(word)}", key.meaning.lower().replace("-", "_")) else None


def type_text(annotation: Any) -> str:
    """A type as YAML's user knows it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {type_text(arguments[0])}"
    if origin is Annotated:
        return type_text(arguments[0])
    if entry_section(annotation) is not None:
        return "mapping of text to keys"
    if origin is dict:
        return f"mapping of {type_text(arguments[0])} to {type_text(arguments[1])}"
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(item) for item in arguments if item is not type(None))
    if section_type(annotation) is not None:
        return "section"
    names = {
        "str": "text",
        "int": "integer",
        "float": "number",
        "bool": "true or false",
        "SecretStr": "secret text",
        "Any": "anything",
    }
    name: str = annotation.__name__
    return names.get(name, name)


def number_text(value: float) -> str:
    """A number without noise: 2^30 and 1e-06 as they are meant."""
    if isinstance(value, int) and value >= POWER_OF_TWO_FROM and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def limits_text(field: FieldInfo) -> str:
    """The limits of a number."""
    parts = [
        pattern.format(number_text(getattr(item, name)))
        for item in field.metadata
        for name, pattern in LIMITS.items()
        if getattr(item, name, None) is not None
    ]
    return ", ".join(parts)


def default_text(field: FieldInfo) -> str:
    """The default as it would stand in YAML, in backquotes; or that there is none."""
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "none"
    if isinstance(field.default, int | float) and not isinstance(field.default, bool):
        return f"`{number_text(field.default)}`"
    return f"`{json.dumps(field.default)}`" if not isinstance(field.default, str) else f'`"{field.default}"`'
