"""The run with many rollout services, small: sixty, of which hosts are killed and return (docs/scale.md)."""

import asyncio
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from benchmarks.chaos.launch import ROOT
from benchmarks.scale.plan import RUN, ScalePlan
from benchmarks.scale.run import ScaleRun, read_records, scale_run
from tests.patience import ANSWER_SECONDS, START_SECONDS

pytestmark = pytest.mark.slow

SEED = 5
PLAN = ScalePlan(
    many=60,
    seconds=20.0,
    compared_seconds=3.0,
    warm_up_seconds=2.0,
    per_host=22,
    batch_size=32,
    generation_seconds=1.0,
    heartbeat_seconds=5.0,
    disturb_seconds=5.0,
    away_seconds=2.0,
    step_deadline_seconds=10 * ANSWER_SECONDS,
)


@pytest.mark.timeout(1800)
def test_no_ticket_is_lost_or_trained_twice_and_the_verdict_can_fail(tmp_path: Path) -> None:
    with scale_run(PLAN, tmp_path / "run") as run:
        verdict = asyncio.run(run.carry_out())
        assert verdict.broken_rules() == []
        assert verdict.found.trained == verdict.found.steps * PLAN.batch_size
        assert verdict.found.issued == verdict.found.trained + verdict.found.on_their_way
        assert verdict.num_killed > 0
        assert verdict.num_joined >= PLAN.many
        for window in (verdict.few, verdict.many, verdict.disturbed):
            assert window.us_per_group["queue"] > 0
        check_faults(run, tmp_path / "run")


def check_faults(run: ScaleRun, folder: Path) -> None:
    """Each seeded fault in what the run left is found."""
    chooser = random.Random(SEED)
    with redis.Redis(port=run.server.port, password=run.server.password) as client:
        ledger = f"penstock:{{{RUN}}}:ledger"
        steps = [each for each in entries(client, ledger) if b'"record":"step"' in each[1][b"r"]]
        entry, fields = chooser.choice(steps)
        client.xadd(ledger, fields)
        assert read_records(run.server, PLAN, folder).trained_twice == PLAN.batch_size
        client.xdel(ledger, entry, client.xrevrange(ledger, count=1)[0][0])
        assert read_records(run.server, PLAN, folder).lost == PLAN.batch_size
        client.xadd(ledger, fields)
        found = read_records(run.server, PLAN, folder)
        assert (found.lost, found.trained_twice) == (0, 0)
        stage = chooser.choice([each for each in ("tickets", "rollouts", "scored") if lengths(client)[each]])
        stream = f"penstock:{{{RUN}}}:{stage}"
        client.xdel(stream, chooser.choice(entries(client, stream))[0])
        assert read_records(run.server, PLAN, folder).lost == 1
    strict = ScalePlan(batch_size=PLAN.batch_size, max_staleness=0)
    assert any("staleness 1" in each for each in read_records(run.server, strict, folder).problems)


def entries(client: Any, key: str) -> list[Any]:
    return list(client.xrange(key))


def lengths(client: Any) -> dict[str, int]:
    return {stage: client.xlen(f"penstock:{{{RUN}}}:{stage}") for stage in ("tickets", "rollouts", "scored")}


def test_nothing_outlives_a_killed_benchmark(tmp_path: Path) -> None:
    out = tmp_path / "scale"
    command = [sys.executable, "-m", "benchmarks.scale", "--out", str(out), "--few", "2", "--batch-size", "8"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as benchmark:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not (out / "runs" / RUN / "steps.jsonl").exists():  # so its hosts work
                assert time.monotonic() < deadline
                assert benchmark.poll() is None
                time.sleep(0.2)
            started = psutil.Process(benchmark.pid).children(recursive=True)
        finally:
            benchmark.kill()
    assert len(started) >= len(("trainer", "reward", "queue", "fork server", "host"))
    _, left = psutil.wait_procs(started, timeout=ANSWER_SECONDS)
    for each in left:
        each.kill()
    assert left == []
