"""What `penstock init` writes: a configuration that loads, nothing over what is there, nothing left after an error."""

import json
import re
from pathlib import Path

import pytest

from penstock.config import Config
from penstock.config.load import load_config
from penstock.errors import ConfigError
from penstock_launch.init import command
from penstock_launch.init.command import SMALL_MODEL, contents, init, run_name, write_new

PYTHON = Path("/somewhere/with blanks: and 'quotes'/python")


def written(folder: Path, *, agent: bool = False, on_gpu: bool = False, python: Path | None = PYTHON) -> Config:
    write_new(folder, contents(folder, agent=agent, model=SMALL_MODEL, python=python, on_gpu=on_gpu))
    return load_config(["--config", str(folder / "config.yaml")], {})


@pytest.mark.parametrize("agent", [False, True])
@pytest.mark.parametrize(("on_gpu", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_the_configuration_loads_and_fits_the_host(tmp_path: Path, agent: bool, on_gpu: bool, dtype: str) -> None:
    config = written(tmp_path / "My task", agent=agent, on_gpu=on_gpu)
    assert (config.actor.dtype, config.rollout.engine.dtype) == (dtype, dtype)
    assert bool(config.rollout.engine.max_total_tokens) is not on_gpu
    assert (config.run.name, config.rollout.engine.python) == ("My-task", str(PYTHON))
    assert config.agent.enabled is agent
    assert config.actor.path == SMALL_MODEL


@pytest.mark.parametrize("on_gpu", [False, True])
def test_keys_that_are_commented_out_can_be_used(tmp_path: Path, on_gpu: bool) -> None:
    written(tmp_path, on_gpu=on_gpu)
    file = tmp_path / "config.yaml"
    used = re.sub(r"^( *)# ([a-z_]+: )", r"\1\2", file.read_text(), flags=re.MULTILINE)
    file.write_text(used.replace("  train: {path: train.jsonl}\n", ""))
    config = load_config(["--config", str(file)], {})
    assert (config.run.max_steps, config.actor.lora.rank, config.tracking.to) == (5, 16, ("tensorboard",))
    assert (config.data.train.kind, config.kl_ctl, config.checkpoint.every_steps) == ("huggingface", 0.001, 50)


def test_rows_differ_and_have_the_answer_that_they_ask_for(tmp_path: Path) -> None:
    written(tmp_path)
    files = (tmp_path / "train.jsonl", tmp_path / "heldout.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(rows) == len({row["answer"] for row in rows}) == 32
    for row in rows:
        assert f"? {row['answer']}\n" in row["prompt"][0]["content"]


def test_nothing_is_overwritten_and_nothing_written_beside_it(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text("mine")
    with pytest.raises(ConfigError, match=r"has rewards\.py already: expected a folder without"):
        init(tmp_path, {}, model=SMALL_MODEL, agent=False)
    assert [path.name for path in tmp_path.iterdir()] == ["rewards.py"]
    assert (tmp_path / "rewards.py").read_text() == "mine"


def test_a_link_to_nowhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "nowhere" / "else")
    with pytest.raises(ConfigError, match="cannot be written"):
        init(tmp_path, {}, model=SMALL_MODEL, agent=False)
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file: cannot be written \(File exists\)"):
        init(tmp_path / "file", {}, model=SMALL_MODEL, agent=False)


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere", "a/b/c", "~/nowhere", "", "a b"])
def test_a_model_that_is_neither_a_folder_nor_a_hub_name(tmp_path: Path, model: str) -> None:
    with pytest.raises(ConfigError, match=r"--model .*no such folder"):
        init(tmp_path / "new", {}, model=model, agent=False)
    assert not (tmp_path / "new").exists()


def test_a_model_folder_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    lines = init(Path("new"), {}, model="model", agent=True)
    assert lines[3:5] == [
        "  cd new",
        "  penstock check --config config.yaml          # tries paths, rewards and prompts, and looks for room",
    ]
    config = load_config(["--config", "new/config.yaml"], {})
    assert config.actor.path == str(tmp_path / "model")


def test_without_sglang_the_user_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_sglang", lambda folder: None)
    lines = init(tmp_path / "new", {}, model=SMALL_MODEL, agent=False)
    assert lines[-1].startswith("No environment of SGLang was found: `penstock envs` makes one")
    assert load_config(["--config", str(tmp_path / "new" / "config.yaml")], {}).rollout.engine.python.startswith(
        ".venv"
    )


@pytest.mark.parametrize(
    ("folder", "name"),
    [("a", "a"), ("My task!", "My-task-"), ("_x", "x"), ("123", "123"), ("\u00e9", "my-run"), ("x" * 99, "x" * 63)],
)
def test_a_run_is_named_after_its_folder(tmp_path: Path, folder: str, name: str) -> None:
    assert run_name(tmp_path / folder) == name
    assert written(tmp_path / folder).run.name == name
