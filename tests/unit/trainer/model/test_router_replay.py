"""Router replay: the trainer goes through the experts that a sampler went through, and nothing else changes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, Glm4MoeConfig, PreTrainedConfig

from penstock.contracts import Completion, ScoredGroup, pack_float32, unpack_int32
from penstock.contracts.trajectories import RoutedExperts
from penstock.errors import ConfigError
from penstock_trainer.batching.batch import BatchRules, Overlong, Sample, make_batch
from penstock_trainer.batching.packing import make_packs, make_separate_packs
from penstock_trainer.batching.routes import OWN_ROUTE
from penstock_trainer.learner.learner import Learner
from penstock_trainer.model.loading import load_model
from penstock_trainer.model.pack_model import PackModel
from tests.unit.trainer.model.families import EXPERTS, NUM_EXPERTS, TOP_K, family, save_family
from tests.unit.trainer.model.noisy_sampler import NUM_LAYERS, NoisySampler, routed, routed_group
from tests.unit.trainer.trainer_groups import SHAPE, config_for, example_groups, save_tiny_model

SIGMOIDS: dict[str, PreTrainedConfig] = {
    "glm4_moe": Glm4MoeConfig(**SHAPE, **EXPERTS, n_routed_experts=NUM_EXPERTS, n_group=1, first_k_dense_replace=1),
    "deepseek_v3": DeepseekV3Config(
        **{**SHAPE, "head_dim": 4, "num_key_value_heads": 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
    ),
}
REPLAYABLE = ["qwen3_moe", "qwen3_moe with a dense layer", "mixtral", "olmoe", "qwen3_next", "qwen3_5_moe"]


def sampled(groups: Sequence[ScoredGroup], sampler: NoisySampler) -> list[ScoredGroup]:
    """The groups as the sampler would have made them: its log-probabilities, and its experts.

    A prompt is routed once for its group, as in an engine: what follows is sampled after the first pass over it.
    """
    made = []
    for group in groups:
        prompt = unpack_int32(group.group.ticket.prompt_ids)
        width = NUM_LAYERS * TOP_K
        answers: list[Completion] = []
        prompt_rows = b""
        for each in group.group.completions:
            ids = [*prompt, *unpack_int32(each.token_ids)]
            logprobs, rows = sampler(ids)
            own = logprobs[len(prompt) - 1 :].tolist()
            prompt_rows = rows[: len(prompt) * width]
            answers.append(
                msgspec.structs.replace(each, logprobs=pack_float32(own), experts=routed(rows[len(prompt) * width :]))
            )
            made.append(
                msgspec.structs.replace(
                    group,
                    group=msgspec.structs.replace(
                        group.group,
                        completions=(answers[-1],),
                        ticket=msgspec.structs.replace(group.group.ticket, seeds=(0,)),
                        prompt_experts=routed(prompt_rows),
                    ),
                    scores=group.scores[:1],
                )
            )
    return made


def samples_of(groups: Sequence[ScoredGroup], *, replays: bool) -> list[Sample]:
    """One completion a group: make_batch leaves out groups of one, so samples are made group by group."""
    rules = BatchRules(Overlong(64), with_zero_advantage=True, router_replay=replays)
    found: list[Sample] = []
    for group in groups:
        twice = msgspec.structs.replace(
            group,
            group=msgspec.structs.replace(
                group.group,
                completions=group.group.completions * 2,
                ticket=msgspec.structs.replace(group.group.ticket, seeds=(0, 1)),
            ),
            scores=group.scores * 2,
        )
        found += make_batch([twice], rules, version=0).samples[:1]
    return found


def largest_difference(model: PackModel, samples: Sequence[Sample], max_tokens: int = 4096) -> float:
    """Of log-probabilities, trainer minus sampler."""
    make = make_packs if model.shares_prefixes else make_separate_packs
    with torch.no_grad():
        return max(
            float((model.token_logprobs(pack)[0][pack.target_N] - pack.behaviour_logprobs_N).abs().max())
            for pack in make(samples, max_tokens)
        )


@pytest.mark.parametrize("max_tokens", [24, 4096])
@pytest.mark.parametrize("name", REPLAYABLE)
def test_with_replay_the_trainer_has_the_samplers_log_probabilities(name: str, max_tokens: int, tmp_path: Path) -> None:
    groups = sampled(example_groups(), NoisySampler(family(name), noise=1.0))
    folder = str(save_family(name, tmp_path))

    def model(*, replays: bool) -> PackModel:
        return PackModel(load_model(folder, "actor.path"), dtype=torch.float32, temperature=1.0, router_replay=replays)

    replayed = samples_of(groups, replays=True)
    assert largest_difference(model(replays=True), replayed, max_tokens) < 5e-5
    own = samples_of(groups, replays=False)
    assert largest_difference(model(replays=True), own, max_tokens) > 1e-2
    assert largest_difference(model(replays=False), replayed, max_tokens) > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_next"])
def test_the_gradient_is_that_of_the_samplers_pass(name: str, checkpointing: bool, tmp_path: Path) -> None:
    """The router's weights get theirs too, and a recomputation goes the same way."""
    sampler = NoisySampler(family(name), noise=1.0)
    groups = sampled(example_groups(num_groups=2), sampler)
    model = PackModel(
        load_model(str(save_family(name, tmp_path)), "actor.path"),
        dtype=torch.float32,
        temperature=1.0,
        gradient_checkpointing=checkpointing,
        router_replay=True,
    )
    make = make_packs if model.shares_prefixes else make_separate_packs
    packs = make(samples_of(groups, replays=True), 30)
    for pack in packs:
        model.token_logprobs(pack)[0][pack.target_N].sin().sum().backward()

    again = NoisySampler(family(name), noise=1.0)  # the same draws
    for group in example_groups(num_groups=2):
        prompt = unpack_int32(group.group.ticket.prompt_ids)
        for each in group.group.completions:
            ids = torch.tensor([*prompt, *unpack_int32(each.token_ids)])
            logits = again.model(input_ids=ids[None], use_cache=False).logits[0]
            rows = torch.arange(len(prompt) - 1, len(ids) - 1)
            mask = torch.tensor(list(each.loss_mask or b"\1" * each.num_tokens), dtype=torch.bool)
            torch.log_softmax(logits, -1)[rows, ids[1:][rows]][mask].sin().sum().backward()
    expected = dict(again.model.named_parameters())
    for key, parameter in model.model.named_parameters():
        assert parameter.grad is not None
        assert expected[key].grad is not None
        torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-3, atol=2e-4)
    assert any(value.abs().max() > 1e-3 for key, value in _gradients(model) if key.endswith("mlp.gate.weight"))


def _gradients(model: PackModel) -> list[tuple[str, Tensor]]:
    return [(key, each.grad) for key, each in model.model.named_parameters() if each.grad is not None]


def test_sequences_share_a_row_only_if_their_experts_agree() -> None:
    groups = sampled(example_groups(num_groups=1), NoisySampler(family("qwen3_moe"), noise=1.0))
    (apart,) = make_packs(samples_of(groups, replays=True), 4096)
    (together,) = make_packs(samples_of(groups, replays=False), 4096)
    assert apart.num_rows > together.num_rows
    assert together.experts_PW is None
    quiet = sampled(example_groups(num_groups=1), NoisySampler(family("qwen3_moe"), noise=0.0))
    (same,) = make_packs(samples_of(quiet, replays=True), 4096)
    assert same.num_rows == together.num_rows
    assert same.experts_PW is not None


def test_rows_without_experts_are_routed_by_the_model(tmp_path: Path) -> None:
    """As when the key is turned on while groups wait that were sampled without it."""
    folder = save_family("qwen3_moe", tmp_path)
    groups = sampled(example_groups(), NoisySampler(family("qwen3_moe"), noise=1.0))
    mixed = samples_of(groups, replays=True)
    half = [each if number % 2 else replace(each, routes=None) for number, each in enumerate(mixed)]
    model, plain = (
        PackModel(load_model(str(folder), "actor.path"), dtype=torch.float32, temperature=1.0, router_replay=replays)
        for replays in (True, False)
    )
    assert largest_difference(model, half[1::2]) < 5e-5
    for sample in half[::2]:
        (pack,) = make_packs([sample], 4096)
        assert torch.equal(model.token_logprobs(pack)[0], plain.token_logprobs(pack)[0])
    (both,) = make_packs(half, 4096)
    assert both.experts_PW is not None
    assert 0 < (both.experts_PW == OWN_ROUTE).sum() < both.experts_PW.numel()


def test_a_step_with_replay_has_no_divergence_from_the_sampler(tmp_path: Path) -> None:
    folder = save_family("qwen3_moe", tmp_path)
    quiet = [routed_group(each) for each in example_groups()]

    def result(*, replays: bool) -> Any:
        actor = {"path": str(folder), "dtype": "float32", "router_replay": replays}
        return Learner(config_for(folder, actor=actor, kl_ctl=0.1)).update(quiet, version=0)

    with_replay, without = result(replays=True), result(replays=False)
    assert with_replay.changed
    assert with_replay.statistics.behaviour_kl < 1e-9
    assert without.statistics.behaviour_kl > 1e-3
    assert with_replay.statistics.experts.keys() == {"entropy", "busiest_share"}
    assert 1 / NUM_EXPERTS <= with_replay.statistics.experts["busiest_share"] <= 1 / TOP_K


@pytest.mark.parametrize("name", ["llama", "qwen3_5", *SIGMOIDS])
def test_a_model_without_routers_that_take_a_softmax_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path
    if name in SIGMOIDS:
        AutoModelForCausalLM.from_config(SIGMOIDS[name]).float().save_pretrained(folder)
    else:
        folder = save_tiny_model(tmp_path) if name == "llama" else save_family(name, tmp_path)
    with pytest.raises(ConfigError, match=r"actor\.router_replay is true and actor\.path .*set actor\.router_replay"):
        Learner(config_for(folder, actor={"path": str(folder), "dtype": "float32", "router_replay": True}))


@pytest.mark.parametrize(
    ("experts", "seen"),
    [
        (RoutedExperts(5, "uint8", bytes(50)), "5 experts"),
        (RoutedExperts(6, "uint8", bytes([9] * 60)), "expert number 9"),
    ],
)
def test_experts_of_another_model_are_refused(experts: RoutedExperts, seen: str, tmp_path: Path) -> None:
    folder = save_family("qwen3_moe", tmp_path)
    (group,) = example_groups(num_groups=1)
    prompt = experts.rows(0, group.group.ticket.num_prompt_tokens)
    answers = tuple(
        msgspec.structs.replace(each, experts=experts.rows(0, each.num_tokens - 1)) for each in group.group.completions
    )
    whole = msgspec.structs.replace(group.group, completions=answers, prompt_experts=prompt)
    learner = Learner(config_for(folder, actor={"path": str(folder), "dtype": "float32", "router_replay": True}))
    with pytest.raises(ConfigError, match=rf"actor\.router_replay is true, and the engine routed .*{seen}"):
        learner.update([msgspec.structs.replace(group, group=whole)], version=0)
