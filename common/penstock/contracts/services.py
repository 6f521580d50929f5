"""What services say of themselves and of the weights that they serve."""

from penstock.contracts import Contract, PolicyIdentity
from penstock.contracts.canary import Canary


class Announcement(Contract, frozen=True):
    """The version that all new work is generated with.

    `path` holds its staged weights; `canary` is what a server that has loaded them must say; None: not asked.
    """

    identity: PolicyIdentity
    path: str
    lease: int
    canary: Canary | None = None


class ServiceRecord(Contract, frozen=True):
    """One running service as the others see it. kind: rollout, reward or trainer."""

    kind: str
    name: str
    url: str
    pid: int
    state: str
    policy: PolicyIdentity | None = None
    engine: str = ""


FENCED = "fenced"
SERVER_STATES = ("starting", "waiting", "updating", "serving", "paused", FENCED)


ENGINE_STARTING = "starting"  # the state of a rollout service without an engine; it catches up by itself
