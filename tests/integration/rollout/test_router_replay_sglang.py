"""Experts that a real SGLang returns: replayed, the trainer has its log-probabilities; a push reaches each expert."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.push_setup import RolloutServer, rollout_server
from penstock.config import Config, WeightsSection
from penstock.contracts import PolicyIdentity, RolloutGroup, Sampling, Score, ScoredGroup, Ticket, pack_int32
from penstock_rollout.engine.draft import Draft
from penstock_rollout.engine.types import completions, prompt_experts
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights.updater import WeightUpdater
from penstock_trainer.batching.batch import BatchRules, Overlong, make_batch
from penstock_trainer.batching.packing import make_packs
from penstock_trainer.model.loading import load_model
from penstock_trainer.model.pack_model import PackModel
from tests.integration.rollout.sglang_pair import PYTHON, VOCABULARY, all_up, pair_config
from tests.integration.rollout.test_engine_sglang import stage
from tests.tolerance import logprob_tolerance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment with SGLang: `make envs` makes one"),
]

NUM_EXPERTS, TOP_K, NUM_LAYERS = 8, 2, 3
PROMPT = tuple(range(60, 100))
SEEDS = (1, 2, 3)
SAMPLING = Sampling(1.0, 24, ())


def make_mixture(folder: Path, seed: int) -> Path:
    """A random mixture. All layers have experts: SGLang takes none of a Qwen3-MoE for dense."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config).float()
    model.lm_head.weight.data[config.eos_token_id] = 0
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    root = tmp_path_factory.mktemp("mixtures")
    return tuple(make_mixture(root / str(seed), seed) for seed in range(2))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server(mixtures: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RolloutServer]:
    """A rollout service whose engine returns experts."""
    folder = tmp_path_factory.mktemp("mixture-server")
    plain = pair_config(mixtures[0], folder, "disk").model_dump()
    config = Config.model_validate({**plain, "actor": {**plain["actor"], "router_replay": True}})
    async with rollout_server("mixture", config, folder) as found:
        await all_up([found])
        yield found


async def sampled(server: RolloutServer, seeds: Sequence[int]) -> ScoredGroup:
    """A group as a rollout service hands it over."""
    draft = Draft(PROMPT, seeds, SAMPLING, one_version_per_answer=False, with_experts=True)
    draft.add(await server.engine.client.generation.complete(draft.requests(), SAMPLING))
    answers = draft.group()
    known = {span.weight_version: PolicyIdentity(0, "0" * 16) for answer in answers for span in answer.spans}
    ticket = Ticket(
        purpose="train",
        number=0,
        attempt=0,
        policy_version=0,
        prompt="",
        prompt_ids=pack_int32(PROMPT),
        seeds=tuple(seeds),
        sampling=SAMPLING,
        answer="",
        reward="",
        metadata={},
    )
    made = completions(answers, known, len(PROMPT))
    rows = prompt_experts(answers, len(PROMPT))
    group = RolloutGroup(ticket, made, "server", 0.0, 1.0, prompt_experts=rows)
    return ScoredGroup(group, tuple(Score(float(each)) for each in range(len(seeds))))


def largest_difference(folder: Path, group: ScoredGroup) -> float:
    """Of log-probabilities, trainer under replay minus engine, in nats."""
    model = load_model(str(folder), "actor.path")
    packed = PackModel(model, dtype=torch.float32, temperature=1.0, router_replay=True)
    rules = BatchRules(Overlong(SAMPLING.max_new_tokens), with_zero_advantage=True, router_replay=True)
    (pack,) = make_packs(make_batch([group], rules, version=0).samples, 10_000)
    with torch.no_grad():
        logprobs_N = packed.token_logprobs(pack)[0][pack.target_N]
    return float((logprobs_N - pack.behaviour_logprobs_N).abs().max())


async def test_the_engines_experts_give_its_log_probabilities(
    server: RolloutServer, mixtures: tuple[Path, ...]
) -> None:
    """Before and after a push, which names the experts one by one."""
    for version, folder in enumerate(mixtures):
        await WeightUpdater(server.engine, WeightsSection(), RolloutMetrics()).update(stage(folder, version))
        group = await sampled(server, SEEDS)
        experts = group.group.prompt_experts
        assert experts is not None
        assert (experts.num_rows, experts.row_length) == (len(PROMPT), NUM_LAYERS * TOP_K)
        tolerance = logprob_tolerance(load_model(str(folder), "actor.path"), len(PROMPT) + SAMPLING.max_new_tokens)
        assert largest_difference(folder, group) < tolerance
        assert largest_difference(folder, with_other_experts(group)) > 100 * tolerance


def with_other_experts(group: ScoredGroup) -> ScoredGroup:
    """The group with all experts moved on by one."""

    def moved(rows: bytes) -> bytes:
        return bytes((each + 1) % NUM_EXPERTS for each in rows)

    made = tuple(
        msgspec.structs.replace(each, experts=msgspec.structs.replace(each.experts, data=moved(each.experts.data)))
        for each in group.group.completions
        if each.experts is not None
    )
    prompt = group.group.prompt_experts
    assert prompt is not None
    changed = msgspec.structs.replace(prompt, data=moved(prompt.data))
    whole = msgspec.structs.replace(group.group, completions=made, prompt_experts=changed)
    return msgspec.structs.replace(group, group=whole)
