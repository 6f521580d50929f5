"""`penstock doctor` on this machine: a configuration that works, one in which much is wrong, and none."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.broker import Queue, connect
from penstock.config import Config
from tests.integration.launch.test_errors import CONFIG_EXIT
from tests.integration.launch.user_commands import END_SECONDS, UserCommands

pytestmark = [pytest.mark.redis, pytest.mark.slow]

SGLANG = str(Path(__file__).parents[3] / ".venv-sglang" / "bin" / "python")
WIDEST = 108


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} - {"config.yaml"}


def lines_of(output: str) -> dict[str, tuple[str, str]]:
    """By what was looked at: the verdict, and all that is said of it."""
    found: dict[str, tuple[str, str]] = {}
    what = ""
    for line in output.splitlines():
        if begins := re.match(r"  (ok|warning|problem|not looked at) +(\S.*?)  +(\S.*)", line):
            verdict, what, text = begins.groups()
            found[what] = (verdict, text)
        elif what and line.startswith("   "):
            found[what] = (found[what][0], f"{found[what][1]} {line.strip()}")
    return found


def test_a_machine_that_works_has_no_problem(setup: UserCommands, queue: Queue) -> None:
    setup.document["rollout"]["engine"]["python"] = SGLANG
    before = entries(setup.folder)
    code, output = setup.run("penstock_launch", "doctor")
    found = lines_of(output)
    assert (code, [each for each in found.values() if each[0] == "problem"]) == (0, []), output
    assert "\x1b" not in output
    assert max(len(line) for line in output.splitlines() if "  " in line.strip()) <= WIDEST
    assert {"Python", "memory", "NVIDIA driver", "SGLang", "model", "ports", "queue"} <= found.keys()
    assert found["services' packages"][0] == "ok"
    assert found["queue"][1].startswith(("Valkey", "Redis"))
    assert found["model"][0] == "ok"
    assert entries(setup.folder) == before


async def test_it_leaves_nothing_in_the_queue(setup: UserCommands, queue: Queue, queue_config: Config) -> None:
    setup.document["rollout"]["engine"]["python"] = SGLANG
    setup.document["run"]["name"] = "looked-at"
    assert setup.run("penstock_launch", "doctor")[0] == 0
    named = queue_config.model_copy(update={"run": queue_config.run.model_copy(update={"name": "looked-at"})})
    keys = [key async for key in queue.client.scan_iter(match="*looked-at*")]
    assert keys == []
    other = await connect(named)  # which does leave keys: the pattern is right
    try:
        assert [key async for key in queue.client.scan_iter(match="*looked-at*")]
    finally:
        await other.delete_run()
        await other.close()


def test_whatever_is_wrong_is_named_with_what_to_do(setup: UserCommands) -> None:
    model = setup.folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"<html>not found</html>")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        setup.document["trainer"] = {"port": port}
        setup.document["actor"]["path"] = str(model)
        setup.document["redis"] = {"url": "redis://:hush-hush@127.0.0.1:1/0"}
        setup.document["run"]["root"] = "train.jsonl"
        code, output = setup.run("penstock_launch", "doctor")
    assert code == CONFIG_EXIT, output
    assert "Traceback" not in output
    assert "hush-hush" not in output
    found = lines_of(output)
    for what, seen, advice in (
        ("SGLang", "'no-such-python' is no executable", "penstock envs"),
        ("ports", f"127.0.0.1:{port}", "set trainer.port to another port"),
        ("model", "expected a safetensors file", "Set actor.path"),
        ("queue", "@127.0.0.1:1/0: no answer", "change redis.url"),
        ("run.root", "train.jsonl cannot be written", "Set run.root"),
    ):
        verdict, text = found[what]
        assert verdict == "problem", output
        assert seen in text
        assert advice in text
    assert "5 problems" in output.splitlines()[-1]


def test_without_a_configuration_it_looks_at_the_machine(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    done = subprocess.run(
        [sys.executable, "-m", "penstock_launch", "doctor", "--rollout.engine.python", SGLANG],
        cwd=tmp_path,
        env={**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=END_SECONDS,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    found = lines_of(done.stdout)
    assert found["model"] == ("not looked at", "actor.path comes with --config FILE")
    assert found["queue"][1].startswith("a launch starts")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_key_is_refused_as_everywhere(setup: UserCommands) -> None:
    setup.document["trainer"] = {"prt": 1}
    code, output = setup.run("penstock_launch", "doctor")
    assert code == CONFIG_EXIT
    assert "trainer.prt: no such key" in output
