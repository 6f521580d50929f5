"""The typical mistakes of a new user: each is answered with what was seen, what was expected and the key to change.

The one list of them; docs/mistakes.md says to users what to do. That an answer comes within seconds is shown by what it
is given without: torch, an engine, a queue. `penstock launch local` begins with the quick part of the same look.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.contracts import PolicyIdentity
from penstock.contracts.ledger import RunRecord, StepRecord, WeightsRecord
from penstock_trainer.checkpoints.journal import Journal
from tests.integration.launch.test_doctor import entries, lines_of
from tests.integration.launch.test_errors import CONFIG_EXIT
from tests.integration.launch.user_commands import UserCommands, checked, said, without_torch

pytestmark = [pytest.mark.redis, pytest.mark.slow]

PAGE = Path(__file__).parents[3] / "docs" / "mistakes.md"
Change = Callable[[UserCommands], None]


def setting(path: str, value: object) -> Change:
    """A change of one key."""

    def change(user: UserCommands) -> None:
        *sections, key = path.split(".")
        node = user.document
        for name in sections:
            node = node.setdefault(name, {})
        node[key] = value

    return change


def rows(*rows: dict[str, object]) -> Change:
    return lambda user: user.write_rows(*rows)


def scored_by(name: str, source: str) -> Change:
    return lambda user: user.score_by(name, source)


def calling(source: str) -> Change:
    """The reward function `f` of this source."""
    return scored_by("f", source)


def giant(user: UserCommands) -> None:
    """A model whose weights nobody's memory holds."""
    folder = user.folder / "giant"
    folder.mkdir()
    shape = json.loads((Path(user.document["actor"]["path"]) / "config.json").read_text())
    sizes = {"hidden_size": 2**18, "intermediate_size": 2**20, "num_hidden_layers": 2**8}
    (folder / "config.json").write_text(json.dumps(shape | sizes))
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    user.document["actor"]["path"] = "giant"


def resumed_with_another_size(user: UserCommands) -> None:
    """A run of a finished step, which the configuration would go on with."""
    journal = Journal(user.run_folder / "steps")
    journal.append(RunRecord("d", 2, 2, 2, 0), WeightsRecord(PolicyIdentity(0, "a"), 0), StepRecord(0, (0,), "f", "d"))
    journal.append(WeightsRecord(PolicyIdentity(1, "b"), 1))
    user.document["actor"]["group_size"] = 4


GOOD: dict[str, object] = {"prompt": "1+1=", "answer": "2"}
RAISES = "def strict(prompt, completion, answer, metadata):\n    raise KeyError('units')\n"
# By mistake: the change, the subject of its line ("" if the configuration is refused), and what the answer holds.
MISTAKES: dict[str, tuple[Change, str, tuple[str, ...]]] = {
    "model": (setting("actor.path", "runs/smol"), "model", ("'runs/smol', which does not exist", "Set actor.path")),
    "hub name": (setting("actor.path", "owner/smol"), "model", ("'owner/smol'", "HF_HUB_OFFLINE", "Set actor.path")),
    "data": (
        setting("data.train.path", "no.jsonl"),
        "data.train",
        ("no.jsonl (data.train.path)", "No such file", "Set data.train.path to a JSONL file that is there"),
    ),
    "held-out data": (setting("data.eval", {"path": "no.jsonl"}), "data.eval", ("(data.eval.path) cannot be read",)),
    "column": (
        rows(GOOD, {"question": "1+2=", "answer": "3"}),
        "data.train",
        ("line 2: no `prompt` among `question`", "set data.train.columns.prompt"),
    ),
    "batch": (
        setting("data.batch_size", 64),
        "data.train",
        ("holds 2 prompts and data.batch_size is 64", "Set data.batch_size to at most 2, or add rows to train.jsonl"),
    ),
    "interpreter": (
        setting("rollout.engine.python", "nowhere/python"),
        "SGLang",
        ("rollout.engine.python: 'nowhere/python' is no executable", "penstock envs"),
    ),
    "interpreter without SGLang": (
        setting("rollout.engine.python", sys.executable),
        "SGLang",
        ("has no package `sglang`", "rollout.engine.python"),
    ),
    "built-in reward": (
        setting("reward.functions", {"exact_mach": 1.0}),
        "reward names",
        ("names 'exact_mach'", "did you mean 'exact_match'?"),
    ),
    "folder of rewards": (
        setting("reward.modules_path", "rewards"),
        "reward names",
        ("reward.modules_path is 'rewards'", "expected an existing folder"),
    ),
    "reward module": (
        setting("reward.functions", {"nowhere:strict": 1.0}),
        "reward names",
        ("'nowhere:strict'", "No module named 'nowhere'", "reward.modules_path"),
    ),
    "reward function": (
        setting("reward.functions", {"own:spraed": 1.0}),
        "reward names",
        ("'own:spraed'", "has no attribute 'spraed'", "did you mean 'own:spread'?", "expected"),
    ),
    "reward without its module": (
        setting("reward.functions", {"spread": 1.0}),
        "reward names",
        ("names 'spread'", "did you mean 'own:spread'?"),
    ),
    "folder of data": (
        setting("data.train.path", "dta/train.jsonl"),
        "data.train",
        ("dta/train.jsonl (data.train.path)", "the folder in which the command runs", "did you mean 'train.jsonl'?"),
    ),
    "reward that raises": (
        scored_by("strict", RAISES),
        "rewards",
        ("own:strict: 6 of 6 calls failed", "6 x KeyError: 'units' (own.py:2)", "line 1)", "Correct the function"),
    ),
    "reward that returns text": (
        calling("def f(prompt, completion, answer, metadata):\n    return '1.0'\n"),
        "rewards",
        ("6 of 6 calls failed", "returned str; expected a number", "Correct the function"),
    ),
    "reward that returns nothing": (
        calling("def f(prompt, completion, answer, metadata):\n    completion == answer\n"),
        "rewards",
        ("6 of 6 calls failed", "returned NoneType; expected a number", "Correct the function"),
    ),
    "reward with the parameters of TRL": (
        calling("def f(prompts, completions, **kwargs):\n    return [1.0]\n"),
        "rewards",
        ("its parameters are (prompts, completions, **kwargs)", "expected (prompt, completion, answer, metadata)"),
    ),
    "answer column": (
        rows(GOOD, {"prompt": "1+2=", "solution": "3"}),
        "data.train",
        ("line 2: no `answer` among `prompt`, `solution`", "set data.train.columns.answer"),
    ),
    "reference": (
        lambda user: user.document.update(ref={"path": "runs/ref"}, kl_ctl=0.1),
        "reference",
        ("ref.path is 'runs/ref', which does not exist", "Set ref.path"),
    ),
    "too large a model": (giant, "memory", (": weights, moments and copies", "actor.lora.rank")),
    "resumed with a changed key": (
        resumed_with_another_size,
        "earlier run",
        ("actor.group_size was 2 and is 4", "Expected the values it began with", "another run.name"),
    ),
    "unknown key": (setting("actor.group_sise", 4), "", ("actor.group_sise: no such key", "mean actor.group_size?")),
    "wrong type": (setting("actor.group_size", "many"), "", ("actor.group_size: saw 'many'", "integer")),
    "name of TRL": (setting("learning_rate", 1e-6), "", ("learning_rate: no such key", "is optimizer.lr here")),
    "key with dots": (
        lambda user: user.document.update({"optimizer.lr": 1e-6}),
        "",
        ("optimizer.lr: no such key", "expected it nested", "optimizer: {lr: ...}"),
    ),
    "group of one": (setting("actor.group_size", 1), "", ("actor.group_size: saw 1", "greater than or equal to 2")),
}
WITH_TOKENIZER: dict[str, tuple[Change, str, tuple[str, ...]]] = {
    "long prompt": (
        rows(GOOD, {"prompt": "1+" * 130, "answer": "3"}),
        "prompts",
        (
            "line 2: the prompt has 260 tokens: expected at most 246",
            "1 of 2 in data.train (50.0%: train.jsonl line 2)",
            "rollout.engine.context_length",
        ),
    ),
}
WARNINGS: dict[str, tuple[Change, str, tuple[str, ...]]] = {
    "constant reward": (
        calling("def f(prompt, completion, answer, metadata):\n    return 1.0\n"),
        "rewards",
        ("own:f gives 1 to each of 6 texts", "has no gradient"),
    ),
    "evaluation of training data": (
        setting("data.eval", {"path": "train.jsonl"}),
        "data.eval",
        ("2 of 2 prompts of data.eval are training prompts too", "Give data.eval another split, path or seed"),
    ),
}


@pytest.mark.parametrize("mistake", [*MISTAKES, *WITH_TOKENIZER])
def test_a_mistake_is_answered_with_what_was_seen_what_was_expected_and_the_key(
    user: UserCommands, mistake: str
) -> None:
    change, subject, texts = (MISTAKES | WITH_TOKENIZER)[mistake]
    (user.folder / "runs").mkdir()
    change(user)
    if mistake in MISTAKES:
        without_torch(user)
    before = entries(user.folder)
    code, output = checked(user)
    assert code == CONFIG_EXIT, output
    assert "Traceback" not in output
    answer = output
    if subject:
        verdict, answer = lines_of(output)[subject]
        assert verdict == "problem", output
    for text in texts:
        assert text in answer, output
    assert entries(user.folder) - before <= {"__pycache__"} | {f"__pycache__/{each}" for each in pycache(user)}


@pytest.mark.parametrize("mistake", WARNINGS)
def test_what_trains_but_proves_or_learns_nothing_is_a_warning(user: UserCommands, mistake: str) -> None:
    change, subject, texts = WARNINGS[mistake]
    change(user)
    code, output = checked(user)
    verdict, answer = lines_of(output)[subject]
    assert (code, verdict) == (0, "warning"), output
    for text in texts:
        assert text in answer


def test_the_page_for_users_lists_each_of_them() -> None:
    page = " ".join(PAGE.read_text().split())
    missing = [name for name, (_, _, texts) in (MISTAKES | WITH_TOKENIZER | WARNINGS).items() if texts[0] not in page]
    assert missing == []


def pycache(user: UserCommands) -> set[str]:
    """What Python itself leaves when a module is imported."""
    return {path.name for path in user.folder.glob("__pycache__/own.*.pyc")}


@pytest.mark.parametrize("mistake", ["model", "batch", "interpreter", "reward function", "resumed with a changed key"])
def test_a_launch_is_refused_before_it_starts_anything(user: UserCommands, mistake: str) -> None:
    change, subject, texts = MISTAKES[mistake]
    (user.folder / "runs").mkdir()
    change(user)
    without_torch(user)
    before = entries(user.folder)
    code, output = checked(user, "launch", "local")
    assert code == CONFIG_EXIT, output
    lines = said(output).splitlines()
    assert len(lines) == 3, output
    first, second, last = lines
    assert first == "penstock: config: the run would fail:"
    assert second.startswith(f"  {subject}: ")
    assert texts[0] in second
    assert last == "nothing was started; `penstock check` shows what to do"
    assert entries(user.folder) == before
