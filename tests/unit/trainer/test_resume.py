"""A restart trains the same steps to the same digests, and refuses a folder of another run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from penstock.contracts import PolicyIdentity
from penstock.contracts.ledger import CheckpointRecord, LedgerState, RunRecord, StepRecord, decode_record, encode_record
from penstock.errors import DataError, WeightsError
from penstock_trainer.checkpoints.folders import CheckpointMeta, Checkpoints
from penstock_trainer.checkpoints.history import newest_checkpoint
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.update import Replayed
from penstock_trainer.resume import ResumePoint, restore
from penstock_trainer.weights.files import Format
from penstock_trainer.weights.staging import Staging
from tests.unit.trainer.trainer_groups import config_for, example_groups, save_tiny_model

NUM_STEPS = 3
RUN = RunRecord("d" * 16, 100, 8, 4, 0)


@dataclass
class Life:
    """One life of a trainer over a folder."""

    folder: Path
    model: Path
    ledger: LedgerState = field(default_factory=LedgerState)

    def __post_init__(self) -> None:
        self.learner = Learner(config_for(self.model))
        self.step_files = StepFiles(self.folder / "steps", keep_bytes=0)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=2)
        staging = Staging(self.learner, self.folder / "weights", Format("float32", "nearest"))
        self.digest: Callable[[int], PolicyIdentity] = staging.digest

    def train(self, steps: range, checkpoint_after: int = -1) -> None:
        version = steps.start
        for step in steps:
            groups = example_groups(seed=step)
            self.ledger.steps.append(self.step_files.write(step, 1, groups))
            version += int(self.learner.update(groups, version=0).changed)
            self.ledger.policies[version] = self.digest(version)
            self.ledger.num_ranks[version] = 1
            if step + 1 == checkpoint_after:
                meta = CheckpointMeta(step + 1, version, 1, 0, ())
                folder = self.checkpoints.begin(meta)
                self.learner.snapshot(folder).write(folder)
                self.ledger.checkpoints.append(self.checkpoints.complete(folder, meta))

    def restore(self) -> ResumePoint:
        return restore(self.learner, self.ledger, self.checkpoints, self.step_files, self.digest)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


@pytest.mark.parametrize("checkpoint_after", [-1, 1, NUM_STEPS])
def test_a_replay_gives_the_digests_of_the_ledger(tmp_path: Path, model: Path, checkpoint_after: int) -> None:
    first = Life(tmp_path, model)
    first.train(range(NUM_STEPS), checkpoint_after)
    second = Life(tmp_path, model, first.ledger)
    assert second.restore() == ResumePoint(NUM_STEPS, NUM_STEPS)
    assert second.digest(NUM_STEPS) == first.ledger.policies[NUM_STEPS]
    first.train(range(NUM_STEPS, NUM_STEPS + 1))
    second.train(range(NUM_STEPS, NUM_STEPS + 1))
    assert second.digest(9) == first.digest(9)


def test_each_step_that_is_trained_again_is_told_of(tmp_path: Path, model: Path) -> None:
    first = Life(tmp_path, model)
    first.train(range(NUM_STEPS), checkpoint_after=1)
    second = Life(tmp_path, model, first.ledger)
    told: list[Replayed] = []
    restore(second.learner, second.ledger, second.checkpoints, second.step_files, second.digest, told.append)
    assert [(each.step, each.versions) for each in told] == [(1, (1, 2)), (2, (2, 3))]
    assert [each.groups for each in told] == [tuple(example_groups(seed=step)) for step in (1, 2)]


def test_a_new_run_begins_at_nothing(tmp_path: Path, model: Path) -> None:
    assert Life(tmp_path, model).restore() == ResumePoint(0, 0)


def test_a_replay_with_another_digest_is_an_error(tmp_path: Path, model: Path) -> None:
    first = Life(tmp_path, model)
    first.train(range(2))
    first.ledger.policies[2] = PolicyIdentity(2, "0" * 16)
    with pytest.raises(WeightsError, match=r"step 1 was trained again and gave weights 2-.*; the ledger records 2-0"):
        Life(tmp_path, model, first.ledger).restore()


def test_a_digest_of_another_number_of_ranks_is_not_compared(tmp_path: Path, model: Path) -> None:
    first = Life(tmp_path, model)
    first.train(range(2))
    first.ledger.policies[2] = PolicyIdentity(2, "0" * 16)
    first.ledger.num_ranks[2] = 2
    assert Life(tmp_path, model, first.ledger).restore() == ResumePoint(2, 2)


def test_a_step_whose_weights_were_never_recorded_is_trained(tmp_path: Path, model: Path) -> None:
    first = Life(tmp_path, model)
    first.train(range(2))
    expected = first.ledger.policies.pop(2)
    second = Life(tmp_path, model, first.ledger)
    assert second.restore() == ResumePoint(2, 2)
    assert second.digest(2) == expected


def test_a_missing_step_file_is_an_error(tmp_path: Path, model: Path) -> None:
    life = Life(tmp_path, model)
    life.ledger.steps.append(StepRecord(0, (0,), "00000000.1.pack", "0" * 16))
    with pytest.raises(DataError, match=r"step 0: .* cannot be read"):
        life.restore()


def test_the_newest_checkpoint_that_is_there_counts(tmp_path: Path, model: Path) -> None:
    life = Life(tmp_path, model)
    life.train(range(1), checkpoint_after=1)
    there = life.ledger.checkpoints[0]
    life.ledger.checkpoints.append(CheckpointRecord(9, "00000009.1"))
    assert newest_checkpoint(life.ledger, life.checkpoints) == there
    assert newest_checkpoint(LedgerState(), life.checkpoints) is None


def test_a_replay_masks_what_the_step_masked_whatever_the_configuration_says_now(tmp_path: Path, model: Path) -> None:
    first = Life(tmp_path, model)
    groups = example_groups()  # of version 0
    for step, max_lag in enumerate((None, 2, 0)):
        record = first.step_files.write(step, 1, groups, version=min(step, 2), max_lag=max_lag)
        first.ledger.steps.append(decode_record(encode_record(record)))  # type: ignore[arg-type]
        result = first.learner.update(groups, version=min(step, 2), max_lag=max_lag)
        assert result.changed == (max_lag != 0)  # the last step changes nothing: all its tokens are too stale
        assert result.counts.masked_stale == (max_lag == 0)
        version = min(step + 1, 2)
        first.ledger.policies[version] = first.digest(version)
        first.ledger.num_ranks[version] = 1
    second = Life(tmp_path, model, first.ledger)
    assert second.restore() == ResumePoint(3, 2)
    assert second.digest(2) == first.digest(2)
    assert second.step_files.read(first.ledger.steps[2])[0].group.completions == groups[0].group.completions


def test_a_step_that_trained_another_version_is_an_error(tmp_path: Path, model: Path) -> None:
    life = Life(tmp_path, model)
    life.ledger.steps.append(life.step_files.write(0, 1, example_groups(), version=3))
    with pytest.raises(WeightsError, match=r"step 0 is trained again on version 0; the ledger records .* version 3"):
        life.restore()
