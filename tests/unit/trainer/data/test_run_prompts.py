"""What the trainer reports about its prompts before anything is loaded."""

import logging
from pathlib import Path

import pytest

from penstock_trainer.data.rows import Row
from penstock_trainer.data.run_prompts import encode_prompts
from tests.unit.trainer.trainer_groups import config_for


def test_held_out_prompts_that_are_trained_too_are_warned_about_and_counted(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(
        tiny_model, data={"train": {"path": "unused.jsonl"}, "batch_size": 2}, sampling={"max_new_tokens": 4}
    )
    train = [Row(f"{number}+1=", "") for number in range(4)]
    with caplog.at_level(logging.WARNING):
        prompts = encode_prompts(config, train, [Row("9+1=", ""), *train[2:]])
        assert caplog.records == [], "`penstock check` has a line of its own for it"
        prompts.warn_of_shared()
    assert [prompt.text for prompt in prompts.shared] == ["2+1=", "3+1="]
    (record,) = caplog.records
    assert "2 of the 3 prompts of data.eval are among the training prompts (the first: '2+1=')" in record.getMessage()
    caplog.clear()
    distinct = encode_prompts(config, train, [Row("9+1=", "")])
    distinct.warn_of_shared()
    assert distinct.shared == []
    assert caplog.records == []
