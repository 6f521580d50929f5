"""Random interleavings of everything that can happen to a run's queue, with the invariants after every step.

The rules (`broker_rules`) move rollout servers, reward workers and trainers over a real server through the product's
own classes and scripts. At the end of each run all remaining work is done, and every ticket must have ended.

CI runs a fixed selection, in as many rounds as it takes to meet every rare rule. To search for longer, with new random
choices each time:

    PENSTOCK_STATEFUL_EXAMPLES=3000 .venv/bin/python -m pytest tests/integration/broker/test_stateful.py --timeout 0
"""

import asyncio
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from penstock.config import Config
from tests.integration.broker.broker_calls import Fate
from tests.integration.broker.broker_entries import age_all
from tests.integration.broker.broker_rules import OLD_MILLISECONDS, QueueRules, WorkerRules
from tests.integration.broker.broker_trainer import PROMPTS

# By a thread: to Hypothesis, a signal's exception is one more failing example, for which it seeks the smallest one.
pytestmark = [pytest.mark.redis, pytest.mark.timeout(1200, method="thread")]

NUM_EXAMPLES = int(os.environ.get("PENSTOCK_STATEFUL_EXAMPLES", "0"))
ROUND_EXAMPLES = 30  # about 12 s
MIN_ROUNDS, MAX_ROUNDS = 2, 8  # in CI; more than the first only until each rare rule has run often enough
STEPS = 60
DRAIN_ROUNDS = 200
RARE = (
    "hand_over",
    "hand_over_and_take",
    "publish_late",
    "bury",
    "failed",
    "lose_the_tail",
    "archive",
    *(each.name for each in Fate),
)
MIN_TIMES = 5  # each rule must run this often in CI, else the random choices are too narrow

PHASES = list(Phase) if NUM_EXAMPLES else [Phase.generate]  # CI reports the first failure; a search also shrinks it


class QueueMachine(WorkerRules, QueueRules):
    """Anything may happen; at the end of the run, nothing fails any more."""

    def teardown(self) -> None:
        if not hasattr(self, "trainer"):
            return
        try:
            self.work_off()
        finally:
            self.run(self.queue.delete_run())
            self.run(self.queue.close())

    def work_off(self) -> None:
        """Do all remaining work without faults: every ticket ends, and no entry is left."""
        self.run(age_all(self.queue, OLD_MILLISECONDS))  # entries whose holder is not aware of them
        for _ in range(DRAIN_ROUNDS):
            if self.trainer.book.finished:
                break
            for holder in list(self.holders):
                self.load_announced(holder)
                while self.run(holder.take()) is not None:
                    pass
                for holding in list(holder.holds):
                    self.publish(holder, holding, (1.0, 0.0))
            self.judge(9)
            if self.trainer.untrained is None:
                self.close_batch()
            if self.trainer.release is not None:
                self.announce()
                self.shorten_the_ledger(0)
            if self.trainer.untrained is not None:
                self.finish_update(0)
        self.every_ticket_is_in_exactly_one_place()
        self.judge(99)
        self.restart_trainer(0)
        self.every_ticket_is_in_exactly_one_place()
        ledger = self.ledger()
        assert ledger.trained.keys() | ledger.dropped.keys() == set(range(len(PROMPTS)))
        assert {entry.ticket for entry in self.entries()} <= self.duplicated


@pytest.fixture
def machine(queue_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[QueueMachine]]:
    monkeypatch.setattr("penstock.broker.worker.FULL_RETRY_SECONDS", 0.001)
    logger = logging.getLogger("penstock")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    with asyncio.Runner() as runner:
        QueueMachine.runner, QueueMachine.base, QueueMachine.folders = runner, queue_config, tmp_path
        yield QueueMachine
    logger.setLevel(before)


def test_nothing_is_lost_or_trained_twice(machine: type[QueueMachine]) -> None:
    if NUM_EXAMPLES:
        run_state_machine_as_test(machine, settings=limits(NUM_EXAMPLES))
        return
    for number in range(MAX_ROUNDS):
        run_state_machine_as_test(seed(number)(machine), settings=limits(ROUND_EXAMPLES))
        missing = [each for each in RARE if machine.met[each] < MIN_TIMES]
        if number + 1 >= MIN_ROUNDS and not missing:
            return
    raise AssertionError(f"{missing} ran too seldom: {machine.met}")


def limits(num_examples: int) -> settings:
    return settings(
        max_examples=num_examples,
        stateful_step_count=STEPS,
        database=None,
        deadline=None,
        phases=PHASES,
        suppress_health_check=list(HealthCheck),
    )
