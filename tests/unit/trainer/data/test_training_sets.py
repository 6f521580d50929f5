"""Several sets of training prompts: their rows, templates and rewards, from files to tickets."""

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.config import Config, DataSection
from penstock.errors import ConfigError, DataError
from penstock_trainer.data.chat import Chats
from penstock_trainer.data.datasets import load_training_rows
from penstock_trainer.data.drawing.draws import Draws
from penstock_trainer.data.prompts import EncodedPrompt, encode_row
from penstock_trainer.data.rows import require_rewards
from penstock_trainer.data.run_prompts import encode_prompts
from tests.unit.trainer.data.chat_models import CHATML, THINKING, characters
from tests.unit.trainer.trainer_groups import config_for


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, dict[str, Any]]:
    plain = [{"prompt": f"{n} + 1", "answer": str(n + 1)} for n in range(6)]
    asked = [{"q": f"What is {n}?", "a": n, "extra": {"level": n}} for n in range(4)]
    asked[0]["extra"] = {"level": 0, "data_source": "from the row"}
    columns = {"prompt": "q", "answer": "a", "metadata": "extra"}
    return {
        "sums": {"path": write(tmp_path / "sums.jsonl", plain), "weight": 1},
        "asked": {"path": write(tmp_path / "asked.jsonl", asked), "columns": columns, "weight": 3, "reward": "math"},
    }


def test_each_set_has_columns_and_a_reward_of_its_own_and_rows_name_their_set(sets: dict[str, dict[str, Any]]) -> None:
    rows = load_training_rows(DataSection(train_sets=sets))
    assert [row.dataset for row in rows] == ["sums"] * 6 + ["asked"] * 4
    assert [row.reward for row in rows] == [""] * 6 + ["math"] * 4
    assert rows[0].metadata == {"data_source": "sums"}
    assert rows[6].metadata == {"data_source": "from the row", "level": 0}, "the row's own name stays"
    assert rows[7].metadata == {"data_source": "asked", "level": 1}
    assert rows[7].answer == "1"
    few = load_training_rows(DataSection(train_sets=sets), first=2)
    assert few == [*rows[:2], *rows[6:8]]


def test_a_fault_names_the_section_of_its_set(sets: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    sets["asked"]["columns"] = {"prompt": "q"}
    with pytest.raises(DataError, match=r"asked.jsonl line 1: no `answer` .*data.train_sets.asked.columns.answer"):
        load_training_rows(DataSection(train_sets=sets))
    sets["asked"]["path"] = str(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"none.jsonl \(data.train_sets.asked.path\)"):
        load_training_rows(DataSection(train_sets=sets))


def test_a_reward_of_a_set_must_exist(sets: dict[str, dict[str, Any]]) -> None:
    sets["asked"]["reward"] = "mth"
    rows = load_training_rows(DataSection(train_sets=sets))
    with pytest.raises(DataError, match=r"asked.jsonl line 1: the reward 'mth' .*did you mean 'math'"):
        require_rewards(rows, {"exact_match": 1.0})


def encode(data: DataSection, tokenizer: Any, chats: Chats) -> list[EncodedPrompt]:
    return [encode_row(row, tokenizer, chats.of(row.dataset)) for row in load_training_rows(data)]


def test_a_set_replaces_templates_and_options_of_the_run(sets: dict[str, dict[str, Any]]) -> None:
    tokenizer = characters(THINKING)
    sets["asked"] |= {"system_prompt": "", "prompt_template": "Q: {prompt}"}
    data = DataSection(train_sets=sets, system_prompt="Be brief.", template_options={"enable_thinking": False})
    prompts = encode(data, tokenizer, Chats(tokenizer, data))
    assert prompts[0].text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert prompts[0].text.endswith("<think>\n\n</think>\n\n")
    assert prompts[6].text == "Q: What is 0?"
    assert [prompt.dataset for prompt in prompts] == ["sums"] * 6 + ["asked"] * 4


def test_options_that_no_prompt_uses_are_refused_with_their_key(sets: dict[str, dict[str, Any]]) -> None:
    tokenizer = characters(CHATML)
    for data, key in (
        (DataSection(train_sets=sets, template_options={"enable_thinking": True}), "data"),
        (
            DataSection(train_sets={**sets, "asked": {**sets["asked"], "template_options": {"x": 1}}}),
            "data.train_sets.asked",
        ),
    ):
        chats = Chats(tokenizer, data)
        encode(data, tokenizer, chats)
        with pytest.raises(ConfigError, match=f"{key}.template_options holds .* every prompt is plain text"):
            chats.require_used()
    both = DataSection(train_sets={**sets, "asked": {**sets["asked"], "system_prompt": "Think."}})
    chats = Chats(characters(THINKING), both.model_copy(update={"template_options": {"enable_thinking": True}}))
    encode(both, tokenizer, chats)
    chats.require_used()  # one of the sets does use them


def test_a_ticket_has_a_prompt_of_its_set_with_the_sets_share(
    sets: dict[str, dict[str, Any]], tiny_model: Path
) -> None:
    config = config_for(tiny_model, data={"train_sets": sets, "batch_size": 2}, sampling={"max_new_tokens": 4})
    prompts = encode_prompts(config, load_training_rows(config.data), {})
    draws = Draws(prompts.train, prompts.sampling(config), config)
    names = [draws.set_of(number) for number in range(draws.num_draws)]
    assert (names.count("sums"), names.count("asked")) == (3, 7), "10 draws of an epoch by weights 1 and 3"
    for number, name in enumerate(names):
        ticket = draws.ticket(number, attempt=0, policy_version=0)
        assert ticket.prompt.startswith("What is") == (name == "asked")
        assert ticket.reward == {"sums": "", "asked": "math"}[name]
    assert prompts.run_record(config).draws == "sets: sums 6 prompts of weight 1.0, asked 4 prompts of weight 3.0"


def config(**data: Any) -> Config:
    return Config.model_validate({"actor": {"path": "m"}, "data": data})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": {"path": "d"}, "train_sets": {"a": {"path": "x"}, "b": {"path": "y"}}}, "both set: expected one"),
        ({"train_sets": {"a": {"path": "x"}}}, "holds one set, a: expected two or more"),
        ({"train_sets": {"a": {"path": "x"}, "b": {}}}, "data.train_sets.b.path is empty"),
        ({"train_sets": {"a": {"path": "x", "weight": 2}, "b": {"path": "y"}}}, "b without a weight beside sets with"),
        ({"train_sets": {"a": {"path": "x", "weight": 0}, "b": {"path": "y"}}}, "greater than 0"),
        ({"train_sets": {"a.b": {"path": "x"}, "b": {"path": "y"}}}, "String should match pattern"),
        ({}, "data.train.path is empty"),
    ],
)
def test_what_cannot_be_right_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**data)


def test_one_set_is_data_train(tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl", [{"prompt": "p", "answer": "a"}] * 3)
    single = config(train={"path": path})
    (only,) = single.data.training_sets
    assert (only.name, only.key, only.section.path) == ("", "data.train", path)
    rows = load_training_rows(single.data)
    assert {row.dataset for row in rows} == {""}
    assert rows[0].metadata == {}
