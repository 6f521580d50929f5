"""Mixtures of experts, recurrent layers and windows: packs equal each sequence alone, in values and gradients."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForConditionalGeneration

from penstock.engine_layers import require_layers
from penstock.errors import ConfigError
from penstock_trainer.batching.batch import Sample
from penstock_trainer.batching.packing import Pack, make_packs, make_separate_packs
from penstock_trainer.batching.rank_shares import share
from penstock_trainer.learner.learner import Learner
from penstock_trainer.model.loading import load_model
from penstock_trainer.model.pack_model import PackModel
from penstock_trainer.weights.files import LazyWeights, master_weights, published_weights
from penstock_trainer.weights.hugging_face import config_json
from tests.unit.trainer.batching.test_packing import objective, samples_of
from tests.unit.trainer.model.adapted_learners import copies, lora_config, trained
from tests.unit.trainer.model.families import (
    FAMILIES,
    HYBRIDS,
    LINEAR,
    MIXTURES,
    NUM_EXPERTS,
    WINDOWS,
    family,
    save_family,
)
from tests.unit.trainer.trainer_groups import SHAPE, config_for, example_groups

TEMPERATURE = 0.7
IDS = [3, 5, 7, 9, 11]


def logprobs_of(model: PreTrainedModel) -> list[float]:
    """Of all of IDS but the first."""
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([IDS])).logits[0], -1)
    return [float(logprobs[row, token]) for row, token in enumerate(IDS[1:])]


def alone(model: PreTrainedModel, sample: Sample) -> Tensor:
    """Log-probabilities of a sample's loss tokens: one sequence, one pass of transformers, nothing around it."""
    ids = torch.tensor([*sample.prompt_ids.tolist(), *sample.token_ids.tolist()])
    logprobs_TV = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0] / TEMPERATURE, -1)
    rows = torch.arange(len(sample.prompt_ids) - 1, len(ids) - 1)
    return logprobs_TV[rows, ids[1:][rows]][torch.from_numpy(sample.loss_mask.copy())]


def packs_of(model: PackModel, samples: tuple[Sample, ...], max_tokens: int) -> list[Pack]:
    make = make_packs if model.shares_prefixes else make_separate_packs
    return make(samples, max_tokens)


@pytest.mark.parametrize("max_tokens", [16, 40, 4096])
@pytest.mark.parametrize("name", FAMILIES)
def test_packs_equal_each_sequence_alone(name: str, max_tokens: int, tmp_path: Path) -> None:
    samples = samples_of(example_groups())
    reference = family(name)
    reference.set_attn_implementation("eager")
    if name not in ("qwen3_5", "mistral"):  # they have no experts
        reference.set_experts_implementation("eager")
    expected = [alone(reference, sample) for sample in samples]
    loss = sum(objective(values, torch.tensor(each.advantage)) for values, each in zip(expected, samples, strict=True))
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, list(reference.parameters()))

    model = PackModel(
        load_model(str(save_family(name, tmp_path)), "actor.path"), dtype=torch.float32, temperature=TEMPERATURE
    )
    assert model.shares_prefixes == (name in MIXTURES)
    seen: list[float] = []
    for pack in packs_of(model, samples, max_tokens):
        values_N = model.token_logprobs(pack)[0][pack.target_N]
        objective(values_N, pack.advantage_N).backward()
        seen += values_N.tolist()
    assert sorted(seen) == pytest.approx(sorted(torch.cat(expected).tolist()), abs=3e-5)
    found = dict(model.model.named_parameters())
    assert found.keys() == dict(reference.named_parameters()).keys()
    for (key, _), gradient in zip(reference.named_parameters(), gradients, strict=True):
        own = found[key].grad
        assert own is not None
        torch.testing.assert_close(own, gradient, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", [*HYBRIDS, *WINDOWS])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_padded_packs_stay_within_the_budget_and_lose_nothing(name: str, num_ranks: int) -> None:
    samples = samples_of(example_groups(num_groups=6))
    shares = [share(samples, 40, rank, num_ranks, shares_prefixes=False) for rank in range(num_ranks)]
    packs = [pack for each in shares for pack in each.packs if pack.num_sequences]
    assert sorted(index for pack in packs for index in pack.indices) == sorted(each.index for each in samples)
    for pack in packs:
        longest = int(pack.positions_P.max()) + 1
        num_sequences = int((pack.positions_P == 0).sum())
        assert num_sequences == pack.num_sequences
        assert num_sequences * longest <= 40


def test_a_trie_is_refused_where_sequences_must_be_apart() -> None:
    model = PackModel(family("qwen3_5"), dtype=torch.float32, temperature=1.0)
    (trie,) = make_packs(samples_of(example_groups()), 4096)
    with pytest.raises(RuntimeError, match="pack of shared prefixes"):
        model.token_logprobs(trie)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next", "qwen3_5", "mistral"])
@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}], ids=str)
def test_two_learners_take_the_same_steps_bit_by_bit(name: str, settings: dict[str, object], tmp_path: Path) -> None:
    """On two threads: nothing depends on which of them adds first."""
    folder = save_family(name, tmp_path)
    actor = {"path": str(folder), "dtype": "float32", "num_threads": 2, "max_tokens_per_micro_batch": 48, **settings}
    config = config_for(folder, actor=actor, rollout={"engine": {"dtype": actor["dtype"]}}, kl_ctl=0.1)
    seen = []
    for _ in range(2):
        learner = Learner(config)
        results = [learner.update(example_groups(seed=seed), version=0) for seed in range(2)]
        assert all(each.changed and each.is_finite for each in results)
        seen.append((learner.fingerprint(), [each.loss for each in results]))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next", "qwen3_5", "mistral"])
def test_an_adapter_is_merged_into_the_weights_of_the_folder(name: str, tmp_path: Path) -> None:
    """Each fused weight is made once for all of its experts."""
    folder = save_family(name, tmp_path / "model")
    learner = trained(lora_config(folder))
    base = load_file(folder / "model.safetensors")
    published = copies(learner)
    changed = {key for key, value in published.items() if not torch.equal(value, base[key].float())}
    assert published.keys() == base.keys()
    assert any("q_proj" in key for key in changed)
    assert not any("experts" in key or "conv1d" in key for key in changed)  # no linear layers
    learner.save_pretrained(tmp_path / "final", 1)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32).eval()
    assert learner.sequence_logprobs(IDS) == pytest.approx(logprobs_of(again), abs=3e-5)


@pytest.mark.parametrize("name", ["qwen3_moe with a dense layer", "qwen3_next"])
def test_parts_of_experts_are_no_targets(name: str, tmp_path: Path) -> None:
    """Also of a dense layer or of a shared expert, which are linear layers."""
    with pytest.raises(ConfigError, match=r"names 'gate_proj' of a Qwen3.*outside of its experts"):
        Learner(lora_config(save_family(name, tmp_path), target_modules=["q_proj", "gate_proj"]))


def test_a_fused_weight_is_gathered_once_for_its_experts(tmp_path: Path) -> None:
    model = load_model(str(save_family("qwen3_moe", tmp_path)), "actor.path")
    made: list[str] = []

    def make(name: str) -> Tensor:
        made.append(name)
        return master_weights(model)[name]

    lazy = LazyWeights(model, master_weights(model), make)
    expected = published_weights(model)
    assert list(lazy) == list(expected)
    assert all(torch.equal(lazy[name], expected[name]) for name in lazy)
    assert sorted(made) == sorted(master_weights(model))
    again = next(iter(lazy))
    assert torch.equal(lazy[again], expected[again])


@pytest.mark.parametrize("name", FAMILIES)
def test_published_weights_are_those_of_the_folder(name: str, tmp_path: Path) -> None:
    """Per expert and under the names of the checkpoint, which an engine loads; an export loads again."""
    folder = save_family(name, tmp_path / "model")
    learner = Learner(config_for(folder))
    files = load_file(folder / "model.safetensors")
    published = learner.weights()
    assert {key: tuple(shape) for key, shape in published.shapes.items()} == {
        key: tuple(value.shape) for key, value in files.items()
    }
    for key, value in files.items():
        assert torch.equal(published[key].float(), value.float()), key
    learner.update(example_groups(), version=0)
    learner.save_pretrained(tmp_path / "final", 1)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32).eval()
    assert learner.sequence_logprobs(IDS) == pytest.approx(logprobs_of(again), abs=3e-5)


def test_a_model_with_an_eye_keeps_the_names_of_its_folder(tmp_path: Path) -> None:
    """Only its text is trained and pushed; an engine keeps what is not pushed."""
    torch.manual_seed(0)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
    config = Qwen3_5Config(text_config={**SHAPE, **LINEAR}, vision_config={**vision, "num_position_embeddings": 16})
    Qwen3_5ForConditionalGeneration(config).float().save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    published = Learner(config_for(tmp_path)).weights()
    assert set(published) == {key for key in files if not key.startswith("model.visual.")}
    assert all(torch.equal(published[key], files[key]) for key in published)


REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "a cap after the projection": (Gemma2Config(**SHAPE, query_pre_attn_scalar=8), "with a plain projection"),
    "no SDPA": (GptOssConfig(**SHAPE, num_local_experts=4), "scaled_dot_product_attention"),
    "no attention": (MambaConfig(vocab_size=48, hidden_size=24, num_hidden_layers=2), "scaled_dot_product_attention"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("config", "seen"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_cannot_be_right_is_refused(config: PreTrainedConfig, seen: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"^actor\.path is .*{seen}"):
        load_model(str(tmp_path), "actor.path")


def test_experts_are_published_one_by_one(tmp_path: Path) -> None:
    """As SGLang's `make_expert_params_mapping` names them; in memory transformers fuses them."""
    learner = Learner(config_for(save_family("qwen3_moe", tmp_path)))
    experts = {key for key in learner.weights() if ".experts." in key}
    assert experts == {
        f"model.layers.{layer}.mlp.experts.{number}.{part}_proj.weight"
        for layer in range(2)
        for number in range(NUM_EXPERTS)
        for part in ("gate", "up", "down")
    }


@pytest.mark.parametrize("name", HYBRIDS)
def test_the_order_of_layers_is_exported_as_engines_read_it(name: str, tmp_path: Path) -> None:
    """Also by a key that transformers drops when it loads a model without `layer_types`, as Qwen3-Next is published."""
    save_family(name, tmp_path)
    published = json.loads((tmp_path / "config.json").read_text())
    del published["layer_types"]
    (tmp_path / "config.json").write_text(json.dumps({**published, "full_attention_interval": 2}))
    exported = config_json(load_model(str(tmp_path), "actor.path"), "float32")
    (tmp_path / "config.json").write_bytes(exported)
    assert json.loads(exported)["layer_types"] == ["linear_attention", "full_attention"]
    require_layers(str(tmp_path), "actor.path")
