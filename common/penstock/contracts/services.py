"""What services say of themselves and of the weights that they serve."""

from penstock.contracts import Contract, PolicyIdentity, ServerState, ServiceKind
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
    """One running service as the others see it. state: of a rollout server a `ServerState`, of others in words."""

    kind: ServiceKind
    name: str
    url: str
    pid: int
    state: str
    policy: PolicyIdentity | None = None
    engine: str = ""

    def __post_init__(self) -> None:
        if self.kind is ServiceKind.ROLLOUT:
            ServerState(self.state)  # ValueError names one that is not known

    @property
    def server_state(self) -> ServerState | None:
        """The state of a rollout server; None for another service."""
        return ServerState(self.state) if self.kind is ServiceKind.ROLLOUT else None
