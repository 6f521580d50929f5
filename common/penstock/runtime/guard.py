"""Who may call a service: decided from the headers of a request, before a byte of its body is read.

Owns the token, and what a browser may do. Invariant: whatever is not a read (GET, HEAD) needs the token, or, if none is
set, comes from a program and not from a page in a browser, which any site can make send requests to this host.

    Host that is no name of this service     421    a site whose name leads to this host (DNS rebinding)
    GET, HEAD                                       open
    no token, though one is set              401
    sent by a browser, and no token is set   403
    a body that is not JSON                  415    such as a form's, which a page may send anywhere

Paths whose requests carry a key of their own are only asked for JSON: their service checks the key, which no page has.
"""

import ipaddress
import secrets
from collections.abc import Callable, Collection

from pydantic import SecretStr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.runtime.error_answers import error_response

READS = ("GET", "HEAD")
FROM_BROWSERS = ("origin", "sec-fetch-site")  # browsers add one of them to whatever a page sends but a read

Refusal = tuple[int, str]


class Guard:
    """An app behind the token."""

    def __init__(self, app: ASGIApp, token: SecretStr | None, own_keys: tuple[str, ...] = ()) -> None:
        """`own_keys`: beginnings of paths whose requests carry a key that the app checks itself."""
        self._app = app
        self._own_keys = own_keys
        self._expected = None if token is None else f"Bearer {token.get_secret_value()}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None
        if scope["type"] == "http" and scope["method"] not in READS:
            headers = Headers(scope=scope)
            has_own_key = scope["path"].startswith(self._own_keys)
            refusal = (None if has_own_key else self._unknown(headers)) or _no_json(headers)
        await _answer(self._app, refusal, scope, receive, send)

    def _unknown(self, headers: Headers) -> Refusal | None:
        if self._expected is not None:
            given = headers.get("authorization", "").encode("latin-1")
            if not secrets.compare_digest(given, self._expected):
                return 401, "no valid bearer token; expected the one of the key `token` (PENSTOCK_TOKEN)"
        elif sent_by := next((name for name in FROM_BROWSERS if name in headers), None):
            why = f"a browser sent this ({sent_by}: {headers[sent_by][:80]}), as a page of any site can make it do"
            return 403, f"{why}; expected a program, or a token (PENSTOCK_TOKEN)"
        return None


def _no_json(headers: Headers) -> Refusal | None:
    kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        return 415, f"Content-Type is {kind[:80]}; expected application/json"
    return None


class OwnNames:
    """An app that answers only to the names of its service: a page may reach this host by a name of its own site."""

    def __init__(self, app: ASGIApp, names: Callable[[], Collection[str]], key: str) -> None:
        """`key`: of the configuration, with which another name can be given."""
        self._app = app
        self._names = names
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None
        if scope["type"] == "http":
            host = host_of(Headers(scope=scope).get("host", ""))
            # The page of a site is at neither an address nor a name without a dot, such as that of a container.
            if "." in host and not _is_address(host) and host not in self._names():
                why = f"Host is {host[:80]}, which is no name of this service"
                refusal = 421, f"{why}; expected its address, localhost, or the name in {self._key}"
        await _answer(self._app, refusal, scope, receive, send)


def host_of(header: str) -> str:
    """The host of a Host header, without port.

    >>> host_of("Node-7.local.:80"), host_of("[::1]:80"), host_of("127.0.0.1")
    ('node-7.local', '::1', '127.0.0.1')
    """
    host = header.strip().lower()
    host = host.partition("]")[0][1:] if host.startswith("[") else host.partition(":")[0]
    return host.rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _answer(app: ASGIApp, refusal: Refusal | None, scope: Scope, receive: Receive, send: Send) -> None:
    if refusal is not None:
        app = error_response(refusal[0], "refused", refusal[1])
    await app(scope, receive, send)
