"""The output of users' code, in the log: full lines, under the name of what wrote them."""

import codecs
import logging

log = logging.getLogger(__name__)

MAX_LOGGED_CHARS = 2000
"""Of one record, and of what is kept for an error."""


class OutputLog:
    """One stream of output."""

    def __init__(self, writer: str, pid: int | None = None) -> None:
        """writer: what writes, for people. pid: a field of each record, if it is known."""
        self._writer = writer
        self._extra = None if pid is None else {"worker_pid": pid}
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._line = ""
        self._tail = ""

    @property
    def tail(self) -> str:
        """The end of what was written."""
        return self._tail.strip()

    def write(self, data: bytes) -> None:
        """Log the lines that are complete; a process that does not hold its output back writes parts of lines."""
        text = self._decode(data)
        self._tail = (self._tail + text)[-MAX_LOGGED_CHARS:]
        lines, newline, self._line = (self._line + text).rpartition("\n")
        self._log(lines + newline)
        if len(self._line) > MAX_LOGGED_CHARS:
            self.flush()

    def flush(self) -> None:
        """Log the rest: no more comes, or it was long enough."""
        rest, self._line = self._line, ""
        self._log(rest)

    def rename(self, writer: str) -> None:
        """What comes now is another's."""
        self.flush()
        self._writer = writer

    def _log(self, text: str) -> None:
        if text := text.rstrip()[:MAX_LOGGED_CHARS]:
            log.info("%s wrote: %s", self._writer, text, extra=self._extra)
