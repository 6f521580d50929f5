"""The names of everything that a run keeps in Redis.

Owns the key names: `penstock:{run}:<name>`, hash-tagged so that one script may touch several of them on a cluster and
so that runs share no key.

    tickets, eval, rollouts, scored   streams of work, one consumer group each
    dead          stream of the messages that nobody could use, with the reason
    part:<name>:<part>  string: the large fields of one group (`penstock.contracts.stored_groups`); the group's
                  entry holds the name. It has a time to live until an entry names it; from then on it is deleted with
                  the last entry that does
    episodes:<stage>:<entry>  hash: index -> a finished episode of the ticket in this entry, while its others are made.
                  Deleted with the entry; has a time to live, renewed while the entry is held
    waiting:<stage>  sorted set: consumer that waits for entries of the stage -> Unix milliseconds until which it does
    woken:<consumer>  list: an element ends the wait of this consumer; has a time to live
    looked:<stage>  string, while nobody need look for entries whose holders are dead; has a time to live
    tidied        string, while nobody need look for dead consumers; has a time to live
    live          hash: ticket -> stage|entry|attempt, one for every outstanding ticket
    failures      hash: ticket -> failures that its workers reported
    deaths        hash: ticket -> engine deaths while it was held
    beats         hash: consumer -> Unix milliseconds until which it counts as alive
    services      hash: service name -> its record, with a deadline, its kind and the digest of its configuration
    policy        hash: the announced version
    ledger        stream: what happened to tickets and weights, in order; never trimmed
    ledger:rebuilt  stream: its copy, while a trainer writes a ledger that the queue has lost
    counters      hash: tickets issued, trained, dropped by reason
    lease         string: the trainer's fencing token, `number:random id`
    lease:last    integer: the highest number given out
    turn          string: token of the trainer that has the GPUs, and the number of its turn; void without its lease
    identity      hash: whose run this is: the identifying keys and their values, their digest for each kind of service,
                  the id of the run's folder, the owner in words
    launcher      string: token of the launcher that holds the run, with a time to live
"""

import re
from enum import StrEnum

from penstock.contracts.stored_groups import Part

GROUP = "penstock"
PART_NAME = re.compile("[0-9a-f]{32}")


class Stage(StrEnum):
    """A stream of work between two services."""

    TICKETS = "tickets"
    EVAL = "eval"
    ROLLOUTS = "rollouts"
    SCORED = "scored"


class Keys:
    """Key names of one run."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._prefix = f"penstock:{{{run}}}:"
        self.dead = self.name("dead")
        self.live = self.name("live")
        self.failures = self.name("failures")
        self.deaths = self.name("deaths")
        self.beats = self.name("beats")
        self.tidied = self.name("tidied")
        self.services = self.name("services")
        self.policy = self.name("policy")
        self.ledger = self.name("ledger")
        self.rebuilt = self.name("ledger:rebuilt")
        self.counters = self.name("counters")
        self.lease = self.name("lease")
        self.last_lease = self.name("lease:last")
        self.turn = self.name("turn")
        self.identity = self.name("identity")
        self.launcher = self.name("launcher")

    def name(self, part: str) -> str:
        return self._prefix + part

    def stream(self, stage: Stage) -> str:
        return self.name(stage)

    def waiting(self, stage: Stage) -> str:
        return self.name(f"waiting:{stage}")

    def woken(self, consumer: str) -> str:
        """`lua/shared/wake.lua` makes this name too."""
        return self.name(f"woken:{consumer}")

    def looked(self, stage: Stage) -> str:
        return self.name(f"looked:{stage}")

    def part(self, name: str, part: Part) -> str:
        return self.name(f"part:{name}:{part}")

    def parts(self, name: str) -> list[str]:
        """The keys of all parts of a name, whether they exist or not; none for the empty name."""
        return [self.part(name, part) for part in Part] if name else []

    def episodes(self, stage: Stage, entry: str) -> str:
        """Of an entry: a ticket's key and attempt come again when a run is deleted and begins anew."""
        return self.name(f"episodes:{stage}:{entry}")

    @property
    def pattern(self) -> str:
        """Matches every key of the run (for SCAN): `{` and `}` are plain characters there."""
        return f"{self._prefix}*"


def part_name(value: bytes) -> str:
    """The name of parts in an entry; empty if it is malformed, so that no entry can name another key."""
    text = value.decode(errors="replace")
    return text if PART_NAME.fullmatch(text) else ""
