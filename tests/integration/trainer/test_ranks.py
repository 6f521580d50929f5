"""Two real ranks on the CPU, started by torchrun: they train like one rank, and neither outlives the other."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from penstock.runtime.process import ProcessIdentity, descendants, kill_all
from penstock_trainer.checkpoints.tensors import read_shapes, read_state
from penstock_trainer.learner.learner import Learner
from penstock_trainer.torchrun import torchrun_arguments
from tests.integration.trainer.ranks_worker import CANARY, CASES, NUM_RUN_STEPS, case_config, take_over, train
from tests.patience import START_SECONDS
from tests.unit.trainer.model.families import FAMILIES, save_family
from tests.unit.trainer.trainer_groups import save_tiny_model

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("ranks_worker.py")
EXACT = [name for name, case in CASES.items() if case.dtype == "float32"]


@contextmanager
def torchrun(mode: str, folder: Path) -> "Iterator[subprocess.Popen[str]]":
    """Run two ranks; afterwards no process of them is left."""
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun_arguments(2), str(WORKER), mode, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        identity = ProcessIdentity.of(process.pid)
        try:
            yield process
        finally:
            kill_all({*descendants(process.pid), *([identity] if identity else [])}, grace_seconds=1)


def save_tiny(name: str, folder: Path) -> Path:
    return save_tiny_model(folder, name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train each case with one rank (in this process) and with two."""
    folder = Path(tmp_path_factory.mktemp("ranks"))
    for model in {case.model for case in CASES.values()}:
        (save_family if model in FAMILIES else save_tiny)(model, folder / model)
    for name, case in CASES.items():
        train(Learner(case_config(folder, case), num_steps=NUM_RUN_STEPS), folder / name / "1")
    with torchrun("train", folder) as process:
        output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0, output
    return folder


def results(folder: Path, name: str, num_ranks: int) -> list[dict[str, Any]]:
    document = json.loads((folder / name / str(num_ranks) / "results.json").read_text())
    assert document["continued"] is True  # from a checkpoint that was written during the next step
    found: list[dict[str, Any]] = document["results"]
    return found


def contents(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in full."""
    dtypes = {"num_steps": torch.int64, "rng": torch.uint8, "lora.alpha": torch.int64, "lora.base": torch.int64}
    state = {name: torch.empty(shape, dtype=dtypes.get(name)) for name, shape in read_shapes(folder).items()}
    read_state(folder, state)
    return state


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_train_as_one_does(trained: Path, name: str) -> None:
    weights = [torch.load(trained / name / num_ranks / "weights.pt", weights_only=True) for num_ranks in ("1", "2")]
    assert list(weights[0]) == list(weights[1])
    for key, expected in weights[0].items():
        torch.testing.assert_close(weights[1][key], expected, rtol=0, atol=1e-5)
    one, two = (results(trained, name, num_ranks) for num_ranks in (1, 2))
    for expected, found in zip(one, two, strict=True):
        counted = {"num_packs", "num_rows"}  # the batch is split differently
        assert {key: value for key, value in found.items() if key not in counted} == pytest.approx(
            {key: value for key, value in expected.items() if key not in counted}, rel=1e-3, abs=1e-5, nan_ok=True
        )


@pytest.mark.parametrize("name", list(CASES))
def test_two_ranks_give_each_tokens_log_ratio_as_one_does(trained: Path, name: str) -> None:
    one, two = (
        json.loads((trained / name / num_ranks / "results.json").read_text())["log_ratios"] for num_ranks in ("1", "2")
    )
    tokens = [[value for row in step for each in row for value in each] for step in one]
    assert all(any(map(math.isfinite, step)) for step in tokens[:-1])  # in the last one only a KL term has a gradient
    close = 1e-3 if name in EXACT else math.inf  # in bfloat16 the same tokens have a value
    for expected, found in zip(one, two, strict=True):
        for row, found_row in zip(expected, found, strict=True):
            for values, found_values in zip(row, found_row, strict=True):
                assert found_values == pytest.approx(values, abs=close, rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_go_on_with_other_settings_as_one_does(trained: Path, name: str) -> None:
    one, two = (
        json.loads((trained / name / num_ranks / "results.json").read_text())["other"] for num_ranks in ("1", "2")
    )
    counted = {"num_packs", "num_rows"}
    assert {key: value for key, value in two.items() if key not in counted} == pytest.approx(
        {key: value for key, value in one.items() if key not in counted}, rel=1e-3, abs=1e-5, nan_ok=True
    )
    assert one["learning_rate"] > 2e-3


@pytest.mark.parametrize("name", list(CASES))
def test_the_canary_is_what_the_published_weights_say(trained: Path, name: str) -> None:
    """The canary between two updates is what one rank and transformers compute."""
    one, two = (
        json.loads((trained / name / num_ranks / "results.json").read_text())["canary"] for num_ranks in ("1", "2")
    )
    model = AutoModelForCausalLM.from_pretrained(trained / name / "1" / "final", dtype=torch.float32)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([CANARY])).logits[0, :-1], -1)
    expected = logprobs.gather(1, torch.tensor(CANARY[1:])[:, None])[:, 0].tolist()
    tolerance = 1e-4 if name in EXACT else 0.1
    assert one == pytest.approx(expected, abs=tolerance)
    assert two == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("name", [name for name in CASES if name not in EXACT])
def test_bfloat16_on_two_ranks_is_close(trained: Path, name: str) -> None:
    one, two = (results(trained, name, num_ranks)[0] for num_ranks in (1, 2))
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.2)
    assert math.isfinite(two["loss"])


@pytest.mark.parametrize("name", list(CASES))
def test_what_two_ranks_publish_has_the_names_and_shapes_of_one(trained: Path, name: str) -> None:
    manifests = [
        json.loads((trained / name / num_ranks / "weights" / "00000001.1" / "manifest.json").read_text())
        for num_ranks in ("1", "2")
    ]
    tensors = [{key: (entry["dtype"], entry["shape"]) for key, entry in each["tensors"].items()} for each in manifests]
    assert tensors[0] == tensors[1]
    assert manifests[0]["files"] == manifests[1]["files"]
    configs = [
        (trained / name / num_ranks / "weights" / "00000001.1" / "config.json").read_bytes() for num_ranks in ("1", "2")
    ]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", list(CASES))
def test_a_checkpoint_of_any_number_of_ranks_resumes_on_any_other(trained: Path, name: str, tmp_path: Path) -> None:
    of_one, of_two = trained / name / "1" / "checkpoint", trained / name / "2" / "checkpoint"
    take_over(Learner(case_config(trained, CASES[name])), of_two, tmp_path / "2-on-1")
    assert equal(contents(of_two), contents(tmp_path / "2-on-1"))
    assert equal(contents(of_one), contents(trained / name / "1-on-2"))
    assert int(contents(of_two)["num_steps"]) == int(contents(of_one)["num_steps"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.lora and name in EXACT])
def test_two_ranks_save_the_adapter_that_one_does(trained: Path, name: str) -> None:
    folders = [trained / name / num_ranks / "final" / "adapter" for num_ranks in ("1", "2")]
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    for key, expected in one.items():
        torch.testing.assert_close(two[key], expected, rtol=0, atol=1e-5)
    configs = [(folder / "adapter_config.json").read_bytes() for folder in folders]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.lora])
def test_a_checkpoint_of_two_ranks_holds_no_weight_of_the_base(trained: Path, name: str) -> None:
    names = read_shapes(trained / name / "2" / "checkpoint")
    assert {each for each in names if ".lora_" not in each} == {"num_steps", "rng", "lora.alpha", "lora.base"}


def until(condition: Callable[[], object], timeout_seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [0, 1])
def test_no_rank_outlives_another(tmp_path: Path, victim: int) -> None:
    save_tiny_model(tmp_path / "llama")
    with torchrun("wait", tmp_path) as process:
        files = [tmp_path / f"pid-{rank}" for rank in (0, 1)]
        until(lambda: (tmp_path / "waiting").exists() and all(each.exists() and each.read_text() for each in files))
        ranks = [ProcessIdentity.of(int(each.read_text())) for each in files]
        killed, other = ranks[victim], ranks[1 - victim]
        assert killed is not None
        assert other is not None
        killed.send(signal.SIGKILL)
        until(lambda: not other.alive)
        output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode != 0
    if victim == 0:
        assert "RanksError: rank 1 has lost rank 0" in output


def test_a_rank_that_fails_ends_all_with_its_error(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "llama")
    with torchrun("fail", tmp_path) as process:
        output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode != 0
    assert "KeyError: 'no.such.weight'" in output
