"""Rollout servers that did not take the weights that were pushed to them.

Owns the memory of those pushes. Invariant: a server counts as fenced from a push that it missed until its own record
says that it serves that version or a newer one, or it is gone. Only counts: what a fenced server may do is decided by
the queue's scripts. Told by the releases, read by the sampler.
"""

from collections import Counter
from collections.abc import Sequence

from penstock.broker import Announcement, ServiceRecord
from penstock.contracts import PolicyIdentity
from penstock_trainer.publisher import Push

FENCED = "fenced"
SERVER_STATES = ("starting", "waiting", "updating", "serving", "paused", FENCED)


class Fences:
    """The fenced servers of one trainer."""

    def __init__(self) -> None:
        self._missed: dict[str, PolicyIdentity] = {}

    def pushed(self, announcement: Announcement, push: Push) -> None:
        """Take note of who took a version and who did not."""
        for name in push.live:
            self._missed.pop(name, None)
        self._missed.update(dict.fromkeys(push.fenced, announcement.identity))

    def server_states(self, records: Sequence[ServiceRecord]) -> Counter[str]:
        """Rollout servers by state, as their records and the pushes tell."""
        servers = [record for record in records if record.kind == "rollout"]
        self._missed = {
            record.name: self._missed[record.name]
            for record in servers
            if record.name in self._missed and not _serves(record, self._missed[record.name])
        }
        return Counter(FENCED if record.name in self._missed else record.state for record in servers)


def _serves(record: ServiceRecord, wanted: PolicyIdentity) -> bool:
    return record.policy is not None and (record.policy == wanted or record.policy.number > wanted.number)
