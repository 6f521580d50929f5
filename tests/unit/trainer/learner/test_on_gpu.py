"""The learner on a GPU that is only pretended: each tensor is on the right device, and the numbers are the CPU's."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.update import StepResult
from penstock_trainer.model import pack_model
from penstock_trainer.weights.files import Format, digests
from tests.pretend_gpu import PretendedTensor, pretended_gpu
from tests.unit.trainer.trainer_groups import VOCAB_SIZE, config_for, example_groups

FLOAT32: dict[str, Any] = {"dtype": "float32"}
EVERYTHING: dict[str, Any] = {
    "kl_ctl": 0.1,
    "loss": {
        "surrogate": "gspo",
        "proximal": "recomputed",
        "num_minibatches": 2,
        "entropy_bonus": 0.01,
        "kl": {"estimator": "k2", "importance_weighted": True},
        "correction": {"weight": "sequence_tis", "gates": ["geometric", "veto", "opsm", "m2po"]},
    },
    "optimizer": {"lr": 1e-3, "max_grad_norm": 0.1, "ess_base": 0.9},
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": (FLOAT32, {}),
    "every term": (FLOAT32, EVERYTHING),
    "KL in the reward": (FLOAT32, {"kl_ctl": 0.1, "loss": {"kl": {"place": "reward", "estimator": "k1"}}}),
    "approximated": (FLOAT32, {"loss": {"proximal": "approximated", "correction": {"weight": "mask"}}}),
    "several packs": ({**FLOAT32, "max_tokens_per_micro_batch": 16}, {}),
    "recomputed activations": ({**FLOAT32, "gradient_checkpointing": True}, {}),
    "an adapter": ({**FLOAT32, "lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]}}, {"kl_ctl": 0.1}),
    "bfloat16": ({"dtype": "bfloat16"}, {"rollout": {"engine": {"dtype": "bfloat16"}}}),
}


def trained(learner: Learner) -> StepResult:
    learner.update(example_groups(), version=0)
    return learner.update(example_groups(seed=1), version=1)


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_that_of_the_cpu(each_model: Path, case: str) -> None:
    actor, sections = CASES[case]
    config = config_for(each_model, actor={"path": str(each_model), **actor}, **sections)
    here = Learner(config)
    expected = trained(here)
    with pretended_gpu():
        there = Learner(config)
        assert there.device == "cuda"
        assert all(isinstance(each, PretendedTensor) for each in there._policy.model.parameters())
        seen = trained(there)
        logprobs = there.sequence_logprobs((4, 5, 6, 7))
    tolerance = 2e-2 if case == "bfloat16" else 2e-4  # of attention's, which sums in another order
    assert seen.changed
    assert seen.grad_norm == pytest.approx(expected.grad_norm, rel=tolerance)
    assert seen.statistics.entropy == pytest.approx(expected.statistics.entropy, rel=tolerance)
    assert logprobs == pytest.approx(here.sequence_logprobs((4, 5, 6, 7)), rel=tolerance)


def test_a_head_in_chunks(each_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(each_model)
    expected = trained(Learner(config))
    monkeypatch.setitem(pack_model.MAX_LOGIT_BYTES, "cuda", 4 * VOCAB_SIZE * 3)
    with pretended_gpu():
        assert trained(Learner(config)).grad_norm == pytest.approx(expected.grad_norm, rel=2e-4)


@pytest.mark.parametrize("form", ["float32 nearest", "bfloat16 nearest", "bfloat16 dithered"])
def test_published_bytes_are_those_of_the_cpu(each_model: Path, form: str) -> None:
    config = config_for(each_model)
    expected = digests(Learner(config).weights(), Format.of(form))
    with pretended_gpu():
        assert digests(Learner(config).weights(), Format.of(form)) == expected


def test_a_checkpoint_of_a_gpu_goes_on_anywhere(each_model: Path, tmp_path: Path) -> None:
    config, folder = config_for(each_model), tmp_path / "checkpoint"
    folder.mkdir()
    with pretended_gpu():
        learner = Learner(config)
        learner.update(example_groups(), version=0)
        copy = learner.snapshot(folder)
        assert not any(isinstance(each, PretendedTensor) for each in copy.state.values())
        expected = learner.update(example_groups(seed=1), version=1)
    copy.write(folder)
    learner = Learner(config)
    learner.load(folder)
    assert learner.update(example_groups(seed=1), version=1).grad_norm == pytest.approx(expected.grad_norm, rel=2e-4)
    with pretended_gpu():
        learner = Learner(config)
        learner.load(folder)
        again = learner.update(example_groups(seed=1), version=1)
    assert again.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)


def test_settings_that_change_take_the_state_along(each_model: Path) -> None:
    first, second = config_for(each_model), config_for(each_model, optimizer={"lr": 2e-3})
    results = []
    for changes in (False, True):
        with pretended_gpu():
            learner = Learner(second if not changes else first)
            if changes:
                learner.use(second, num_steps=4)
            results.append(learner.update(example_groups(), version=0))
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-6)


def test_the_time_of_the_optimizer_is_that_of_its_kernels(each_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run on after the call that started them."""
    with pretended_gpu():
        learner = Learner(config_for(each_model))
        kernels = SimpleNamespace(synchronize=lambda: time.sleep(0.2))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: kernels)
        assert learner.update(example_groups(), version=0).seconds["optimizer"] >= 0.2


def test_a_tensor_on_the_wrong_device_is_refused() -> None:
    with pretended_gpu():
        there = torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
            _ = there + torch.ones(3)
        with pytest.raises(TypeError, match=r"Tensor\.cpu\(\) first"):
            there.numpy()
        assert (there + torch.tensor(1.0)).tolist() == [2.0, 2.0, 2.0]  # of one number: CUDA takes it
