"""Whose a run is: the configuration of its owner and the folder with its state, as the queue has them.

Owns the arguments that every script about it takes. The owner is the launcher, or the trainer if there is none; it
writes them when nothing of another configuration or folder lives. Every script that gives out work, takes a result or
shows a service compares them with those of the process that calls it. A process is a stranger to the run if it would do
something else than the run: a service that reads other values of its keys, a trainer or a launcher of another
configuration or folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from penstock.broker.scripts import Given
from penstock.config import Config
from penstock.config.identity import differences, digest_of, identifying_keys, keys_of
from penstock.contracts import ServiceKind
from penstock.run_home import RunHome, new_id
from penstock.runtime.process import this_machine

MOST_SHOWN = 8  # of the keys that differ
LATER_MS = 10  # the resolution of times to live, and then some


@dataclass(frozen=True)
class RunIdentity:
    """The configuration of a process of a kind: the identifying keys and their values."""

    kind: ServiceKind
    keys: Mapping[str, Any]
    digests: Mapping[ServiceKind, str]
    """Of the keys that decide what a service of each kind does."""

    @classmethod
    def of(cls, config: Config, kind: ServiceKind) -> "RunIdentity":
        """That of the configuration. kind: trainer, of a launcher too."""
        keys = identifying_keys(config)
        return cls(kind, keys, {each: digest_of(keys_of(each, keys)) for each in ServiceKind})

    @property
    def compared(self) -> dict[str, Given]:
        """The arguments of `stranger.lua` in `lua/shared`."""
        return {"kind": self.kind, "digest": self.digests[self.kind]}

    def for_owner(self, home: RunHome | None) -> dict[str, Given]:
        """The arguments of `own()` in `lua/shared`. None: a tool that has no folder."""
        return {
            **self.compared,
            "rollout_digest": self.digests[ServiceKind.ROLLOUT],
            "agent_digest": self.digests[ServiceKind.AGENT],
            "reward_digest": self.digests[ServiceKind.REWARD],
            "settings": msgspec.json.encode(self.keys, order="deterministic"),
            "folder": home.id() if home else "",
            "next_folder": new_id() if home else "",
            "words": home.words if home else "",
            "place": f"{this_machine()} {home.path.resolve()}" if home else "",
        }

    def unlike(self, fields: Mapping[bytes, bytes]) -> str:
        """What the owner of a run has that this process does not, from the hash in Redis."""
        there = msgspec.json.decode(fields.get(b"settings", b"{}"), type=dict[str, Any])
        found = differences(keys_of(self.kind, there), keys_of(self.kind, self.keys))
        if not found:
            return f"of {owner_in(fields)}, with the same configuration"
        more = f"; and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
        return f"of {owner_in(fields)}, with another configuration: {'; '.join(found[:MOST_SHOWN])}{more}"


def owner_in(fields: Mapping[bytes, bytes]) -> str:
    """The owner of a run in words, from the hash in Redis."""
    return fields.get(b"words", b"").decode(errors="replace") or "another process"


class Renewals:
    """Distinguishes holders that live from those that were killed: of the former, some deadline becomes later."""

    def __init__(self) -> None:
        self._first: list[int] | None = None

    def seen(self, deadlines: list[int]) -> bool:
        """Whether somebody has renewed since the first call. deadlines: Unix milliseconds; 0: there is none."""
        if self._first is None:
            self._first = deadlines
        return any(now > first + LATER_MS for first, now in zip(self._first, deadlines, strict=True))
