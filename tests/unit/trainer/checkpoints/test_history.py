"""Settings that fix the meaning of ticket numbers must not change within a run."""

import msgspec
import pytest

from penstock.contracts.ledger import RunRecord
from penstock.errors import ConfigError
from penstock_trainer.checkpoints.history import check_same_run

RUN = RunRecord("d" * 16, 100, 8, 4, 0)


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"dataset_digest": "e" * 16}, r"data.train \(its content\) was d+ and is e+"),
        ({"dataset_length": 99}, r"data.train \(its number of rows\) was 100 and is 99"),
        ({"batch_size": 4}, "data.batch_size was 8 and is 4"),
        ({"group_size": 8}, "actor.group_size was 4 and is 8"),
        ({"seed": 1}, "run.seed was 0 and is 1"),
    ],
)
def test_another_run_is_refused(changes: dict[str, object], seen: str) -> None:
    current = msgspec.structs.replace(RUN, **changes)
    with pytest.raises(ConfigError, match=rf"cannot be resumed: {seen}\. Expected .*run.existing"):
        check_same_run(RUN, current)


def test_the_same_run_is_not_refused() -> None:
    check_same_run(RUN, msgspec.structs.replace(RUN))
