"""Training prompts on disk: the same run as from memory, whatever happens to files and settings."""

import json
import os
import re
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pytest

from penstock.config import Config
from penstock.contracts import Ticket
from penstock.errors import DataError, PenstockError
from penstock_trainer.data import training
from penstock_trainer.data.datasets import BegunRows, load_training_rows, source_states, training_rows
from penstock_trainer.data.drawing.draws import Draws
from penstock_trainer.data.prompt_table import (
    BLOCK_ROWS,
    TABLE,
    UNFINISHED,
    UNFINISHED_SECONDS,
    PromptTable,
    PromptTables,
    set_sizes,
)
from penstock_trainer.data.prompts import EncodedPrompt
from penstock_trainer.data.rows import with_rewards
from penstock_trainer.data.run_prompts import Prompts, encode_prompts
from penstock_trainer.data.shared_prompts import shared_prompts
from penstock_trainer.data.table_key import table_key
from penstock_trainer.data.tokenizer import load_vocabulary
from tests.unit.trainer.data.chat_models import CHATML, characters
from tests.unit.trainer.trainer_groups import config_for

NUM_ROWS = 16 * BLOCK_ROWS + 3
REWARD = {"functions": {"exact_match": 1.0, "math": 0.0}}
CONTENTS = "contents.json"


def row(number: int) -> dict[str, Any]:
    named = {"reward": "math"} if number % 7 == 0 else {}
    return {
        "prompt": f"{number}+1=",
        "answer": str(number + 1),
        "metadata": {"n": number, "deep": [{"a": 0.5}]},
    } | named


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "train.jsonl", [row(number) for number in range(NUM_ROWS)])


@pytest.fixture
def tables(tmp_path: Path) -> PromptTables:
    return PromptTables(tmp_path / "cache" / "penstock")


def config(model: Path, file: Path, **changes: Any) -> Config:
    data = {"train": {"path": str(file)}, "batch_size": 2, **changes.pop("data", {})}
    return config_for(model, data=data, sampling={"max_new_tokens": 4}, reward=REWARD, **changes)


def begin(config: Config, most: int = 5) -> BegunRows:
    """As a trainer begins to read at its start."""
    rows = training_rows(config.data, of_episodes=config.agent.enabled)
    return BegunRows(with_rewards(rows, config.all_rewards.functions), source_states(config), most)


def read(config: Config, tables: PromptTables | None, held_out: Any = None) -> Prompts:
    """As a trainer reads them at its start."""
    begun = begin(config)
    assert begun.are_many
    return encode_prompts(config, begun, held_out or {}, tables)


def table_of(prompts: Prompts) -> PromptTable:
    assert isinstance(prompts.train, PromptTable)
    return prompts.train


def tickets(prompts: Prompts, config: Config) -> list[Ticket]:
    draws = Draws(prompts.train, prompts.sampling(config), config)
    return [draws.ticket(number, attempt=0, policy_version=0) for number in range(draws.num_draws)]


def unread(config: Config, tables: PromptTables) -> PromptTable:
    """The prompts of a start that must find them ready: no row is read."""

    def no_rows() -> Any:
        raise AssertionError("a row was read")
        yield

    return table_of(encode_prompts(config, no_rows(), {}, tables))


SETS = {
    "a": {"path": "", "weight": 2, "reward": "math", "prompt_template": "1+1=2 {prompt}"},
    "b": {"path": "", "weight": 1, "system_prompt": "add"},
}


def several(model: Path, file: Path, **data: Any) -> Config:
    other = write(file.with_name("other.jsonl"), [{"prompt": f"{n}*2=", "answer": str(2 * n)} for n in range(40)])
    sets = {"a": SETS["a"] | {"path": str(file)}, "b": {"path": str(other), "weight": 1}}
    return config(model, file, data={"train": {}, "train_sets": sets, **data})


@pytest.mark.parametrize("kind", ["one set", "several sets", "in order", "episodes", "too long", "curriculum"])
def test_a_run_from_disk_is_the_run_from_memory(
    kind: str, tiny_model: Path, file: Path, tables: PromptTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {
        "one set": lambda: config(tiny_model, file, total_train_epochs=2),
        "several sets": lambda: several(tiny_model, file),
        "in order": lambda: several(tiny_model, file, shuffle=False),
        "episodes": lambda: config(tiny_model, file, agent={"environment": "envs:Guess", "max_tokens": 64}),
        "too long": lambda: config(
            tiny_model,
            file,
            data={"too_long": "drop"},
            rollout={"engine": {"dtype": "float32", "context_length": 15}},
        ),
        "curriculum": lambda: config(tiny_model, file, data={"curriculum": {"priority": "failure"}}),
    }[kind]()
    in_memory, on_disk = read(made, None), read(made, tables)
    assert isinstance(in_memory.train, list)
    again = Prompts(
        unread(made, tables),
        {},
        on_disk.stop_token_ids,
        on_disk.first_ids,
        on_disk.tokenizer,
        too_long=on_disk.too_long,
    )
    for prompts in (on_disk, again):
        assert list(table_of(prompts)) == in_memory.train
        assert prompts.run_record(made) == in_memory.run_record(made)
        assert set_sizes(prompts.train) == set_sizes(in_memory.train)
        assert tickets(prompts, made) == tickets(in_memory, made)
    assert on_disk.too_long == in_memory.too_long
    assert bool(on_disk.too_long) == (kind == "too long")
    assert (on_disk.first_ids, on_disk.stop_token_ids) == (in_memory.first_ids, in_memory.stop_token_ids)


def test_prompts_are_read_by_any_index(tiny_model: Path, file: Path, tables: PromptTables) -> None:
    table = table_of(read(config(tiny_model, file), tables))
    assert len(table) == NUM_ROWS
    assert [table[number].answer for number in (BLOCK_ROWS, 0, -1, BLOCK_ROWS - 1)] == [
        str(BLOCK_ROWS + 1),
        "1",
        str(NUM_ROWS),
        str(BLOCK_ROWS),
    ]
    assert [prompt.answer for prompt in table[1:5:2]] == ["2", "4"]
    with pytest.raises(IndexError):
        table[NUM_ROWS]


def test_messages_and_their_template_come_back(tmp_path: Path, tables: PromptTables) -> None:
    """A start that finds the prompts ready knows that options of the template are used."""
    model = tmp_path / "model"
    characters(CHATML.replace("{{", "{{ '' if thinking else '' }}{{", 1)).save_pretrained(model)
    (model / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 256})
    )
    chats = [{"prompt": [{"role": "user", "content": f"hi {n}"}], "answer": ""} for n in range(9)]
    made = config(model, write(tmp_path / "chats.jsonl", chats), data={"template_options": {"thinking": True}})
    in_memory, on_disk = read(made, None), read(made, tables)
    assert list(table_of(on_disk)) == in_memory.train
    assert [prompt.asked for prompt in unread(made, tables)] == [each["prompt"] for each in chats]


def test_a_bad_row_in_the_middle_is_named_and_leaves_no_table(
    tiny_model: Path, tmp_path: Path, tables: PromptTables
) -> None:
    rows: list[object] = [row(number) for number in range(NUM_ROWS)]
    for bad, message in (
        ({"prompt": "1+"}, r"train.jsonl line 151: no `answer` among `prompt`"),
        ({"prompt": "1+", "answer": "2", "reward": "maths"}, r"train.jsonl line 151: the reward 'maths' .*does not ex"),
        (
            {"prompt": "1" * 300, "answer": "2"},
            r"train.jsonl line 151: the prompt has 300 tokens: expected at most 246",
        ),
    ):
        path = write(tmp_path / "train.jsonl", [*rows[:150], bad, *rows[151:]])
        with pytest.raises(DataError, match=message):
            read(config(tiny_model, path), tables)
        assert list(tables.folder.iterdir()) == []
    read(config(tiny_model, write(path, rows)), tables)


def test_another_file_or_other_templates_make_other_prompts(tiny_model: Path, file: Path, tables: PromptTables) -> None:
    made = config(tiny_model, file)
    first = table_of(read(made, tables))
    assert unread(made, tables).folder == first.folder
    write(file, [row(number) for number in range(1, NUM_ROWS)])
    second = table_of(read(made, tables))
    assert (first[0].answer, second[0].answer) == ("1", "2"), "what is open stays as it was"
    assert first.contents.digest != second.contents.digest, "a run that began with the first is not resumed with these"
    worded = config(tiny_model, file, data={"prompt_template": "1+1=2 {prompt}"})
    assert table_of(read(worded, tables))[0].text == "1+1=2 1+1="
    assert unread(made, tables).folder == second.folder


def test_another_release_of_penstock_makes_them_again(
    tiny_model: Path, file: Path, tables: PromptTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(tiny_model, file)
    first = table_of(read(made, tables))
    monkeypatch.setattr(
        "penstock_trainer.data.table_key.version", lambda name: "99" if name == "penstock" else version(name)
    )
    assert table_of(read(made, tables)).folder != first.folder


def test_keys_that_change_no_prompt_find_them_ready(tiny_model: Path, file: Path, tables: PromptTables) -> None:
    first = table_of(read(config(tiny_model, file), tables))
    shorter = config_for(
        tiny_model,
        data={"train": {"path": str(file)}, "batch_size": 3, "shuffle": False},
        sampling={"max_new_tokens": 9},
        optimizer={"lr": 2e-3},
        reward={"functions": {"math": 1.0}},
    )
    assert unread(shorter, tables).folder == first.folder


def test_a_reward_that_is_no_more_is_named_with_its_first_row(
    tiny_model: Path, file: Path, tables: PromptTables
) -> None:
    write(file, [{**row(number), "reward": "own:f"} if number >= 200 else row(number) for number in range(NUM_ROWS)])
    own = config(tiny_model, file).model_copy(
        update={
            "reward": config(tiny_model, file).reward.model_copy(
                update={"functions": {"exact_match": 1.0, "own:f": 0.0}}
            )
        }
    )
    read(own, tables)
    with pytest.raises(DataError, match=r"train.jsonl line 201: the reward 'own:f' \(str\) does not exist"):
        unread(config(tiny_model, file), tables)


def test_another_limit_that_leaves_out_other_prompts_makes_another_table(
    tiny_model: Path, file: Path, tables: PromptTables
) -> None:
    """Prompts have 4 to 6 tokens."""

    def limited(context: int, too_long: str = "drop") -> Config:
        engine = {"dtype": "float32", "context_length": context}
        return config(tiny_model, file, data={"too_long": too_long}, rollout={"engine": engine})

    wide, narrow = read(limited(200), tables), read(limited(15), tables)
    assert len(narrow.train) < len(wide.train) == NUM_ROWS
    assert table_of(narrow).folder != table_of(wide).folder
    assert unread(limited(15), tables).folder == table_of(narrow).folder
    assert unread(limited(90, "error"), tables).folder == table_of(wide).folder
    with pytest.raises(DataError, match=r"data\.too_long drop"):
        read(limited(15, "error"), tables)


def test_held_out_prompts_among_them_are_found(tiny_model: Path, file: Path, tables: PromptTables) -> None:
    sections: dict[str, Any] = {"eval": {"path": "unused.jsonl"}}
    made = config(tiny_model, file, data=sections)
    held_out = {"main": load_training_rows(made.data)[::50]}
    other = write(file.with_name("held_out.jsonl"), [{"prompt": "9*9=", "answer": "81"}])
    held_out["main"] += load_training_rows(config(tiny_model, other).data)
    in_memory, on_disk = read(made, None, held_out), read(made, tables, held_out)
    assert on_disk.shared == in_memory.shared
    assert len(on_disk.shared["main"]) == len(held_out["main"]) - 1
    again = table_of(read(made, tables, held_out))
    assert [each.key for each in again.contents.lengths] == ["data.train"], "of the table, not of this start"


@pytest.mark.parametrize("says", ["Play.", "", "{n}"])
def test_held_out_episodes_among_them_are_found(
    says: str, tiny_model: Path, tmp_path: Path, tables: PromptTables
) -> None:
    def episodes(numbers: range) -> list[object]:
        return [{"prompt": says.format(n=n), "level": n} for n in numbers]

    made = config(
        tiny_model,
        write(tmp_path / "episodes.jsonl", episodes(range(300))),
        data={"eval": {"path": "unused.jsonl"}},
        agent={"environment": "envs:Guess", "max_tokens": 64},
    )
    other = config(tiny_model, write(tmp_path / "other.jsonl", episodes(range(297, 303))))
    held_out = {"main": load_training_rows(other.data, of_episodes=True)}
    in_memory, on_disk = read(made, None, held_out), read(made, tables, held_out)
    assert [each.metadata["level"] for each in on_disk.shared["main"]] == [297, 298, 299]
    assert on_disk.shared == in_memory.shared
    assert table_of(on_disk).told_apart_by_words == (says == "{n}")


def test_a_table_that_changes_under_the_run_is_refused(tiny_model: Path, file: Path, tables: PromptTables) -> None:
    made = config(tiny_model, file)
    table = table_of(read(made, tables))
    path = table.folder / TABLE
    whole = path.read_bytes()
    place = whole.index(b"150+1=")
    with path.open("r+b") as open_file:
        open_file.seek(place)
        open_file.write(b"151")
    assert table[0].answer == "1"
    with pytest.raises(DataError, match=rf"{TABLE} is damaged \(prompt 150 is not .*delete .*makes it again"):
        table[150]
    os.truncate(path, place)
    with pytest.raises(DataError, match=rf"{TABLE} is damaged"):
        table[NUM_ROWS - 1]
    with pytest.raises(DataError, match=rf"{TABLE} is damaged \(.*delete .*makes it again"):
        shared_prompts([table[0]], table)
    path.unlink()
    with pytest.raises(DataError, match=rf"{TABLE} is damaged \(No such file"):
        shared_prompts([table[0]], table)


def test_a_table_that_cannot_be_read_is_made_again(
    tiny_model: Path, file: Path, tables: PromptTables, caplog: pytest.LogCaptureFixture
) -> None:
    made = config(tiny_model, file)
    first = table_of(read(made, tables))
    os.truncate(first.folder / TABLE, 1000)
    second = table_of(read(made, tables))
    assert second.folder != first.folder
    assert f"{first.folder} cannot be read" in caplog.text
    (second.folder / CONTENTS).write_text("{}")
    assert len(table_of(read(made, tables))) == NUM_ROWS


def test_a_file_that_changes_while_it_is_read_is_refused(tiny_model: Path, file: Path, tables: PromptTables) -> None:
    made = config(tiny_model, file)

    def rows() -> Any:
        for number, each in enumerate(training_rows(made.data)):
            if number == NUM_ROWS - 1:
                write(file, [row(number) for number in range(5)])
            yield each

    with pytest.raises(DataError, match=r"train.jsonl \(data.train.path\) changed while it was read"):
        encode_prompts(made, rows(), {}, tables)
    assert list(tables.folder.iterdir()) == []


def test_a_file_that_is_replaced_after_its_first_rows_is_refused(
    tiny_model: Path, file: Path, tables: PromptTables
) -> None:
    """No table has the rows of a file that was open under the key of the one that took its name."""
    made = config(tiny_model, file)
    begun = begin(made)
    new = write(file.with_name("new.jsonl"), [row(number) for number in range(500, 500 + NUM_ROWS)])
    new.replace(file)
    with pytest.raises(DataError, match=r"train.jsonl \(data.train.path\) changed while it was read"):
        encode_prompts(made, begun, {}, tables)
    assert list(tables.folder.iterdir()) == []
    assert table_of(read(made, tables))[0].answer == "501"


def test_what_a_killed_trainer_left_is_removed_a_day_later(tiny_model: Path, file: Path, tables: PromptTables) -> None:
    fresh, old = (tables.folder / f"{name}{UNFINISHED}" for name in ("a", "b"))
    for folder in (fresh, old):
        folder.mkdir(parents=True)
        (folder / TABLE).write_bytes(b"")
    for path in (old, old / TABLE):
        at = path.stat().st_mtime - UNFINISHED_SECONDS - 1
        os.utime(path, (at, at))
    read(config(tiny_model, file), tables)
    assert fresh.exists()
    assert not old.exists()


def test_a_folder_that_cannot_be_written_is_named(tiny_model: Path, file: Path, tables: PromptTables) -> None:
    tables.folder.parent.write_text("a file")
    with pytest.raises(PenstockError, match=rf"{re.escape(str(tables.folder))}.*cannot be written.*HF_DATASETS_CACHE"):
        read(config(tiny_model, file), tables)


def test_the_cache_of_datasets_has_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert PromptTables.of_cache().folder == tmp_path / "penstock"


def test_rows_of_a_small_set_are_all_checked_at_once(tiny_model: Path, file: Path) -> None:
    made = config(tiny_model, file)
    assert not begin(made, most=NUM_ROWS).are_many
    begun = begin(made, most=NUM_ROWS - 1)
    assert begun.are_many
    assert list(begun) == load_training_rows(made.data)


def test_rows_that_a_table_stands_for_are_forgotten(tiny_model: Path, file: Path, tables: PromptTables) -> None:
    """And their file is closed, though they were read in part only."""

    def is_open() -> bool:
        return any(os.path.realpath(each) == str(file.resolve()) for each in Path("/proc/self/fd").iterdir())

    made = config(tiny_model, file)
    read(made, tables)
    begun = begin(made)
    prompts = encode_prompts(made, begun, {}, tables)
    assert is_open()
    begun.close()
    assert not is_open()
    assert list(begun) == []
    assert len(prompts.train) == NUM_ROWS


def test_the_key_depends_on_what_makes_prompts(
    tiny_model: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary, made = load_vocabulary(str(tiny_model)), config(tiny_model, file)

    def key(config: Config = made) -> str | None:
        return table_key(config, vocabulary)

    first = key()
    assert first == table_key(made, load_vocabulary(str(tiny_model)))
    assert key(config(tiny_model, file, optimizer={"lr": 1.0}, data={"batch_size": 7})) == first
    others = {
        key(config(tiny_model, file, data={"system_prompt": "s"})),
        key(config(tiny_model, file, data={"train": {"path": str(file), "size": 9}})),
        key(config(tiny_model, file, agent={"environment": "e:E", "max_tokens": 9})),
        key(several(tiny_model, file)),
    }
    template = vocabulary.tokenizer.chat_template
    monkeypatch.setattr(vocabulary.tokenizer, "chat_template", f"{template}x")
    others.add(key())
    monkeypatch.setattr(vocabulary.tokenizer, "chat_template", template)
    assert len(others - {first}) == 5
    os.utime(file, ns=(0, 0))
    assert key() != first

    class Slow:
        """A tokenizer without a form in the library `tokenizers`."""

    assert table_key(made, replace(vocabulary, tokenizer=Slow())) is None


def test_hub_and_made_sets_have_keys_that_stay(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([{"prompt": f"{n}", "answer": "a"} for n in range(9)]).save_to_disk(str(folder))
    vocabulary = load_vocabulary(str(tiny_model))
    for section in (
        {"kind": "huggingface", "path": str(folder)},
        {"kind": "reasoning_gym", "path": "basic_arithmetic", "size": 9},
    ):
        made = config(tiny_model, folder, data={"train": section})
        assert table_key(made, vocabulary) == table_key(made, vocabulary)
    other = config(tiny_model, folder, data={"train": {**section, "seed": 1}})
    assert table_key(other, vocabulary) != table_key(made, vocabulary)


def test_progress_is_logged(
    tiny_model: Path,
    file: Path,
    tables: PromptTables,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "PROGRESS_SECONDS", -1.0)
    with caplog.at_level("INFO"):
        read(config(tiny_model, file), tables)
        unread(config(tiny_model, file), tables)
    assert "1 training prompts made" in caplog.text
    assert f"{NUM_ROWS} training prompts are in a table that was made before" in caplog.text


def test_memory_does_not_grow_with_the_prompts(tiny_model: Path, file: Path, tables: PromptTables) -> None:
    """A hundred draws and a comparison with a held-out prompt, of 300 and of 3000 rows of 2 kB."""

    def held(count: int) -> int:
        write(file, [{"prompt": "1" * 40, "answer": str(n) + "x" * 2000} for n in range(count)])
        made = config(tiny_model, file, data={"shuffle": False})
        table = table_of(read(made, tables))
        tracemalloc.start()
        try:
            draws = Draws(table, Prompts(table, {}, (), (), None).sampling(made), made)
            for number in range(0, count, count // 100):
                draws.ticket(number, attempt=0, policy_version=0)
            assert shared_prompts([EncodedPrompt("2", (2,), "", "", {}, asked="2")], table) == []
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = held(300), held(3000)
    assert large - small < 2700 * 100, "far less than their answers"
