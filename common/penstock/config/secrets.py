"""Secrets in the configuration: which can be used, and how text that may hold one is shown.

Owns both. Invariant: what `shown_url` and `hide` return, and what the checks raise, holds no secret, however malformed
the value is.
"""

import re
from collections.abc import Iterable, Iterator
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

MASK = "**********"
SHORTEST_HIDDEN = 4  # characters; to hide a shorter secret would garble any text, and it protects nothing

_PLAIN = re.compile(r"[!-~]*")  # visible ASCII
_OPTIONS = frozenset({"db", "username", "password"})
_TLS_OPTIONS = frozenset(
    {"ssl_cert_reqs", "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname"}
)
_QUEUE_URL = (
    "expected redis://[user:password@]host[:port][/db], rediss:// or unix://, with every special character of the "
    "password percent-encoded (such as %40 for @), or the password in redis.password instead"
)


def check_token(token: str) -> None:
    """ValueError unless it can be sent in an HTTP header."""
    expected = "expected visible ASCII characters, such as those of `openssl rand -hex 32`"
    if not token:
        raise ValueError(f"it is empty: {expected}, or no token at all")
    if wrong := _first_unusable(token, _PLAIN):
        raise ValueError(f"{wrong}: {expected}")


def check_password(password: str) -> None:
    """ValueError if it cannot be passed on: to the queue as UTF-8, to the services in their environment."""
    if wrong := _first_unusable(password, re.compile("[^\x00-\x1f\x7f\ud800-\udfff]*")):
        raise ValueError(f"{wrong}: expected text of one line, without control characters")


def check_queue_url(url: str) -> None:
    """ValueError unless the queue's client reads host, port, database and password of it as they were meant.

    An option that would change how the client reads answers, waits or repeats calls is refused.
    """
    parts = _split(url, ("redis", "rediss", "unix"))
    if parts is None:
        raise ValueError(_QUEUE_URL)
    if parts.scheme == "unix":
        fits = bool(parts.path.strip("/"))
    else:
        fits = bool(parts.hostname) and re.fullmatch(r"(/\d*)?", parts.path) is not None
    if not fits:
        raise ValueError(_QUEUE_URL)
    allowed = _OPTIONS | _TLS_OPTIONS if parts.scheme == "rediss" else _OPTIONS
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    refused = [name for name in options if name not in allowed]
    if refused:
        shown = refused[0] if re.fullmatch(r"[a-z_]{1,32}", refused[0]) else "that it holds"
        raise ValueError(f"the option {shown} is not supported: expected only {', '.join(sorted(allowed))}")
    if not options.get("db", "0").isdecimal():
        raise ValueError("the option db is no number: expected that of a database, such as ?db=0")


def check_http_url(url: str) -> None:
    """ValueError unless it is the address of a server, to which paths are added."""
    parts = _split(url, ("http", "https"))
    if parts is None or not parts.hostname or parts.query:
        raise ValueError("expected http://host:port or https://host:port, without options")


def shown_url(url: str, mask: str = MASK) -> str:
    """A URL as logs, errors and the status show it: the only way in which any is shown.

    Passwords and values of options are replaced by `mask`; an empty mask leaves the password out, and the result can
    be used. A URL that cannot be taken apart is masked after its scheme.
    """
    if not url:
        return ""
    parts = _split(url, ("redis", "rediss", "unix", "http", "https"))
    if parts is None:
        scheme = re.match(r"(rediss?|unix|https?)://", url)
        return f"{scheme[0] if scheme else ''}{MASK}"
    credentials, at, host = parts.netloc.rpartition("@")
    user, colon, _ = credentials.partition(":")
    if mask:
        user = f"{user}:{mask}" if colon else mask  # a password whose colon was forgotten looks like a user
    netloc = f"{user}@{host}" if at and user else host
    query = "&".join(_shown_options(parts.query, mask))
    return f"{parts.scheme}://{netloc}{parts.path}{'?' if query else ''}{query}"


def url_secrets(url: str) -> Iterator[str]:
    """The passwords in a URL, as they are written there and as they are meant."""
    parts = _split(url, ("redis", "rediss", "unix", "http", "https"))
    if parts is None:
        return
    written = [parts.password or "", *(option[9:] for option in parts.query.split("&") if option[:9] == "password=")]
    for password in written:
        yield from {password, unquote(password)}


def hide(text: str, secrets: Iterable[str]) -> str:
    """`text` without the secrets."""
    for secret in sorted(set(secrets), key=len, reverse=True):
        if len(secret) >= SHORTEST_HIDDEN:
            text = text.replace(secret, MASK)
    return text


def _split(url: str, schemes: tuple[str, ...]) -> SplitResult | None:
    """The parts of a URL; None if it holds characters that belong encoded, or is none."""
    if not _PLAIN.fullmatch(url) or "#" in url:
        return None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    stray = "@" in parts.path or "@" in parts.query  # a password with / or ? ends the host
    return None if parts.scheme not in schemes or stray or port == 0 or "://" not in url else parts


def _shown_options(query: str, mask: str) -> Iterator[str]:
    for option in query.split("&"):
        name, separator, _ = option.partition("=")
        if name in ("db", *_TLS_OPTIONS):
            yield option
        elif name and mask:
            yield f"{name}{separator}{mask}" if name in _OPTIONS else mask
        elif name == "username":
            yield option


def _first_unusable(text: str, usable: re.Pattern[str]) -> str:
    """What the first character is that does not fit, without the character; empty if all fit."""
    found = usable.match(text)
    end = found.end() if found else 0
    if end == len(text):
        return ""
    kinds = {"\n": "a line break", "\r": "a line break", " ": "a space", "\t": "a tab"}
    kind = kinds.get(text[end], "a control character" if ord(text[end]) < 128 else "a character beyond ASCII")
    return f"character {end + 1} of {len(text)} is {kind}"
