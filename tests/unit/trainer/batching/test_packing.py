"""Trie packing: equal to separate padded passes in log-probabilities and gradients; budget and order."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from penstock.contracts import ScoredGroup
from penstock.errors import ConfigError
from penstock_trainer.batching.batch import BatchRules, Overlong, Sample, make_batch
from penstock_trainer.batching.packing import make_packs
from penstock_trainer.grpo import varies
from penstock_trainer.model.attention import trie_mask
from penstock_trainer.model.loading import load_model
from penstock_trainer.model.pack_model import PackModel
from tests.unit.trainer.trainer_groups import (
    completion,
    example_groups,
    save_tiny_model,
    scored_group,
    tiny_model,
)


def rules(**changed: Any) -> BatchRules:
    return BatchRules(Overlong(max_new_tokens=64), **changed)


def samples_of(groups: list[ScoredGroup]) -> tuple[Sample, ...]:
    return make_batch(groups, rules(with_zero_advantage=True), version=0).samples


def padded_logprobs(model: PreTrainedModel, samples: tuple[Sample, ...], temperature: float) -> list[Tensor]:
    """Log-probabilities of each sample's loss tokens, from one right-padded pass as in other trainers."""
    sequences = [sample.prompt_ids.tolist() + sample.token_ids.tolist() for sample in samples]
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
    attention = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in sequences])
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits / temperature
    logprobs = torch.log_softmax(logits, -1)
    return [
        torch.stack(
            [
                logprobs[row, len(sample.prompt_ids) + t - 1, sample.token_ids[t]]
                for t, is_loss in enumerate(sample.loss_mask)
                if is_loss
            ]
        )
        for row, sample in enumerate(samples)
    ]


def objective(values: Tensor, advantage: Tensor) -> Tensor:
    """A function whose gradient differs at every token."""
    return (values * (advantage + values.detach().sin())).sum()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("max_tokens", [16, 30, 4096])
def test_packs_equal_separate_padded_passes(kind: str, max_tokens: int) -> None:
    model = tiny_model(kind).eval()
    samples = samples_of(example_groups())
    expected = padded_logprobs(model, samples, temperature=0.7)
    loss = sum(objective(values, torch.tensor(each.advantage)) for values, each in zip(expected, samples, strict=True))
    assert isinstance(loss, Tensor)
    expected_gradients = torch.autograd.grad(loss, list(model.parameters()))

    packed = PackModel(model, dtype=torch.float32, temperature=0.7)
    packs = make_packs(samples, max_tokens)
    seen: list[float] = []
    for pack in packs:
        logprobs_U, entropy_R = packed.token_logprobs(pack)
        values_N = logprobs_U[pack.target_N]
        objective(values_N, pack.advantage_N).backward()
        seen += values_N.tolist()
        assert entropy_R.shape == pack.parents_R.shape
        assert pack.num_rows <= max_tokens

    assert sorted(seen) == pytest.approx(sorted(torch.cat(expected).tolist()), abs=2e-5)
    for parameter, expected_gradient in zip(model.parameters(), expected_gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected_gradient, rtol=1e-3, atol=2e-4)


def test_chunks_and_checkpointing_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = samples_of(example_groups())
    (pack,) = make_packs(samples, 4096)

    def run(model: PackModel) -> tuple[Tensor, Tensor, list[Tensor]]:
        logprobs_U, entropy_R = model.token_logprobs(pack, entropy_gradient=True)
        loss = logprobs_U.sin().sum() + entropy_R.cos().sum()
        gradients = torch.autograd.grad(loss, list(model.model.parameters()))
        return logprobs_U, entropy_R, list(gradients)

    whole = run(PackModel(tiny_model(), dtype=torch.float32, temperature=1.0))
    monkeypatch.setattr("penstock_trainer.model.pack_model.MAX_LOGIT_BYTES", {"cpu": 4 * 48 * 3})
    chunked = run(PackModel(tiny_model(), dtype=torch.float32, temperature=1.0, gradient_checkpointing=True))
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)


def test_every_prefix_is_computed_once() -> None:
    prompt = [5, 6, 7]
    answers = [[8, 9, 2], [8, 9, 2], [8, 10, 2], [11, 2]]
    group = scored_group(0, prompt, [completion(ids, [-1.0] * len(ids)) for ids in answers], [1.0, 1.0, 0.0, 0.5])
    (pack,) = make_packs(samples_of([group]), 100)
    # 5 6 7 | 8 -> {9, 10} | 11; the last token of a completion needs no row
    assert sorted(pack.token_ids_P.tolist()) == [5, 6, 7, 8, 9, 10, 11]
    assert pack.target_N.numel() == 11
    assert pack.target_token_U.numel() == 7  # {8, 11} after the prompt, {9, 10} after 8, a stop after each of 9, 10, 11
    assert pack.positions_P.tolist() == [0, 1, 2, 3, 4, 4, 3]
    assert pack.subtree_end_P.tolist() == [7, 7, 7, 6, 5, 6, 7]


def test_mask_without_shared_prefixes_is_block_diagonal_causal() -> None:
    mask = trie_mask(torch.tensor([3, 3, 3, 5, 5]), torch.float32)[0, 0] == 0
    expected = torch.block_diag(torch.ones(3, 3).tril(), torch.ones(2, 2).tril()).bool()
    assert mask.tolist() == expected.tolist()


def test_groups_stay_whole_where_they_fit() -> None:
    samples = samples_of(example_groups(num_groups=6, seed=3))
    prompts = dict.fromkeys(sample.prompt_ids.tobytes() for sample in samples)
    alone = [make_packs([s for s in samples if s.prompt_ids.tobytes() == prompt], 4096)[0] for prompt in prompts]
    budget = max(pack.num_rows for pack in alone)
    packs = make_packs(samples, budget)
    # If a group were split, its prompt would be computed twice, and its samples would be in two packs.
    advantages = [set(pack.advantage_N.tolist()) for pack in packs]
    assert all(any(set(group.advantage_N.tolist()) <= each for each in advantages) for group in alone)
    assert 1 < len(packs) <= len(alone)


def test_group_larger_than_the_budget_is_split_between_completions() -> None:
    answers = [[8 + i, 9, 10, 11, 2] for i in range(6)]
    group = scored_group(0, [5, 6, 7], [completion(ids, [-1.0] * 5) for ids in answers], [0.0, 1, 2, 3, 4, 5])
    packs = make_packs(samples_of([group]), 12)
    assert [pack.num_rows for pack in packs] == [11, 11, 11]
    assert sum(pack.target_N.numel() for pack in packs) == 30


def test_sequence_longer_than_the_budget_gets_its_own_pack() -> None:
    group = scored_group(0, [5] * 40, [completion([6, 2], [-1.0, -1]), completion([7, 8, 2], [-1.0] * 3)], [0.0, 1.0])
    packs = make_packs(samples_of([group]), 16)
    assert sorted(pack.num_rows for pack in packs) == [41, 42]


def test_packs_do_not_depend_on_the_order_of_samples() -> None:
    samples = samples_of(example_groups())
    forward, backward = make_packs(samples, 30), make_packs(samples[::-1], 30)
    assert [pack.token_ids_P.tolist() for pack in forward] == [pack.token_ids_P.tolist() for pack in backward]


def test_batch_leaves_out_zero_advantages_and_counts_them() -> None:
    answers = [completion([8 + i, 2], [-1.0, -1.0]) for i in range(4)]
    cut = [*answers[:2], *(msgspec.structs.replace(each, finish_reason="length") for each in answers[2:])]
    groups = [
        scored_group(0, [5], cut, [1.0, 0.0, None, 0.0]),
        scored_group(1, [6], answers, [1.0, 1.0, 1.0, 1.0]),
        scored_group(2, [7], answers, [None, None, 0.0, None]),
    ]
    batch = make_batch(groups, rules(), version=0)
    assert [sample.prompt_ids.tolist() for sample in batch.samples] == [[5]] * 3
    assert batch.samples[0].weight == 1 / (2 * 3)
    counts = batch.counts
    assert (counts.num_groups, counts.num_failed_groups, counts.num_degenerate_groups) == (2, 1, 1)
    assert (counts.num_completions, counts.num_failed_completions, counts.num_loss_tokens) == (7, 4, 14)
    assert counts.num_truncated_completions == 2
    assert counts.reward_mean == pytest.approx(5 / 8)
    assert [varies([score.value for score in group.scores]) for group in groups] == [True, False, False]
    assert len(make_batch(groups, rules(with_zero_advantage=True), version=0).samples) == 7
    assert math.isnan(make_batch([], rules(), version=0).counts.reward_mean)


def test_completion_without_loss_tokens_is_no_sample() -> None:
    answers = [completion([8, 2], [-1.0, -1.0], mask=[0, 0]), completion([], []), completion([9], [-1.0])]
    group = scored_group(0, [5], answers, [1.0, 2.0, 0.0])
    assert [sample.token_ids.tolist() for sample in samples_of([group])] == [[9]]


def test_missing_model_folder_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"actor\.path is '.*absent', which does not exist"):
        load_model(str(tmp_path / "absent"), "actor.path")
    with pytest.raises(ConfigError, match=r"ref\.path .* without config\.json"):
        load_model(str(tmp_path), "ref.path")


def test_model_with_missing_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    weights = {name: value for name, value in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ConfigError, match="lack 3 weights"):
        load_model(str(tmp_path), "actor.path")


def test_model_that_mixes_tokens_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path)
    monkeypatch.setattr(
        "penstock_trainer.model.pack_model.attention_arguments", lambda *_: {}
    )  # as if the mask were ignored
    with pytest.raises(ConfigError, match="expected a causal model that mixes tokens by attention only"):
        load_model(str(tmp_path), "actor.path")
