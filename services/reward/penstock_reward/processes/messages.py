"""The messages between pool and worker process (`penstock.workers.frames` has their framing).

parent                     child
Start ------------------->           loads the configured functions
      <------------------- Started | Refused
CallBatch --------------->           loads further functions that the batch names
      <------------------- Accepted
      <------------------- Outcome   one per call, as soon as it is known: the parent's deadline is per call
"""

from typing import Literal

from penstock.workers.frames import Message

FailureKind = Literal[
    "exception",
    "transient",
    "timeout",
    "died",
    "not_a_number",
    "too_large",
    "unavailable",
    "unknown_reward",
    "environment",
    "teacher",
]
OUTAGE_KINDS: frozenset[FailureKind | None] = frozenset({"transient", "timeout", "died"})
"""Failures that may pass: such a call is repeated, and many in a row open the function's breaker."""


class Start(Message, frozen=True, tag="start"):
    """First frame: load these functions; `modules_path` is put on the import path unless empty."""

    functions: tuple[str, ...]
    modules_path: str


class Started(Message, frozen=True, tag="started"):
    """All functions are loaded; the first line of each one's docstring."""

    descriptions: dict[str, str]


class Refused(Message, frozen=True, tag="refused"):
    """A configured function cannot be loaded."""

    function: str
    reason: str


class Call(Message, frozen=True, array_like=True):
    """One call of one function on one completion of the batch."""

    function: str
    completion: int


class CallBatch(Message, frozen=True, tag="batch"):
    """Calls that share a prompt. `metadata` is MessagePack within MessagePack: each call decodes its own copy."""

    prompt: str
    completions: tuple[str, ...]
    answer: str
    metadata: bytes
    calls: tuple[Call, ...]


class Accepted(Message, frozen=True, tag="accepted"):
    """The batch has arrived and its functions are loaded: the first call begins."""


class Outcome(Message, frozen=True, tag="outcome"):
    """The result of a call: a finite value, or the kind and the text of its failure. seconds: its duration."""

    value: float | None
    seconds: float
    kind: FailureKind | None = None
    reason: str = ""


ToChild = Start | CallBatch
FromChild = Started | Refused | Accepted | Outcome
