"""Tickets of agents, their episodes, and a queue of them in memory."""

import asyncio
from typing import Any

from penstock.broker import Delivery, Stage
from penstock.contracts import (
    Episode,
    EpisodeCounts,
    EpisodeEnd,
    Node,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    Ticket,
    VersionSpan,
    encode,
    pack_float32,
    pack_int32,
)

ENVIRONMENT = "my_envs:Guess"
NODES = (
    Node(-1, pack_int32([1, 2]), role="user"),
    Node(0, pack_int32([5]), pack_float32([-0.5]), (VersionSpan(PolicyIdentity(0, "0" * 16), 0, 1),), "assistant"),
)


def agent_ticket(number: int, group_size: int = 3, **fields: Any) -> Ticket:
    return Ticket(
        **{
            "purpose": "train",
            "number": number,
            "attempt": 0,
            "policy_version": 0,
            "prompt": "",
            "prompt_ids": b"",
            "seeds": tuple(range(100 * number, 100 * number + group_size)),
            "sampling": Sampling(1.0, 4, (2,)),
            "answer": "7",
            "reward": "",
            "metadata": {"level": 1},
            "environment": ENVIRONMENT,
            **fields,
        }
    )


def make_episode(score: Score | float = 1.0, end: EpisodeEnd = "done", **fields: Any) -> Episode:
    given = score if isinstance(score, Score) else Score(score)
    nodes = () if given.failure else NODES
    return Episode(nodes, given, end, EpisodeCounts(**fields), 1.0, 2.0, text="transcript")


class TicketsInMemory:
    """The queue as the loop sees it: deliveries to take, and the fate of each."""

    def __init__(self, *messages: Ticket | bytes, kept: dict[str, dict[int, bytes]] | None = None) -> None:
        self.waiting = [
            Delivery(
                Stage.EVAL if isinstance(each, Ticket) and each.purpose == "eval" else Stage.TICKETS,
                f"{index}-0",
                each.key if isinstance(each, Ticket) else str(index),
                0,
                encode(each) if isinstance(each, Ticket) else each,
                "",
                0,
                0,
            )
            for index, each in enumerate(messages)
        ]
        self.kept = kept or {}
        self.late: set[str] = set()
        """Tickets that another worker has taken over."""
        self.handed_over: dict[str, RolloutGroup] = {}
        self.buried: dict[str, str] = {}
        self.given_back: list[str] = []
        self.forgotten: list[str] = []
        self.idle = asyncio.Event()
        """Set when nothing is left to take."""
        self.ask_seconds = 0.001

    async def take(self, *stages: Stage) -> Delivery | None:
        for stage in stages:
            for delivery in self.waiting:
                if delivery.stage is stage:
                    self.waiting.remove(delivery)
                    return delivery
        return None

    async def wait(self, *, timeout_seconds: float) -> None:
        self.idle.set()
        await asyncio.sleep(timeout_seconds)

    async def store_episode(self, delivery: Delivery, index: int, data: bytes) -> bool:
        if delivery.ticket_key in self.late:
            return False
        self.kept.setdefault(delivery.ticket_key, {}).setdefault(index, data)
        return True

    async def stored_episodes(self, delivery: Delivery) -> dict[int, bytes]:
        return dict(self.kept.get(delivery.ticket_key, {}))

    async def hand_over(self, delivery: Delivery, message: RolloutGroup, to: Stage) -> bool:
        assert to is Stage.ROLLOUTS
        self.handed_over[delivery.ticket_key] = message
        self.kept.pop(delivery.ticket_key, None)
        return True

    async def give_back(self, delivery: Delivery) -> None:
        self.given_back.append(delivery.ticket_key)

    async def bury(self, delivery: Delivery, reason: str) -> bool:
        self.buried[delivery.ticket_key] = reason
        return True

    def forget(self, delivery: Delivery) -> None:
        self.forgotten.append(delivery.ticket_key)
