"""Every error that a client of the gateway gets, in OpenAI's form.

    GatewayError            status, type and code of the answer
    |- RequestRefusedError  400  the request asks for something that cannot be had
    |- KeyRefusedError      401  no session has this key
    |- SessionClosedError   401  the session ended while the request waited
    |- EpisodeCutError      400  the episode is at max_turns or max_tokens: no further call
    '- UnavailableError     503  no engine answered, and the same request may succeed later

Clients of OpenAI repeat a request by themselves after 408, 409, 429 and 5xx, so only what may succeed then has such a
status.
"""

from typing import Any, ClassVar, Literal

from penstock.errors import PenstockError

RETRY_AFTER_SECONDS = 1

Cut = Literal["max_turns", "max_tokens"]
"""The limits at which an episode ends."""


class GatewayError(PenstockError):
    """Base: `message` is for people, `code` for programs."""

    kind = "gateway"
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: str = "internal_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        """`param`: the field of the request that is at fault."""
        super().__init__(message)
        self.param = param


class RequestRefusedError(GatewayError):
    """A request that cannot be answered as it stands."""

    kind = "request_refused"
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextTooLongError(RequestRefusedError):
    """An auxiliary request that is too long: the episode goes on."""

    code = "context_length_exceeded"


class KeyRefusedError(GatewayError):
    """A key that is no session's now."""

    kind = "key_refused"
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class SessionClosedError(GatewayError):
    """The episode has ended, and nobody reads what its agent does further."""

    kind = "session_closed"
    status = 401
    type = "authentication_error"
    code = "episode_ended"


class EpisodeCutError(GatewayError):
    """The call would be one too many, or its prompt and answer would not fit: the episode ends at `end`."""

    kind = "episode_cut"
    status = 400
    type = "invalid_request_error"
    code = "episode_ended"

    def __init__(self, end: Cut, message: str) -> None:
        super().__init__(message)
        self.end = end


class UnavailableError(GatewayError):
    """No engine gave an answer."""

    kind = "unavailable"
    status = 503
    code = "unavailable"


def error_body(message: str, *, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error, in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
