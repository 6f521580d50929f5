"""`penstock check`: the typical mistakes of a new user, what is shown if all is well, and that nothing is left."""

import socket
import sys
from collections.abc import Callable

import psutil
import pytest

from tests.integration.launch.test_doctor import entries, lines_of
from tests.integration.launch.test_errors import CONFIG_EXIT, break_sglang
from tests.integration.launch.user_commands import SPREAD, UserCommands, without_torch

pytestmark = [pytest.mark.redis, pytest.mark.slow]

Change = Callable[[UserCommands], None]


@pytest.fixture
def user(setup: UserCommands) -> UserCommands:
    """With a configuration that has no problem."""
    break_sglang(setup)  # it answers the probe like an environment with SGLang; nothing starts it here
    setup.document["rollout"]["engine"] |= {"dtype": "float32"}
    setup.score_by("spread", SPREAD)
    return setup


def checked(user: UserCommands, *words: str) -> tuple[int, str]:
    """Exit code and output."""
    return user.run("penstock_launch", *(words or ("check",)))


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


GOOD: dict[str, object] = {"prompt": "1+1=", "answer": "2"}
RAISES = "def strict(prompt, completion, answer, metadata):\n    raise KeyError('units')\n"
# By mistake: the change, the subject of its line ("" if the configuration is refused), and what the answer holds.
MISTAKES: dict[str, tuple[Change, str, tuple[str, ...]]] = {
    "model": (setting("actor.path", "runs/smol"), "model", ("'runs/smol', which does not exist", "Set actor.path")),
    "hub name": (setting("actor.path", "owner/smol"), "model", ("'owner/smol'", "HF_HUB_OFFLINE", "Set actor.path")),
    "data": (setting("data.train.path", "no.jsonl"), "data.train", ("no.jsonl (data.train.path)", "No such file")),
    "held-out data": (setting("data.eval", {"path": "no.jsonl"}), "data.eval", ("(data.eval.path) cannot be read",)),
    "column": (
        rows(GOOD, {"question": "1+2=", "answer": "3"}),
        "data.train",
        ("line 2: no `prompt` among `question`", "set data.train.columns.prompt"),
    ),
    "batch": (
        setting("data.batch_size", 64),
        "data.train",
        ("holds 2 prompts and data.batch_size is 64", "lower data.batch_size"),
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
        "rewards",
        ("'nowhere:strict'", "No module named 'nowhere'", "reward.modules_path"),
    ),
    "reward function": (
        setting("reward.functions", {"own:strict": 1.0}),
        "rewards",
        ("'own:strict'", "has no attribute 'strict'", "expected"),
    ),
    "reward that raises": (
        scored_by("strict", RAISES),
        "rewards",
        ("own:strict: 6 of 6 calls failed", "line 1: ", "KeyError: 'units'", "Correct the function"),
    ),
    "unknown key": (setting("actor.group_sise", 4), "", ("actor.group_sise: no such key", "mean actor.group_size?")),
    "wrong type": (setting("actor.group_size", "many"), "", ("actor.group_size: saw 'many'", "integer")),
    "group of one": (setting("actor.group_size", 1), "", ("actor.group_size: saw 1", "greater than or equal to 2")),
}
WITH_TOKENIZER: dict[str, tuple[Change, str, tuple[str, ...]]] = {
    "long prompt": (
        rows(GOOD, {"prompt": "1+" * 130, "answer": "3"}),
        "prompts",
        ("line 2: the prompt has 260 tokens: expected at most 246", "rollout.engine.context_length"),
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


def pycache(user: UserCommands) -> set[str]:
    """What Python itself leaves when a module is imported."""
    return {path.name for path in user.folder.glob("__pycache__/own.*.pyc")}


def test_a_port_in_use_is_named_whatever_else_is_wrong(user: UserCommands) -> None:
    user.document["actor"]["path"] = "./none"
    without_torch(user)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        user.document["trainer"] = {"port": port}
        code, output = checked(user)
    assert code == CONFIG_EXIT, output
    found = lines_of(output)
    verdict, text = found["ports"]
    assert (verdict, f"127.0.0.1:{port}" in text, "set trainer.port" in text) == ("problem", True, True)
    assert found["prompts"] == ("not looked at", "first correct the problem in 'what it names'")


def test_what_works_is_shown_with_prompts_lengths_and_scores(user: UserCommands) -> None:
    user.write_rows(*({"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(12)))
    code, output = checked(user)
    found = lines_of(output)
    assert (code, output.splitlines()[-1].partition(";")[0]) == (0, "No problem, no warning"), output
    assert [*found].index("rewards") < [*found].index("prompt 1") < [*found].index("memory")
    assert "own:spread: no text 0.00, the row's answer " in found["rewards"][1]
    assert "'0+1=' (4 tokens)" in found["prompt 1"][1]
    assert "12 prompts of 4 to 5 tokens (median 4), and up to 4 new ones" in found["lengths"][1]
    assert "at most 9 of 250" in found["lengths"][1]


def test_a_reward_that_hangs_ends_in_time_and_leaves_no_process(user: UserCommands) -> None:
    pids = user.folder / "pids"
    source = (
        "import os, subprocess, time\n"
        "def slow(prompt, completion, answer, metadata):\n"
        "    child = subprocess.Popen(['sleep', '600'])\n"
        f"    open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n{{child.pid}}\\n')\n"
        "    time.sleep(600)\n"
    )
    user.score_by("slow", source)
    user.document["reward"]["timeout_seconds"] = 1
    code, output = checked(user)
    verdict, text = lines_of(output)["rewards"]
    assert (code, verdict) == (CONFIG_EXIT, "problem"), output
    assert "killed after 1 s (reward.timeout_seconds)" in text
    left = [int(pid) for pid in pids.read_text().split()]
    assert len(left) == 2
    assert not [pid for pid in left if lives(pid)]


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("mistake", ["model", "batch", "interpreter"])
def test_a_launch_is_refused_before_it_starts_anything(user: UserCommands, mistake: str) -> None:
    change, subject, texts = MISTAKES[mistake]
    (user.folder / "runs").mkdir()
    change(user)
    without_torch(user)
    code, output = checked(user, "launch", "local")
    assert code == CONFIG_EXIT, output
    first, second, last = output.splitlines()
    assert first == "penstock: config: the run would fail:"
    assert second.startswith(f"  {subject}: ")
    assert texts[0] in second
    assert last == "nothing was started; `penstock check` shows what to do"
    assert list((user.folder / "runs").iterdir()) == []


def test_the_configuration_is_printed_with_warnings_of_what_is_not_there(user: UserCommands) -> None:
    """It may be meant for another host."""
    user.document["actor"]["path"] = "./none"
    code, output = checked(user, "config")
    assert code == 0, output
    assert "penstock: warning: model: actor.path is './none', which does not exist" in output
