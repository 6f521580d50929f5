"""Rows of a run of episodes: from columns to tickets."""

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.config import ColumnsSection, DatasetSection
from penstock.contracts import Sampling
from penstock.errors import ConfigError, DataError
from penstock_trainer.data.datasets import load_rows
from penstock_trainer.data.drawing.draws import Draws, eval_ticket
from penstock_trainer.data.prompts import digest, episode_rows
from penstock_trainer.data.rows import Row, read_row
from penstock_trainer.data.run_prompts import encode_prompts
from penstock_trainer.data.shared_prompts import shared_prompts
from tests.unit.trainer.trainer_groups import config_for

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Guess."}]


def row(record: object, **columns: str) -> Row:
    return read_row(record, "rows.jsonl line 1", ColumnsSection(**columns), "data.train", of_episode=True)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"secret": 5, "level": "easy"}, Row("", "", "", {"secret": 5, "level": "easy"})),
        ({"prompt": "Go", "answer": 3, "n": None}, Row("Go", "3", "", {"n": None})),
        ({"prompt": None, "answer": None}, Row("", "")),
        ({"prompt": MESSAGES, "metadata": {"a": [1]}, "b": {}}, Row(MESSAGES, "", "", {"b": {}, "a": [1]})),
        ({"answer": "x", "reward": "numeric"}, Row("", "x", "numeric")),
        ({}, Row("", "")),
    ],
)
def test_all_columns_become_arguments_of_the_environment(record: dict[str, Any], expected: Row) -> None:
    found = row(record)
    assert (found.prompt, found.answer, found.reward, found.metadata) == (
        expected.prompt,
        expected.answer,
        expected.reward,
        expected.metadata,
    )


@pytest.mark.parametrize(
    ("record", "columns", "expected"),
    [
        ([1], {}, r"expected an object"),
        ({"level": 1, "metadata": {"level": 2}}, {}, r"`level` .*it is a column too.*rename one of them"),
        ({"metadata": {"prompt": "a"}}, {}, r"`prompt` in `metadata` .*data.train.columns.prompt is `prompt`"),
        ({"question": "a", "prompt": "b"}, {"prompt": "question"}, r"`prompt` .*columns.prompt is `question`"),
        ({"solution": "a", "answer": "b"}, {"answer": "solution"}, r"`answer` .*columns.answer is `solution`"),
        ({"answer": [1]}, {}, r"`answer` is \[1\] \(list\): expected text or a number"),
        ({"prompt": 3}, {}, r"`prompt` is 3 \(int\)"),
        ({"price": float("nan")}, {}, r"`price` is nan: expected lists, objects, finite numbers and text"),
        ({"image": object()}, {}, r"metadata cannot be sent"),
        ({"metadata": 3}, {}, r"`metadata` is 3 \(int\): expected an object"),
    ],
)
def test_a_row_that_an_environment_cannot_get_is_refused(
    record: object, columns: dict[str, str], expected: str
) -> None:
    with pytest.raises(DataError, match=r"^rows.jsonl line 1: .*" + expected):
        row(record, **columns)


def test_rows_without_episodes_need_a_prompt_as_before(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"secret": 5}) + "\n")
    section = DatasetSection(path=str(path))
    assert load_rows(section, of_episodes=True)[0].metadata == {"secret": 5}
    with pytest.raises(DataError, match=r"no `prompt` among `secret`"):
        load_rows(section)


def test_a_task_of_reasoning_gym_is_scored_by_its_environment() -> None:
    section = DatasetSection(kind="reasoning_gym", path="basic_arithmetic", size=2)
    rows = load_rows(section, of_episodes=True)
    assert [(row.reward, row.metadata["task"]) for row in rows] == [("", "basic_arithmetic")] * 2
    assert [row.reward for row in load_rows(section)] == ["reasoning_gym"] * 2


def test_the_text_of_a_row_is_for_people() -> None:
    rows = [Row("Go", "3"), Row(MESSAGES, ""), Row("", "7", "", {"a": 1, "b": "x" * 300}), Row("", "7")]
    texts = [each.text for each in episode_rows(rows)]
    assert texts[:2] == ["Go", "system: Be brief.\nuser: Guess."]
    assert (texts[2][:13], len(texts[2]), texts[2][-3:]) == ("a: 1, b: xxxx", 200, "...")
    assert texts[3] == "answer: 7"
    assert [each.metadata.get("prompt") for each in episode_rows(rows)] == ["Go", MESSAGES, None, None]


def test_a_system_prompt_begins_the_messages() -> None:
    rows = [Row("Go", ""), Row(MESSAGES, ""), Row("", "7")]
    system = {"role": "system", "content": "Think."}
    assert [each.metadata["prompt"] for each in episode_rows(rows, lambda name: "Think.")] == [
        [system, {"role": "user", "content": "Go"}],
        MESSAGES,
        [system],
    ]


def agent_config(folder: Path, **changes: object) -> Any:
    return config_for(
        folder,
        data={"train": {"path": "unused.jsonl"}, "eval": {"path": "unused.jsonl"}, "batch_size": 2},
        **{"agent": {"environment": "my_envs:Guess", "max_tokens": 64}, "sampling": {"max_new_tokens": 4}, **changes},
    )


def test_tickets_of_episodes_name_their_environment(tiny_model: Path) -> None:
    config = agent_config(tiny_model)
    rows = [Row("", str(n), "", {"level": n}) for n in range(3)]
    prompts = encode_prompts(config, rows, {"main": [rows[0], Row("", "0", "", {"level": 9})]})
    sampling = Sampling(1.0, 4, prompts.stop_token_ids)
    draws = Draws(prompts.train, sampling, config)
    tickets = [draws.ticket(number, attempt=0, policy_version=0) for number in range(3)]
    assert {(ticket.environment, ticket.prompt_ids) for ticket in tickets} == {("my_envs:Guess", b"")}
    assert sorted((ticket.answer, ticket.metadata["level"]) for ticket in tickets) == [("0", 0), ("1", 1), ("2", 2)]
    held_out = eval_ticket(
        prompts.held_out["main"][1], 9, sampling=sampling, policy_version=1, seed=3, environment=config.agent.name
    )
    assert (held_out.environment, held_out.metadata, len(held_out.seeds)) == ("my_envs:Guess", {"level": 9}, 1)
    assert prompts.first_ids
    assert prompts.run_record(config).dataset_digest == digest(prompts.train)


def test_rows_are_the_same_if_an_environment_gets_the_same(tiny_model: Path) -> None:
    train = episode_rows([Row("", "1", "", {"level": 1}), Row("Go", "2")])
    held_out = episode_rows([Row("", "1", "", {"level": 2}), Row("", "1", "", {"level": 1}), Row("Go", "3")])
    assert shared_prompts(held_out, train) == [held_out[1]]
    assert shared_prompts(held_out[1:2], train[:1]) == [held_out[1]]
    assert digest(train) != digest(held_out[:2])


def test_rows_are_the_same_if_their_prompts_tell_them_apart_and_are_the_same(tiny_model: Path) -> None:
    """An id or a note in another column makes no other task of it."""
    train = episode_rows(
        [Row(f"What is {n} + 1?", str(n + 1), "", {"id": n}) for n in range(3)], lambda name: "Be brief."
    )
    held_out = episode_rows(
        [
            Row([{"role": "user", "content": "What is  1 + 1?"}], "2", "", {"id": 77}),
            Row("What is 5 + 1?", "2", "", {"id": 1}),
        ]
    )
    assert shared_prompts(held_out, train) == held_out[:1]


def test_a_longest_path_that_no_engine_can_generate_is_refused(tiny_model: Path) -> None:
    config = agent_config(tiny_model, agent={"environment": "my_envs:Guess", "max_tokens": 10**6})
    with pytest.raises(ConfigError, match=r"agent.max_tokens is 1000000: expected at most \d+.*context_length"):
        encode_prompts(config, [Row("", "1")] * 2, {"main": []})
