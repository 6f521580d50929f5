"""Settings that fix the meaning of ticket numbers must not change within a run."""

import msgspec
import pytest

from penstock.contracts.ledger import RunRecord
from penstock.errors import ConfigError
from penstock_trainer.checkpoints.history import check_same_run

RUN = RunRecord("d" * 16, 100, 8, 4, 0, model="f" * 16, model_path="models/a", lora="rank 2")


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"dataset_digest": "e" * 16}, r"data.train or data.system_prompt \(the prompts\) was d+ and is e+"),
        ({"dataset_length": 99}, r"data.train \(its number of rows\) was 100 and is 99"),
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
