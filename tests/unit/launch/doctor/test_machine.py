"""What the doctor says of cores, memory and limits."""

import resource
import sys

import pytest

from penstock_launch.doctor.cgroup import Limits
from penstock_launch.doctor.machine import (
    MACHINE_LINES,
    cores_line,
    files_line,
    memory_line,
    processes_line,
    python_line,
)
from penstock_launch.doctor.report import Verdict

GIB = 2**30


@pytest.mark.parametrize(
    ("usable", "quota", "verdict", "seen"),
    [
        (8, None, "ok", "8 of 64"),
        (8, 2.0, "ok", "8 of 64, and a quota of 2"),
        (8, 1.5, "warning", "8 of 64, and a quota of 1.5"),
        (1, None, "warning", "1 of 64"),
    ],
)
def test_cores_that_this_process_may_use(usable: int, quota: float | None, verdict: str, seen: str) -> None:
    line = cores_line(usable, 64, quota)
    assert (line.verdict, line.seen) == (verdict, seen)


@pytest.mark.parametrize(
    ("available", "limit", "verdict"),
    [(20 * GIB, None, "ok"), (20 * GIB, 8 * GIB, "ok"), (2 * GIB, None, "warning"), (20 * GIB, 2 * GIB, "warning")],
)
def test_memory_that_this_process_may_use(available: int, limit: int | None, verdict: str) -> None:
    line = memory_line(64 * GIB, available, limit)
    assert line.verdict == verdict
    assert "of 64.0 GiB are free" in line.seen
    assert ("control group" in line.seen) == (limit is not None)


@pytest.mark.parametrize(
    ("soft", "hard", "verdict", "seen"),
    [
        (1024, 1024, "warning", "1024: each service accepts 256 connections instead of 512"),
        (1024, 4096, "ok", "4096: each service accepts 512 connections"),
        (1024, resource.RLIM_INFINITY, "ok", "65536: each service accepts 512 connections"),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, "ok", "no limit: each service accepts 512 connections"),
    ],
)
def test_services_raise_the_limit_of_files_themselves(soft: int, hard: int, verdict: str, seen: str) -> None:
    line = files_line(soft, hard)
    assert (line.verdict, line.seen) == (verdict, seen)


@pytest.mark.parametrize(
    ("limit", "group", "verdict"),
    [
        (resource.RLIM_INFINITY, None, "ok"),
        (30000, 4096, "ok"),
        (30000, 100, "warning"),
        (500, None, "warning"),
    ],
)
def test_few_processes_are_a_warning(limit: int, group: int | None, verdict: str) -> None:
    assert processes_line(limit, group).verdict == verdict


def test_another_system_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert python_line().verdict is Verdict.OK
    monkeypatch.setattr(sys, "platform", "darwin")
    line = python_line()
    assert (line.verdict, "Linux" in line.advice) == (Verdict.PROBLEM, True)


def test_this_machine_has_a_line_for_each() -> None:
    narrow = Limits(memory_bytes=2**20, cores=0.5, num_processes=10)
    lines = {what: look(narrow) for what, look in MACHINE_LINES.items()}
    assert [line.what for line in lines.values()] == list(MACHINE_LINES)
    found = {what: str(line.verdict) for what, line in lines.items() if what != "open files"}
    assert found == {"Python": "ok", "CPU cores": "warning", "memory": "warning", "processes": "warning"}
