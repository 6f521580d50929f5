"""What trainer and engines that take turns on GPUs need of the rest of the configuration."""

from typing import Any

import pytest
from pydantic import ValidationError

from penstock.config import Config


def make(take_turns: bool, **changes: Any) -> Config:
    trainer = {"take_turns": take_turns} | changes.pop("trainer", {})
    return Config.model_validate(
        {"actor": {"path": "m"}, "data": {"train": {"path": "d"}}, "trainer": trainer, **changes}
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"staleness": {"max_staleness": 2}}, ("staleness.max_staleness 2", "expected 0 or 1")),
        ({"weights": {"pause_mode": "in_place"}}, ("weights.pause_mode in_place", "expected retract or abort")),
        ({"weights": {"transport": "nccl"}}, ("weights.transport nccl", "expected disk")),
        ({"weights": {"transport": "tensor"}}, ("weights.transport tensor", "expected disk")),
        ({"trainer": {"num_ranks": 2}}, ("trainer.num_ranks 2", "expected 1")),
        ({"rollout": {"engine": {"url": "http://127.0.0.1:1"}}}, ("rollout.engine.url", "rollout services start")),
    ],
)
def test_what_cannot_take_turns_is_refused_by_name(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as raised:
        make(True, **changes)
    message = str(raised.value)
    assert "trainer.take_turns is on" in message
    assert all(word in message for word in words), message
    make(False, **changes)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("pause_mode", ["retract", "abort"])
def test_all_else_is_accepted(staleness: int, pause_mode: str) -> None:
    weights = {"pause_mode": pause_mode, "transport": "disk", "full_every": 5}
    assert make(True, staleness={"max_staleness": staleness}, weights=weights).trainer.take_turns
