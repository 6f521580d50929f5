"""What is done to a run, in which order and when: pure functions of the seed.

Owns the deck of a part. Each target rests after a disturbance: the launcher gives up a service that dies five times
within two minutes.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Action = Literal["kill", "freeze", "cut", "lose_tail", "storm"]


@dataclass(frozen=True)
class Disturbance:
    """One thing to do. `target`: a kind of service, `engine`, `environment`, `queue`, `launcher` or `connections`."""

    action: Action
    target: str

    @property
    def is_kill(self) -> bool:
        """A lost tail begins with a kill of the queue."""
        return self.action in ("kill", "lose_tail")

    def __str__(self) -> str:
        return f"{self.action}:{self.target}"


@dataclass(frozen=True)
class Plan:
    """How often each disturbance happens, the mean seconds between two of them, and how long each victim rests."""

    kills: Mapping[str, int]
    freezes: Mapping[str, int]
    num_cuts: int
    num_lost_tails: int
    mean_pause_seconds: float
    rest_seconds: float
    num_storms: int = 0

    @property
    def num_kills(self) -> int:
        return sum(self.kills.values()) + self.num_lost_tails


def deck(plan: Plan, chooser: random.Random) -> list[Disturbance]:
    """All disturbances of a part in the order in which they are tried."""
    cards = [Disturbance("kill", target) for target, count in sorted(plan.kills.items()) for _ in range(count)]
    cards += [Disturbance("freeze", target) for target, count in sorted(plan.freezes.items()) for _ in range(count)]
    cards += [Disturbance("cut", "connections")] * plan.num_cuts
    cards += [Disturbance("lose_tail", "queue")] * plan.num_lost_tails
    cards += [Disturbance("storm", "rollout")] * plan.num_storms
    chooser.shuffle(cards)
    return cards


def pause_seconds(plan: Plan, chooser: random.Random) -> float:
    """Seconds until the next disturbance: from 0, which hits the recovery from the last one, to twice the mean."""
    return chooser.uniform(0.0, 2 * plan.mean_pause_seconds)
