"""`<run.root>/<run.name>.targets.json`: the addresses of a run's services for Prometheus.

Owns that file, in the form of Prometheus' file-based discovery: one entry per service, with the run's name as label
`run` and the kind of the service as `job`. Invariant: a reader sees a complete file; it names the services with a
current heartbeat, and is removed when the run ends in order, so that only a failed run leaves targets that do not
answer.
"""

import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from penstock.config import RunSection
from penstock.contracts.services import ServiceRecord

SUFFIX = ".targets.json"  # next to the run folders, since Prometheus takes a * only in the last part of a path
log = logging.getLogger(__name__)


class ScrapeTargets:
    """The file of one run."""

    def __init__(self, run: RunSection) -> None:
        self._run = run.name
        self.path = Path(run.root) / f"{run.name}{SUFFIX}"
        self._written = ""
        self._closed = False
        self._failed = False
        self._lock = threading.Lock()  # a thread may still write while the run ends

    def write(self, records: Sequence[ServiceRecord]) -> None:
        """Bring the file up to date; if the folder cannot be written, training goes on without targets."""
        text = json.dumps([_entry(self._run, record) for record in records], indent=1) + "\n"
        with self._lock:
            if self._closed or text == self._written:
                return
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            try:
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(self.path)
            except OSError as error:
                if not self._failed:
                    log.warning("cannot write %s (%s): Prometheus will not find this run", self.path, error.strerror)
                self._failed = True
                return
            self._written = text

    def remove(self) -> None:
        """Remove the file: the run has ended in order."""
        with self._lock:
            self._closed = True
            self.path.unlink(missing_ok=True)


def _entry(run: str, record: ServiceRecord) -> dict[str, object]:
    return {"targets": [urlsplit(record.url).netloc], "labels": {"job": record.kind, "run": run}}
