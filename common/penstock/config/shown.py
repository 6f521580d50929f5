"""How a configuration is shown and stored: as plain YAML values, its secrets omitted or masked."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from penstock.config.tree import Config

MASK = "**********"
SECRET_WORDS = ("key", "password", "secret", "token")  # parts of the names of an engine's arguments


def masked(config: Config) -> dict[str, Any]:
    """The tree with every secret that is set replaced by asterisks."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["redis"]["url"] = _mask_password(config.redis.url, MASK)
    engine = config.rollout.engine
    tree["rollout"]["engine"]["url"] = _mask_password(engine.url, MASK)
    tree["rollout"]["engine"]["extra_args"] = list(_mask_arguments(engine.extra_args))
    return tree


def without_secrets(config: Config) -> dict[str, Any]:
    """The tree without secrets: services get these through their environment."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["token"] = None
    tree["redis"]["password"] = None
    tree["redis"]["url"] = _mask_password(config.redis.url, "")
    return tree


def as_yaml(tree: Mapping[str, Any]) -> str:
    """A tree as YAML, in which every text is what it was when it is read again."""
    return str(yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


class _Dumper(yaml.SafeDumper):
    """YAML with readable Unicode."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes these as they are, and reads them as line breaks; in double quotes it escapes them.
    style = '"' if set(text) & set("\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)


def _mask_password(url: str, mask: str) -> str:
    """`scheme://user:password@host?password=password` with both replaced."""
    scheme, separator, rest = re.sub(r"(?<=[?&]password=)[^&]*", mask, url).partition("://")
    credentials, at, host = rest.rpartition("@")
    if not at:
        return f"{scheme}{separator}{rest}"
    user, colon, _ = credentials.partition(":")
    shown = f"{user}:{mask}" if colon and mask else user
    return f"{scheme}{separator}{shown}@{host}" if shown else f"{scheme}{separator}{host}"


def _mask_arguments(arguments: Sequence[str]) -> Iterator[str]:
    """`--api-key VALUE` and `--api-key=VALUE` with the value replaced."""
    secret_follows = False
    for argument in arguments:
        name, separator, _ = argument.partition("=")
        is_secret = name.startswith("-") and any(part in SECRET_WORDS for part in name.lower().split("-"))
        if secret_follows:
            yield MASK
        else:
            yield f"{name}={MASK}" if is_secret and separator else argument
        secret_follows = is_secret and not separator and not secret_follows
