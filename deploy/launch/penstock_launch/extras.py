"""The extras of this package: which a command or a run needs, and what of them this environment lacks.

A host installs only the extras of what runs on it. Invariant: a command that needs one asks here before it imports what
the extra brings, so that its user reads one line and no traceback.
"""

import importlib.metadata
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence

from packaging.requirements import Requirement

from penstock.broker.embedded import SERVER_NAMES
from penstock.config import Config
from penstock.errors import ConfigError

PACKAGE = "penstock"
SERVICES = ("rollout", "reward", "trainer")  # of every run
QUEUE = "launch"


def extras_of(config: Config, path: str | None = None) -> list[str]:
    """The extras that a run of this configuration needs on one host. path: as in PATH; None: this process's."""
    has_server = any(shutil.which(name, path=path) for name in SERVER_NAMES)
    wanted = {
        QUEUE: not config.redis.url and not has_server,
        "agent": config.agent.enabled,
        "lora": config.actor.lora.rank > 0,
    }
    return [*SERVICES, *(extra for extra, is_wanted in wanted.items() if is_wanted), *config.tracking.to]


def installed(package: str) -> str | None:
    """The version in this process's environment, which is the services'."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def metadata() -> list[str]:
    """What the installed package asks for, with the extra of each as a marker; nothing if it is not installed."""
    try:
        return importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def requirements(lines: Iterable[str], extras: Sequence[str]) -> Iterator[tuple[Requirement, str]]:
    """Each package that these extras ask for, once, with its extra; empty: all of Penstock needs it."""
    names = set[str]()
    asked = [Requirement(line) for line in lines]
    for extra in ("", *extras):
        for requirement in asked:
            outside = requirement.marker is not None and not requirement.marker.evaluate({"extra": extra})
            if not outside and requirement.name not in names:
                names.add(requirement.name)
                yield requirement, extra


def missing(
    extras: Sequence[str], lines: Iterable[str] | None = None, version_of: Callable[[str], str | None] = installed
) -> dict[str, str]:
    """Package -> extra of what this environment lacks of these extras. lines: as of `metadata`."""
    asked = requirements(metadata() if lines is None else lines, extras)
    return {each.name: extra for each, extra in asked if extra and version_of(each.name) is None}


def require(
    command: str,
    extras: Sequence[str],
    lines: Iterable[str] | None = None,
    version_of: Callable[[str], str | None] = installed,
) -> None:
    """ConfigError with what to install if this environment lacks a package of these extras."""
    if lacking := missing(extras, lines, version_of):
        named = ",".join(dict.fromkeys(lacking.values()))
        raise ConfigError(
            f"{command} needs packages that are not installed: {', '.join(lacking)}; expected "
            f"`pip install '{PACKAGE}[{named}]'`, or all extras: `pip install '{PACKAGE}[all]'`"
        )
