"""`penstock check`: what is shown if all is well, and that nothing is left. Mistakes: `test_typical_mistakes`."""

import socket

import psutil
import pytest

from penstock_launch.check.rewards import MOST_LOST
from tests.integration.launch.test_doctor import lines_of
from tests.integration.launch.test_errors import CONFIG_EXIT
from tests.integration.launch.user_commands import UserCommands, checked, without_torch

pytestmark = [pytest.mark.redis, pytest.mark.slow]


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
    assert found["prompts"] == ("not looked at", "first correct model")
    assert found["rewards"][0] == "ok", "its rows are plain text, which needs no model"


def test_one_look_names_all_problems_that_do_not_depend_on_each_other(user: UserCommands) -> None:
    user.document["rollout"]["engine"]["python"] = "nowhere/python"
    user.score_by("strict", "def strict(prompt, completion, answer, metadata):\n    raise KeyError('units')\n")
    user.write_rows({"prompt": "1+1=", "answer": "2"}, {"prompt": "1+" * 130, "answer": "3"})
    code, output = checked(user)
    found = lines_of(output)
    assert code == CONFIG_EXIT, output
    assert [name for name, (verdict, _) in found.items() if verdict == "problem"] == ["SGLang", "rewards", "prompts"]


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
    assert len(left) == 2 * MOST_LOST
    assert not [pid for pid in left if lives(pid)]


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_the_configuration_is_printed_with_warnings_of_what_is_not_there(user: UserCommands) -> None:
    """It may be meant for another host."""
    user.document["actor"]["path"] = "./none"
    code, output = checked(user, "config")
    assert code == 0, output
    assert "penstock: warning: model: actor.path is './none', which does not exist" in output
