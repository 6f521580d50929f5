"""The short chaos run of episodes: agent services and their environments are killed, servers refuse all calls for a
while, and some rows hang, fail or lie; what is trained is that of an undisturbed run (docs/chaos.md)."""

from pathlib import Path

import pytest

from benchmarks.chaos.parts import NOTHING, ChaosPart, run_part
from benchmarks.chaos.reader import Findings
from benchmarks.chaos.schedule import Plan

pytestmark = pytest.mark.slow

SEED = 4
NUM_STEPS = 6  # two epochs
DEADLINE_SECONDS = 600  # a run takes less than a minute on an idle machine; a stall says so after 90 s
PLAN = Plan(
    kills={"agent": 2, "environment": 1, "rollout": 1},
    freezes={},
    num_cuts=1,
    num_lost_tails=0,
    mean_pause_seconds=1.0,
    rest_seconds=30.0,
    num_storms=1,
)


def run(folder: Path, plan: Plan) -> Findings:
    part = ChaosPart(
        folder.name,
        plan,
        num_steps=NUM_STEPS,
        max_staleness=0,
        deadline_seconds=DEADLINE_SECONDS,
        num_servers=2,
        num_agents=2,
    )
    record, findings = run_part(part, folder, SEED)
    assert sum(record.kills.values()) == plan.num_kills, record.time_line
    assert findings.issued == part.num_tickets == findings.trained + sum(findings.dropped.values()), record.time_line
    return findings


@pytest.mark.timeout(3 * DEADLINE_SECONDS)
def test_episodes_are_those_of_a_calm_run_whatever_is_killed(tmp_path: Path) -> None:
    calm, found = run(tmp_path / "calm", NOTHING), run(tmp_path / "killed", PLAN)
    assert found.same() == calm.same()
    assert set(calm.dropped) == {"reward_failed"}
    assert calm.turns > calm.episodes > 0
