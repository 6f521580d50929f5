"""The short chaos run: a few seeded kills, a freeze, a cut and a lost tail, with the pure engine and weights
as deltas (docs/chaos.md)."""

from pathlib import Path

import pytest

from benchmarks.chaos.parts import ChaosPart, run_part
from benchmarks.chaos.schedule import Plan

pytestmark = pytest.mark.slow

SEED = 3
DEADLINE_SECONDS = 600  # a run takes less than 60 s on an idle machine; a stall says so after 90 s
PLAN = Plan(
    kills={"rollout": 1, "engine": 1, "reward": 2, "trainer": 1, "queue": 2},
    freezes={"trainer": 1},
    num_cuts=1,
    num_lost_tails=1,
    mean_pause_seconds=1.5,
    rest_seconds=30.0,
)


@pytest.mark.timeout(2 * DEADLINE_SECONDS)
def test_every_ticket_ends_once_whatever_is_killed(tmp_path: Path) -> None:
    part = ChaosPart(
        "short", PLAN, num_steps=24, max_staleness=1, deadline_seconds=DEADLINE_SECONDS, num_servers=2, full_every=5
    )
    record, findings = run_part(part, tmp_path / "run", SEED)
    assert sum(record.kills.values()) == PLAN.num_kills == 8
    assert findings.trained == findings.issued == part.num_tickets, record.time_line
    assert findings.dropped == {}, record.time_line
    assert findings.problems == []
    log = "".join(path.read_text() for path in (tmp_path / "run").glob("runs/chaos/logs/trainer*.log"))
    assert log.count("is staged as a delta") >= 20
