"""The learner: determinism, micro-batches, non-finite steps, the reference, checkpoints, warm-up, export."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from penstock.errors import ConfigError, NonFiniteError
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.training_state import NUM_STEPS, OPTIMIZER
from penstock_trainer.weights.files import Format, digests
from tests.unit.trainer.trainer_groups import completion, config_for, example_groups, save_tiny_model, scored_group

BFLOAT16_ENGINE = {"engine": {"dtype": "bfloat16"}}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def snapshot(learner: Learner) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in learner.weights().items()}


def moments(learner: Learner) -> dict[str, Tensor]:
    state = learner.state()
    return {name: tensor.clone() for name, tensor in state.items() if name.startswith((OPTIMIZER, NUM_STEPS))}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_equal_groups_give_bit_identical_weights(model_folder: Path) -> None:
    runs = []
    for _ in range(2):
        learner = Learner(config_for(model_folder))
        results = [learner.update(example_groups(seed=step), version=0) for step in range(3)]
        runs.append((snapshot(learner), [result.loss for result in results]))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_reward_rises_on_a_token_that_is_rewarded(model_folder: Path) -> None:
    learner = Learner(config_for(model_folder, optimizer={"lr": 1e-2}))
    groups = [scored_group(0, [4, 5, 6], [completion([7], [-3.9]), completion([8], [-3.9])], [1.0, 0.0])]
    first = learner.update(groups, version=0)
    later = [learner.update(groups, version=0) for _ in range(3)][-1]
    assert first.changed
    assert later.loss < first.loss
    assert set(first.seconds) == {"pack", "forward_backward", "optimizer"}
    assert 0 < first.statistics.entropy <= math.log(48)


def test_micro_batches_give_the_same_step(model_folder: Path) -> None:
    results, weights = [], []
    for max_tokens in (4096, 16):
        actor = {"path": str(model_folder), "dtype": "float32", "max_tokens_per_micro_batch": max_tokens}
        learner = Learner(config_for(model_folder, actor=actor))
        results.append(learner.update(example_groups(), version=0))
        weights.append(snapshot(learner))
    assert (results[0].num_packs, results[1].num_packs > 1) == (1, True)
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-5)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-4)
    for name, value in asdict(results[0].statistics).items():
        if value is not None:  # teacher_kl, without a teacher
            assert asdict(results[1].statistics)[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


def test_bfloat16_compute_is_close_to_float32(model_folder: Path) -> None:
    actor = {"path": str(model_folder), "dtype": "bfloat16", "gradient_checkpointing": True}
    low = Learner(config_for(model_folder, actor=actor, rollout=BFLOAT16_ENGINE))
    assert all(weight.dtype == torch.float32 for weight in low.weights().values())
    full = Learner(config_for(model_folder)).update(example_groups(), version=0)
    assert low.update(example_groups(), version=0).grad_norm == pytest.approx(full.grad_norm, rel=0.2)


def test_engines_get_the_weights_that_a_bfloat16_trainer_computes_with(model_folder: Path, tmp_path: Path) -> None:
    """Updates below half a step of bfloat16, all in one direction: the trainer's own rounding still hides them."""
    (model_folder / "tokenizer.json").write_text("{}")
    groups = [scored_group(0, [4, 5, 6], [completion([7], [-3.9]), completion([8], [-3.9])], [1.0, 0.0])]

    def learner_of(folder: Path) -> Learner:
        actor = {"path": str(folder), "dtype": "bfloat16"}
        return Learner(config_for(folder, actor=actor, rollout=BFLOAT16_ENGINE, optimizer={"lr": 4e-4}))

    learner = learner_of(model_folder)
    with torch.no_grad():
        for weight in learner.weights().values():
            weight.copy_(weight.bfloat16())
    for _ in range(2):
        learner.update(groups, version=0)
    learner.save_pretrained(tmp_path / "published", 1)
    computed, sampled = (each.sequence_logprobs((4, 5, 6, 7)) for each in (learner, learner_of(tmp_path / "published")))
    assert sampled == pytest.approx(computed, abs=0.1)  # dithered: 0.21, and more with every update


def test_step_with_non_finite_gradient_changes_nothing(model_folder: Path) -> None:
    learner = Learner(config_for(model_folder))
    learner.update(example_groups(), version=0)
    saved_weights, saved = snapshot(learner), moments(learner)
    with torch.no_grad():
        next(iter(learner.weights().values()))[5, 0] = math.nan  # a token that the groups use
    poisoned = snapshot(learner)
    result = learner.update(example_groups(), version=0)
    assert (result.changed, result.is_finite) == (False, False)
    after = snapshot(learner)
    assert all(torch.equal(after[name].nan_to_num(7), poisoned[name].nan_to_num(7)) for name in after)
    assert same(moments(learner), saved)
    assert not same(saved_weights, poisoned)


def test_a_mini_batch_that_is_not_finite_shows_in_the_step(model_folder: Path) -> None:
    """The first of two changes the weights, the second one's gradient is not a number."""
    learner = Learner(config_for(model_folder, loss={"num_minibatches": 2}, optimizer={"lr": 1e30}))
    result = learner.update(example_groups(), version=0)
    assert (result.changed, result.is_finite) == (True, False)
    assert math.isnan(result.grad_norm)


def test_a_learning_rate_that_is_not_finite_changes_nothing(model_folder: Path) -> None:
    """A product of finite settings."""
    learner = Learner(config_for(model_folder, optimizer={"lr": 1e-3}))
    before = snapshot(learner)
    learner._optimizer._section = learner._optimizer._section.model_copy(update={"lr": math.inf})
    result = learner.update(example_groups(), version=0)
    assert (result.changed, result.is_finite) == (False, False)
    assert same(before, snapshot(learner))


@pytest.mark.parametrize(("lr", "rank"), [(3e38, 0), (1e30, 4)])
def test_weights_that_are_not_finite_are_neither_published_nor_saved(
    model_folder: Path, tmp_path: Path, lr: float, rank: int
) -> None:
    """With an adapter its two matrices are finite, and their product is not."""
    actor = {"path": str(model_folder), "dtype": "float32", "lora": {"rank": rank}}
    learner = Learner(config_for(model_folder, actor=actor, optimizer={"lr": lr, "weight_decay": 0.01}))
    (model_folder / "tokenizer.json").write_text("{}")
    learner.save_pretrained(tmp_path / "final", 1)
    saved = (tmp_path / "final" / "model.safetensors").read_bytes()
    assert learner.update(example_groups(), version=0).changed
    for form in (Format("float32", "nearest"), Format("bfloat16", "dithered"), Format("bfloat16", "nearest")):
        with pytest.raises(NonFiniteError, match=r"\.weight holds (nan|inf|-inf), .*optimizer\.lr"):
            digests(learner.weights(), form)
    with pytest.raises(NonFiniteError):
        learner.save_pretrained(tmp_path / "final", 1)
    assert (tmp_path / "final" / "model.safetensors").read_bytes() == saved


def test_batch_without_a_gradient_changes_nothing(model_folder: Path) -> None:
    learner = Learner(config_for(model_folder))
    learner.update(example_groups(), version=0)
    before = snapshot(learner)
    answers = [completion([7, 8], [-3.0, -3.0]), completion([9], [-3.0])]
    result = learner.update(
        [scored_group(0, [4], answers, [1.0, 1.0]), scored_group(1, [5], answers, [None, 2.0])], version=0
    )
    assert (result.changed, result.is_finite, result.num_packs) == (False, True, 0)
    assert result.counts.num_degenerate_groups == 1
    assert same(before, snapshot(learner))


def test_non_finite_behaviour_is_masked_and_counted(model_folder: Path) -> None:
    answers = [completion([7, 8], [math.nan, -3.0]), completion([9], [-math.inf]), completion([6, 5], [-3.0, -3.0])]
    result = Learner(config_for(model_folder)).update([scored_group(0, [4], answers, [1.0, 0.0, 0.4])], version=0)
    assert result.changed
    assert (result.statistics.num_tokens, result.statistics.num_non_finite) == (3, 2)


def test_reference_term_is_zero_at_first_and_pulls_back(model_folder: Path) -> None:
    learner = Learner(config_for(model_folder, kl_ctl=0.5, optimizer={"lr": 1e-2}))
    first = learner.update(example_groups(), version=0)
    second = learner.update(example_groups(), version=0)
    assert first.statistics.reference_kl == pytest.approx(0.0, abs=1e-6)
    assert second.statistics.reference_kl > 1e-4
    plain = Learner(config_for(model_folder, optimizer={"lr": 1e-2}))
    plain.update(example_groups(), version=0)
    assert plain.update(example_groups(), version=0).loss < second.loss


def test_reference_with_another_vocabulary_is_refused(model_folder: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other")
    config = LlamaConfig.from_pretrained(other)
    config.vocab_size = 50
    LlamaForCausalLM(config).save_pretrained(other)
    with pytest.raises(ConfigError, match=r"48 tokens and ref\.path 50"):
        Learner(config_for(model_folder, kl_ctl=0.1, ref={"path": str(other)}))


def test_restored_learner_continues_bit_identically(model_folder: Path, tmp_path: Path) -> None:
    optimizer = {"lr": 1e-3, "warmup_steps": 4, "weight_decay": 0.1}
    whole = Learner(config_for(model_folder, optimizer=optimizer))
    for step in range(2):
        whole.update(example_groups(seed=step), version=0)
    whole.snapshot(tmp_path).write(tmp_path)
    rates = [whole.update(example_groups(seed=step), version=0).learning_rate for step in (2, 3)]

    restored = Learner(config_for(model_folder, optimizer=optimizer))
    restored.update(example_groups(seed=9), version=0)
    restored.load(tmp_path)
    assert [restored.update(example_groups(seed=step), version=0).learning_rate for step in (2, 3)] == rates
    assert rates == pytest.approx([0.75e-3, 1e-3])
    assert same(snapshot(whole), snapshot(restored))


def test_checkpoint_of_another_model_is_refused(model_folder: Path, tmp_path: Path) -> None:
    other = Learner(config_for(save_tiny_model(tmp_path / "other", "qwen3")))
    other.snapshot(tmp_path).write(tmp_path)
    with pytest.raises(ConfigError, match=r"actor\.path differ in .* first model\.lm_head\.weight"):
        Learner(config_for(model_folder)).load(tmp_path)


def test_clipped_gradient_has_the_largest_norm(model_folder: Path) -> None:
    learner = Learner(config_for(model_folder, optimizer={"lr": 1e-3, "max_grad_norm": 1e-3, "beta1": 0.0}))
    result = learner.update(example_groups(), version=0)
    assert result.grad_norm > 1e-3  # reported before clipping
    averages = [moment.flatten() for name, moment in moments(learner).items() if name.endswith(".exp_avg")]
    clipped = torch.cat(averages)  # with beta1 = 0 the gradient itself
    assert clipped.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_tied_weights_are_published_once_and_final_folder_loads(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "tokenizer.json").write_text("{}")
    learner = Learner(config_for(model_folder))
    learner.update(example_groups(), version=0)
    assert "lm_head.weight" not in learner.weights()
    learner.save_pretrained(tmp_path / "final", 1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    own = learner.weights()
    assert all(torch.equal(weight, own[name]) for name, weight in loaded.state_dict().items() if name in own)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert (tmp_path / "final" / "tokenizer.json").exists()


def test_untied_weights_are_all_published(tmp_path: Path) -> None:
    learner = Learner(config_for(save_tiny_model(tmp_path, "qwen3")))
    assert "lm_head.weight" in learner.weights()


OTHER_SETTINGS: dict[str, dict[str, object]] = {
    "optimizer": {"optimizer": {"lr": 3e-3, "beta1": 0.5, "eps": 1e-4, "weight_decay": 0.2, "max_grad_norm": 0.1}},
    "schedule": {"optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 1}},
    "objective": {"loss": {"surrogate": "cispo", "aggregation": "token-mean", "num_minibatches": 2}},
    "reference": {"kl_ctl": 0.2},
    "temperature": {"sampling": {"temperature": 0.5, "max_new_tokens": 64}},
    "type": {"actor": {"dtype": "bfloat16"}, "rollout": BFLOAT16_ENGINE},
    "packs": {"actor": {"dtype": "float32", "max_tokens_per_micro_batch": 24, "gradient_checkpointing": True}},
}


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_other_settings_hold_as_if_a_checkpoint_had_been_loaded_under_them(
    model_folder: Path, tmp_path: Path, name: str, lora: int
) -> None:
    actor: dict[str, object] = {"path": str(model_folder), "dtype": "float32", "lora": {"rank": lora}}
    changes = dict(OTHER_SETTINGS[name])
    before = config_for(model_folder, actor=actor)
    after = config_for(model_folder, **changes | {"actor": actor | dict(changes.get("actor", {}))})  # type: ignore[call-overload]
    going_on = Learner(before, num_steps=5)
    for step in range(2):
        going_on.update(example_groups(seed=step), version=0)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    going_on.snapshot(folder).write(folder)
    begun_anew = Learner(after, num_steps=7)
    begun_anew.load(folder)
    begun_as_before = Learner(before, num_steps=5)
    begun_as_before.load(folder)

    going_on.use(after, num_steps=7)
    results = [each.update(example_groups(seed=2), version=0) for each in (going_on, begun_anew, begun_as_before)]
    assert same(snapshot(going_on), snapshot(begun_anew))
    assert same(moments(going_on), moments(begun_anew))
    assert results[0].learning_rate == results[1].learning_rate
    assert not same(snapshot(going_on), snapshot(begun_as_before)) or name == "packs"


def test_the_same_settings_make_nothing_anew(model_folder: Path) -> None:
    learner = Learner(config_for(model_folder), num_steps=5)
    weights = learner.state()
    learner.use(config_for(model_folder, checkpoint={"every_steps": 3}), num_steps=6)
    assert all(learner.state()[name] is weight for name, weight in weights.items() if name.startswith(OPTIMIZER))
    assert learner.num_steps == 6


def test_the_fingerprint_is_of_the_model_whatever_it_is_published_in(model_folder: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", "qwen3")
    found = {
        Learner(config).fingerprint()
        for config in (
            config_for(model_folder),
            config_for(model_folder, rollout=BFLOAT16_ENGINE),
            config_for(model_folder, actor={"path": str(model_folder), "dtype": "float32", "lora": {"rank": 2}}),
        )
    }
    assert len(found) == 1
    assert Learner(config_for(other)).fingerprint() not in found
