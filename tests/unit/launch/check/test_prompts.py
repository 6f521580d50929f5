"""Prompts as the check shows them: by the functions of the trainer, with a real tokenizer."""

import json
import shutil
from pathlib import Path

import pytest

from penstock.config import Config
from penstock_launch.check import few_rows, prompts
from penstock_launch.check.prompts import NUM_TIMED, every, prompt_lines, view
from penstock_launch.doctor.report import Line
from penstock_trainer.data.prompts import EncodedPrompt
from penstock_trainer.data.tokenizer import load_vocabulary


def config(folder: Path, model: Path, *rows: dict[str, object], **sections: object) -> Config:
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "actor": {"path": str(model)},
        "sampling": {"max_new_tokens": 4},
        "data": {"train": {"path": str(folder / "d.jsonl")}, "batch_size": 2},
        **sections,
    }
    return Config.model_validate(document)


ROWS: list[dict[str, object]] = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+10=", "answer": "11"}]


def by_subject(lines: list[Line]) -> dict[str, Line]:
    return {line.what: line for line in lines}


def test_two_prompts_and_all_lengths_are_shown(tmp_path: Path, tiny_model: Path) -> None:
    found = by_subject(prompt_lines(config(tmp_path, tiny_model, *ROWS, {"prompt": "1+", "answer": "3"})))
    assert [*found] == ["prompt 1", "prompt 2", "lengths"]
    assert found["prompt 1"].seen == "'1+1=' (4 tokens)"
    assert "3 prompts of 2 to 5 tokens (median 4)" in found["lengths"].seen
    assert "at most 9 of 250 that an engine takes" in found["lengths"].seen


@pytest.mark.parametrize(
    ("sections", "texts"),
    [
        ({"rollout": {"engine": {"context_length": 14}}}, ("line 2: the prompt has 5 tokens: expected at most 4",)),
        ({"rollout": {"engine": {"max_total_tokens": 14}}}, ("line 2: the prompt has 5 tokens: expected at most 4",)),
    ],
    ids=["context", "key-value cache"],
)
def test_what_the_trainer_would_refuse_is_a_problem(
    tmp_path: Path, tiny_model: Path, sections: dict[str, object], texts: tuple[str, ...]
) -> None:
    [line] = prompt_lines(config(tmp_path, tiny_model, *ROWS, **sections))
    assert line.verdict == "problem"
    for text in texts:
        assert text in line.seen


def test_prompts_that_are_left_out_are_a_warning(tmp_path: Path, tiny_model: Path) -> None:
    shown = config(
        tmp_path, tiny_model, *ROWS, {"prompt": "1+", "answer": "3"}, rollout={"engine": {"context_length": 14}}
    )
    dropping = shown.model_copy(update={"data": shown.data.model_copy(update={"too_long": "drop"})})
    found = by_subject(prompt_lines(dropping))
    assert (found["too long"].verdict, found["lengths"].verdict) == ("warning", "ok")
    assert "1 of 3 in data.train (33.3%:" in found["too long"].seen
    assert "line 2) are longer than engines generate to the end" in found["too long"].seen
    assert "2 prompts of 2 to 4 tokens" in found["lengths"].seen


def test_of_more_rows_than_there_is_time_for_each_nth_is_looked_at(tmp_path: Path, tiny_model: Path) -> None:
    assert [every(1000, 0.01, seconds) for seconds in (60, 10, 5, 4)] == [1, 1, 2, 3]
    rows: list[dict[str, object]] = [{"prompt": "1+1=" * (1 + number % 2), "answer": ""} for number in range(NUM_TIMED)]
    rows += [{"prompt": "1+1=", "answer": ""}] * NUM_TIMED
    found = by_subject(prompt_lines(config(tmp_path, tiny_model, *rows), seconds=1e-9))
    assert "2 prompts of 4 to 4 tokens" in found["lengths"].seen
    assert found["lengths"].seen.endswith("Looked at: 1 row of 500, since all would take too long here.")
    assert "1000 prompts" in by_subject(prompt_lines(config(tmp_path, tiny_model, *rows)))["lengths"].seen
    short = config(tmp_path, tiny_model, *rows, rollout={"engine": {"context_length": 13}})
    [line] = prompt_lines(short, seconds=1e-9)
    assert line.verdict == "problem"
    assert "2 of 2 in data.train (100.0%: " in line.seen
    assert "Looked at: 1 row of 500" in line.seen


def test_of_a_very_large_set_the_first_rows_are_looked_at(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "MOST_ROWS", 2)
    found = by_subject(prompt_lines(config(tmp_path, tiny_model, *ROWS, {"prompt": "not read"})))
    assert found["lengths"].seen.endswith("Of data.train: the first 2 rows; the trainer looks at all.")
    whole = {"path": str(tmp_path / "d.jsonl"), "size": 2}
    asked = config(tmp_path, tiny_model, *ROWS, *ROWS, data={"train": whole, "batch_size": 2})
    assert "first 2 rows" not in by_subject(prompt_lines(asked))["lengths"].seen


def test_a_context_beyond_the_model_is_a_warning(tmp_path: Path, tiny_model: Path) -> None:
    sections = {"rollout": {"engine": {"context_length": 100_000}}}
    lines = [line for line in prompt_lines(config(tmp_path, tiny_model, *ROWS, **sections)) if line.verdict != "ok"]
    assert [(line.verdict, line.what) for line in lines] == [("warning", "lengths")]
    assert "rollout.engine.context_length is 100000: expected at most 256" in lines[0].seen


def test_a_chat_is_shown_as_the_template_renders_it_and_a_reward_gets_the_same_text(
    tmp_path: Path, tiny_model: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}1{{ m.content }}+{% endfor %}=")
    rows: list[dict[str, object]] = [{"prompt": [{"role": "user", "content": "2"}], "answer": ""}] * 2
    seen = config(tmp_path, model, *rows)
    assert [sample.prompt for sample in few_rows.samples(seen, few_rows.of_sets(seen))] == ["12+="] * 2
    assert by_subject(prompt_lines(seen))["prompt 1"].seen == "'12+=' (4 tokens)"


def test_a_long_prompt_is_cut_in_its_middle(tmp_path: Path, tiny_model: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "1+" * 90 + "2=", "answer": ""}] * 2
    whole = by_subject(prompt_lines(config(tmp_path, tiny_model, *rows)))["prompt 1"].seen
    assert whole == f"'{'1+' * 90}2=' (182 tokens)"
    prompt = EncodedPrompt("1+" * 500 + "\n2=", (), "", "", {})
    text = view(prompt, load_vocabulary(str(tiny_model)))
    assert (text.startswith("'1+1+"), "characters ...]" in text, text.endswith("\\n2='")) == (True, True, True)
    assert len(text) < len(prompt.text)
