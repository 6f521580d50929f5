"""The helper that kills groups of processes when their owner dies."""

import os
import subprocess
import sys

import psutil
import pytest

from penstock.workers.guard import GroupGuard
from tests.patience import ANSWER_SECONDS

OWNER = """
import subprocess, sys
from penstock.workers.guard import GroupGuard

guard = GroupGuard()
for released in (True, False):
    started = subprocess.Popen(["sleep", "600"], start_new_session=True)
    guard.watch(started.pid)
    if released:
        guard.release(started.pid)
    print(started.pid, flush=True)
sys.stdin.read()
"""


def test_watched_groups_die_with_their_owner_and_released_ones_do_not() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        released, watched = (psutil.Process(int(owner.stdout.readline())) for _ in range(2))
        try:
            owner.kill()
            watched.wait(ANSWER_SECONDS)
            assert released.is_running()
        finally:
            released.kill()


def test_a_guard_ends_with_its_owner_and_kills_nothing_that_was_released() -> None:
    before = set(psutil.Process().children())
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as group:
        try:
            with GroupGuard() as guard:
                [helper] = set(psutil.Process().children()) - before - {psutil.Process(group.pid)}
                guard.watch(group.pid)
                guard.release(group.pid)
            assert not helper.is_running()
            assert group.poll() is None
        finally:
            group.kill()


def test_a_helper_that_was_killed_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    before = set(psutil.Process().children())
    with (
        subprocess.Popen(["sleep", "600"], start_new_session=True) as kept,
        subprocess.Popen(["sleep", "600"], start_new_session=True) as released,
    ):
        try:
            with GroupGuard() as guard:
                guard.watch(kept.pid)
                guard.watch(released.pid)
                [helper] = (
                    set(psutil.Process().children()) - before - {psutil.Process(kept.pid), psutil.Process(released.pid)}
                )
                helper.kill()
                os.waitid(os.P_PID, helper.pid, os.WEXITED | os.WNOWAIT)
                guard.release(released.pid)
            kept.wait(ANSWER_SECONDS)
            assert released.poll() is None
            assert "starting another" in caplog.text
        finally:
            kept.kill()
            released.kill()
