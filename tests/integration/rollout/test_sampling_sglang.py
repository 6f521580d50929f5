"""What a real SGLang does with filters, penalties and stop strings, and which log-probabilities it returns."""

import math
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
import torch

from benchmarks.push_setup import RolloutServer
from penstock.config import WeightsSection
from penstock.contracts import Sampling, pack_int32
from penstock.stop_strings import before_stop
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.types import Answer
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights.updater import WeightUpdater
from tests.integration.rollout.sglang_pair import PYTHON
from tests.integration.rollout.test_engine_sglang import load, stage
from tests.tolerance import logprob_tolerance
from tests.unit.rollout.one_request import generate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment with SGLang: `make envs` makes one"),
]

PROMPT = [5, 6, 7]
SEEDS = (1, 2, 3, 4)
NUM_TOKENS = 16
PLAIN = Sampling(0.7, NUM_TOKENS, ())
PENALTY = 1.5
FILTERS = [{"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.2}, {"top_p": 0.8, "top_k": 5, "min_p": 0.05}]


@pytest_asyncio.fixture(loop_scope="session")
async def engine(sglang_pair: list[RolloutServer], sglang_models: tuple[Path, ...]) -> Engine:
    """An engine with the weights of the first model."""
    found = sglang_pair[0].engine
    await WeightUpdater(found, WeightsSection(), RolloutMetrics()).update(stage(sglang_models[0], 0))
    return found


async def sampled(engine: Engine, sampling: Sampling) -> tuple[Answer, ...]:
    return await generate(engine, pack_int32(PROMPT), SEEDS, sampling)


def expected(folder: Path, answer: Answer, penalty: float = 1.0) -> tuple[list[float], torch.Tensor, float]:
    """The log-probability of each token, those of all tokens [T, V], and how far the former may be off."""
    model, ids = load(folder), list(answer.token_ids)
    with torch.no_grad():
        logits_TV = model(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1].double()
    for t, row in enumerate(logits_TV):
        before = sorted(set(ids[:t]))
        row[before] = torch.where(row[before] > 0, row[before] / penalty, row[before] * penalty)
    logprobs_TV = torch.log_softmax(logits_TV / PLAIN.temperature, -1)
    bound = logprob_tolerance(model, len(PROMPT) + len(ids)) / PLAIN.temperature
    return [float(row[each]) for row, each in zip(logprobs_TV, ids, strict=True)], logprobs_TV, bound


@pytest.mark.parametrize("filters", FILTERS, ids=str)
async def test_log_probabilities_are_of_the_full_softmax_whatever_was_filtered(
    engine: Engine, sglang_models: tuple[Path, ...], filters: dict[str, float]
) -> None:
    sampling = msgspec.structs.replace(PLAIN, **filters)
    answers = await sampled(engine, sampling)
    kept_mass = []
    for answer in answers:
        own, logprobs_TV, bound = expected(sglang_models[0], answer)
        assert answer.logprobs.tolist() == pytest.approx(own, abs=bound)
        for row, token in zip(logprobs_TV.exp(), answer.token_ids, strict=True):
            more_likely = row[row > row[token] * math.exp(2 * bound)]
            assert float(more_likely.sum()) <= sampling.top_p + 1e-3
            assert not sampling.top_k or len(more_likely) < sampling.top_k
            assert float(row[token]) >= sampling.min_p * float(row.max()) * math.exp(-2 * bound)
            kept_mass.append(float(row[token] + more_likely.sum()))
    assert min(kept_mass) < 0.9  # so renormalised ones would differ by more than the bound
    assert [each.token_ids for each in await sampled(engine, sampling)] == [each.token_ids for each in answers]
    assert [each.token_ids for each in await sampled(engine, PLAIN)] != [each.token_ids for each in answers]


async def test_log_probabilities_are_after_a_penalty_of_tokens_of_the_completion(
    engine: Engine, sglang_models: tuple[Path, ...]
) -> None:
    for answer in await sampled(engine, msgspec.structs.replace(PLAIN, repetition_penalty=PENALTY)):
        own, _, bound = expected(sglang_models[0], answer, PENALTY)
        assert answer.logprobs.tolist() == pytest.approx(own, abs=bound)


async def test_a_completion_ends_with_the_token_that_completes_a_stop_string(engine: Engine) -> None:
    whole = await sampled(engine, PLAIN)
    for number, answer in enumerate(whole):
        words = answer.text.split(" ")
        stop = f"{words[5][-1]} {words[6][:2]}"  # the end of one token, and the beginning of the next
        ended = (await sampled(engine, msgspec.structs.replace(PLAIN, stop=("never", stop))))[number]
        assert ended.finish_reason == "stop"
        assert ended.text == before_stop(answer.text, (stop,))
        assert ended.token_ids == answer.token_ids[: len(ended.token_ids)]
        shown = await engine.client.generation.detokenize([ended.token_ids, ended.token_ids[:-1]])
        assert [stop in text for text in shown] == [True, False]


async def test_a_stop_token_ends_nothing_if_it_is_ignored(engine: Engine) -> None:
    whole = await sampled(engine, PLAIN)
    ends = tuple(answer.token_ids[3] for answer in whole)
    stopped = await sampled(engine, msgspec.structs.replace(PLAIN, stop_token_ids=ends))
    assert {each.finish_reason for each in stopped} == {"stop"}
    again = await sampled(engine, msgspec.structs.replace(PLAIN, stop_token_ids=ends, ignore_eos=True))
    assert [each.token_ids for each in again] == [each.token_ids for each in whole]
