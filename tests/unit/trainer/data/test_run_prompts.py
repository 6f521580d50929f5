"""What the trainer reports about its prompts before anything is loaded."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from penstock.contracts import Sampling
from penstock.errors import ConfigError
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


def test_a_teacher_is_compared_before_anything_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    """Of a run of episodes the longest sequence is agent.max_tokens."""
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 64}))
    rows = [Row(f"{number}+1=", "") for number in range(4)]
    sections: dict[str, object] = {
        "data": {"train": {"path": "unused.jsonl"}, "batch_size": 2},
        "sampling": {"max_new_tokens": 4},
        "teacher": {"path": str(folder)},
    }
    with pytest.raises(ConfigError, match=r"teacher\.path is .*reads up to 64 tokens, .* may have \d+"):
        encode_prompts(config_for(tiny_model, **sections), rows, [])
    short = sections | {"rollout": {"engine": {"dtype": "float32", "context_length": 64}}}
    assert len(encode_prompts(config_for(tiny_model, **short), rows, []).train) == 4
    episodes = sections | {"agent": {"environment": "envs:Guess", "max_tokens": 60}}
    assert len(encode_prompts(config_for(tiny_model, **episodes), rows, []).train) == 4


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
