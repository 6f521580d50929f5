"""Folders as a run leaves them."""

import json
import os
import platform
from pathlib import Path

import msgspec

from penstock.records.processes import LAUNCHER, KnownProcess, KnownProcesses
from penstock.runtime.process import ProcessIdentity, this_machine


def write_lines(path: Path, *lines: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def write_summary(folder: Path, code: int, reason: str, *lines: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({"exit": {"code": code, "reason": reason, "lines": lines}}))


def write_processes(folder: Path, *, run: str, started: str = "", machine: str = "") -> int:
    """A record whose launcher is this process, or one that had its pid before; returns the pid."""
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    folder.mkdir(parents=True, exist_ok=True)
    launcher = KnownProcess(LAUNCHER, identity.pid, started or identity.started)
    known = KnownProcesses(run, machine or this_machine(), (launcher,))
    (folder / "processes.json").write_bytes(msgspec.json.encode(known))
    return identity.pid


def before_the_boot() -> str:
    return f"{platform.node()} 11111111-2222-3333-4444-555555555555"
