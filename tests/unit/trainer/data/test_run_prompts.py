"""What the trainer reports about its prompts before anything is loaded."""

import asyncio
import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.config import Config
from penstock.contracts import Sampling
from penstock.errors import ConfigError, DataError
from penstock_trainer.data.rows import Row
from penstock_trainer.data.run_prompts import encode_prompts
from penstock_trainer.data.tokenizer import load_vocabulary, token_texts
from tests.unit.reward.teacher.teacher_setup import FakeTeacher, serving
from tests.unit.trainer.trainer_groups import config_for


def test_held_out_prompts_that_are_trained_too_are_warned_about_and_counted(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(
        tiny_model,
        data={"train": {"path": "unused.jsonl"}, "eval": {"path": "unused.jsonl"}, "batch_size": 2},
        eval={"sets": {"hard": {"path": "unused.jsonl"}}},
        sampling={"max_new_tokens": 4},
    )
    train = [Row(f"{number}+1=", "") for number in range(4)]
    with caplog.at_level(logging.WARNING):
        prompts = encode_prompts(config, train, {"main": [Row("9+1=", ""), *train[2:]], "hard": train[:1]})
        assert caplog.records == [], "`penstock check` has a line of its own for it"
        prompts.warn(config)
    assert {name: [each.text for each in some] for name, some in prompts.shared.items()} == {
        "main": ["2+1=", "3+1="],
        "hard": ["0+1="],
    }
    record, other = caplog.records
    assert "1 of the 1 prompts of eval.sets.hard are among the training prompts" in other.getMessage()
    assert "2 of the 3 prompts of data.eval are among the training prompts (the first: '2+1=')" in record.getMessage()
    caplog.clear()
    distinct = encode_prompts(config, train, {"main": [Row("9+1=", "")], "hard": [Row("8+1=", "")]})
    distinct.warn(config)
    assert distinct.shared == {"main": [], "hard": []}
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
        encode_prompts(config_for(tiny_model, **sections), rows, {})
    short = sections | {"rollout": {"engine": {"dtype": "float32", "context_length": 64}}}
    assert len(encode_prompts(config_for(tiny_model, **short), rows, {}).train) == 4
    episodes = sections | {"agent": {"environment": "envs:Guess", "max_tokens": 60}}
    assert len(encode_prompts(config_for(tiny_model, **episodes), rows, {}).train) == 4


async def test_the_servers_of_a_teacher_are_compared_before_anything_is_loaded(tiny_model: Path) -> None:
    """Their tokens one by one, the size of their vocabulary, and the longest sequence that they read."""
    policy = load_vocabulary(str(tiny_model))
    rows = [Row(f"{number}+1=", "") for number in range(4)]
    async with serving(FakeTeacher()) as fake:
        fake.longest, fake.texts = 256, token_texts(policy)
        config = config_for(
            tiny_model,
            data={"train": {"path": "unused.jsonl"}, "batch_size": 2},
            sampling={"max_new_tokens": 4},
            teacher={"urls": [fake.url]},
        )

        async def refusal() -> str:
            with pytest.raises(ConfigError) as error:
                await asyncio.to_thread(encode_prompts, config, rows, {})
            assert str(error.value).startswith(f"teacher.urls names {fake.url}, ")
            return str(error.value)

        assert len((await asyncio.to_thread(encode_prompts, config, rows, {})).train) == 4
        fake.longest = 64
        assert "reads up to 58 tokens there, and a sequence of this run may have 250" in await refusal()
        fake.longest, fake.texts = 256, [*fake.texts[:5], fake.texts[6], fake.texts[5], *fake.texts[7:]]
        assert re.search(r"differ in 2 of 43 tokens, first 5: '.' there, '.' here", await refusal())
        fake.texts = token_texts(policy)
        fake.num_embeddings = policy.size - 1
        assert "embeddings of 43 tokens: expected no fewer of the teacher" in await refusal()
    assert "gave no answer to /server_info: ConnectError (Connection refused)" in await refusal()


async def test_a_trainer_of_a_run_that_has_begun_starts_while_a_server_of_the_teacher_is_away(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Any process may be killed at any time. A server that answers is compared still."""
    rows = [Row(f"{number}+1=", "") for number in range(4)]
    async with serving(FakeTeacher()) as early:
        absent = early.url
    async with serving(FakeTeacher()) as fake:
        fake.longest, fake.texts = 256, token_texts(load_vocabulary(str(tiny_model)))
        config = config_for(
            tiny_model,
            data={"train": {"path": "unused.jsonl"}, "batch_size": 2},
            sampling={"max_new_tokens": 4},
            teacher={"urls": [absent, fake.url]},
        )

        async def encoded(*, has_begun: bool) -> int:
            return len((await asyncio.to_thread(encode_prompts, config, rows, {}, has_begun=has_begun)).train)

        with pytest.raises(ConfigError, match="gave no answer to /server_info"):
            await encoded(has_begun=False)
        assert await encoded(has_begun=True) == 4
        assert f"{absent}, which gave no answer" in caplog.text
        assert "The run has begun: groups wait for it" in caplog.text
        fake.is_full = True
        assert await encoded(has_begun=True) == 4
        assert "503: the queue is full" in caplog.text
        fake.is_full, fake.longest = False, 64
        with pytest.raises(ConfigError, match="reads up to 58 tokens there"):
            await encoded(has_begun=True)


def lengthy(model: Path, too_long: str, **data: Any) -> Config:
    """A run whose engines take prompts of at most 4 tokens."""
    return config_for(
        model,
        data={
            "train": {"path": "d.jsonl"},
            "eval": {"path": "h.jsonl"},
            "batch_size": 2,
            "too_long": too_long,
            **data,
        },
        sampling={"max_new_tokens": 4},
        rollout={"engine": {"dtype": "float32", "context_length": 14}},
    )


def sums(*lengths: int) -> list[Row]:
    return [Row("1" * (length - 1) + "+", "", place=f"d.jsonl line {n}") for n, length in enumerate(lengths, start=1)]


def test_prompts_that_are_too_long_are_left_out_and_counted(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, held_out = sums(2, 9, 3, 7, 4), sums(5, 4)
    with pytest.raises(DataError, match=r"d.jsonl line 2: the prompt has 9 tokens: expected at most 4 .*data.too_long"):
        encode_prompts(lengthy(tiny_model, "error"), train, {"main": held_out})
    config = lengthy(tiny_model, "drop")
    prompts = encode_prompts(config, train, {"main": held_out})
    assert [len(each.token_ids) for each in prompts.train] == [2, 3, 4]
    assert [len(each.token_ids) for each in prompts.held_out["main"]] == [4]
    assert [(each.key, each.count, each.num_prompts) for each in prompts.too_long] == [
        ("data.train", 2, 5),
        ("data.eval", 1, 2),
    ]
    fitting = encode_prompts(config, sums(2, 3, 4), {"main": sums(4)})
    assert fitting.too_long == ()
    assert prompts.run_record(config) == fitting.run_record(config), "the run is that of the prompts that are left"
    with caplog.at_level(logging.WARNING):
        prompts.warn(config)
    assert (
        "prompts that are too long are left out (data.too_long): 2 of 5 in data.train (40.0%: d.jsonl line 2, d.jsonl "
        "line 4), 1 of 2 in data.eval (50.0%: d.jsonl line 1); the longest has 9 tokens"
    ) in caplog.text


def test_prompts_of_several_sets_are_left_out_by_set(tiny_model: Path) -> None:
    sets = {"a": {"path": "a.jsonl"}, "b": {"path": "b.jsonl"}}
    config = lengthy(tiny_model, "drop", train={}, train_sets=sets)
    rows = [*(replace(row, dataset="a") for row in sums(2, 9)), *(replace(row, dataset="b") for row in sums(8, 3))]
    prompts = encode_prompts(config, rows, {})
    assert [(each.key, each.count) for each in prompts.too_long] == [("data.train_sets.a", 1), ("data.train_sets.b", 1)]
    assert [each.dataset for each in prompts.train] == ["a", "b"]


def test_what_leaves_too_little_is_refused(tiny_model: Path) -> None:
    with pytest.raises(DataError, match=r"data.eval: all 2 prompts have more than 4 tokens .*data.too_long is drop"):
        encode_prompts(lengthy(tiny_model, "drop"), sums(2, 3), {"main": sums(5, 6)})
    with pytest.raises(DataError, match=r"holds 1 prompts, without 2 that are too long, and data.batch_size is 2"):
        encode_prompts(lengthy(tiny_model, "drop"), sums(9, 3, 5), {})


STOP = ["Q: ", "\n"]
EVAL = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}


def test_completions_end_at_strings_of_any_length_and_evaluation_samples_as_its_section_says(tiny_model: Path) -> None:
    data = {"train": {"path": "unused.jsonl"}, "eval": {"path": "unused.jsonl"}, "batch_size": 2}
    sections: dict[str, object] = {"data": data, "eval": EVAL}
    rows = [Row(f"{number}+1=", "") for number in range(4)]
    config = config_for(tiny_model, sampling={"max_new_tokens": 4, "stop": STOP, "temperature": 0.9}, **sections)
    prompts = encode_prompts(config, rows, {"main": rows})
    ends = prompts.stop_token_ids
    assert prompts.sampling(config) == Sampling(0.9, 4, ends, ("Q: ", "\n"))
    [main] = config.held_out_sets
    assert prompts.eval_sampling(config, main) == Sampling(
        0.6, 4, ends, ("Q: ", "\n"), top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.1
    )
    endless = config_for(tiny_model, sampling={"max_new_tokens": 4, "stop": STOP, "ignore_eos": True}, **sections)
    assert encode_prompts(endless, rows, {"main": []}).sampling(endless) == Sampling(
        1.0, 4, (), ("Q: ", "\n"), ignore_eos=True
    )
    assert len(ends) == 1


def test_a_turn_of_an_episode_ends_at_tokens(tiny_model: Path) -> None:
    sections: dict[str, object] = {
        "agent": {"environment": "envs:Guess", "max_tokens": 64},
        "data": {"train": {"path": "unused.jsonl"}, "batch_size": 2},
    }
    rows = [Row(f"{number}+1=", "") for number in range(4)]
    config = config_for(tiny_model, sampling={"max_new_tokens": 4, "stop": ["+"]}, **sections)
    sampling = encode_prompts(config, rows, {}).sampling(config)
    assert (len(sampling.stop_token_ids), sampling.stop) == (2, ())
    longer = config_for(tiny_model, sampling={"max_new_tokens": 4, "stop": STOP}, **sections)
    with pytest.raises(ConfigError, match="a turn of an episode ends at a token"):
        encode_prompts(longer, rows, {})


def test_a_set_has_its_own_length_strings_and_templates(tiny_model: Path) -> None:
    hard = {"path": "h", "prompt_template": "Q: {prompt} A:", "max_new_tokens": 9, "stop": ["."], "temperature": 0.5}
    config = config_for(
        tiny_model,
        data={"train": {"path": "t"}, "eval": {"path": "e"}, "batch_size": 2, "prompt_template": "Sum: {prompt}"},
        eval={"max_new_tokens": 6, "stop": ["\n"], "sets": {"hard": hard, "same": {"path": "s"}}},
        sampling={"max_new_tokens": 4, "stop": STOP},
    )
    rows = [Row(f"{number}+1=", "") for number in range(2)]
    prompts = encode_prompts(config, rows, {"main": rows, "hard": rows, "same": rows[:1]})
    shown = {name: [each.text for each in some] for name, some in prompts.held_out.items()}
    assert shown == {
        "main": ["Sum: 0+1=", "Sum: 1+1="], "hard": ["Q: 0+1= A:", "Q: 1+1= A:"], "same": ["Sum: 0+1="]
    }  # fmt: skip
    ends = prompts.stop_token_ids
    assert {each.name: prompts.eval_sampling(config, each) for each in config.held_out_sets} == {
        "main": Sampling(0.0, 6, ends, ("\n",)),
        "hard": Sampling(0.5, 9, ends, (".",)),
        "same": Sampling(0.0, 6, ends, ("\n",)),
    }
    assert prompts.sampling(config) == Sampling(1.0, 4, ends, tuple(STOP))


def test_prompts_leave_room_for_the_longest_completion_of_their_set(tiny_model: Path) -> None:
    """Each key is named where it is the one that is too large."""
    rows = [Row(f"{number}+1=", "", place=f"row {number}") for number in range(2)]
    for key, evaluation in (
        ("eval", {"max_new_tokens": 60}),
        ("eval.sets.hard", {"sets": {"hard": {"path": "h", "max_new_tokens": 60}}}),
    ):
        config = config_for(
            tiny_model,
            data={"train": {"path": "t"}, "eval": {"path": "e"}, "batch_size": 2},
            eval=evaluation,
            sampling={"max_new_tokens": 4},
            rollout={"engine": {"context_length": 64}},
        )
        with pytest.raises(DataError, match=rf"row 0: the prompt has \d+ tokens.*lower {key}.max_new_tokens, or raise"):
            encode_prompts(config, rows, {each.name: rows for each in config.held_out_sets})
