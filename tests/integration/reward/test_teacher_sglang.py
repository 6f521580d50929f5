"""A real SGLang as a teacher: its log-probabilities are those of the same model in the trainer, and its tokens ours."""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
import torch

from benchmarks.push_setup import RolloutServer
from penstock.config import WeightsSection
from penstock.contracts import ScoredGroup
from penstock.errors import ConfigError
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights.updater import WeightUpdater
from penstock_trainer.batching.batch import BatchRules, Overlong, make_batch
from penstock_trainer.batching.packing import make_packs
from penstock_trainer.data.teacher_servers import check_servers, describe
from penstock_trainer.data.tokenizer import load_vocabulary, token_texts
from penstock_trainer.model.loading import load_model
from penstock_trainer.model.pack_model import PackModel
from tests.integration.rollout.sglang_pair import PYTHON, VOCABULARY
from tests.integration.rollout.test_engine_sglang import stage
from tests.tolerance import logprob_tolerance
from tests.unit.reward.teacher.teacher_setup import answering, teacher_of
from tests.unit.trainer.episode_groups import context, episode, episode_group, sampled
from tests.unit.trainer.trainer_groups import completion, scored_group

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment with SGLang: `make envs` makes one"),
]

PROMPT = tuple(range(60, 160))
LONGEST = len(PROMPT) + 40


@pytest_asyncio.fixture(loop_scope="session")
async def server(sglang_pair: list[RolloutServer], sglang_models: Sequence[Path]) -> RolloutServer:
    """One that serves the second model."""
    await WeightUpdater(sglang_pair[0].engine, WeightsSection(), RolloutMetrics()).update(stage(sglang_models[1], 1))
    return sglang_pair[0]


def completions_group() -> ScoredGroup:
    """Of several lengths, two of them equal; the last has no reward."""
    answers = [[7, 8, 9], list(range(200, 240)), [7, 8, 9], [5]]
    made = [completion(each, [-1.0] * len(each)) for each in answers]
    return scored_group(0, PROMPT, made, [1.0, 0.0, 0.5, None])


def episodes_group() -> ScoredGroup:
    """A tree with a branch and an auxiliary call, and a conversation of two turns."""
    branched = [
        context(-1, PROMPT),
        sampled(0, [7, 8]),
        context(1, [30, 31]),
        sampled(2, [9]),
        sampled(0, [40, 41, 42]),
        sampled(0, [50], auxiliary=True),
    ]
    turns = [context(-1, [3, 4]), sampled(0, [5]), context(1, [6]), sampled(2, [10, 11])]
    return episode_group(0, [episode(branched), episode(turns)], [1.0, 0.0])


def largest_difference(folder: Path, group: ScoredGroup) -> float:
    """Of log-probabilities: a teacher that the trainer loads, minus what the group has."""
    model = PackModel(load_model(str(folder), "teacher.path"), dtype=torch.float32, temperature=1.0)
    rules = BatchRules(Overlong(64), with_zero_advantage=True, served_teacher=True)
    (pack,) = make_packs(make_batch([group], rules, version=0).samples, 10_000)
    assert pack.teacher_logprobs_N is not None
    with torch.no_grad():
        logprobs_N = model.token_logprobs(pack)[0][pack.target_N]
    return float((logprobs_N - pack.teacher_logprobs_N).abs().max())


@pytest.mark.parametrize("make", [completions_group, episodes_group])
async def test_a_server_says_what_the_trainer_would_compute(
    server: RolloutServer, sglang_models: Sequence[Path], make: Callable[[], ScoredGroup]
) -> None:
    scored = make()
    async with answering(teacher_of(server.server.url)) as teacher:
        answers = await teacher.taught(scored.group, [each.value is not None for each in scored.scores])
    assert answers.failed == {}
    taught = msgspec.structs.replace(scored, teacher_logprobs=answers.logprobs)
    tolerance = logprob_tolerance(load_model(str(sglang_models[1]), "teacher.path"), LONGEST)
    assert largest_difference(sglang_models[1], taught) < tolerance
    assert largest_difference(sglang_models[0], taught) > 100 * tolerance


async def test_what_the_server_refuses_fails_alone(server: RolloutServer) -> None:
    """It reads up to 4096 tokens."""
    made = [completion(each, [-1.0] * len(each)) for each in ([7, 8], [9] * 5000, [9])]
    group = scored_group(0, PROMPT, made, [1.0, 0.0, 0.5]).group
    async with answering(teacher_of(server.server.url)) as teacher:
        answers = await teacher.taught(group, [True] * 3)
        assert teacher.servers.down == {}
    assert list(map(len, answers.logprobs)) == [8, 0, 4]
    assert list(answers.failed) == [1]
    assert "refused" in answers.failed[1]


async def test_its_tokens_embeddings_and_context_are_compared(
    server: RolloutServer, sglang_models: Sequence[Path], tmp_path: Path
) -> None:
    url, policy = server.server.url, load_vocabulary(str(sglang_models[0]))
    texts = token_texts(policy)
    check_servers([url], "policy", texts, VOCABULARY, LONGEST)
    assert describe(url).model == str(sglang_models[1])
    with pytest.raises(ConfigError, match=r"differ in 2 of 300 tokens, first 17: 'w17' there, 'w18' here"):
        check_servers([url], "policy", [*texts[:17], texts[18], texts[17], *texts[19:]], VOCABULARY, LONGEST)
    with pytest.raises(ConfigError, match=r"embeddings of 301 tokens: .*valid range is \[0, 300\)"):
        check_servers([url], "policy", texts, VOCABULARY + 1, LONGEST)
    with pytest.raises(ConfigError, match=r"reads up to 4090 tokens there, .* may have 4091"):
        check_servers([url], "policy", texts, VOCABULARY, 4091)
