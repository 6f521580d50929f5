"""What `penstock init` writes, used as its user would: the commands that it names, with an engine without a model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.launch.user_commands import END_SECONDS, UserCommands

pytestmark = [pytest.mark.redis, pytest.mark.slow]

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}={{ message.content }}+{% endfor %}"
    "{% if add_generation_prompt %}assistant={% endif %}"
)


def penstock(folder: Path, *words: str) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "penstock_launch", *words]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=END_SECONDS,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("words", [(), ("--agent",)], ids=["reward", "agent"])
def test_what_init_writes_trains(setup: UserCommands, tiny_model: Path, words: tuple[str, ...]) -> None:
    name = f"init-{setup.folder.name}"  # runs of all tests share a queue
    model = setup.folder / "model"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    code, output = penstock(setup.folder, "init", name, "--model", str(model), *words)
    assert code == 0, output
    folder = setup.folder / name
    assert "  penstock launch local --config config.yaml" in output
    setup.use_pure_engine()
    redis = setup.document["redis"]
    code, output = penstock(
        folder,
        *("launch", "local", "--config", "config.yaml"),
        *("--run.max_steps", "2", "--data.batch_size", "2", "--actor.group_size", "2"),
        *("--redis.url", redis["url"], "--redis.password", redis["password"]),
        *("--rollout.engine.python", setup.document["rollout"]["engine"]["python"], "--weights.canary_tokens", "0"),
        *("--rollout.engine.context_length", "256", "--sampling.max_new_tokens", "4"),
        *(("--agent.template", "plain", "--agent.max_tokens", "200", "--agent.sessions", "4") if words else ()),
    )
    assert code == 0, output
    steps = [json.loads(line) for line in (folder / "runs" / name / "steps.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert all(step["statistics"]["num_failed_completions"] == 0 for step in steps)
    if not words:  # of letters at random
        assert 0 < sum(step["reward_mean"] for step in steps) < 1
