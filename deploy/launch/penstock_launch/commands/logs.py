"""`penstock logs`: the logs of a run's services, merged by time or one of them.

Invariant: it only reads, and ends by itself unless it follows a run that still runs.
"""

import difflib
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain

from penstock.errors import ConfigError
from penstock.records import RunRecords, find_run, list_runs, newest_run
from penstock.records.logs import LogEntry, LogFile, log_names, merged

LOOK_EVERY_SECONDS = 0.5  # nothing tells of new lines on every file system


def show_logs(
    words: Sequence[str],
    root: str,
    write: Callable[[str], None],
    *,
    num_lines: int = 0,
    errors: bool = False,
    follow: bool = False,
) -> None:
    """Write the last entries of a run's logs, all if `num_lines` is 0. words: RUN and SERVICE, or less of it."""
    records, service = _chosen(words, root)
    logs = {name: LogFile(records.folder, name) for name in _named(records, service)}
    titles = _titles(logs)

    def wanted() -> Iterator[LogEntry]:
        return (entry for entry in merged(list(logs.values())) if entry.is_fault or not errors)

    for line in _last(wanted(), titles, num_lines):
        write(line)
    while follow:
        runs = records.state().name == "running"  # asked first: what a run writes at its end is read after that
        logs |= {name: LogFile(records.folder, name) for name in _named(records, service) if name not in logs}
        titles = _titles(logs)
        for entry in wanted():
            write(_shown(entry, titles))
        sys.stdout.flush()
        if not runs:
            return
        time.sleep(LOOK_EVERY_SECONDS)


def _chosen(words: Sequence[str], root: str) -> tuple[RunRecords, str]:
    """The run and the service that are meant, "" for all; ConfigError that names what there is."""
    if len(words) > 2:
        raise ConfigError(f"saw {words[2]!r}; expected penstock logs [RUN] [SERVICE]")
    if not words:
        return newest_run(root), ""
    try:
        return find_run(words[0], root), words[1] if len(words) == 2 else ""
    except ConfigError:
        if len(words) == 2 or words[0] not in _services(root):
            raise
        return newest_run(root), words[0]


def _services(root: str) -> list[str]:
    """Those of the run that has logged last, so that its name may be left out."""
    return [_kind(name) for name in log_names(newest_run(root).folder)] if list_runs(root) else []


def _named(records: RunRecords, service: str) -> list[str]:
    """The logs of a service, or all; ConfigError if there is none."""
    there = log_names(records.folder)
    found = [name for name in there if service in ("", name, _kind(name))]
    if found:
        return found
    if not there:
        raise ConfigError(f"run {records.name!r} has no logs in {records.folder / 'logs'}")
    kinds = sorted({*there, *map(_kind, there)})
    near = difflib.get_close_matches(service, kinds, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"run {records.name!r} has no log of {service!r}: expected one of {', '.join(kinds)}{hint}")


def _kind(name: str) -> str:
    """rollout of rollout-1; engine of all engines, which are named after their service's process."""
    return re.split(r"-(?=\d)|(?<=^engine)-", name, maxsplit=1)[0]


def _titles(names: Iterable[str]) -> dict[str, str]:
    """The log's name for people, all of one width: its kind, if it is the only one of that kind."""
    counts = Counter(map(_kind, names))
    titles = {name: _kind(name) if counts[_kind(name)] == 1 else name for name in names}
    width = max(map(len, titles.values()))
    return {name: title.ljust(width) for name, title in titles.items()}


def _last(entries: Iterable[LogEntry], titles: Mapping[str, str], num_lines: int) -> Iterator[str]:
    kept: deque[LogEntry] = deque(maxlen=num_lines or None)
    num = 0
    for entry in entries:
        num += 1
        kept.append(entry)
    left_out = num - len(kept)
    head = [f"({left_out:,} earlier entries: --lines 0 shows all)"] if left_out else []
    return chain(head, (_shown(entry, titles) for entry in kept))


def _shown(entry: LogEntry, titles: Mapping[str, str]) -> str:
    stamp = datetime.fromtimestamp(entry.time, UTC).strftime("%Y-%m-%d %H:%M:%S") if entry.time else "-" * 19
    first, *more = entry.shown().splitlines() or [""]
    title = titles[entry.log]
    indent = "\n" + " " * (len(stamp) + len(title) + 4)
    return f"{stamp}  {title}  {indent.join([first, *more])}"
