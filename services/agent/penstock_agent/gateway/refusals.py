"""Every error that a client of the gateway gets, in OpenAI's form.

    GatewayError            status, type and code of the answer
    |- RequestRefusedError  400  the request asks for something that cannot be had
    |- KeyRefusedError      401  no session has this key
    |- SessionClosedError   401  the session has ended, perhaps while the request waited
    '- EpisodeCutError      400  the episode is at max_turns or max_tokens: no further call

Clients of OpenAI repeat a request by themselves after 408, 409, 429 and 5xx, so none of these has such a status. No
error says that engines are away: a call waits for one until its episode ends.
"""

from typing import Any, ClassVar

from penstock.contracts.vocabulary import Cut
from penstock.errors import PenstockError


class GatewayError(PenstockError):
    """Base: `message` is for people, `code` for programs."""

    kind = "gateway"
    status: ClassVar[int]
    type: ClassVar[str]
    code: ClassVar[str]

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


def error_body(message: str, *, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error, in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
