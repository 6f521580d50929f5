"""Who may read the page's data, and what a browser may do with the page.

Owns both. Prompts and completions are nobody's but the run's owner's, so unlike the figures of a service they are not
open to every read. Invariant: whatever the page shows, no script but its own runs, and nothing is sent anywhere.

    data, a token is set       401 without it: the page asks for it, and keeps it for its tab
    data, no token             403 unless the reader is on this host
    data, from another site    403: its page may send requests here, and must not learn even how long they take
"""

import ipaddress
import secrets

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.runtime.error_answers import error_response

DATA = "/v1/view"  # beginning of the paths that need more than a read
OWN_SITES = ("same-origin", "none")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class ViewGuard:
    """An app whose data only the run's owner reads, and whose pages run no code of others."""

    def __init__(self, app: ASGIApp, token: SecretStr | None) -> None:
        self._app = app
        self._expected = None if token is None else f"Bearer {token.get_secret_value()}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        app = self._app
        if scope["type"] == "http" and scope["path"].startswith(DATA) and (refusal := self._refusal(scope)):
            app = error_response(refusal[0], "refused", refusal[1])
        await app(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        site = headers.get("sec-fetch-site", "none")
        if site not in OWN_SITES:
            return 403, f"a page of another site sent this (sec-fetch-site: {site[:80]}); expected the page of this run"
        if self._expected is not None:
            given = headers.get("authorization", "").encode("latin-1")
            if not secrets.compare_digest(given, self._expected):
                return 401, "no valid bearer token; expected the one of the key `token` (PENSTOCK_TOKEN)"
        elif not _is_loopback(scope):
            return 403, "the reader is on another host, and no token is set; expected PENSTOCK_TOKEN, or a tunnel"
        return None


def _is_loopback(scope: Scope) -> bool:
    client = scope.get("client")
    try:
        return client is not None and ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False
