"""What a user sees after each common mistake, with real processes: one clear line, a non-zero exit, never a hang.

Each mistake is made as a newcomer would make it, in a configuration file that is correct otherwise.
"""

import shutil
import socket
import sys

import pytest
from transformers import AutoTokenizer

from penstock.broker import connect
from penstock.config import Config
from tests.integration.launch.user_commands import (
    UserCommands,
    assert_launch_ends,
    assert_one_line,
    ended,
    said,
    without_torch,
)
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
    if module != "penstock_trainer":  # which names mistakes in prompts first
        without_torch(setup)
    assert_one_line(setup.run(module), QUEUE_EXIT, "queue: redis.url redis://127.0.0.1:1/0: no answer within 1 s")


def test_a_wrong_password_of_the_queue_is_named(setup: UserCommands) -> None:
    setup.document["redis"]["password"] = "wrong"
    assert_one_line(setup.run("penstock_reward"), CONFIG_EXIT, "redis.url", "set redis.password")


@pytest.mark.parametrize("words", [("penstock_launch", "launch", "local"), *((module,) for module in SERVICES)])
@pytest.mark.parametrize("token", ["hush\ntoken", "hush-token-\u00e9"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_printed(
    setup: UserCommands, words: tuple[str, ...], token: str
) -> None:
    setup.document["token"] = token
    code, output = setup.run(*words)
    assert_one_line((code, output), CONFIG_EXIT, "config: token: saw a secret; character", "visible ASCII")
    assert "hush" not in output


@pytest.mark.parametrize("words", [("penstock_launch", "launch", "local"), *((module,) for module in SERVICES)])
@pytest.mark.parametrize("url", ["redis://:hu/sh@127.0.0.1:1", "redis://127.0.0.1:1/0?password=hu/sh&protocol=3"])
def test_a_queue_url_that_would_be_misread_is_refused_and_its_password_not_printed(
    setup: UserCommands, words: tuple[str, ...], url: str
) -> None:
    setup.document["redis"] = {"url": url}
    code, output = setup.run(*words)
    assert_one_line((code, output), CONFIG_EXIT, "config: redis.url: saw 'redis://", "expected")
    assert "hu" not in output.replace("**********", "")


@pytest.mark.parametrize("words", [("penstock_launch", "launch", "local"), ("penstock_reward",)])
@pytest.mark.parametrize("url", ["redis://:hu%2Fsh@127.0.0.1:1", "redis://127.0.0.1:1?password=hu%2Fsh"])
def test_the_password_in_the_url_of_an_unreachable_queue_is_not_printed(
    setup: UserCommands, words: tuple[str, ...], url: str
) -> None:
    setup.document["redis"] = {"url": url, "timeout_seconds": 1}
    break_sglang(setup)
    code, output = setup.run(*words)
    assert code == QUEUE_EXIT, output
    assert "**********" in output
    assert "hu%2Fsh" not in output
    assert "hu/sh" not in output


@pytest.mark.parametrize("module", ["penstock_trainer", "penstock_rollout"])
def test_a_missing_model_folder_is_named(setup: UserCommands, module: str) -> None:
    setup.document["actor"]["path"] = "./models/none"
    assert_one_line(setup.run(module), CONFIG_EXIT, "actor.path is './models/none', which does not exist", "expected")


def test_a_trainer_that_is_to_use_a_gpu_and_sees_none_is_named(setup: UserCommands) -> None:
    setup.environ["CUDA_VISIBLE_DEVICES"] = ""
    setup.document["trainer"] = {"device": "cuda"}
    assert_one_line(
        setup.run("penstock_trainer"), CONFIG_EXIT, "trainer.device is cuda, and torch", "or trainer.device cpu"
    )


def test_a_row_without_prompt_is_named(setup: UserCommands) -> None:
    setup.write_rows({"prompt": "1+1=", "answer": "2"}, {"question": "1+2=", "answer": "3"})
    assert_one_line(
        setup.run("penstock_trainer"), CONFIG_EXIT, "train.jsonl line 2: no `prompt` among `question`, `answer`"
    )


@pytest.mark.parametrize(
    ("row", "seen"),
    [
        ({"prompt": "a\ud83d", "answer": "1"}, "`prompt` has a lone surrogate"),
        ({"prompt": "a", "answer": "\ud83d"}, "`answer` has a lone surrogate"),
        ({"prompt": "a", "answer": float("nan")}, "`answer` is nan"),
        ({"prompt": "a", "answer": "1", "reward": "exact"}, "the reward 'exact' (str) does not exist"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_before_a_model_is_loaded(
    setup: UserCommands, row: dict[str, object], seen: str
) -> None:
    setup.write_rows({"prompt": "1+1=", "answer": "2"}, row)
    setup.document["redis"] = {"url": "redis://127.0.0.1:1/0", "timeout_seconds": 600}  # what comes after would wait
    assert_one_line(setup.run("penstock_trainer"), CONFIG_EXIT, f"train.jsonl line 2: {seen}")


def test_a_prompt_longer_than_the_context_is_named(setup: UserCommands) -> None:
    setup.write_rows({"prompt": "1+1=", "answer": "2"}, {"prompt": "1+" * 130, "answer": "3"})
    assert_one_line(
        setup.run("penstock_trainer"),
        CONFIG_EXIT,
        "train.jsonl line 2: the prompt has 260 tokens: expected at most 246",
        "rollout.engine.context_length",
    )


def test_a_prompt_whose_completion_the_engine_would_cut_is_named(setup: UserCommands) -> None:
    """SGLang takes it, and generates as much as its key-value cache holds."""
    setup.write_rows({"prompt": "1+1=", "answer": "2"}, {"prompt": "1+1+1=", "answer": "3"})
    setup.document["rollout"]["engine"]["max_total_tokens"] = 64
    setup.document["sampling"]["max_new_tokens"] = 54
    assert_one_line(
        setup.run("penstock_trainer"),
        CONFIG_EXIT,
        "train.jsonl line 2: the prompt has 6 tokens: expected at most 4",
        "rollout.engine.max_total_tokens",
    )


@pytest.mark.parametrize(
    ("template", "options", "seen"),
    [
        (
            "{{ messages[0].content }}{{ 1 // (messages[0].content | length - 2) }}",
            {},
            "data: train.jsonl line 2: the chat template in actor.path refuses",
        ),
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", {}, "data: train.jsonl line 1: the chat template in"),
        ("{{ messages[0].content }}{{ mood }}", {"mod": 1}, "config: data.template_options holds 'mod'"),
    ],
)
def test_a_chat_that_the_template_cannot_take_is_named_before_a_model_is_loaded(
    setup: UserCommands, template: str, options: dict[str, object], seen: str
) -> None:
    setup.write_rows(*({"prompt": [{"role": "user", "content": text}], "answer": ""} for text in ("a", "of")))
    model = setup.folder / "model"
    shutil.copytree(setup.document["actor"]["path"], model, ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "chat_template.jinja").write_text(template)
    setup.document["actor"]["path"] = str(model)
    setup.document["data"]["template_options"] = options
    setup.document["redis"] = {"url": "redis://127.0.0.1:1/0", "timeout_seconds": 600}  # what comes after would wait
    assert_one_line(setup.run("penstock_trainer"), CONFIG_EXIT, seen, "expected")


def test_a_prompt_with_a_token_that_the_model_lacks_is_named(setup: UserCommands) -> None:
    folder = setup.folder / "more-tokens"
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
    assert_one_line(setup.run("penstock_rollout"), ENGINE_EXIT, "has no package `sglang`", "penstock envs")


def break_sglang(setup: UserCommands) -> None:
    python = setup.folder / "python"
    python.write_text(BROKEN_SGLANG)
    python.chmod(0o755)
    setup.document["rollout"]["engine"] |= {"python": str(python), "start_attempts": 2}


def test_a_sglang_that_does_not_start_shows_the_end_of_its_log(setup: UserCommands) -> None:
    break_sglang(setup)
    code, output = setup.run("penstock_rollout")
    assert code == ENGINE_EXIT, output
    first, *others = said(output).splitlines()
    assert first.startswith(
        "rollout: engine_start: the engine did not start, 2 times in a row (rollout.engine.start_attempts); "
        "the last time: SGLang ended with code 1; the end of runs/"
    )
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
        "engine_start: the engine did not start, 2 times in a row",
        "ImportError: libcudart.so.12",
    )


def test_launch_ends_with_the_message_about_an_unreachable_queue(setup: UserCommands) -> None:
    setup.document["redis"] = {"url": "redis://127.0.0.1:1/0", "timeout_seconds": 1}
    break_sglang(setup)
    assert_launch_ends(setup.launch(), QUEUE_EXIT, "penstock: queue: redis.url redis://127.0.0.1:1/0: no answer within")


@pytest.mark.parametrize("epochs", [8, 1])
async def test_a_reward_function_that_raises_ends_the_run_with_its_reason(setup: UserCommands, epochs: int) -> None:
    """With 1 epoch the draws end before the limit on failures is reached."""
    setup.score_by("strict", OWN_REWARD)
    setup.document["total_train_epochs"] = epochs
    async with serving(FakeSGLang()) as url:
        setup.start_services(url)
        trainer = setup.start("penstock_trainer")
        code = await ended(trainer)
    assert trainer.stdout is not None
    assert_one_line((code, trainer.stdout.read()), STALL_EXIT, "stall: ", "reward", "own:strict", "KeyError: 'units'")


async def test_an_engine_without_room_for_any_completion_is_named(setup: UserCommands) -> None:
    """Its cache is sized by its own host's memory, and no configuration shows it."""
    fake = FakeSGLang()
    fake.cache_tokens = 10
    async with serving(fake) as url:
        setup.document["rollout"]["engine"] = {"url": url}
        rollout = setup.start("penstock_rollout")
        code = await ended(rollout)
    assert rollout.stdout is not None
    texts = ("sampling.max_new_tokens is 4", "at most 4 tokens", "rollout.engine.max_total_tokens")
    assert_one_line((code, rollout.stdout.read()), CONFIG_EXIT, *texts)


async def test_a_prompt_longer_than_the_engines_context_is_a_dead_letter(setup: UserCommands) -> None:
    """The engine was started by someone else, with a shorter context than the model's."""
    rows = [{"prompt": "1+" * 50, "answer": "2"}] * 2
    setup.write_rows(*rows)
    setup.document["total_train_epochs"] = 1
    async with serving(FakeSGLang()) as url:
        setup.start_services(url)
        trainer = setup.start("penstock_trainer")
        code = await ended(trainer)
    assert trainer.stdout is not None
    assert_one_line(
        (code, trainer.stdout.read()), STALL_EXIT, "2 poison", "100 tokens", "rollout.engine.context_length"
    )
    queue = await connect(Config.model_validate(setup.document))
    try:
        assert (await queue.depths())["dead"] == len(rows)
    finally:
        await queue.close()
