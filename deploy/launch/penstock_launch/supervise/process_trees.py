"""The process tree of each service: its peak memory, and its members.

Writes `processes.json` in the run's folder (`penstock.records.processes`): every process of this launch by pid and
start time, so that the next launch finds processes that this one could not end (after a kill of the launcher, or if a
child left its session).
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import psutil

from penstock.durable import writing
from penstock.records.files import PROCESSES_FILE
from penstock.records.processes import LAUNCHER, KnownProcess, KnownProcesses
from penstock.runtime.process import ProcessIdentity, this_machine


class ProcessTrees:
    """The processes seen in the tree of each service."""

    def __init__(self, folder: Path, run: str) -> None:
        self.peak_rss_bytes: dict[str, int] = {}
        """By process: a service by its name, what it starts as service/process name, `total` for all at once."""
        self._path = folder / PROCESSES_FILE
        self._run = run
        self._machine = this_machine()
        self._members: dict[str, set[ProcessIdentity]] = {}
        self._recorded: tuple[KnownProcess, ...] | None = None

    def survivors(self, service: str) -> Iterable[ProcessIdentity]:
        """Processes that were seen below a service; those that it started and that left its session among them."""
        return tuple(self._members.get(service, ()))

    def sample(self, roots: Mapping[str, ProcessIdentity]) -> None:
        """Measure the trees of `roots` (by service name) and this process; PenstockError if the record has no room."""
        rss_bytes: dict[str, int] = {}
        for service, root in {LAUNCHER: ProcessIdentity.of(os.getpid()), **roots}.items():
            if root is None or not root.alive:
                continue
            below = service != LAUNCHER
            members = _measure(service, root.pid, rss_bytes, with_children=below)
            kept = {known for known in self._members.get(service, ()) if known.alive} if below else set()
            self._members[service] = kept | members
        rss_bytes["total"] = sum(rss_bytes.values())
        for name, size in rss_bytes.items():
            self.peak_rss_bytes[name] = max(size, self.peak_rss_bytes.get(name, 0))
        self._record()

    def forget(self) -> None:
        """Delete the record: all processes have ended in order."""
        self._path.unlink(missing_ok=True)

    def _record(self) -> None:
        processes = tuple(
            KnownProcess(service, each.pid, each.started)
            for service, members in sorted(self._members.items())
            for each in sorted(members, key=lambda member: member.pid)
        )
        if processes == self._recorded:
            return
        temporary = self._path.with_suffix(".tmp")
        known = KnownProcesses(run=self._run, machine=self._machine, processes=processes)
        with writing(str(self._path)):
            temporary.write_bytes(msgspec.json.encode(known))
            temporary.replace(self._path)
        self._recorded = processes


def _measure(service: str, pid: int, rss_bytes: dict[str, int], *, with_children: bool) -> set[ProcessIdentity]:
    """Add the resident memory of a tree to `rss_bytes`; returns the tree's members."""
    members: set[ProcessIdentity] = set()
    try:
        root = psutil.Process(pid)
        processes = [root, *(root.children(recursive=True) if with_children else [])]
    except psutil.NoSuchProcess:
        return members
    for process in processes:
        try:
            name = service if process.pid == pid else f"{service}/{process.name()}"
            size = process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
        identity = ProcessIdentity.of(process.pid)
        if identity is not None:
            members.add(identity)
            rss_bytes[name] = rss_bytes.get(name, 0) + size
    return members
