"""What the trainer reports about its prompts before anything is loaded."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.config import Config
from penstock.contracts import Sampling
from penstock.errors import ConfigError, DataError
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
        prompts.warn()
    assert [prompt.text for prompt in prompts.shared] == ["2+1=", "3+1="]
    (record,) = caplog.records
    assert "2 of the 3 prompts of data.eval are among the training prompts (the first: '2+1=')" in record.getMessage()
    caplog.clear()
    distinct = encode_prompts(config, train, [Row("9+1=", "")])
    distinct.warn()
    assert distinct.shared == []
    assert caplog.records == []


def lengthy(model: Path, too_long: str, **data: Any) -> Config:
    """A run whose engines take prompts of at most 4 tokens."""
    return config_for(
        model,
        data={"train": {"path": "d.jsonl"}, "batch_size": 2, "too_long": too_long, **data},
        sampling={"max_new_tokens": 4},
        rollout={"engine": {"dtype": "float32", "context_length": 14}},
    )


def sums(*lengths: int) -> list[Row]:
    return [Row("1" * (length - 1) + "+", "", place=f"d.jsonl line {n}") for n, length in enumerate(lengths, start=1)]


def test_prompts_that_are_too_long_are_left_out_and_counted(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, held_out = sums(2, 9, 3, 7, 4), sums(5, 4)
    with pytest.raises(DataError, match=r"d.jsonl line 2: the prompt has 9 tokens: expected at most 4 .*data.too_long"):
        encode_prompts(lengthy(tiny_model, "error"), train, held_out)
    config = lengthy(tiny_model, "drop")
    prompts = encode_prompts(config, train, held_out)
    assert [len(each.token_ids) for each in prompts.train] == [2, 3, 4]
    assert [len(each.token_ids) for each in prompts.held_out] == [4]
    assert [(each.key, each.count, each.num_prompts) for each in prompts.too_long] == [
        ("data.train", 2, 5),
        ("data.eval", 1, 2),
    ]
    fitting = encode_prompts(config, sums(2, 3, 4), sums(4))
    assert fitting.too_long == ()
    assert prompts.run_record(config) == fitting.run_record(config), "the run is that of the prompts that are left"
    with caplog.at_level(logging.WARNING):
        prompts.warn()
    assert (
        "prompts that are too long are left out (data.too_long): 2 of 5 in data.train (40.0%: d.jsonl line 2, d.jsonl "
        "line 4), 1 of 2 in data.eval (50.0%: d.jsonl line 1); the longest has 9 tokens"
    ) in caplog.text


def test_prompts_of_several_sets_are_left_out_by_set(tiny_model: Path) -> None:
    sets = {"a": {"path": "a.jsonl"}, "b": {"path": "b.jsonl"}}
    config = lengthy(tiny_model, "drop", train={}, train_sets=sets)
    rows = [*(replace(row, dataset="a") for row in sums(2, 9)), *(replace(row, dataset="b") for row in sums(8, 3))]
    prompts = encode_prompts(config, rows, [])
    assert [(each.key, each.count) for each in prompts.too_long] == [("data.train_sets.a", 1), ("data.train_sets.b", 1)]
    assert [each.dataset for each in prompts.train] == ["a", "b"]


def test_what_leaves_too_little_is_refused(tiny_model: Path) -> None:
    with pytest.raises(DataError, match=r"data.eval: all 2 prompts have more than 4 tokens .*data.too_long is drop"):
        encode_prompts(lengthy(tiny_model, "drop"), sums(2, 3), sums(5, 6))
    with pytest.raises(DataError, match=r"holds 1 prompts, without 2 that are too long, and data.batch_size is 2"):
        encode_prompts(lengthy(tiny_model, "drop"), sums(9, 3, 5), [])


STOP = ["Q: ", "\n"]
EVAL = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}


def test_completions_end_at_strings_of_any_length_and_evaluation_samples_as_its_section_says(tiny_model: Path) -> None:
    sections: dict[str, object] = {"data": {"train": {"path": "unused.jsonl"}, "batch_size": 2}, "eval": EVAL}
    rows = [Row(f"{number}+1=", "") for number in range(4)]
    config = config_for(tiny_model, sampling={"max_new_tokens": 4, "stop": STOP, "temperature": 0.9}, **sections)
    prompts = encode_prompts(config, rows, [])
    ends = prompts.stop_token_ids
    assert prompts.sampling(config) == Sampling(0.9, 4, ends, ("Q: ", "\n"))
    assert prompts.eval_sampling(config) == Sampling(
        0.6, 4, ends, ("Q: ", "\n"), top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.1
    )
    endless = config_for(tiny_model, sampling={"max_new_tokens": 4, "stop": STOP, "ignore_eos": True}, **sections)
    assert encode_prompts(endless, rows, []).sampling(endless) == Sampling(1.0, 4, (), ("Q: ", "\n"), ignore_eos=True)
    assert len(ends) == 1


def test_a_turn_of_an_episode_ends_at_tokens(tiny_model: Path) -> None:
    sections: dict[str, object] = {
        "agent": {"environment": "envs:Guess", "max_tokens": 64},
        "data": {"train": {"path": "unused.jsonl"}, "batch_size": 2},
    }
    rows = [Row(f"{number}+1=", "") for number in range(4)]
    config = config_for(tiny_model, sampling={"max_new_tokens": 4, "stop": ["+"]}, **sections)
    sampling = encode_prompts(config, rows, []).sampling(config)
    assert (len(sampling.stop_token_ids), sampling.stop) == (2, ())
    longer = config_for(tiny_model, sampling={"max_new_tokens": 4, "stop": STOP}, **sections)
    with pytest.raises(ConfigError, match="a turn of an episode ends at a token"):
        encode_prompts(longer, rows, [])
