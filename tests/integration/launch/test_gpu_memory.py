"""Launches whose processes need more memory than their GPUs have, or share one: by a stand-in for nvidia-smi."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.gpus import FakeGpu, host_with_gpus
from tests.integration.launch.launch_setup import LaunchSetup
from tests.integration.launch.test_gpus import RECORD
from tests.integration.launch.user_commands import UserCommands
from tests.patience import START_SECONDS

pytestmark = pytest.mark.redis

SEVEN_BILLION = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
}


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[LaunchSetup]:
    setup = LaunchSetup(tmp_path)
    yield setup
    setup.end()


def test_a_launch_that_surely_does_not_fit_starts_nothing(setup: LaunchSetup) -> None:
    setup.environ = host_with_gpus(setup.folder / "bin", [FakeGpu()] * 2)
    model = setup.folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SEVEN_BILLION))
    process = setup.launch("--actor.path", str(model))
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 2
    assert "penstock: config: GPU 1 (NVIDIA H100 80GB HBM3) has 79.6 GiB, and weights, moments and" in output
    assert "  trainer  moments" in output
    assert [entry.name for entry in setup.run_folder.iterdir()] == [".lock"]
    words = ("config", "--config", "config.yaml", "--actor.path", str(model))
    output, _ = setup.command(*words, "--actor.lora.rank", "16").communicate(timeout=START_SECONDS)
    assert "# memory of GPU 1: trainer " in output
    assert "key-value cache" in output


@pytest.mark.slow
def test_an_engine_that_shares_a_gpu_is_bounded_by_its_cache(tmp_path: Path, tiny_model: Path) -> None:
    """A whole run of real services with an engine that records what it was started with."""
    run = UserCommands(tmp_path, tiny_model)
    run.environ = host_with_gpus(tmp_path / "bin", [FakeGpu()])
    run.use_pure_engine(RECORD)
    try:
        code, output = run.launch()
    finally:
        run.end()
    assert code == 0, output
    assert "the engine that shares a GPU runs with --rollout.engine.memory_fraction" in output
    (arguments,) = (
        path.read_text().split() for path in tmp_path.glob("python.*.arguments") if "--port" in path.read_text()
    )
    given = dict(pairwise(arguments))
    assert 0.9 < float(given["--mem-fraction-static"]) < 1
    assert int(given["--max-total-tokens"]) > 0
