"""How a configuration is shown and stored: as plain YAML values, its secrets omitted or masked."""

from collections.abc import Iterator, Sequence
from typing import Any

from penstock.config.secrets import MASK, shown_url, url_secrets
from penstock.config.tree import Config

SECRET_WORDS = ("key", "password", "secret", "token")  # parts of the names of an engine's arguments


def masked(config: Config) -> dict[str, Any]:
    """The tree with every secret that is set replaced by asterisks."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["redis"]["url"] = shown_url(config.redis.url)
    engine = config.rollout.engine
    tree["rollout"]["engine"]["url"] = shown_url(engine.url)
    tree["rollout"]["engine"]["extra_args"] = list(_mask_arguments(engine.extra_args))
    return tree


def without_secrets(config: Config) -> dict[str, Any]:
    """The tree without secrets: services get these through their environment."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["token"] = None
    tree["redis"]["password"] = None
    tree["redis"]["url"] = shown_url(config.redis.url, mask="")
    return tree


def secret_values(config: Config) -> tuple[str, ...]:
    """The secrets themselves, for what must not show them."""
    stored = (secret.get_secret_value() for secret in (config.token, config.redis.password) if secret is not None)
    return (*stored, *url_secrets(config.redis.url), *url_secrets(config.rollout.engine.url))


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
