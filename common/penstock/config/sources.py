"""What a user wrote in each source: YAML files, environment variables, the command line.

Owns the syntax of all three. On the command line and in a variable, the value of a key that holds text is that text,
character for character; any other value is YAML, which includes JSON.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from penstock.absent_path import looked_for
from penstock.config.keys import Key, find_key, holds_text, may_be_none
from penstock.config.reference.hints import hint
from penstock.errors import ConfigError

ENV_PREFIX = "PENSTOCK_"
ENV_DELIMITER = "__"
CONFIG_FLAG = "--config"
# Variables have no case, so these mappings alone have entries there: names of resources and of other variables do.
MAPPINGS_OF_LOWER_CASE = (
    *("reward.functions", "data.template_options", "data.train.options", "data.eval.options"),
    "data.train_sets",
)

# Of YAML's guesses what a plain word is, all but dates: no key holds a date.
RESOLVERS = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

Setting = tuple[Key, Any]


def parse_arguments(argv: Sequence[str], *, needs_file: bool = True) -> tuple[list[Path], list[tuple[str, str]]]:
    """Split `--config FILE --a.b value` (or `--a.b=value`) into the files and pairs of a dotted key and its text."""
    paths: list[Path] = []
    pairs: list[tuple[str, str]] = []
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
            pairs.append((name.removeprefix("--"), value))
    if needs_file and not paths:
        raise ConfigError("no configuration file: expected --config FILE")
    return paths, pairs


def command_line_settings(pairs: Iterable[tuple[str, str]]) -> Iterator[Setting]:
    """The settings of the command line, in its order; ConfigError for an unknown key."""
    for dotted, text in pairs:
        key = find_key(dotted)
        if key is None:
            raise ConfigError(f"{dotted}: no such key in the command line{hint(dotted)}")
        yield key, _value(f"--{dotted}", key, text)


def python_settings(keys: Mapping[str, Any]) -> Iterator[Setting]:
    """The settings of a mapping from dotted keys to values; ConfigError for an unknown key. A path is its text."""
    for dotted, value in keys.items():
        key = find_key(dotted)
        if key is None:
            raise ConfigError(f"{dotted}: no such key{hint(dotted)}")
        yield key, os.fspath(value) if isinstance(value, os.PathLike) else value


def without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that set keys."""
    return {name: value for name, value in environ.items() if not name.upper().startswith(ENV_PREFIX)}


def environment_settings(environ: Mapping[str, str]) -> list[Setting]:
    """The settings in PENSTOCK_* variables, a mapping before its entries; ConfigError for an unknown key.

    An empty variable sets nothing.
    """
    settings = []
    for variable, text in environ.items():
        if not variable.upper().startswith(ENV_PREFIX):
            continue
        dotted = variable[len(ENV_PREFIX) :].lower().replace(ENV_DELIMITER, ".")
        key = find_key(dotted)
        if key is None:
            raise ConfigError(f"{variable}: no such key ({dotted}) in the environment{hint(dotted)}")
        if key.is_entry and not dotted.startswith(MAPPINGS_OF_LOWER_CASE):
            raise ConfigError(
                f"{variable}: a variable has no case, and names of entries here do ({dotted}); expected the mapping "
                "as JSON in one variable, or the entry on the command line"
            )
        if text:
            settings.append((key, _value(variable, key, text)))
    return sorted(settings, key=lambda setting: len(setting[0].path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The YAML file as a mapping; ConfigError if it is missing, not YAML or not a mapping."""
    try:
        document = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        where = f"; {looked_for(str(path))}" if isinstance(error, FileNotFoundError | NotADirectoryError) else ""
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}); expected a YAML file{where}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not UTF-8 ({error}); expected a YAML file") from None
    except _NotYamlError as error:
        raise ConfigError(f"--config {path}: not YAML: {error}") from None
    except _DuplicateKeyError as error:
        raise ConfigError(f"--config {path}: {error}; expected each key once") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"--config {path}: holds a {type(document).__name__}; expected sections with keys")
    return document


def _value(shown: str, key: Key, text: str) -> Any:
    """A text of the command line or of a variable as the value of `key`; `shown` names it in messages."""
    if any("\ud800" <= character <= "\udfff" for character in text):  # the mark of bytes that could not be decoded
        raise ConfigError(f"{shown}: saw bytes that are not UTF-8; expected UTF-8 text")
    if holds_text(key.holds):
        return None if not text and may_be_none(key.holds) else text
    try:
        return _parse(text)
    except _NotYamlError:
        return text
    except _DuplicateKeyError as error:
        raise ConfigError(f"{shown}: {error}; expected each key once") from None


class _NotYamlError(Exception):
    """A text that is not YAML."""


class _DuplicateKeyError(Exception):
    """A mapping with a key twice, of which YAML would drop the first."""


class _Loader(yaml.SafeLoader):
    """YAML in which each key stands once and every text is Unicode."""

    yaml_implicit_resolvers = RESOLVERS

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        try:  # JSON writes one character as two surrogates, which YAML keeps apart
            node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise _NotYamlError(f"line {node.start_mark.line + 1}: a text with a lone surrogate") from None
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _DuplicateKeyError(f"{key.value[:80]!r} twice, again in line {key.start_mark.line + 1}")
                seen.add((key.tag, key.value))
        return node


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise _NotYamlError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:  # without the line itself, which may hold a secret
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise _NotYamlError(f"{place}{error.problem}") from None
    except (yaml.YAMLError, ValueError, KeyError) as error:  # a value that does not fit its tag, such as !!bool x
        raise _NotYamlError(type(error).__name__) from None
