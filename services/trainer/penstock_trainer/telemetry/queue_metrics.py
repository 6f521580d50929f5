"""Metrics of the rest of the run: queue, tickets, services.

Owns names and labels; each label shows 0 from the start, so that a rate exists before its first event.
"""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from penstock.broker import MemoryUse, Stage
from penstock.contracts import DropReason, ReissueReason, ServerState, ServiceKind

# How a ticket can end, and why.
TICKET_STATES = {
    "issued": ("",),
    "reissued": tuple(ReissueReason),
    "trained": ("",),
    "dropped": tuple(DropReason),
}
STREAMS = (*map(str, Stage), "dead")


class QueueMetrics:
    """Metrics of everything between the services, on the trainer's registry."""

    def __init__(self, registry: CollectorRegistry, *, of_episodes: bool) -> None:
        """`of_episodes`: agent services are counted too; elsewhere their number would be a 0 that alerts wait for."""
        self._kinds = [kind for kind in ServiceKind if of_episodes or kind is not ServiceKind.AGENT]

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"penstock_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"penstock_{name}", text, labels, registry=registry)

        self._groups = gauge("queue_groups", "Groups in a stream, held ones included", "stream")
        self._oldest_age = gauge("queue_oldest_age_seconds", "Age of the oldest group of a stream", "stream")
        self._used = gauge("queue_memory_used_bytes", "Memory that the queue's server uses")
        self._limit = gauge("queue_memory_limit_bytes", "Memory limit of the queue: maxmemory, else its host's memory")
        self._services = gauge("services", "Services with a current heartbeat, by kind", "kind")
        self._servers = gauge(
            "rollout_servers",
            "Rollout servers by state; fenced: did not take the last pushed weights, and works again once it has",
            "state",
        )
        self.outstanding = gauge("tickets_outstanding", "Tickets issued and not resolved")
        self.tickets = counter("tickets", "Tickets by what became of them", "state", "reason")
        self.oldest_waiting = gauge(
            "tickets_oldest_waiting_seconds", "How long the ticket that the next batch waits for first has been waiting"
        )
        self.dead_letters = counter("dead_letters", "Messages that could not be used", "reason")
        self.duplicates = counter("duplicate_groups", "Groups that arrived for a ticket already held or resolved")
        for state, reasons in TICKET_STATES.items():
            for reason in reasons:
                self.tickets.labels(state=state, reason=reason)
        for reason in ("reported", "malformed"):
            self.dead_letters.labels(reason=reason)
        self.show_services({}, {})
        self.show_streams(dict.fromkeys(STREAMS, 0), {})

    def show_streams(self, depths: Mapping[str, int], ages_seconds: Mapping[str, float]) -> None:
        """Show the depth and the age of each stream."""
        for stream, depth in depths.items():
            self._groups.labels(stream=stream).set(depth)
        for stream, seconds in ages_seconds.items():
            self._oldest_age.labels(stream=stream).set(seconds)

    def show_memory(self, use: MemoryUse) -> None:
        self._used.set(use.used_bytes)
        self._limit.set(use.limit_bytes)

    def show_services(self, kinds: Mapping[ServiceKind, int], server_states: Mapping[ServerState, int]) -> None:
        """Show the number of services of each kind of the run, and of rollout servers in each state."""
        for kind in self._kinds:
            self._services.labels(kind=kind).set(kinds.get(kind, 0))
        for state in ServerState:
            self._servers.labels(state=state).set(server_states.get(state, 0))
