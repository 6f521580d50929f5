"""Where configuration values come from: defaults < YAML files < environment < command line.

Owns the layering and the errors: an unknown key in YAML, environment or command line is refused, and the error names
the nearest key. Invariant: sections are joined key by key; a mapping is a value, which a later source replaces, and
only the key of one of its entries leaves the others. A default holds if no source says anything of its key.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from penstock.config.keys import entry_section, flat, section_type
from penstock.config.reference.hints import unknown_keys
from penstock.config.secrets import shown_url
from penstock.config.sources import (
    Setting,
    command_line_settings,
    environment_settings,
    parse_arguments,
    python_settings,
    read_yaml,
)
from penstock.config.tree import Config
from penstock.errors import ConfigError


def load_config(
    argv: Sequence[str], environ: Mapping[str, str] | None = None, *, without_file: Mapping[str, Any] | None = None
) -> Config:
    """The configuration from `--config FILE ... --key value ...` and PENSTOCK_* variables; ConfigError otherwise.

    Of several files a later one wins, key by key. `without_file`: the document if there is none; None: there must be.
    """
    paths, pairs = parse_arguments(argv, needs_file=without_file is None)
    document = _joined(paths) if paths else dict(without_file or {})
    return build_config(document, pairs, os.environ if environ is None else environ)


def load_files(paths: Sequence[Path], keys: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Config:
    """The same for Python: `keys` hold values rather than text, and stand where the command line would."""
    return _build(_joined(paths), python_settings(keys), os.environ if environ is None else environ)


def _joined(paths: Iterable[Path]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for path in paths:
        _join(document, read_yaml(path), f"--config {path}")
    return document


def build_config(document: Mapping[str, Any], pairs: Iterable[tuple[str, str]], environ: Mapping[str, str]) -> Config:
    """Layer a document, the environment and the command line, pairs of a dotted key and its text, over the defaults."""
    return _build(document, command_line_settings(pairs), environ)


def _build(document: Mapping[str, Any], settings: Iterable[Setting], environ: Mapping[str, str]) -> Config:
    tree: dict[str, Any] = {}
    _join(tree, document, "the document")
    for key, value in (*environment_settings(environ), *settings):
        _put(tree, key.path, value)

    class Joined(BaseSettings, Config):
        """The tree with its one source; local, because pydantic-settings takes sources per class."""

        model_config = SettingsConfigDict(extra="forbid", frozen=True)

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *_: PydanticBaseSettingsSource, **__: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (_JoinedSource(settings_cls, tree),)

    try:
        return Config.model_validate(Joined().model_dump())
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


class _JoinedSource(PydanticBaseSettingsSource):
    """All sources in one: several of pydantic-settings would be merged entry by entry, mappings too."""

    def __init__(self, settings_cls: type[BaseSettings], tree: Mapping[str, Any]) -> None:
        super().__init__(settings_cls)
        self._tree = dict(tree)

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._tree.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._tree


def given_keys(argv: Sequence[str]) -> frozenset[str]:
    """The keys that `--key value` sets: of a section those in its value, of an entry the key of its mapping."""
    tree: dict[str, Any] = {}
    for key, value in command_line_settings(parse_arguments(argv)[1]):
        _put(tree, key.path, value)
    return frozenset(key for key, _ in flat(tree))


def _join(
    tree: dict[str, Any], values: Mapping[str, Any], source: str, model: type[BaseModel] = Config, prefix: str = ""
) -> None:
    """Set the keys of a section, those of its sections one by one; ConfigError for those that are none of `model`'s."""
    if unknown := list(_unknown(values, model, prefix)):
        raise ConfigError("\n".join(unknown_keys(unknown, source)))
    _set(tree, values, model)


def _set(tree: dict[str, Any], values: Mapping[str, Any], model: type[BaseModel]) -> None:
    for name, value in values.items():
        section = section_type(model.model_fields[str(name)].annotation)
        if section is None or not isinstance(value, Mapping):
            tree[name] = value
            continue
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        _set(tree[name], value, section)


def _unknown(values: Mapping[str, Any], model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    """Each dotted key that the sections do not have, and its value."""
    for name, value in values.items():
        field = model.model_fields.get(str(name))
        section = section_type(field.annotation) if field else None
        if field is None:
            yield f"{prefix}{name}", value
        elif section is not None and isinstance(value, Mapping):
            yield from _unknown(value, section, f"{prefix}{name}.")
        elif (entry := entry_section(field.annotation)) is not None and isinstance(value, Mapping):
            for each, inner in value.items():
                if isinstance(inner, Mapping):
                    yield from _unknown(inner, entry, f"{prefix}{name}.{each}.")


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set one key, a section key by key; ConfigError if what should hold the key is a plain value."""
    *holders, name = path
    model: type[BaseModel] | None = Config
    for depth, holder in enumerate(holders, start=1):
        model = section_type(model.model_fields[holder].annotation) if model else None
        if tree.get(holder) is None:
            tree[holder] = {}
        if not isinstance(tree[holder], dict):
            above, kind = ".".join(path[:depth]), type(tree[holder]).__name__
            raise ConfigError(f"{'.'.join(path)}: {above} holds {kind}; expected a mapping, or one key of the two")
        inner = dict(tree[holder])  # a copy: a mapping may stand in several places of a document
        tree[holder] = inner
        tree = inner
    if model is not None:
        _join(tree, {name: value}, "the value", model, "".join(f"{holder}." for holder in holders))
    else:
        tree[name] = value


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            lines.append(f"{key}: missing; expected a value")
        elif key and not (problem["type"] == "value_error" and isinstance(problem["input"], Mapping)):
            lines.append(f"{key}: saw {_shown(key, problem['input'])}; {message[:1].lower()}{message[1:]}")
        else:  # a rule of a section or of the tree names its keys
            lines.append(message)
    return "\n".join(lines)


def _shown(key: str, value: Any) -> str:
    """A wrong value, unless it is a secret or may hold one."""
    if any(secret == key or secret.startswith(f"{key}.") for secret in _secret_keys()):
        return "a secret"
    is_url = isinstance(value, str) and (key.endswith(".url") or "://" in value)
    return repr(shown_url(value) if is_url else value)[:80]


def _secret_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        section = section_type(field.annotation)
        if section is not None:
            yield from _secret_keys(section, f"{prefix}{name}.")
        elif SecretStr in (field.annotation, *get_args(field.annotation)):
            yield f"{prefix}{name}"
