"""LoRA: merged weights, the frozen base, the reference, checkpoints, export, and what is refused."""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from penstock.config import Config
from penstock.errors import ConfigError
from penstock.settings import load_config
from penstock_launch.__main__ import run
from penstock_trainer import learner as learner_module
from penstock_trainer.adapter import Adapter, adapted
from penstock_trainer.checkpoint import CheckpointMeta, Checkpoints
from penstock_trainer.checkpoint_state import read_shapes
from penstock_trainer.learner import Learner
from penstock_trainer.model import load_model
from penstock_trainer.staging import Staging
from penstock_trainer.weight_files import Format, master_weights
from tests.unit.test_trainer_export import write_config
from tests.unit.trainer_groups import config_for, example_groups, save_tiny_model, tiny_model

RANK, ALPHA = 3, 12


@pytest.fixture(params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model with tied embeddings, and one without."""
    return save_tiny_model(tmp_path / "model", request.param)


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", "qwen3")


def lora_config(folder: Path, *, kl_ctl: float = 0.0, seed: int = 0, **lora: Any) -> Config:
    actor = {"path": str(folder), "dtype": "float32", "lora": {"rank": RANK, "alpha": ALPHA, **lora}}
    optimizer = {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 2}
    return config_for(folder, actor=actor, kl_ctl=kl_ctl, optimizer=optimizer, run={"seed": seed})


def trained(config: Config, num_steps: int = 3) -> Learner:
    learner = Learner(config)
    for step in range(num_steps):
        assert learner.update(example_groups(seed=step), version=0).changed
    return learner


def copies(learner: Learner) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in learner.weights().items()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(
        torch.equal(left[name].view(torch.int32), right[name].view(torch.int32)) for name in left
    )


def adapter_weights(learner: Learner) -> dict[str, Tensor]:
    return {
        name.removeprefix("model."): tensor.clone()
        for name, tensor in learner.state().items()
        if name.startswith("model.")
    }


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


def test_published_weights_are_the_closed_form(folder: Path) -> None:
    base = copies(Learner(config_for(folder)))
    learner = trained(lora_config(folder))
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


def test_a_merged_model_computes_what_the_adapted_one_does(folder: Path, tmp_path: Path) -> None:
    learner = trained(lora_config(folder))
    learner.save_pretrained(tmp_path / "final")
    merged = Learner(config_for(tmp_path / "final"))
    groups = example_groups(seed=7)
    ours, plain = (each.update(groups, version=0) for each in (learner, merged))
    assert ours.loss == pytest.approx(plain.loss, abs=1e-5)
    for name, value in asdict(plain.statistics).items():
        assert asdict(ours.statistics)[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_the_final_folder_holds_merged_weights_and_the_adapter(folder: Path, tmp_path: Path) -> None:
    learner = trained(lora_config(folder))
    learner.save_pretrained(tmp_path / "final")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    published = learner.weights()
    for name, weight in merged.state_dict().items():
        assert name not in published or torch.equal(weight, published[name])
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[3, 9, 4, 11]])
    with torch.no_grad():
        expected, plain = merged(input_ids=ids).logits, base(input_ids=ids).logits
        found = PeftModel.from_pretrained(base, tmp_path / "final" / "adapter")(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - plain).abs().max() > 1e-2


def test_only_the_adapter_is_trained(folder: Path) -> None:
    learner = trained(lora_config(folder))
    masters = master_weights(learner._policy.model)
    frozen = {name.replace(".base_layer.", "."): each for name, each in masters.items() if ".lora_" not in name}
    assert same_bits(frozen, master_weights(load_model(str(folder), "actor.path")))
    first = adapter_weights(Learner(lora_config(folder)))
    assert {name for name, each in adapter_weights(learner).items() if torch.equal(each, first[name])} == set()
    assert all(".lora_" in name for name in learner.state() if name.startswith(("model.", "optimizer.")))


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_the_reference_is_the_policy_without_its_adapter(
    folder: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    loaded: list[str] = []

    def counting(path: str, key: str) -> Any:
        loaded.append(key)
        return load_model(path, key)

    monkeypatch.setattr(learner_module, "load_model", counting)
    document = {**lora_config(folder, kl_ctl=0.5).model_dump(), "loss": {"kl": {"place": place}}}
    runs = []
    for ref in ("", str(folder), str(other)):
        learner = Learner(Config.model_validate({**document, "ref": {"path": ref}}))
        results = [learner.update(example_groups(seed=step), version=0) for step in range(3)]
        runs.append(([(each.loss, each.grad_norm, each.statistics) for each in results], copies(learner)))
    assert loaded == ["actor.path", "actor.path", "actor.path", "ref.path"]
    for results_of, weights in runs[1:]:
        assert results_of == runs[0][0]
        assert same_bits(weights, runs[0][1])


def test_a_checkpoint_holds_the_adapter_alone_and_continues_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    config = lora_config(folder, kl_ctl=0.1)
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
    learner.save_pretrained(tmp_path / "final")
    words = ["--actor.lora.rank", str(RANK), "--actor.lora.alpha", str(ALPHA), "--out", str(tmp_path / "out")]
    assert run([*write_config(tmp_path, dtype), *words]) == 0
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "final" / name).read_bytes()
    assert set(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()) == set(learner.weights())


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


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        (["--actor.lora.target_modules", "[q_proj, v_proj]"], {}, ("q_proj", "v_proj")),
        ([], {"PENSTOCK_ACTOR__LORA__TARGET_MODULES": '["q_proj"]'}, ("q_proj",)),
        ([], {"PENSTOCK_ACTOR__LORA__TARGET_MODULES": "all-linear"}, "all-linear"),
        (["--actor.lora.rank", "-1"], {}, "actor.lora.rank: saw -1"),
        (["--actor.lora.alpha", "0"], {}, "actor.lora.alpha: saw 0"),
        (["--actor.lora.target_modules", "q_proj"], {}, "saw 'q_proj'"),
        (["--actor.lora.target_modules", "[]"], {}, "actor.lora.target_modules is empty and actor.lora.rank 8"),
        (["--actor.lora.dropout", "0.1"], {}, "actor.lora.dropout: no such key"),
    ],
)
def test_the_section_is_checked(tmp_path: Path, words: list[str], environment: dict[str, str], expected: Any) -> None:
    (tmp_path / "config.yaml").write_text(
        "actor: {path: some/model, lora: {rank: 8}}\ndata: {train: {path: prompts.jsonl}}\n"
    )
    arguments = ["--config", str(tmp_path / "config.yaml"), *words]
    if isinstance(expected, str) and expected != "all-linear":
        with pytest.raises(ConfigError) as error:
            load_config(arguments, environment)
        assert expected in str(error.value)
    else:
        assert load_config(arguments, environment).actor.lora.target_modules == expected


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
