"""Trainer and engines that take turns on a GPU, as killed processes: the weights are those of a calm run without."""

from pathlib import Path

import pytest

from benchmarks.chaos.engine import FAULT
from benchmarks.chaos.parts import NOTHING, ChaosPart, run_part
from benchmarks.chaos.schedule import Plan

pytestmark = pytest.mark.slow

SEED = 5
NUM_STEPS = 12
DEADLINE_SECONDS = 600  # a run takes about a minute on an idle machine; a stall says so after 90 s
PLAN = Plan(
    kills={"rollout": 1, "engine": 1, "trainer": 1},
    freezes={},
    num_cuts=0,
    num_lost_tails=0,
    mean_pause_seconds=1.5,
    rest_seconds=30.0,
)


def run(folder: Path, plan: Plan, *, take_turns: bool) -> tuple[str, str, str]:
    """The final version's digest, that of its file, and all logs."""
    part = ChaosPart(
        folder.name,
        plan,
        num_steps=NUM_STEPS,
        max_staleness=0,
        deadline_seconds=DEADLINE_SECONDS,
        num_servers=2,
        take_turns=take_turns,
    )
    record, findings = run_part(part, folder, SEED)
    assert sum(record.kills.values()) == plan.num_kills, record.time_line
    logs = "".join(path.read_text() for path in folder.glob("runs/chaos/logs/*.log"))
    return findings.policy_digest, findings.weights_sha256, logs


@pytest.mark.timeout(3 * DEADLINE_SECONDS)
def test_killed_processes_that_take_turns_give_the_weights_of_a_calm_run_without(tmp_path: Path) -> None:
    *expected, _ = run(tmp_path / "calm", NOTHING, take_turns=False)
    *found, logs = run(tmp_path / "turns", PLAN, take_turns=True)
    assert found == expected
    assert FAULT not in logs
    assert logs.count("asleep") >= NUM_STEPS
