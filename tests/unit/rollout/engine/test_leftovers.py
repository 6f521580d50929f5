"""Shared memory that a killed engine leaves: its own files are deleted, those of others stay."""

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from penstock.runtime.process import ProcessIdentity
from penstock_rollout.engine.sglang.leftovers import SHARED_MEMORY, kill_and_clear

MAPS = """
import mmap, multiprocessing, sys
lock = multiprocessing.get_context("spawn").Lock()
kept = []
for path in sys.argv[1:]:
    file = open(path, "wb+")
    file.truncate(4096)
    kept.append(mmap.mmap(file.fileno(), 4096))
print(lock._semlock.name, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists() or not SHARED_MEMORY.is_dir(), reason="needs Linux")
def test_what_a_killed_server_had_mapped_under_a_name_of_its_own_is_deleted() -> None:
    own, weights, foreign = (
        SHARED_MEMORY / f"{name}{uuid.uuid4().hex}" for name in ("sglang_loads_", "penstock-", "sglang_loads_")
    )
    foreign.touch()
    server = subprocess.Popen(
        [sys.executable, "-c", MAPS, str(own), str(weights)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        semaphore = SHARED_MEMORY / f"sem.{server.stdout.readline().strip().removeprefix('/')}"
        assert semaphore.exists()
        identity = ProcessIdentity.of(server.pid)
        assert identity is not None
        kill_and_clear(identity, grace_seconds=0)
        assert [own.exists(), semaphore.exists(), weights.exists(), foreign.exists()] == [False, False, True, True]
    finally:
        server.kill()
        server.communicate()
        for path in (own, weights, foreign):
            path.unlink(missing_ok=True)
