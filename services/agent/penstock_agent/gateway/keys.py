"""Keys of sessions: what an agent shows instead of an API key, and which episode it is for.

Invariant: a key is made from a secret that this process alone has and never shows, and no two sessions have the same
one. So a key dies with its session, and with its service; it is never another episode's, and never a default.
"""

import hmac
import re
import secrets

PREFIX = "psk_"
NUM_DIGITS = 40  # of the HMAC, in hex: 160 bits cannot be guessed
_SHAPE = re.compile(f"{PREFIX}[0-9a-f]{{{NUM_DIGITS}}}")
_BEARER = "bearer "


class Keys:
    """Makes the keys of one service."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._num_made = 0

    def make(self, ticket_key: str, ticket_attempt: int, episode: int, episode_attempt: int) -> str:
        """A new key. An episode that runs again gets another: its agent of before cannot enter the session of now."""
        self._num_made += 1
        what = f"{ticket_key} {ticket_attempt} {episode} {episode_attempt} {self._num_made}".encode()
        return PREFIX + hmac.digest(self._secret, what, "sha256").hex()[:NUM_DIGITS]


def has_key_shape(text: str) -> bool:
    """Whether it can be a key at all.

    >>> has_key_shape("psk_" + 20 * "0f"), has_key_shape("sk-1234"), has_key_shape("psk_" + 20 * "0F")
    (True, False, False)
    """
    return _SHAPE.fullmatch(text) is not None


def bearer(authorization: str) -> str:
    """What an Authorization header carries; empty if it is none of a bearer.

    >>> bearer("Bearer psk_1"), bearer("bearer  psk_1 "), bearer("Basic dTpw"), bearer("")
    ('psk_1', 'psk_1', '', '')
    """
    is_bearer = authorization[: len(_BEARER)].lower() == _BEARER
    return authorization[len(_BEARER) :].strip() if is_bearer else ""
