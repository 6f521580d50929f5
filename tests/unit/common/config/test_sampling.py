"""Sampling in training and in evaluation: what is refused, and what other libraries' keys are answered with."""

from pathlib import Path

import pytest

from penstock.config import Config
from penstock.config.load import load_config
from penstock.errors import ConfigError


def loaded(folder: Path, *arguments: str) -> Config:
    path = folder / "run.yaml"
    path.write_text("actor: {path: m}\ndata: {train: {path: d}}\n")
    return load_config(["--config", str(path), *arguments], {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--eval.top_p 0.9", "eval.top_p is 0.9 with eval.temperature 0"),
        ("--eval.top_k 5", "eval.top_k is 5 with eval.temperature 0"),
        ("--eval.min_p 0.1", "expected a temperature above 0, or eval.min_p at its default"),
        ("--eval.samples_per_prompt 4", "makes all completions of a prompt equal"),
        ("--eval.temperature 1 --eval.top_p 0", "eval.top_p"),
        ("--eval.temperature 1 --eval.repetition_penalty 3", "eval.repetition_penalty"),
        ('--sampling.stop [""]', "sampling.stop"),
        (f"--sampling.stop [{','.join(map(str, 'x' * 33))}]", "sampling.stop"),
        ("--sampling.ignore_eos true --agent.environment my:Env --agent.max_tokens 512", "sampling.ignore_eos true"),
        (
            "--actor.router_replay true --agent.environment my:Env --agent.max_tokens 512",
            "actor.router_replay true: the calls of an episode do not record",
        ),
        ("--sampling.ignore_eos true --loss.truncated leave_out", "every completion would be truncated"),
        ("--sampling.top_p 0.9", "top_p is eval.top_p here (of evaluation only"),
        ("--sampling.min_p 0.1", "eval.min_p"),
    ],
)
def test_what_cannot_be_right_is_refused_with_its_key(tmp_path: Path, arguments: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, *arguments.split())
    assert words in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        "--eval.temperature 0.6 --eval.top_p 0.95 --eval.top_k 20 --eval.min_p 0.05",
        "--eval.repetition_penalty 1.1",
        "--eval.temperature 0.6 --eval.samples_per_prompt 100",
        "--sampling.stop [Q.,END] --sampling.ignore_eos true --loss.truncated leave_out",
    ],
)
def test_the_rest_is_accepted(tmp_path: Path, arguments: str) -> None:
    loaded(tmp_path, *arguments.split())
