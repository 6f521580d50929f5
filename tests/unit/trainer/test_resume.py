"""A restart trains the same steps to the same digests, and refuses a folder of another run."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.contracts import PolicyIdentity
from penstock.contracts.ledger import (
    CheckpointRecord,
    LedgerState,
    RunRecord,
    StepRecord,
    WeightsRecord,
    decode_record,
    encode_record,
)
from penstock.contracts.log_ratios import LogRatiosFile
from penstock.errors import ConfigError, DataError, WeightsError
from penstock_trainer.checkpoints.folders import CheckpointMeta, Checkpoints
from penstock_trainer.checkpoints.history import newest_checkpoint
from penstock_trainer.checkpoints.settings import StepConfigs
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.update import Replayed
from penstock_trainer.resume import ResumePoint, restore, resume
from penstock_trainer.weights.files import published_format
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
    changes: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = config_for(self.model, **self.changes)
        self.step_files = StepFiles(self.folder / "steps", keep_bytes=0)
        self.learner = Learner(self.config, num_steps=self.configs.num_steps(self.config))
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=2)
        staging = Staging(self.learner, self.folder / "weights", published_format(self.config))
        self.digest: Callable[[int], PolicyIdentity] = staging.digest

    def train(self, steps: range, checkpoint_after: int = -1) -> None:
        version = steps.start
        for step in steps:
            groups = example_groups(seed=step)
            settings = self.step_files.settings.write(self.config)
            self.ledger.steps.append(self.step_files.write(step, 1, groups, settings=settings))
            version += int(self.learner.update(groups, version=version).changed)
            policy, form = self.digest(version), str(published_format(self.config))
            self.ledger.policies[version], self.ledger.num_ranks[version] = policy, 1
            self.ledger.forms[version] = form
            self.ledger.weights[step + 1] = WeightsRecord(policy, step + 1, form=form)
            if step + 1 == checkpoint_after:
                meta = CheckpointMeta(step + 1, version, 1, 0, ())
                folder = self.checkpoints.begin(meta)
                self.learner.snapshot(folder).write(folder)
                self.ledger.checkpoints.append(self.checkpoints.complete(folder, meta))

    def restore(self) -> ResumePoint:
        return restore(self.learner, self.ledger, self.checkpoints, self.step_files, self.configs, self.digest)

    @property
    def configs(self) -> StepConfigs:
        return StepConfigs(self.config, 80, self.step_files.settings)


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
    restore(
        second.learner,
        second.ledger,
        second.checkpoints,
        second.step_files,
        second.configs,
        second.digest,
        told.append,
    )
    assert [(each.step, each.versions) for each in told] == [(1, (1, 2)), (2, (2, 3))]
    assert [each.groups for each in told] == [tuple(example_groups(seed=step)) for step in (1, 2)]


def test_a_new_run_begins_at_nothing(tmp_path: Path, model: Path) -> None:
    assert Life(tmp_path, model).restore() == ResumePoint(0, 0)


@dataclass
class Surroundings:
    """What a start uses of history, releases, rollouts and reports; `phases`: as people are shown them."""

    ledger: LedgerState
    life: Life
    phases: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.checkpoints, self.step_files = self.life.checkpoints, self.life.step_files
        self.configs, self.digest = self.life.configs, self.life.digest

    async def open(self, model: str) -> LedgerState:
        assert model == self.life.learner.fingerprint()
        return self.ledger

    async def reopen(self, ledger: LedgerState) -> None:
        assert ledger is self.ledger

    async def restore(self, ledger: LedgerState, *, steps: int, version: int) -> None:
        assert ledger is self.ledger

    def phase(self, phase: str) -> None:
        self.phases.append(phase)

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def is_reported(self, step: int) -> bool:
        return True

    def write_log_ratios(self, record: StepRecord, groups: tuple[tuple[bytes, ...], ...]) -> None:
        self.step_files.write_log_ratios(record, groups)

    def resumed(self, *progress: object) -> None:
        self.phases.append("resumed")


async def phases_of_a_start(folder: Path, model: Path, ledger: LedgerState) -> list[str]:
    life = Life(folder, model, ledger)
    around: Any = Surroundings(ledger, life)
    await resume(life.learner, around, around, around, around)
    phases: list[str] = around.phases
    return phases


async def test_only_a_run_that_has_steps_is_said_to_resume(tmp_path: Path, model: Path) -> None:
    first = Life(tmp_path, model)
    new = await phases_of_a_start(tmp_path, model, LedgerState())
    assert new == ["taking the model's fingerprint", "beginning the run", "resumed"]
    first.train(range(2))
    assert await phases_of_a_start(tmp_path, model, first.ledger) == [new[0], "resuming", "resumed"]


async def test_a_start_writes_the_log_ratios_that_an_earlier_life_did_not(tmp_path: Path, model: Path) -> None:
    first = Life(tmp_path, model)
    first.train(range(3), checkpoint_after=1)
    steps = tmp_path / "steps"
    kept = steps / "00000001.1.log_ratios"
    first.step_files.write_log_ratios(first.ledger.steps[1], ((b"kept",),))
    before = kept.read_bytes()
    await phases_of_a_start(tmp_path, model, first.ledger)
    assert sorted(path.name for path in steps.glob("*.log_ratios")) == [kept.name, "00000002.1.log_ratios"]
    assert kept.read_bytes() == before
    written = msgspec.msgpack.decode((steps / "00000002.1.log_ratios").read_bytes(), type=LogRatiosFile)
    assert (written.step, written.digest) == (2, first.ledger.steps[2].digest)
    groups = example_groups(seed=2)
    lengths = [[2 * each.num_tokens for each in group.group.trajectories] for group in groups]
    assert [list(map(len, row)) for row in written.groups] == lengths


def test_a_replay_with_another_digest_is_an_error(tmp_path: Path, model: Path) -> None:
    first = Life(tmp_path, model)
    first.train(range(2))
    first.ledger.policies[2] = PolicyIdentity(2, "0" * 16)
    with pytest.raises(WeightsError, match=r"step 2 was trained again and gave weights 2-.*; the ledger records 2-0"):
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


def test_a_step_that_was_scored_without_the_teacher_of_now_says_what_to_do(tmp_path: Path, model: Path) -> None:
    first = Life(tmp_path, model)
    first.train(range(2))
    taught: dict[str, object] = {"teacher": {"urls": ["http://localhost:1"]}}
    assert Life(tmp_path, model, first.ledger, changes=taught).restore() == ResumePoint(2, 2)
    first.ledger.policies.pop(2)
    del first.ledger.weights[2]
    with pytest.raises(ConfigError, match=r"step 2 was scored before .*: start once with teacher\.urls as it was"):
        Life(tmp_path, model, first.ledger, changes=taught).restore()
    assert Life(tmp_path, model, first.ledger).restore() == ResumePoint(2, 2)


def test_a_missing_step_file_is_an_error(tmp_path: Path, model: Path) -> None:
    life = Life(tmp_path, model)
    life.ledger.steps.append(StepRecord(0, (0,), "00000000.1.pack", "0" * 16))
    with pytest.raises(DataError, match=r"step 1: .* cannot be read"):
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
    with pytest.raises(WeightsError, match=r"step 1 is trained again on version 0; the ledger records .* version 3"):
        life.restore()


CHANGED: dict[str, dict[str, object]] = {
    "optimizer": {"optimizer": {"lr": 5e-3, "beta1": 0.5, "schedule": "linear"}},
    "objective": {"loss": {"surrogate": "cispo", "aggregation": "token-mean"}, "kl_ctl": 0.1},
    "epochs under a falling rate": {"total_train_epochs": 9, "optimizer": {"lr": 1e-3, "schedule": "linear"}},
    "temperature": {"sampling": {"temperature": 0.5}},
    "a reference that moves": {"kl_ctl": 0.1, "ref": {"sync_steps": 2}},
}


@pytest.mark.parametrize("checkpoint_after", [-1, 1])
@pytest.mark.parametrize("name", CHANGED)
def test_steps_are_trained_again_with_their_own_settings_and_new_ones_hold_after_them(
    tmp_path: Path, model: Path, name: str, checkpoint_after: int
) -> None:
    begun: dict[str, object] = {"optimizer": {"lr": 1e-3, "schedule": "linear"}}
    first = Life(tmp_path, model, changes=begun)
    first.train(range(2), checkpoint_after)
    second = Life(tmp_path, model, first.ledger, changes=CHANGED[name])
    assert second.restore() == ResumePoint(2, 2)
    assert second.digest(2) == first.ledger.policies[2]
    second.train(range(2, 3))
    as_before = Life(tmp_path / "other", model, changes=begun)
    as_before.train(range(3))
    assert second.ledger.policies[3] != as_before.ledger.policies[3]
    third = Life(tmp_path, model, second.ledger, changes=begun)
    assert third.restore() == ResumePoint(3, 3)
    assert third.digest(3) == second.ledger.policies[3]
    assert third.learner.config == third.config


SYNCED: dict[str, object] = {"kl_ctl": 0.5, "ref": {"sync_steps": 2, "mixup_alpha": 0.5}}


@pytest.mark.parametrize("checkpoint_after", [-1, 1, 2, 3])
def test_steps_beside_a_moving_reference_are_trained_again_bit_by_bit(
    tmp_path: Path, model: Path, checkpoint_after: int
) -> None:
    """Checkpoints before a move, at one and after it; the weights of each later step are compared with the ledger."""
    first = Life(tmp_path, model, changes=SYNCED)
    first.train(range(5), checkpoint_after)
    second = Life(tmp_path, model, first.ledger, changes=SYNCED)
    assert second.restore() == ResumePoint(5, 5)
    assert second.digest(5) == first.ledger.policies[5]
    standing = Life(tmp_path / "other", model, changes={"kl_ctl": 0.5})
    standing.train(range(5))
    assert standing.ledger.policies[2] == first.ledger.policies[2]
    assert standing.ledger.policies[3] != first.ledger.policies[3]


@pytest.mark.parametrize("checkpoint_after", [-1, 2, 5, 6])
def test_a_reference_that_stood_still_for_a_while_begins_anew_in_every_life(
    tmp_path: Path, model: Path, checkpoint_after: int
) -> None:
    """Moving, standing, moving: an unbroken life and one that is restored at any point have the same reference."""
    begun = Life(tmp_path, model, changes=SYNCED)
    begun.train(range(3), checkpoint_after)
    stood = Life(tmp_path, model, begun.ledger, changes={"kl_ctl": 0.5})
    stood.restore()
    stood.train(range(3, 4))
    moved = Life(tmp_path, model, stood.ledger, changes=SYNCED)
    moved.restore()
    moved.train(range(4, 7), checkpoint_after)
    again = Life(tmp_path, model, moved.ledger, changes=SYNCED)
    assert again.restore() == ResumePoint(7, 7)
    assert again.digest(7) == moved.ledger.policies[7]


def test_an_older_ledger_is_trained_again_with_the_present_settings(tmp_path: Path, model: Path) -> None:
    first = Life(tmp_path, model)
    first.train(range(2))
    first.ledger.steps = [msgspec.structs.replace(step, settings="") for step in first.ledger.steps]
    assert Life(tmp_path, model, first.ledger).restore() == ResumePoint(2, 2)
    with pytest.raises(WeightsError, match=r"ledger records 1-.*; the configuration of that step is not recorded"):
        Life(tmp_path, model, first.ledger, changes={"optimizer": {"lr": 2e-3}}).restore()


def test_a_digest_of_bytes_in_another_form_is_not_compared(tmp_path: Path, model: Path) -> None:
    first = Life(tmp_path, model)
    first.train(range(2))
    second = Life(tmp_path, model, first.ledger, changes={"rollout": {"engine": {"dtype": "bfloat16"}}})
    assert second.restore() == ResumePoint(2, 2)
    assert second.digest(2) != first.ledger.policies[2]


def test_missing_or_damaged_settings_of_a_step_are_named(tmp_path: Path, model: Path) -> None:
    first = Life(tmp_path, model)
    first.train(range(1))
    path = first.step_files.settings.path(first.ledger.steps[0].settings)
    text = path.read_text()
    path.write_text(text.replace("0.9", "0.8", 1))
    with pytest.raises(DataError, match=r"settings-[0-9a-f]{16}\.json has digest"):
        Life(tmp_path, model, first.ledger).restore()
    path.unlink()
    with pytest.raises(DataError, match=r"settings-[0-9a-f]{16}\.json cannot be read \(No such file"):
        Life(tmp_path, model, first.ledger).restore()
