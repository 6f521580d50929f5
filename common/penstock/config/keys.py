"""The keys of the configuration: which there are, and what each holds.

A key is a section, a mapping such as `reward.functions`, an entry of a mapping, or a plain value. Names of entries are
the user's: they are not listed, and may have dots, unless the entries are sections (`data.train_sets`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr

from penstock.config.tree import Config


@dataclass(frozen=True)
class Key:
    """A key that exists. holds: the type of its value; is_entry: whether it is an entry of a mapping."""

    path: tuple[str, ...]
    holds: Any
    is_entry: bool = False


def find_key(dotted: str, model: type[BaseModel] = Config) -> Key | None:
    """The key `dotted`, such as `optimizer.lr` or `reward.functions.my.module:score`; None if there is none.

    Behind a mapping of plain values all is one name, dots included; behind one of anything, dots lead deeper; an entry
    of a mapping to sections, such as `eval.sets.hard`, has the keys of its section.
    """
    name, dot, rest = dotted.partition(".")
    field = model.model_fields.get(name)
    if field is None:
        return None
    if not dot:
        return Key((name,), field.annotation)
    if (section := section_type(field.annotation)) is not None:
        inner = find_key(rest, section)
        return inner and Key((name, *inner.path), inner.holds, inner.is_entry)
    if get_origin(field.annotation) is not dict:
        return None
    values = get_args(field.annotation)[1]
    if (entry := section_type(values)) is not None:
        return _in_entry(name, rest, entry)
    names = rest.split(".") if values is Any else [rest]
    return Key((name, *names), values, is_entry=True) if all(names) else None


def _in_entry(name: str, rest: str, section: type[BaseModel]) -> Key | None:
    """The key `rest` of the mapping `name`, each entry of which is a section."""
    entry, dot, key = rest.partition(".")
    if not dot:
        return Key((name, entry), section, is_entry=True) if entry else None
    inner = find_key(key, section)
    return inner and Key((name, entry, *inner.path), inner.holds, is_entry=True)


def entry_section(annotation: Any) -> type[BaseModel] | None:
    """The section class of each entry of a mapping to sections; None if the field is none."""
    return section_type(get_args(annotation)[1]) if get_origin(annotation) is dict else None


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        section = section_type(field.annotation)
        if section is not None:
            yield from known_keys(section, f"{prefix}{name}.")


def keys_beside(dotted: str, model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """The keys of the entry that an unknown key names, such as those of `eval.sets.hard`; none if it names none."""
    name, _, rest = dotted.partition(".")
    field = model.model_fields.get(name)
    if field is None:
        return
    if (section := section_type(field.annotation)) is not None:
        yield from keys_beside(rest, section, f"{prefix}{name}.")
    elif (entry := entry_section(field.annotation)) is not None and "." in rest:
        yield from known_keys(entry, f"{prefix}{name}.{rest.partition('.')[0]}.")


def flat(tree: Mapping[str, Any], model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of each value in a tree of sections; a mapping is a value, and so is a section that is None.

    What an earlier release had as a section and this one does not is a value too.
    """
    for name, value in tree.items():
        field = model.model_fields.get(name)
        section = section_type(field.annotation) if field else None
        if section is not None and isinstance(value, Mapping):
            yield from flat(value, section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The section class of a field's annotation (`Section` or `Section | None`), if it is one."""
    if get_origin(annotation) is dict:  # a mapping to sections is none
        return None
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def holds_text(annotation: Any) -> bool:
    """Whether every value of this type is a text: a text, a secret, a choice of words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return holds_text(arguments[0])
    if origin in (Union, UnionType):
        return all(holds_text(each) for each in arguments if each is not type(None))
    if origin is Literal:
        return all(isinstance(each, str) for each in arguments)
    return annotation in (str, SecretStr)


def may_be_none(annotation: Any) -> bool:
    """Whether a value of this type may be left out."""
    return type(None) in get_args(annotation)
