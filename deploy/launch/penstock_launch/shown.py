"""How a configuration is shown and stored: as plain YAML values, its secrets left out or masked.

Called by `penstock config` and by the launcher.
"""

from typing import Any

from penstock.config import Config

MASK = "**********"


def masked(config: Config) -> dict[str, Any]:
    """The tree with every secret that is set replaced by asterisks."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["redis"]["url"] = _mask_password(config.redis.url, MASK)
    return tree


def without_secrets(config: Config) -> dict[str, Any]:
    """The tree without secrets: those reach the services through their environment."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["token"] = None
    tree["redis"]["password"] = None
    tree["redis"]["url"] = _mask_password(config.redis.url, "")
    return tree


def _mask_password(url: str, mask: str) -> str:
    """`scheme://user:password@host` with the password replaced."""
    scheme, separator, rest = url.partition("://")
    credentials, at, host = rest.rpartition("@")
    if not at:
        return url
    user, colon, _ = credentials.partition(":")
    shown = f"{user}:{mask}" if colon and mask else user
    return f"{scheme}{separator}{shown}@{host}" if shown else f"{scheme}{separator}{host}"
