"""Trains recorded steps again and compares the weights with those that the run recorded.

Owns the comparison. Invariant: the groups of a step, their order, its settings and the arithmetic are those of the run
(one rank), so that on a CPU each digest must be the recorded one; the first unequal one names the step that differed.
Several ranks or another device rightly give other bits: after such a step an unequal digest proves nothing. Nothing is
written.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from penstock.contracts import PolicyIdentity
from penstock.contracts.ledger import WeightsRecord
from penstock.errors import DataError
from penstock.weights.manifest import identity_digest
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.update import StepResult
from penstock_trainer.offline.recording import Plan, Recording
from penstock_trainer.weights.files import Format, digests, published_format


class DigestVerdict(Enum):
    """The result of comparing a digest."""

    EQUAL = "equal"
    DIFFERS = "DIFFERS"
    NOT_EXACT = "differs, which proves nothing"
    NOT_RECORDED = "not recorded"
    DAMAGED = "STEP FILE DAMAGED"


@dataclass(frozen=True)
class Compared:
    """Weights after `steps` steps, and the recorded ones. `result`: of the last of these steps; None at the start."""

    steps: int
    found: PolicyIdentity | None
    recorded: WeightsRecord | None
    verdict: DigestVerdict
    result: StepResult | None = None
    seconds: float = 0.0
    problem: str = ""

    @property
    def step(self) -> int:
        return self.steps - 1


class Replay:
    """One replay of a plan."""

    def __init__(self, recording: Recording, plan: Plan) -> None:
        self._recording = recording
        self._plan = plan
        config = recording.config_of(plan.start)
        self.learner = Learner(config, num_steps=recording.configs.num_steps(config))
        self._form = published_format(recording.config)
        self._is_exact = self.learner.is_deterministic

    def run(self) -> Iterator[Compared]:
        """The weights at the start, and after each step; ends at a step whose file is damaged."""
        version = 0
        if self._plan.checkpoint is not None:
            meta, folder = self._recording.checkpoints.read(self._plan.checkpoint)
            self.learner.load(folder)
            version = meta.version
        yield self._compare(self._plan.start, version)
        for step in range(self._plan.start, self._plan.end):
            record = self._recording.steps[step]
            try:
                groups = self._recording.step_files.read(record)
            except DataError as error:
                recorded = self._recording.ledger.weights.get(step + 1)
                yield Compared(step + 1, None, recorded, DigestVerdict.DAMAGED, problem=str(error))
                return
            config = self._recording.config_of(step)
            self.learner.use(config, num_steps=self._recording.configs.num_steps(config))
            started = time.monotonic()
            result = self.learner.update(groups, version=version, max_lag=record.max_lag)
            seconds = time.monotonic() - started
            version += int(result.changed)
            yield self._compare(step + 1, version, result, seconds)

    def _compare(self, steps: int, version: int, result: StepResult | None = None, seconds: float = 0.0) -> Compared:
        recorded = self._recording.ledger.weights.get(steps)
        form = Format.of(recorded.form) if recorded is not None and recorded.form else self._form
        found = PolicyIdentity(version, identity_digest(digests(self.learner.weights(), form)))
        return Compared(steps, found, recorded, self._verdict(found, recorded), result, seconds)

    def _verdict(self, found: PolicyIdentity, recorded: WeightsRecord | None) -> DigestVerdict:
        if recorded is None:
            return DigestVerdict.NOT_RECORDED
        if recorded.policy == found:
            return DigestVerdict.EQUAL
        same_place = (recorded.device, recorded.num_ranks) == (self.learner.device, self.learner.num_ranks)
        self._is_exact = self._is_exact and same_place
        return DigestVerdict.DIFFERS if self._is_exact else DigestVerdict.NOT_EXACT


def why_not_exact(learner: Learner, recording: Recording, plan: Plan) -> list[str]:
    """Reasons why an unequal digest would prove nothing; empty if it would prove a difference."""
    reasons = []
    if not learner.is_deterministic:
        reasons.append(
            f"arithmetic on {learner.device} is not deterministic: even the same host may give other bits; "
            "set CUDA_VISIBLE_DEVICES to nothing to compute on the CPU"
        )
    weights = recording.ledger.weights
    records = [weights[steps] for steps in range(plan.start + 1, plan.end + 1) if steps in weights]
    if devices := sorted({each.device for each in records} - {"cpu"}):
        reasons.append(f"steps were trained on {', '.join(devices)}, where arithmetic is not deterministic")
    if ranks := sorted({each.num_ranks for each in records} - {learner.num_ranks}):
        reasons.append(
            f"steps were trained by {', '.join(map(str, ranks))} ranks, which add in another order than this one"
        )
    return reasons
