"""Where configuration values come from: defaults < YAML < environment < command line.

Owns the layering (pydantic-settings) and the errors: an unknown key in YAML, environment or command line is refused,
and the error names the nearest key.
"""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from penstock.config.tree import Config
from penstock.errors import ConfigError

ENV_PREFIX = "PENSTOCK_"
ENV_DELIMITER = "__"
CONFIG_FLAG = "--config"


def load_config(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Config:
    """The configuration from `--config FILE ... --key value ...` and PENSTOCK_* variables; ConfigError otherwise.

    Of several files a later one wins, key by key.
    """
    paths, overrides = parse_arguments(argv)
    variables = os.environ if environ is None else environ
    document: dict[str, Any] = {}
    for path in paths:
        document = _merged(document, read_yaml(path))
    return build_config(document, overrides, variables)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def build_config(document: dict[str, Any], overrides: dict[str, Any], environ: Mapping[str, str]) -> Config:
    """Layer YAML, environment and command line over the defaults."""
    check_keys(document, "the YAML file")
    check_keys(overrides, "the command line")
    _check_environment(environ)

    class Layered(BaseSettings, Config):
        """The tree with its sources; local, because pydantic-settings takes sources per class."""

        model_config = SettingsConfigDict(
            env_prefix=ENV_PREFIX,
            env_nested_delimiter=ENV_DELIMITER,
            env_ignore_empty=True,
            extra="forbid",
            frozen=True,
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            assert isinstance(env_settings, EnvSettingsSource)
            env_settings.env_vars = {key.lower(): value for key, value in environ.items()}
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=document)

    try:
        layered = Layered(**overrides)
        return Config.model_validate(layered.model_dump())
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def parse_arguments(argv: Sequence[str]) -> tuple[list[Path], dict[str, Any]]:
    """Split `--config FILE --a.b value` (or `--a.b=value`) into the files and a nested mapping of overrides."""
    paths: list[Path] = []
    overrides: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"argument {flag!r}: expected --config FILE or --section.key value")
        name, separator, value = flag.partition("=")
        if not separator:
            if not rest:
                raise ConfigError(f"{name} has no value: expected {name} VALUE")
            value = rest.pop(0)
        if name == CONFIG_FLAG:
            paths.append(Path(value))
        else:
            _assign(overrides, name.removeprefix("--"), _scalar(value))
    if not paths:
        raise ConfigError("no configuration file: expected --config FILE")
    return paths, overrides


def given_keys(argv: Sequence[str]) -> frozenset[str]:
    """The keys that `--key value` sets."""
    return frozenset(_dotted(parse_arguments(argv)[1], Config, ""))


def read_yaml(path: Path) -> dict[str, Any]:
    """The YAML file as a mapping; ConfigError if it is missing, not YAML or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}); expected a YAML file") from None
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not YAML: {error}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"--config {path}: holds a {type(document).__name__}; expected sections with keys")
    return document


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        section = section_type(field.annotation)
        if section is not None:
            yield from known_keys(section, f"{prefix}{name}.")


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The section class of a field's annotation (`Section` or `Section | None`), if it is one."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def check_keys(values: Mapping[str, Any], source: str) -> None:
    """ConfigError naming the nearest key if `values` holds an unknown one."""
    known = set(known_keys())
    for key in _dotted(values, Config, ""):
        if key not in known:
            raise ConfigError(f"{key}: no such key in {source}{_nearest(key, known)}")


def _dotted(values: Mapping[str, Any], model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        field = model.model_fields.get(str(name))
        section = section_type(field.annotation) if field else None
        if section is not None and isinstance(value, Mapping):
            yield from _dotted(value, section, f"{prefix}{name}.")


def _nearest(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:
        tails = {candidate.rpartition(".")[2]: candidate for candidate in known}
        close = [tails[tail] for tail in difflib.get_close_matches(key.rpartition(".")[2], tails, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]}?" if close else "; docs/configuration.md lists all keys"


def _check_environment(environ: Mapping[str, str]) -> None:
    known = set(known_keys())
    for variable in environ:
        if not variable.upper().startswith(ENV_PREFIX):
            continue
        key = variable[len(ENV_PREFIX) :].lower().replace(ENV_DELIMITER, ".")
        if key not in known and not key.startswith("reward.functions."):
            raise ConfigError(f"{variable}: no such key ({key}) in the environment{_nearest(key, known)}")


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, name = dotted.split(".")
    if dotted.startswith("reward.functions."):
        sections, name = ["reward", "functions"], dotted.removeprefix("reward.functions.")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--{dotted}: {section} was given a value before; expected one or the other")
    tree[name] = value


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            lines.append(f"{key}: missing; expected a value")
        elif key and not (problem["type"] == "value_error" and isinstance(problem["input"], Mapping)):
            lines.append(f"{key}: saw {_shown(problem['input'])}; {message[:1].lower()}{message[1:]}")
        else:  # a rule of a section or of the tree names its keys
            lines.append(message)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "a secret" if isinstance(value, SecretStr) else repr(value)[:80]
