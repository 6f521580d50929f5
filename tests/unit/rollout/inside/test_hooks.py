"""The hooks for SGLang's attention and sampling on a CPU, against the plain formulas."""

from typing import Any

import pytest
import torch
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from penstock_rollout.engine.sglang.inside import attention, sampling

HEADS, KEY_HEADS, SIZE, SLOTS = 6, 2, 8, 200
OPTIONS: dict[str, Any] = {
    "scaling": SIZE**-0.5,
    "enable_gqa": True,
    "causal": True,
    "is_cross_attn": False,
    "sliding_window_size": None,
}


@pytest.fixture
def cache() -> tuple[Any, Any, Any]:
    """Keys, values, and the slots of each of four requests."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(SLOTS, KEY_HEADS, SIZE, generator=generator) for _ in range(2))
    return keys, values, torch.randperm(SLOTS, generator=generator).view(4, 50)


def one_by_one(query: Any, cache: tuple[Any, Any, Any], request: int, length: int) -> Any:
    """Causal attention of the last tokens of one sequence."""
    keys, values, slots = cache
    row = slots[request, :length]
    k, v = (each[row].repeat_interleave(HEADS // KEY_HEADS, dim=1) for each in (keys, values))
    scores = torch.einsum("qhd,shd->hqs", query, k) * OPTIONS["scaling"]
    positions = torch.arange(length - len(query), length)
    scores = scores.masked_fill(torch.arange(length) > positions[:, None], -torch.inf)
    return torch.einsum("hqs,shd->qhd", scores.softmax(-1), v)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("expected the hook to do it itself")


def test_decoding_attends_to_each_sequence_alone(cache: tuple[Any, Any, Any]) -> None:
    requests, lengths = torch.tensor([2, 0, 3]), torch.tensor([5, 17, 1])
    query = torch.randn(3, HEADS, SIZE)
    output = attention.decode(
        never, None, query, torch.empty_like(query), cache[0], cache[1], cache[2], requests, lengths, None, **OPTIONS
    )
    for row, (request, length) in enumerate(zip(requests.tolist(), lengths.tolist(), strict=True)):
        torch.testing.assert_close(output[row : row + 1], one_by_one(query[row : row + 1], cache, request, length))


def test_prefill_continues_behind_prefixes_of_any_length(cache: tuple[Any, Any, Any]) -> None:
    requests, prefixes, new = torch.tensor([1, 3, 0]), torch.tensor([0, 12, 7]), torch.tensor([6, 1, 20])
    query = torch.randn(int(new.sum()), HEADS, SIZE)
    lengths = prefixes + new
    output = attention.extend(
        never, None, query, torch.empty_like(query), *cache, requests, lengths, prefixes, new, None, **OPTIONS
    )
    start = 0
    for request, length, count in zip(requests.tolist(), lengths.tolist(), new.tolist(), strict=True):
        rows = slice(start, start + count)
        torch.testing.assert_close(output[rows], one_by_one(query[rows], cache, request, length))
        start += count


@pytest.mark.parametrize("change", [{"sliding_window_size": 4}, {"is_cross_attn": True}])
def test_whatever_is_not_plain_goes_to_sglangs_own_code(cache: tuple[Any, Any, Any], change: dict[str, Any]) -> None:
    query = torch.randn(1, HEADS, SIZE)
    with pytest.raises(AssertionError, match="itself"):
        attention.decode(
            never, None, query, query, *cache, torch.tensor([0]), torch.tensor([3]), None, **{**OPTIONS, **change}
        )


def test_the_same_seed_and_position_give_the_same_token() -> None:
    logprobs = torch.randn(1, 50).log_softmax(-1).expand(40, 50)
    seeds, positions = torch.arange(40), torch.full((40,), 7)
    first = sampling.sample(never, logprobs, seeds, positions)
    assert first.shape == (40, 1)
    assert torch.equal(first, sampling.sample(never, logprobs, seeds, positions))
    assert not torch.equal(first, sampling.sample(never, logprobs, seeds, positions + 1))
    alone = sampling.sample(never, logprobs[5:6], seeds[5:6], positions[5:6])
    assert torch.equal(first[5:6], alone)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    probs = torch.tensor([0.5, 0.0, 0.2, 0.3])
    number = 40000
    rows = probs.log().expand(number, 4)
    drawn = sampling.sample(never, rows, torch.arange(number), torch.arange(number) % 50).view(-1)
    frequency = drawn.bincount(minlength=4) / number
    assert frequency[1] == 0
    torch.testing.assert_close(frequency, probs, atol=0.012, rtol=0)  # about five standard errors


@pytest.mark.parametrize("size", [3, 256, 700])
def test_the_token_is_where_the_cumulated_probability_passes_the_number(size: int) -> None:
    weights = torch.rand(200, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = weights * (torch.rand(weights.shape, generator=torch.Generator().manual_seed(1)) < 0.3)
    weights[:, size // 2] += 0.01  # no row without any
    seeds, positions = torch.arange(200), torch.arange(200) % 7
    drawn = sampling.sample_from_probs(never, weights, seeds, positions)
    assert drawn.dtype == torch.int32
    for row, (token, seed, position) in enumerate(zip(drawn.tolist(), seeds.tolist(), positions.tolist(), strict=True)):
        number = sampling._uniform(seed, position) * float(weights[row].sum())
        cumulated = weights[row].cumsum(-1).tolist()
        assert weights[row, token] > 0
        assert cumulated[token] >= number - 1e-9
        assert token == 0 or cumulated[token - 1] <= number + 1e-9


def test_a_number_at_either_end_draws_a_token_that_has_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.zeros(1, 600)
    weights[0, [3, 400]] = 0.1
    for number, token in ((0.0, 3), (1.0, 400)):
        monkeypatch.setattr(sampling, "_uniform", lambda *_, number=number: number)
        assert sampling.sample_from_probs(never, weights, torch.zeros(1), torch.zeros(1)).tolist() == [token]


def test_log_probabilities_are_those_of_log_softmax_and_the_original_runs_without_seeds() -> None:
    sampler = type("Sampler", (), {"enable_deterministic": False})()
    sampling.with_log_softmax(None, sampler)
    assert sampler.enable_deterministic
    probs, positions = torch.ones(1, 2), torch.zeros(1)
    assert sampling.sample_from_probs(lambda *given: given, probs, None, positions) == (probs, None, positions)


def test_greedy_rows_among_sampled_ones() -> None:
    probs = torch.randn(4, 20).softmax(-1)
    everything = torch.tensor([1, 2**30, 1, 2**30])
    ones, seeds, positions = torch.ones(4), torch.arange(4), torch.zeros(4, dtype=torch.int64)
    tokens = sampling.sample_or_greedy(
        never, probs, everything, ones, torch.zeros(4), False, seeds, positions, return_filtered_probs=False
    )
    sampled = sampling.sample(never, probs.log(), seeds, positions).view(-1)
    expected = torch.where(everything == 1, probs.argmax(-1), sampled)
    assert torch.equal(tokens.long(), expected)
    with pytest.raises(AssertionError, match="itself"):
        sampling.sample_or_greedy(
            never, probs, everything, ones, ones, False, seeds, positions, return_filtered_probs=True
        )


NO_FILTER = (2**30, 1.0, 0.0)
FILTERS = [(3, 1.0, 0.0), (2**30, 0.5, 0.0), (2**30, 1.0, 0.3), (4, 0.8, 0.05), (2**30, 1e-6, 0.0)]


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [*FILTERS, NO_FILTER])
def test_a_filter_keeps_the_tokens_that_transformers_keeps(top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(1)) * 2
    processors = [
        *([TopKLogitsWarper(top_k)] if top_k < 40 else []),
        *([TopPLogitsWarper(top_p)] if top_p < 1 else []),
        *([MinPLogitsWarper(min_p)] if min_p else []),
    ]
    expected = torch.ones(50, 40, dtype=torch.bool)
    for each in processors:  # each looks at the full softmax, as SGLang's do
        expected &= each(torch.zeros(50, 1, dtype=torch.int64), logits.clone()).isfinite()
    rows = torch.ones(50)
    probs = logits.softmax(-1)
    kept = sampling.kept_probs(probs, rows * top_k, rows * top_p, rows * min_p)
    assert torch.equal(kept > 0, expected)
    assert torch.equal(kept[expected], probs[expected])


def test_rows_with_filters_leave_the_tokens_of_others_as_they_are() -> None:
    probs = torch.randn(60, 30, generator=torch.Generator().manual_seed(2)).softmax(-1)
    chosen = [NO_FILTER if row % 2 else FILTERS[row // 2 % len(FILTERS)] for row in range(60)]
    top_ks, top_ps, min_ps = (torch.tensor(each) for each in zip(*chosen, strict=True))
    seeds, positions = torch.arange(60), torch.zeros(60, dtype=torch.int64)
    tokens = sampling.sample_or_greedy(never, probs, top_ks, top_ps, min_ps, True, seeds, positions).long()
    alone = sampling.sample(never, probs.log(), seeds, positions).view(-1)
    assert torch.equal(tokens[1::2], alone[1::2])
    kept = sampling.kept_probs(probs, top_ks, top_ps, min_ps)
    assert bool((kept.gather(1, tokens[:, None]) > 0).all())
    assert torch.equal(tokens[::2], sampling.sample(never, kept.log(), seeds, positions).view(-1)[::2])
