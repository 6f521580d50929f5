"""What every client of a service needs, whichever library sends its requests: the token, and why there is no answer.

Invariant: it imports no web framework, whose import takes longer than most commands.
"""

import os
import socket

from pydantic import SecretStr


def auth_headers(token: SecretStr | None) -> dict[str, str]:
    """The header that `Guard` accepts."""
    return {} if token is None else {"Authorization": f"Bearer {token.get_secret_value()}"}


def transport_fault(error: Exception) -> str:
    """Why a request got no answer: the kind of the error and the system's reason.

    Without the library's text, which may repeat a header with the token in it: the reason is shown to everyone.
    """
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno):
        cause = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause.__cause__ or cause.__context__
    kind = type(error).__name__
    if isinstance(cause, socket.gaierror):
        return f"{kind} (no such host)"
    return f"{kind} ({os.strerror(cause.errno)})" if isinstance(cause, OSError) and cause.errno else kind
