"""JSON lines on standard error: one object per event, with the service and the run in each.

Owns the format. Everything else uses `logging` with `extra={...}`.
"""

import json
import logging
import sys
import time

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; keys given as `extra` are added as they are."""

    def __init__(self, service: str, run: str) -> None:
        super().__init__()
        self._constant = {"service": service, "run": run}

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
        return json.dumps(line, default=str)


def setup_logging(service: str, run: str, level: str) -> None:
    """Send all records at `level` and above, and the warnings of libraries, to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service, run))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for chatty in ("httpx", "httpcore", "uvicorn.access", "filelock", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
