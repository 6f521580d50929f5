"""The names of everything that a run keeps in Redis.

Owns the key names: `penstock:{run}:<name>`, hash-tagged so that one script may touch several of them on a cluster and
so that runs do not meet. Called by the other modules of `penstock.broker`.

    tickets, eval, rollouts, scored   streams of work, one consumer group each
    dead          stream of what could not be used, with the reason
    wake:<stage>  stream of length 1 that blocking readers wait on
    live          hash: ticket -> stage|entry|attempt, one for every outstanding ticket
    failures      hash: ticket -> failures that its workers reported
    deaths        hash: ticket -> engine deaths while it was held
    beats         hash: consumer -> Unix milliseconds until which it counts as alive
    services      hash: service name -> its record with a deadline
    policy        hash: the announced version
    ledger        stream: what happened to tickets and weights, in order; never trimmed
    counters      hash: tickets issued, trained, dropped by reason
    lease         string: the trainer's fencing token, `number:random id`
    lease:last    integer: the highest number given out
"""

from enum import StrEnum

GROUP = "penstock"


class Stage(StrEnum):
    """A stream of work between two services."""

    TICKETS = "tickets"
    EVAL = "eval"
    ROLLOUTS = "rollouts"
    SCORED = "scored"


class Keys:
    """Key names of one run."""

    def __init__(self, run: str) -> None:
        self._prefix = f"penstock:{{{run}}}:"
        self.dead = self.name("dead")
        self.live = self.name("live")
        self.failures = self.name("failures")
        self.deaths = self.name("deaths")
        self.beats = self.name("beats")
        self.services = self.name("services")
        self.policy = self.name("policy")
        self.ledger = self.name("ledger")
        self.counters = self.name("counters")
        self.lease = self.name("lease")
        self.last_lease = self.name("lease:last")

    def name(self, part: str) -> str:
        return self._prefix + part

    def stream(self, stage: Stage) -> str:
        return self.name(stage)

    def wake(self, stage: Stage) -> str:
        return self.name(f"wake:{stage}")

    @property
    def pattern(self) -> str:
        """Matches every key of the run (for SCAN): `{` and `}` are plain characters there."""
        return f"{self._prefix}*"
