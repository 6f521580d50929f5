"""What a user sees of each common mistake, through the real processes: one clear line, a non-zero exit, never a hang.

Each mistake is made as a newcomer makes it, in a configuration file that is right otherwise.
"""

import asyncio
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from penstock.broker import connect
from penstock.broker.embedded import EmbeddedServer
from penstock.config import Config
from tests.integration.launch.user_commands import END_SECONDS, UserCommands, assert_launch_ends, assert_one_line, said
from tests.patience import START_SECONDS
from tests.unit.rollout.test_fake_engine import FakeSGLang, serving

pytestmark = [pytest.mark.redis, pytest.mark.slow]

CONFIG_EXIT, STALL_EXIT, QUEUE_EXIT, ENGINE_EXIT = 2, 3, 4, 6

# Answers the probe like an environment with SGLang; the server itself ends at once.
BROKEN_SGLANG = """#!/bin/sh
if [ "$1" = "-c" ]; then echo '["0.5.21", false]'; exit 0; fi
for i in 1 2 3 4 5 6 7 8 9; do echo "  File line $i" >&2; done
echo "ImportError: libcudart.so.12: cannot open shared object file" >&2
exit 1
"""

OWN_REWARD = """
def strict(prompt, completion, answer, metadata):
    raise KeyError("units")
"""


@pytest.fixture
def setup(tmp_path: Path, tiny_model: Path, redis_server: EmbeddedServer) -> Iterator[UserCommands]:
    setup = UserCommands(tmp_path, tiny_model, redis_server)
    yield setup
    for process in setup.started:
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


SERVICES = ("penstock_trainer", "penstock_reward", "penstock_rollout")


@pytest.mark.parametrize("module", SERVICES)
def test_a_wrong_key_is_named_with_the_nearest_one(setup: UserCommands, module: str) -> None:
    setup.document["actor"]["group_sise"] = 4
    name = module.removeprefix("penstock_")
    assert_one_line(
        setup.run(module), CONFIG_EXIT, f"{name}: config: actor.group_sise: no such key", "mean actor.group_size?"
    )


def test_a_wrong_value_is_named_with_what_was_expected(setup: UserCommands) -> None:
    setup.document["actor"]["group_size"] = "many"
    assert_one_line(setup.run("penstock_reward"), CONFIG_EXIT, "actor.group_size: saw 'many'", "integer")


@pytest.mark.parametrize("module", SERVICES)
def test_an_occupied_port_is_named(setup: UserCommands, module: str) -> None:
    section = module.removeprefix("penstock_")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        setup.document.setdefault(section, {})["port"] = port
        assert_one_line(
            setup.run(module), CONFIG_EXIT, f"{section}.port: cannot listen on 127.0.0.1:{port}", "expected a free port"
        )


@pytest.mark.parametrize("module", SERVICES)
def test_an_unreachable_queue_is_named(setup: UserCommands, module: str) -> None:
    setup.document["redis"] = {"url": "redis://127.0.0.1:1/0", "timeout_seconds": 1}
    assert_one_line(setup.run(module), QUEUE_EXIT, "queue: redis.url redis://127.0.0.1:1/0: no answer within 1 s")


def test_a_wrong_password_of_the_queue_is_named(setup: UserCommands) -> None:
    setup.document["redis"]["password"] = "wrong"
    assert_one_line(setup.run("penstock_reward"), CONFIG_EXIT, "redis.url", "set redis.password")


@pytest.mark.parametrize("module", ["penstock_trainer", "penstock_rollout"])
def test_a_missing_model_folder_is_named(setup: UserCommands, module: str) -> None:
    setup.document["actor"]["path"] = "./models/none"
    assert_one_line(setup.run(module), CONFIG_EXIT, "actor.path is './models/none', which does not exist", "expected")


def test_a_row_without_prompt_is_named(setup: UserCommands) -> None:
    setup.write_rows({"prompt": "1+1=", "answer": "2"}, {"question": "1+2=", "answer": "3"})
    assert_one_line(
        setup.run("penstock_trainer"), CONFIG_EXIT, "train.jsonl line 2: no `prompt` among `question`, `answer`"
    )


def test_a_prompt_longer_than_the_context_is_named(setup: UserCommands) -> None:
    setup.write_rows({"prompt": "1+1=", "answer": "2"}, {"prompt": "1+" * 130, "answer": "3"})
    assert_one_line(
        setup.run("penstock_trainer"),
        CONFIG_EXIT,
        "train.jsonl line 2: the prompt has 260 tokens: expected at most 252",
        "rollout.engine.context_length",
    )


def test_a_prompt_with_a_token_that_the_model_lacks_is_named(setup: UserCommands, tmp_path: Path) -> None:
    folder = tmp_path / "more-tokens"
    shutil.copytree(setup.document["actor"]["path"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    setup.document["actor"]["path"] = str(folder)
    setup.write_rows({"prompt": "1+1=", "answer": "2"}, {"prompt": "1+<new>=", "answer": "3"})
    assert_one_line(
        setup.run("penstock_trainer"), CONFIG_EXIT, "train.jsonl line 2: the prompt has token id", "actor.path"
    )


def test_a_missing_dataset_is_named(setup: UserCommands) -> None:
    setup.document["data"]["train"]["path"] = "nowhere.jsonl"
    assert_one_line(setup.run("penstock_trainer"), CONFIG_EXIT, "nowhere.jsonl (data.train.path) cannot be read")


def test_an_unknown_reward_function_is_named(setup: UserCommands) -> None:
    setup.document["reward"]["functions"] = {"exact_mach": 1.0}
    assert_one_line(setup.run("penstock_reward"), CONFIG_EXIT, "'exact_mach'", "did you mean 'exact_match'?")


def test_a_reward_module_that_cannot_be_imported_is_named(setup: UserCommands) -> None:
    setup.document["reward"]["functions"] = {"nowhere:strict": 1.0}
    assert_one_line(setup.run("penstock_reward"), CONFIG_EXIT, "nowhere:strict", "No module named 'nowhere'")


def test_a_python_without_sglang_is_named(setup: UserCommands) -> None:
    assert_one_line(setup.run("penstock_rollout"), ENGINE_EXIT, "rollout.engine.python: 'no-such-python' is no exec")
    setup.document["rollout"]["engine"]["python"] = sys.executable
    assert_one_line(setup.run("penstock_rollout"), ENGINE_EXIT, "has no package `sglang`", "make envs")


def break_sglang(setup: UserCommands) -> None:
    python = setup.folder / "python"
    python.write_text(BROKEN_SGLANG)
    python.chmod(0o755)
    setup.document["rollout"]["engine"]["python"] = str(python)


def test_a_sglang_that_does_not_start_shows_the_end_of_its_log(setup: UserCommands) -> None:
    break_sglang(setup)
    code, output = setup.run("penstock_rollout")
    assert code == ENGINE_EXIT, output
    first, *others = said(output).splitlines()
    assert first.startswith("rollout: engine_start: SGLang ended with code 1; the end of runs/")
    assert others[-1] == "ImportError: libcudart.so.12: cannot open shared object file"


def test_an_engine_url_where_nothing_answers_is_named(setup: UserCommands) -> None:
    setup.document["rollout"]["engine"] = {"url": "http://127.0.0.1:1", "start_timeout_seconds": 1}
    assert_one_line(setup.run("penstock_rollout"), ENGINE_EXIT, "rollout.engine.url: nothing answers like SGLang")


def test_launch_ends_with_the_message_about_a_missing_model(setup: UserCommands) -> None:
    setup.embed_queue()
    break_sglang(setup)
    setup.document["actor"]["path"] = "./models/none"
    result = setup.launch()
    assert_launch_ends(result, CONFIG_EXIT, "actor.path is './models/none', which does not exist: expected")


def test_launch_ends_with_the_message_about_a_row_without_prompt(setup: UserCommands) -> None:
    setup.embed_queue()
    setup.write_rows({"question": "1+2=", "answer": "3"})
    setup.document["rollout"]["engine"] = {"url": "http://127.0.0.1:1", "start_timeout_seconds": START_SECONDS}
    assert_launch_ends(setup.launch(), CONFIG_EXIT, "train.jsonl line 1: no `prompt` among")


def test_launch_ends_with_the_message_about_an_occupied_port(setup: UserCommands) -> None:
    setup.embed_queue()
    setup.document["rollout"]["engine"] = {"url": "http://127.0.0.1:1", "start_timeout_seconds": START_SECONDS}
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        setup.document["reward"]["port"] = other.getsockname()[1]
        assert_launch_ends(setup.launch(), CONFIG_EXIT, "reward: config: reward.port: cannot listen on 127.0.0.1:")


def test_launch_ends_with_the_message_about_a_sglang_that_does_not_start(setup: UserCommands) -> None:
    setup.embed_queue()
    break_sglang(setup)
    assert_launch_ends(
        setup.launch(),
        ENGINE_EXIT,
        "its inference engine does not start",
        "engine_start: SGLang ended with code 1",
        "ImportError: libcudart.so.12",
    )


def test_launch_ends_with_the_message_about_an_unreachable_queue(setup: UserCommands) -> None:
    setup.document["redis"] = {"url": "redis://127.0.0.1:1/0", "timeout_seconds": 1}
    assert_launch_ends(setup.launch(), QUEUE_EXIT, "penstock: queue: redis.url redis://127.0.0.1:1/0: no answer within")


async def _ended(process: "subprocess.Popen[str]", seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        assert time.monotonic() < deadline, "the process did not end in time"
        await asyncio.sleep(0.1)
    assert process.stdout is not None
    return process.stdout.read()


@pytest.mark.parametrize("epochs", [8, 1])
async def test_a_reward_function_that_raises_ends_the_run_with_its_reason(setup: UserCommands, epochs: int) -> None:
    """With 1 epoch the draws end before the limit on failures is reached."""
    (setup.folder / "own.py").write_text(OWN_REWARD)
    setup.document["reward"]["functions"] = {"own:strict": 1.0}
    setup.document["total_train_epochs"] = epochs
    async with serving(FakeSGLang()) as url:
        setup.document["rollout"]["engine"] = {"url": url}
        for module in ("penstock_reward", "penstock_rollout"):
            setup.start(module)
        trainer = setup.start("penstock_trainer")
        output = await _ended(trainer, END_SECONDS)
    assert_one_line((trainer.returncode, output), STALL_EXIT, "stall: ", "reward", "own:strict", "KeyError: 'units'")


async def test_a_prompt_longer_than_the_engines_context_is_a_dead_letter(setup: UserCommands) -> None:
    """The engine was started by someone else, with a shorter context than the model's."""
    rows = [{"prompt": "1+" * 50, "answer": "2"}] * 2
    setup.write_rows(*rows)
    setup.document["total_train_epochs"] = 1
    async with serving(FakeSGLang()) as url:
        setup.document["rollout"]["engine"] = {"url": url}
        for module in ("penstock_reward", "penstock_rollout"):
            setup.start(module)
        trainer = setup.start("penstock_trainer")
        output = await _ended(trainer, END_SECONDS)
    assert_one_line((trainer.returncode, output), STALL_EXIT, "2 poison", "100 tokens", "rollout.engine.context_length")
    queue = await connect(Config.model_validate(setup.document))
    try:
        assert (await queue.depths())["dead"] == len(rows)
    finally:
        await queue.close()
