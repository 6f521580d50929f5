"""LoRA on disk: the final folder, checkpoints and those that are refused, and export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from penstock.config import Config
from penstock.errors import ConfigError
from penstock_launch.__main__ import run
from penstock_trainer.checkpoints.folders import CheckpointMeta, Checkpoints
from penstock_trainer.checkpoints.tensors import read_shapes
from penstock_trainer.learner.learner import Learner
from tests.unit.trainer.model.adapted_learners import ALPHA, RANK, copies, lora_config, same_bits, trained
from tests.unit.trainer.offline.test_export import write_config
from tests.unit.trainer.trainer_groups import example_groups, tiny_model


def test_the_final_folder_holds_merged_weights_and_the_adapter(each_model: Path, tmp_path: Path) -> None:
    learner = trained(lora_config(each_model))
    learner.save_pretrained(tmp_path / "final", 1)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    published = learner.weights()
    for name, weight in merged.state_dict().items():
        assert name not in published or torch.equal(weight, published[name])
    base = AutoModelForCausalLM.from_pretrained(each_model, dtype=torch.float32)
    ids = torch.tensor([[3, 9, 4, 11]])
    with torch.no_grad():
        expected, plain = merged(input_ids=ids).logits, base(input_ids=ids).logits
        found = PeftModel.from_pretrained(base, tmp_path / "final" / "adapter")(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - plain).abs().max() > 1e-2


def test_a_checkpoint_holds_the_adapter_alone_and_continues_bit_for_bit(each_model: Path, tmp_path: Path) -> None:
    config = lora_config(each_model, kl_ctl=0.1)
    through = trained(config, 2)
    (tmp_path / "checkpoint").mkdir()
    through.snapshot(tmp_path / "checkpoint").write(tmp_path / "checkpoint")
    losses = [through.update(example_groups(seed=step), version=0).loss for step in (2, 3)]
    names = set(read_shapes(tmp_path / "checkpoint"))
    assert {name for name in names if ".lora_" not in name} == {"num_steps", "rng", "lora.alpha", "lora.base"}
    restored = trained(config, 1)
    restored.load(tmp_path / "checkpoint")
    assert [restored.update(example_groups(seed=step), version=0).loss for step in (2, 3)] == losses
    assert same_bits(copies(restored), copies(through))


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"rank": 2}, r"differ in 84 weights and moments, .*: expected the same model and the same actor\.lora"),
        ({"target_modules": ["q_proj"]}, r"differ in .* set actor\.path and actor\.lora back"),
        ({"rank": 0}, r"differ in .* set actor\.path and actor\.lora back"),
        ({"alpha": 5}, r"actor\.lora\.alpha 12, which is 5 now: expected the same"),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(
    qwen3: Path, tmp_path: Path, change: dict[str, Any], seen: str
) -> None:
    Learner(lora_config(qwen3)).snapshot(tmp_path).write(tmp_path)
    with pytest.raises(ConfigError, match=seen):
        Learner(lora_config(qwen3, **change)).load(tmp_path)


def test_a_checkpoint_beside_another_base_is_refused(qwen3: Path, tmp_path: Path) -> None:
    Learner(lora_config(qwen3)).snapshot(tmp_path).write(tmp_path)
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"adapter of other weights than those of actor\.path"):
        Learner(lora_config(tmp_path / "other")).load(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_merges_as_it_was_published(qwen3: Path, tmp_path: Path, dtype: str) -> None:
    document = {**lora_config(qwen3).model_dump(), "rollout": {"engine": {"dtype": dtype}}}
    learner = trained(Config.model_validate(document))
    checkpoints = Checkpoints(tmp_path / "runs" / "r" / "checkpoints", keep=2)
    meta = CheckpointMeta(3, 3, 1, 0, ())
    folder = checkpoints.begin(meta)
    learner.snapshot(folder).write(folder)
    checkpoints.complete(folder, meta)
    learner.save_pretrained(tmp_path / "final", 1)
    words = ["--actor.lora.rank", str(RANK), "--actor.lora.alpha", str(ALPHA), "--out", str(tmp_path / "out")]
    assert run([*write_config(tmp_path, dtype), *words]) == 0
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "final" / name).read_bytes()
    assert set(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()) == set(learner.weights())
