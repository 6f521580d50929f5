"""The words in messages. Ledgers, queue and dashboards contain them, so their spelling never changes."""

import json
from enum import StrEnum

import msgspec
import pytest

from penstock.contracts import DropReason, ReissueReason, ServerState, ServiceKind, decode, encode
from penstock.contracts.wire import Contract, MalformedMessageError

WORDS: list[tuple[type[StrEnum], list[str]]] = [
    (ServiceKind, ["rollout", "agent", "reward", "trainer"]),
    (ServerState, ["starting", "waiting", "updating", "serving", "paused", "asleep", "fenced"]),
    (DropReason, ["stale", "degenerate", "reward_failed", "poison"]),
    (ReissueReason, ["version", "sampling", "stale", "teacher", "lost"]),
]


class Message(Contract, frozen=True):
    """A message with one word."""

    reason: DropReason


@pytest.mark.parametrize(("kind", "words"), WORDS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_word_is_written_as_it_is_spelt(kind: type[StrEnum], words: list[str]) -> None:
    assert [str(word) for word in kind] == words
    assert msgspec.json.encode(list(kind)) == json.dumps(words, separators=(",", ":")).encode()
    assert json.loads(json.dumps(list(kind))) == words
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(words), type=list[kind]) == list(kind)  # type: ignore[valid-type]


def test_an_unknown_word_is_refused_by_name() -> None:
    message = encode(Message(DropReason.POISON))
    assert message == b"\x81\xa6reason\xa6poison"
    assert decode(message, Message) == Message(DropReason.POISON)
    with pytest.raises(MalformedMessageError, match="Invalid enum value 'prison'"):
        decode(message.replace(b"poison", b"prison"), Message)
