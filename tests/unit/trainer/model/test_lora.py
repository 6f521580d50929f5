"""LoRA: merged weights, the frozen base, the reference, first values, and targets that are refused."""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.config import Config
from penstock.errors import ConfigError
from penstock_trainer.learner import learner as learner_module
from penstock_trainer.learner.learner import Learner
from penstock_trainer.model.loading import load_model
from penstock_trainer.model.lora import Adapter, adapted
from penstock_trainer.weights.files import Format, master_weights
from penstock_trainer.weights.staging import Staging
from tests.unit.trainer.model.adapted_learners import (
    ALPHA,
    RANK,
    adapter_weights,
    copies,
    lora_config,
    same_bits,
    trained,
)
from tests.unit.trainer.trainer_groups import config_for, example_groups, save_tiny_model, tiny_model


def test_before_training_the_base_is_published_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, :4] = torch.tensor([-0.0, 0.0, -1e-42, 1e-42])
    model.save_pretrained(tmp_path / "model")
    plain, adapted_learner = Learner(config_for(tmp_path / "model")), Learner(lora_config(tmp_path / "model"))
    assert same_bits(copies(adapted_learner), copies(plain))
    form = Format("bfloat16", "dithered")
    first, second = (
        Staging(each, tmp_path / name, form).write(0, 1) for name, each in (("a", plain), ("b", adapted_learner))
    )
    assert first == second


def test_published_weights_are_the_closed_form(each_model: Path) -> None:
    base = copies(Learner(config_for(each_model)))
    learner = trained(lora_config(each_model))
    published, adapter = copies(learner), adapter_weights(learner)
    assert list(published) == list(base)
    merged = 0
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.default.weight" not in adapter:
            assert torch.equal(published[name], weight)
            continue
        a, b = (adapter[f"{module}.{each}.default.weight"].double() for each in ("lora_A", "lora_B"))
        expected = weight.double() + ALPHA / RANK * b @ a
        assert not torch.equal(published[name], weight)
        torch.testing.assert_close(published[name].double(), expected, rtol=1e-6, atol=1e-6)
        merged += 1
    assert merged == 14  # seven projections in each of two layers
    assert learner.weights().shapes == {name: weight.shape for name, weight in base.items()}


def test_a_merged_model_computes_what_the_adapted_one_does(each_model: Path, tmp_path: Path) -> None:
    learner = trained(lora_config(each_model))
    learner.save_pretrained(tmp_path / "final", 1)
    merged = Learner(config_for(tmp_path / "final"))
    groups = example_groups(seed=7)
    ours, plain = (each.update(groups, version=0) for each in (learner, merged))
    assert ours.loss == pytest.approx(plain.loss, abs=1e-5)
    for name, value in asdict(plain.statistics).items():
        if value is not None:  # teacher_kl, without a teacher
            assert asdict(ours.statistics)[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_only_the_adapter_is_trained(each_model: Path) -> None:
    learner = trained(lora_config(each_model))
    masters = master_weights(learner._policy.model)
    frozen = {name.replace(".base_layer.", "."): each for name, each in masters.items() if ".lora_" not in name}
    assert same_bits(frozen, master_weights(load_model(str(each_model), "actor.path")))
    first = adapter_weights(Learner(lora_config(each_model)))
    assert {name for name, each in adapter_weights(learner).items() if torch.equal(each, first[name])} == set()
    assert all(".lora_" in name for name in learner.state() if name.startswith(("model.", "optimizer.")))


@pytest.mark.parametrize("kl", [{"place": "loss"}, {"place": "reward", "estimator": "k1"}])
def test_the_reference_is_the_policy_without_its_adapter(
    each_model: Path, tmp_path: Path, kl: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(each_model, tmp_path / "other")
    loaded: list[str] = []

    def counting(path: str, key: str) -> Any:
        loaded.append(key)
        return load_model(path, key)

    monkeypatch.setattr(learner_module, "load_model", counting)
    document = {**lora_config(each_model, kl_ctl=0.5).model_dump(), "loss": {"kl": kl}}
    runs = []
    for ref in ("", str(each_model), str(other)):
        learner = Learner(Config.model_validate({**document, "ref": {"path": ref}}))
        results = [learner.update(example_groups(seed=step), version=0) for step in range(3)]
        runs.append(([(each.loss, each.grad_norm, each.statistics) for each in results], copies(learner)))
    assert loaded == ["actor.path", "actor.path", "actor.path", "ref.path"]
    for results_of, weights in runs[1:]:
        assert results_of == runs[0][0]
        assert same_bits(weights, runs[0][1])


def test_first_values_depend_on_the_seed_alone(qwen3: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = load_model(str(qwen3), "actor.path")
    adapted(model, lora_config(qwen3, seed=5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = (adapter_weights(Learner(lora_config(qwen3, seed=seed))) for seed in (5, 6))
    own = master_weights(model)
    assert all(torch.equal(own[name], each) for name, each in again.items())
    assert any(not torch.equal(own[name], each) for name, each in other.items())
    assert all(bool(each.any()) == ("lora_A" in name) for name, each in again.items())


def test_low_precision_and_recomputed_activations_train_it_too(qwen3: Path) -> None:
    exact = Learner(lora_config(qwen3, kl_ctl=0.1)).update(example_groups(), version=0)
    document = lora_config(qwen3, kl_ctl=0.1).model_dump()
    document["actor"] |= {"gradient_checkpointing": True}
    recomputed = Learner(Config.model_validate(document)).update(example_groups(), version=0)
    assert recomputed.grad_norm == pytest.approx(exact.grad_norm, rel=1e-5)
    document["actor"] |= {"dtype": "bfloat16"}
    low = Learner(Config.model_validate(document))
    assert low.update(example_groups(), version=0).grad_norm == pytest.approx(exact.grad_norm, rel=0.2)
    assert all(each.dtype == torch.float32 for each in adapter_weights(low).values())


def test_chosen_layers_may_include_an_untied_head(qwen3: Path) -> None:
    learner = trained(lora_config(qwen3, target_modules=["v_proj", "model.layers.1.mlp.down_proj", "lm_head"]))
    modules = {name.partition(".lora_")[0] for name in adapter_weights(learner)}
    layers = {f"model.layers.{number}.self_attn.v_proj" for number in (0, 1)}
    assert modules == layers | {"model.layers.1.mlp.down_proj", "lm_head"}


@pytest.mark.parametrize(
    ("kind", "targets", "seen"),
    [
        ("qwen3", ["q_proj", "query"], r"names 'query', and no linear layer .*: expected some of down_proj, .*q_proj"),
        ("qwen3", ["embed_tokens"], r"names 'embed_tokens', and no linear layer"),
        ("llama", ["lm_head"], r"names 'lm_head', whose weight another layer"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(tmp_path: Path, kind: str, targets: list[str], seen: str) -> None:
    save_tiny_model(tmp_path, kind)
    with pytest.raises(ConfigError, match=r"actor\.lora\.target_modules " + seen):
        Learner(lora_config(tmp_path, target_modules=targets))


def test_without_peft_the_extra_is_named(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"actor\.lora\.rank is 3, .*`pip install 'penstock\[lora\]'`"):
        Learner(lora_config(qwen3))
    Learner(config_for(qwen3))


def test_an_error_while_it_is_off_turns_it_on_again(qwen3: Path) -> None:
    model = load_model(str(qwen3), "actor.path")
    adapter = adapted(model, lora_config(qwen3))
    assert isinstance(adapter, Adapter)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.lora_B.default.weight").fill_(0.5)
    ids = torch.tensor([[3, 4]])
    on = model(input_ids=ids).logits

    def fail() -> None:
        with adapter.off():
            assert not torch.equal(model(input_ids=ids).logits, on)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert torch.equal(model(input_ids=ids).logits, on)
