"""A teacher: a step against plain forward passes, a policy that comes near it, and what a run of it keeps."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from penstock.config import TeacherSection
from penstock.contracts import ScoredGroup, pack_float32, unpack_float32, unpack_int32
from penstock.errors import ConfigError
from penstock_trainer.batching.packing import pack_of_sequence
from penstock_trainer.checkpoints.tensors import read_shapes
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.recipe import advantage_test, gradient_test
from penstock_trainer.model.pack_model import PackModel
from tests.unit.trainer.trainer_groups import (
    SHAPE,
    VOCAB_SIZE,
    completion,
    config_for,
    example_groups,
    save_tiny_model,
    scored_group,
)

TEMPERATURE = 0.8
PROMPTS = ((4, 5, 6), (7, 8, 9), (10, 11, 12))
ANSWER_TOKENS, COPIES, NUM_STEPS = 3, 6, 40


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "student")


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Another architecture, with the same number of tokens."""
    return save_tiny_model(tmp_path / "teacher", "qwen3")


def plain(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def logprobs(model: PreTrainedModel, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> Tensor:
    """float32[T]: of the tokens behind the prompt, by one forward pass of transformers."""
    ids = torch.tensor([*prompt_ids, *token_ids])
    logits_TV = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt_ids) - 1 : -1] / TEMPERATURE
    found: Tensor = logits_TV.log_softmax(-1).gather(1, ids[len(prompt_ids) :, None])[:, 0]
    return found


def test_a_step_equals_plain_forward_passes(student: Path, teacher: Path) -> None:
    """Loss, norm of the gradient and divergence, with rewards beside the teacher, masks and repeated completions."""
    groups, model, other = example_groups(), plain(student), plain(teacher)
    changes: dict[str, Any] = {
        "sampling": {"temperature": TEMPERATURE},
        "teacher": {"path": str(teacher), "kl_ctl": 0.3, "reward_weight": 0.5},
        "loss": {"surrogate": "cispo", "eps_clip": 0.4, "eps_clip_higher": 0.6},
    }
    learner = Learner(config_for(student, **changes))
    result = learner.update(groups, version=0)
    loss, distances = torch.zeros(()), []
    for group in groups:
        rewards = torch.tensor([score.value for score in group.scores], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        prompt_ids = unpack_int32(group.group.ticket.prompt_ids)
        for each, advantage in zip(group.group.completions, advantages.tolist(), strict=True):
            token_ids = unpack_int32(each.token_ids)
            own = logprobs(model, prompt_ids, token_ids)
            with torch.no_grad():
                distance = own - logprobs(other, prompt_ids, token_ids)
            mask = torch.tensor([bool(bit) for bit in each.loss_mask or b"\1" * len(token_ids)])
            distances += distance.detach()[mask].tolist()
            weight = (own.detach() - torch.tensor(unpack_float32(each.logprobs))).exp().clamp(0.6, 1.6)
            surrogate = -weight * (0.5 * advantage - 0.3 * distance.detach()) * own
            loss = loss + (surrogate * mask).sum() / (len(groups) * len(advantages))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = math.sqrt(sum(float(each.square().sum()) for each in gradients))
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    assert result.statistics.teacher_kl == pytest.approx(sum(distances) / len(distances), rel=1e-4)
    assert result.grad_norm == pytest.approx(norm, rel=1e-3)


def taught(groups: Sequence[ScoredGroup], folder: Path) -> list[ScoredGroup]:
    """The groups with the log-probabilities of the model in a folder, as a server gives them: temperature 1."""
    model, found = PackModel(plain(folder), dtype=torch.float32, temperature=1.0), []
    for group in groups:
        prompt_ids, of_completions = unpack_int32(group.group.ticket.prompt_ids), []
        for each in group.group.completions:
            token_ids = unpack_int32(each.token_ids)
            pack = pack_of_sequence([*prompt_ids, *token_ids])
            with torch.no_grad():
                logprobs_N = model.token_logprobs(pack)[0][pack.target_N]
            of_completions.append(pack_float32(logprobs_N[len(prompt_ids) - 1 :].tolist()))
        found.append(msgspec.structs.replace(group, teacher_logprobs=tuple(of_completions)))
    return found


@pytest.mark.parametrize("max_tokens", [4096, 16])
@pytest.mark.parametrize("loss", [{}, {"num_minibatches": 2, "selection": {"entropy_share": 0.5}}])
def test_a_teacher_that_a_server_has_gives_the_step_of_one_that_the_trainer_loads(
    student: Path, teacher: Path, max_tokens: int, loss: dict[str, Any]
) -> None:
    actor = {"path": str(student), "dtype": "float32", "max_tokens_per_micro_batch": max_tokens}
    weights = {"kl_ctl": 0.3, "reward_weight": 0.5}
    sections: list[dict[str, Any]] = [{"path": str(teacher)}, {"urls": ["http://127.0.0.1:1"]}]
    results, groups = [], taught(example_groups(), teacher)
    for section in sections:
        learner = Learner(config_for(student, actor=actor, teacher=section | weights, loss=loss))
        results.append(learner.update(groups, version=0))
    loaded, served = results
    assert served.statistics.teacher_kl == pytest.approx(loaded.statistics.teacher_kl, rel=1e-4)
    assert served.loss == pytest.approx(loaded.loss, rel=1e-4, abs=1e-6)
    assert served.grad_norm == pytest.approx(loaded.grad_norm, rel=1e-3)
    assert served.num_packs == loaded.num_packs


def test_a_group_that_no_server_was_asked_about_is_no_step(student: Path) -> None:
    learner = Learner(config_for(student, teacher={"urls": ["http://127.0.0.1:1"]}))
    with pytest.raises(ValueError, match=r"ticket 0 has no log-probabilities of a teacher: .* teacher\.urls"):
        learner.update(example_groups(), version=0)


def written(model: PreTrainedModel, generator: torch.Generator, copies: int) -> Tensor:
    """[prompts * copies, prompt and answer]: answers as the policy samples them."""
    ids = torch.tensor(PROMPTS).repeat_interleave(copies, 0)
    with torch.no_grad():
        for _ in range(ANSWER_TOKENS):
            logits_BV = model(input_ids=ids, use_cache=False).logits[:, -1] / TEMPERATURE
            ids = torch.cat([ids, torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)], 1)
    return ids


def groups_of(model: PreTrainedModel, ids: Tensor, copies: int) -> list[ScoredGroup]:
    """A group of each prompt, with rewards that say nothing."""
    groups = []
    for number, prompt_ids in enumerate(PROMPTS):
        rows = ids[number * copies : (number + 1) * copies, len(prompt_ids) :].tolist()
        with torch.no_grad():
            answers = [completion(row, logprobs(model, prompt_ids, row).tolist()) for row in rows]
        groups.append(scored_group(number, prompt_ids, answers, [1.0] * copies))
    return groups


def divergence(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """KL(model, other) in nats a token, over the full vocabulary, where the policy writes."""
    ids = written(model, torch.Generator().manual_seed(99), 32)
    with torch.no_grad():
        own, its = (
            (each(input_ids=ids, use_cache=False).logits[:, -1 - ANSWER_TOKENS : -1] / TEMPERATURE).log_softmax(-1)
            for each in (model, other)
        )
    return float((own.exp() * (own - its)).sum(-1).mean())


@pytest.mark.parametrize("num_minibatches", [1, 3])
def test_a_policy_comes_near_its_teacher_though_rewards_say_nothing(
    student: Path, teacher: Path, num_minibatches: int
) -> None:
    """The further mini-batches of a step are off-policy."""
    config = config_for(
        student,
        sampling={"temperature": TEMPERATURE},
        staleness={"max_staleness": 0},
        teacher={"path": str(teacher), "reward_weight": 0.0},
        loss={"aggregation": "token-mean", "num_minibatches": num_minibatches},
        optimizer={"lr": 1e-2},
    )
    learner, other = Learner(config), plain(teacher)
    generator = torch.Generator().manual_seed(3)
    policy = learner._policy.model
    before = divergence(policy, other)
    seen = []
    for version in range(NUM_STEPS):
        groups = groups_of(policy, written(policy, generator, COPIES), COPIES)
        result = learner.update(groups, version=version)
        assert result.counts.num_degenerate_groups == len(groups)
        assert result.statistics.teacher_kl is not None
        seen.append(result.statistics.teacher_kl)
    assert divergence(policy, other) < before / 2
    assert sum(seen[-5:]) < sum(seen[:5]) / 2
    alone = Learner(config.model_copy(update={"teacher": TeacherSection()}))
    assert not alone.update(groups, version=0).changed  # without it there is nothing to learn


def test_a_teacher_that_is_the_policy_teaches_nothing(student: Path) -> None:
    """At the first step; and on stale groups it pulls the policy back no further than to itself."""
    learner = Learner(config_for(student, teacher={"path": str(student), "reward_weight": 0.0}))
    result = learner.update(example_groups(), version=0)
    assert (result.statistics.teacher_kl, result.loss, result.grad_norm) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"num_minibatches": 2, "proximal": "recomputed", "correction": {"weight": "tis", "gates": ["opsm"]}},
        {"selection": {"covariance": "clip", "covariance_share": 0.2, "covariance_low": 0.01}},
        {"selection": {"entropy_share": 0.5, "covariance": "kl", "covariance_share": 0.2}},
        {"surrogate": "gspo"},
    ],
)
def test_micro_batches_give_the_same_step(student: Path, teacher: Path, loss: dict[str, Any]) -> None:
    results, weights = [], []
    for max_tokens in (4096, 16):
        actor = {"path": str(student), "dtype": "float32", "max_tokens_per_micro_batch": max_tokens}
        learner = Learner(config_for(student, actor=actor, teacher={"path": str(teacher)}, loss=loss))
        results.append(learner.update(example_groups(), version=0))
        weights.append(dict(learner.weights()))
    assert results[0].num_packs < results[1].num_packs
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-5)
    assert results[0].statistics.teacher_kl == pytest.approx(results[1].statistics.teacher_kl, rel=1e-4)
    assert results[0].statistics.masked == pytest.approx(results[1].statistics.masked)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=2e-3)  # Adam: at most twice the rate apart


def test_each_token_of_the_teacher_is_computed_once_a_step(
    student: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three mini-batches with a gate: two passes of the policy for each, one of the teacher."""
    passes: list[str] = []
    computed = PackModel.token_logprobs

    def counted(self: PackModel, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        passes.append(self.model.config.model_type)
        return computed(self, *arguments, **keywords)

    loss = {"num_minibatches": 3, "selection": {"entropy_share": 0.5}}
    learner = Learner(config_for(student, teacher={"path": str(teacher)}, loss=loss))
    monkeypatch.setattr(PackModel, "token_logprobs", counted)
    learner.update(example_groups(num_groups=3), version=0)
    assert (passes.count("llama"), passes.count("qwen3")) == (6, 3)


def test_a_checkpoint_holds_nothing_of_it_and_a_learner_goes_on_bit_identically(
    student: Path, teacher: Path, tmp_path: Path
) -> None:
    config = config_for(student, teacher={"path": str(teacher), "kl_ctl": 0.5})
    learner = Learner(config)
    learner.update(example_groups(), version=0)
    learner.snapshot(tmp_path).write(tmp_path)
    assert {name.partition(".")[0] for name in read_shapes(tmp_path)} == {"model", "optimizer", "num_steps", "rng"}
    again = Learner(config)
    again.load(tmp_path)
    changed = Learner(config_for(student))  # the key changed between two starts
    changed.load(tmp_path)
    changed.use(config, num_steps=0)
    for each in (learner, again, changed):
        each.update(example_groups(seed=1), version=1)
    assert len({each.fingerprint() for each in (learner, again, changed)}) == 1


def test_with_an_adapter_the_base_can_be_the_teacher_without_a_second_copy(student: Path) -> None:
    actor = {"path": str(student), "dtype": "float32", "lora": {"rank": 4}}
    learner = Learner(config_for(student, actor=actor, teacher={"path": str(student)}))
    alone = Learner(config_for(student, actor=actor))
    assert [each.nbytes for each in learner._tensors()] == [each.nbytes for each in alone._tensors()]
    first = learner.update(example_groups(), version=0)
    assert first.statistics.teacher_kl == 0.0
    assert learner.update(example_groups(), version=1).statistics.teacher_kl != 0.0


@pytest.mark.parametrize(("size", "is_refused"), [(VOCAB_SIZE - 1, True), (VOCAB_SIZE + 16, False)])
def test_a_teacher_needs_a_row_for_each_token_of_the_policy_and_may_have_more(
    student: Path, tmp_path: Path, size: int, is_refused: bool
) -> None:
    other = tmp_path / "other"
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": size})).save_pretrained(other)
    config = config_for(student, teacher={"path": str(other)})
    if is_refused:
        with pytest.raises(ConfigError, match=r"actor\.path has 48 tokens and teacher\.path 47"):
            Learner(config)
    else:
        assert Learner(config).update(example_groups(), version=0).changed


def test_groups_of_equal_rewards_have_a_signal(student: Path, teacher: Path) -> None:
    group = scored_group(0, [4], [completion([7, 8], [-3.0, -3.0]), completion([9], [-3.0])], [1.0, 1.0])
    taught, alone = config_for(student, teacher={"path": str(teacher)}), config_for(student)
    for test in (gradient_test, advantage_test):
        assert [test(config)(group) for config in (taught, alone)] == [True, False]
