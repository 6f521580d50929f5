"""Which version may follow which on a server. Owns the rules; pure.

A higher lease is a trainer that has taken over: its version is loaded, even a lower one. Under one lease versions only
rise.
"""

from penstock.contracts import PolicyIdentity
from penstock.contracts.generation import AtLeast
from penstock.contracts.services import Announcement
from penstock.errors import WeightsConflictError


def is_behind(served: PolicyIdentity | None, lease: int, announced: Announcement) -> bool:
    """Whether a server that serves `served` of `lease` must load the announced version before it takes its tickets."""
    if served is None or lease < announced.lease:
        return True
    newer = served.number < announced.identity.number
    other = served.number == announced.identity.number and served != announced.identity
    return lease == announced.lease and (newer or other)


def check_lease(lease: int, followed: int) -> None:
    """WeightsConflictError for a lease lower than the one that the server has followed."""
    if lease < followed:
        raise WeightsConflictError(
            f"lease {lease} is lower than {followed}, which this server has followed: another trainer has taken over; "
            "expected the sender to stop"
        )


def check_order(wanted: Announcement, served: PolicyIdentity | None, followed: int) -> None:
    """WeightsConflictError if `wanted` must not replace `served`: a lower lease, or an older version of the same."""
    check_lease(wanted.lease, followed)
    older = served is not None and wanted.identity.number <= served.number
    if wanted.lease == followed and older and wanted.identity != served:
        raise WeightsConflictError(
            f"this server serves {served}; expected one newer than {wanted.identity}, or a lease higher than {followed}"
        )


def serves_at_least(served: PolicyIdentity | None, lease: int, wanted: AtLeast) -> bool:
    """Whether a server that serves `served` of `lease` may answer a call that needs at least `wanted`."""
    if served is None or lease < wanted.lease:
        return False
    return lease > wanted.lease or served.number >= wanted.number
