"""JSON lines on standard error: one object per event, with the service and the run in each.

Owns the format. Invariant: no line holds a secret, whatever a library writes. Everything else uses `logging` with
`extra={...}`.
"""

import json
import logging
import sys
import time
from collections.abc import Sequence

from penstock.config.secrets import hide

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; keys given as `extra` are added as they are, all of it without `secrets`."""

    def __init__(self, service: str, run: str, secrets: Sequence[str] = ()) -> None:
        super().__init__()
        self._constant = {"service": service, "run": run}
        self._secrets = [*secrets, *(json.dumps(secret)[1:-1] for secret in secrets)]

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            **self._constant,
            "event": record.getMessage(),
        }
        line.update({key: value for key, value in vars(record).items() if key not in _STANDARD})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return hide(json.dumps(line, default=str), self._secrets)


def setup_logging(service: str, run: str, level: str, secrets: Sequence[str] = ()) -> None:
    """Send all records at `level` and above, and the warnings of libraries, to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service, run, secrets))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for chatty in ("httpx", "httpcore", "uvicorn.access", "filelock", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
