"""How a configuration is shown and stored: as plain YAML values, its secrets omitted or masked."""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from typing import Any

import yaml

from penstock.config.keys import flat
from penstock.config.secrets import MASK, shown_url, url_secrets
from penstock.config.services import RedisSection
from penstock.config.tree import Config

EXTRA_ARGS = "rollout.engine.extra_args"
SECRET_WORDS = ("key", "password", "secret", "token")  # parts of the names of an engine's arguments


def masked(config: Config) -> dict[str, Any]:
    """The tree with every secret that is set replaced by asterisks."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["redis"]["url"] = shown_url(config.redis.url)
    engine = config.rollout.engine
    tree["rollout"]["engine"]["url"] = shown_url(engine.url)
    tree["rollout"]["engine"]["extra_args"] = [
        f"{shown}{MASK if secret else ''}" for shown, secret in _split_arguments(engine.extra_args)
    ]
    return tree


def without_secrets(config: Config) -> dict[str, Any]:
    """The tree without secrets: services get these through their environment."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["token"] = None
    tree["redis"]["password"] = None
    tree["redis"]["url"] = shown_url(config.redis.url, mask="")
    tree["rollout"]["engine"]["url"] = shown_url(config.rollout.engine.url, mask="")
    return tree


def secret_settings(config: Config, redis: RedisSection) -> dict[str, str]:
    """What `without_secrets` leaves out, as environment variables. `redis`: the section with the queue's address."""
    engine_url = config.rollout.engine.url
    secrets = {
        "PENSTOCK_REDIS__URL": redis.url,
        "PENSTOCK_REDIS__PASSWORD": redis.password.get_secret_value() if redis.password else "",
        "PENSTOCK_ROLLOUT__ENGINE__URL": engine_url if any(url_secrets(engine_url)) else "",
        "PENSTOCK_TOKEN": config.token.get_secret_value() if config.token else "",
    }
    return {name: value for name, value in secrets.items() if value}


def changed(config: Config) -> dict[str, Any]:
    """What differs from the defaults. With the values of `hidden_keys` it is the same configuration when read again."""
    tree: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    if config.agent.enabled:  # whose default is another one, which these functions may be the only ones to override
        tree.setdefault("reward", {})["functions"] = dict(config.reward.functions)
    shown = dict(flat(without_secrets(config))) | {EXTRA_ARGS: dict(flat(masked(config)))[EXTRA_ARGS]}
    for key in hidden_keys(config):
        *sections, name = key.split(".")
        section = reduce(getitem, sections, tree)
        section[name] = shown[key]
        if shown[key] is None:
            del section[name]
    return tree


def hidden_keys(config: Config) -> list[str]:
    """The keys that hold a secret."""
    stored = dict(flat(config.model_dump(mode="json")))
    return [key for key, value in flat(masked(config)) if value == MASK or value != stored[key]]


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


def secret_values(config: Config) -> tuple[str, ...]:
    """The secrets themselves, for what must not show them."""
    engine = config.rollout.engine
    stored = (secret.get_secret_value() for secret in (config.token, config.redis.password) if secret is not None)
    passed = (secret for _, secret in _split_arguments(engine.extra_args) if secret)
    return (*stored, *url_secrets(config.redis.url), *url_secrets(engine.url), *passed)


def _split_arguments(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What may be shown of each argument, and the secret at its end: of `--api-key VALUE` and `--api-key=VALUE`."""
    secret_follows = False
    for argument in arguments:
        name, separator, value = argument.partition("=")
        is_secret = name.startswith("-") and any(part in SECRET_WORDS for part in name.lower().split("-"))
        if secret_follows:
            yield "", argument
        else:
            yield (f"{name}=", value) if is_secret and separator else (argument, "")
        secret_follows = is_secret and not separator and not secret_follows
