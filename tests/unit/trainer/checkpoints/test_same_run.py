"""Settings that fix the meaning of ticket numbers must not change within a run."""

from pathlib import Path

import msgspec
import pytest

from penstock.config import Config
from penstock.contracts import PolicyIdentity
from penstock.contracts.ledger import RunRecord, StepRecord, WeightsRecord
from penstock.errors import ConfigError
from penstock_trainer.checkpoints.journal import Journal
from penstock_trainer.checkpoints.same_run import check_same_run, check_settings

RUN = RunRecord("d" * 16, 100, 8, 4, 0, model="f" * 16, model_path="models/a", lora="rank 2")


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"dataset_digest": "e" * 16}, r"data.train, .* \(the prompts\) was d+ and is e+"),
        ({"dataset_length": 99}, r"data.train or data.train_sets \(its number of rows; .*\) was 100 and is 99"),
        ({"batch_size": 4}, "data.batch_size was 8 and is 4"),
        ({"group_size": 8}, "actor.group_size was 4 and is 8"),
        ({"seed": 1}, "run.seed was 0 and is 1"),
        ({"lora": ""}, "actor.lora was rank 2 and is off"),
        (
            {"model": "a" * 16, "model_path": "models/b"},
            r"actor.path was models/a \(weights f+\) and is models/b \(weights a+\)",
        ),
    ],
)
def test_another_run_is_refused(changes: dict[str, object], seen: str) -> None:
    current = msgspec.structs.replace(RUN, **changes)
    with pytest.raises(ConfigError, match=rf"cannot be resumed: {seen}\. Expected .*run.existing replace would delete"):
        check_same_run(RUN, current)


def test_the_same_run_is_not_refused() -> None:
    check_same_run(RUN, msgspec.structs.replace(RUN))


def test_the_same_model_in_another_folder_is_not_refused() -> None:
    check_same_run(RUN, msgspec.structs.replace(RUN, model_path="elsewhere/a"))


def test_a_model_that_is_not_read_yet_is_compared_later() -> None:
    check_same_run(RUN, msgspec.structs.replace(RUN, model=""))


def test_an_older_run_recorded_neither_model_nor_adapter() -> None:
    check_same_run(msgspec.structs.replace(RUN, model="", lora=""), RUN)


def config(**sections: object) -> Config:
    document = {"actor": {"path": "m", "group_size": 4}, "data": {"train": {"path": "d.jsonl"}, "batch_size": 8}}
    return Config.model_validate(document | sections)


def test_a_configuration_is_compared_with_a_run_that_has_a_step(tmp_path: Path) -> None:
    journal, other = Journal(tmp_path), config(actor={"path": "m", "group_size": 2})
    journal.append(msgspec.structs.replace(RUN, lora=""))
    assert not check_settings(journal, other)  # it begins anew
    journal.append(WeightsRecord(PolicyIdentity(0, "a"), 0), StepRecord(0, (0,), "f", "d"))
    journal.append(WeightsRecord(PolicyIdentity(1, "b"), 1))
    assert check_settings(journal, config())
    with pytest.raises(ConfigError, match=r"actor\.group_size was 4 and is 2\. Expected"):
        check_settings(journal, other)
    with pytest.raises(ConfigError, match=r"actor\.lora was off and is rank 2, alpha 32, target_modules all-linear\. "):
        check_settings(journal, config(actor={"path": "m", "group_size": 4, "lora": {"rank": 2}}))
