"""Sampling on a CPU that honours `sampling_seed`, by inversion: one uniform number per token.

SGLang honours seeds only in deterministic mode, which needs kernels that plain CPUs lack. Here the number is a hash of
the request's seed and the token's position, and the sampled token is the first whose cumulative probability exceeds the
number. This gives the same distribution as `torch.multinomial` in a tenth of its time. A request without a seed gets a
random one. The same seed gives the same token, except if rounding, which depends on the rest of the batch, moves a
boundary across the number.

SGLang also takes the logarithm of the full distribution twice, and a CPU computes only 1e8 logarithms per second. The
first is an argument of the sampling, which does not need it here. The second gives the log-probabilities; SGLang's
deterministic mode computes them by `log_softmax`, which takes a tenth of the time and keeps tokens whose probability is
too small for a float.

Runs inside SGLang's scheduler; `launcher` registers it in SGLang's hook registry.

Shapes: B sequences, V vocabulary.
"""

import secrets
from collections.abc import Callable
from typing import Any

import torch

SEED_BITS = 63
MASK_64 = 2**64 - 1
BLOCK = 256  # tokens; single tokens are cumulated within one block only
GOLDEN = 0x9E3779B97F4A7C15  # the increment of splitmix64

Replace = Callable[..., Any]


def after_hooks() -> dict[str, Replace]:
    """Hooks that run after the original and get its result."""
    return {
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch": with_seeds,
        "sglang.srt.layers.sampler.Sampler.__init__": with_log_softmax,
    }


def around_hooks() -> dict[str, Replace]:
    """Hooks that run instead of the original and may call it."""
    return {
        "sglang.srt.layers.sampler.sampling_from_probs_torch": sample_from_probs,
        "sglang.srt.layers.sampler.multinomial_with_seed": sample,
        "sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch": sample_or_greedy,
    }


def with_seeds(info: Any, _: type, batch: Any, *__: Any) -> None:
    """Set the seed of each request of a new batch."""
    seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
    chosen = [secrets.randbits(SEED_BITS) if seed is None else seed for seed in seeds]
    info.sampling_seed = torch.tensor(chosen, dtype=torch.int64)


def with_log_softmax(_: None, sampler: Any, *__: Any, **___: Any) -> None:
    """Compute log-probabilities by `log_softmax`; this attribute changes nothing else in a sampler."""
    sampler.enable_deterministic = True


def sample_from_probs(
    original: Replace,
    probs_BV: torch.Tensor,
    sampling_seed: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> Any:
    """One token per row of probabilities, as int32[B]."""
    if sampling_seed is None or positions is None:
        return original(probs_BV, sampling_seed, positions)
    return _invert(probs_BV, sampling_seed, positions).view(-1).to(torch.int32)


def sample(_: Replace, logprobs_BV: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One token per row of (possibly not normalised) log-probabilities, as int64[B, 1]."""
    return _invert(logprobs_BV.exp(), seed, positions)


def sample_or_greedy(original: Replace, probs_BV: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor,
                     min_ps: torch.Tensor, need_min_p_sampling: bool, sampling_seed: torch.Tensor,
                     positions: torch.Tensor, **options: Any) -> Any:  # fmt: skip
    """One token per row, greedy if its top_k is 1; a row with filters samples from the tokens that they keep.

    Other rows sample as they do in a batch without filters: SGLang would sort the vocabulary of all, so that the
    evaluation of some prompts changed the tokens of others. And it refuses min_p with a seed.
    """
    if any(options.values()):
        return original(
            probs_BV, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions, **options
        )  # fmt: skip
    greedy = top_ks == 1
    filtered = ~greedy & ((top_ks < probs_BV.shape[-1]) | (top_ps < 1) | (min_ps > 0))
    weights_BV = probs_BV
    if bool(filtered.any()):
        weights_BV = probs_BV.clone()
        weights_BV[filtered] = kept_probs(probs_BV[filtered], top_ks[filtered], top_ps[filtered], min_ps[filtered])
    sampled = _invert(weights_BV, sampling_seed, positions).view(-1)
    return torch.where(greedy, probs_BV.argmax(-1), sampled).to(torch.int32)


def kept_probs(
    probs_BV: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor
) -> torch.Tensor:
    """The probabilities, 0 for tokens that a filter drops. As SGLang's, all filters look at the full softmax.

    top_k keeps the k most likely; top_p keeps a token if those before it have at most p; min_p keeps tokens that are at
    least min_p times as likely as the first.
    """
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    kept_BV = torch.arange(probs_BV.shape[-1])[None] < top_ks.view(-1, 1)
    kept_BV &= before_BV <= top_ps.view(-1, 1)
    kept_BV &= sorted_BV >= sorted_BV[:, :1] * min_ps.view(-1, 1)
    return torch.zeros_like(probs_BV).scatter_(1, order_BV, sorted_BV.where(kept_BV, 0.0))


def _invert(weights_BV: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Find the block, then the token in it, whose cumulative weight exceeds the number; never a token of weight 0."""
    B, V = weights_BV.shape
    uniform = [_uniform(*pair) for pair in zip(seed.tolist(), positions.tolist(), strict=True)]
    blocks = torch.nn.functional.pad(weights_BV, (0, -V % BLOCK)).view(B, -1, BLOCK)
    cumulated = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    threshold = torch.tensor(uniform, dtype=torch.float64)[:, None] * cumulated[:, -1:]
    block = _passed(cumulated, threshold)
    before = torch.nn.functional.pad(cumulated, (1, 0)).gather(1, block)
    within = blocks[torch.arange(B), block[:, 0]].cumsum(-1, dtype=torch.float64)
    return block * BLOCK + _passed(within, threshold - before)


def _passed(cumulated_BN: torch.Tensor, threshold_B1: torch.Tensor) -> torch.Tensor:
    """The first index whose cumulative weight exceeds the threshold, as int64[B, 1]. Rounding may have moved the
    threshold out of the range; then it is the first or last index that has weight.
    """
    end = torch.nextafter(cumulated_BN[:, -1:], torch.zeros(()).double())
    return torch.searchsorted(cumulated_BN, threshold_B1.clamp(min=0).minimum(end), right=True)


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a seed and a position: splitmix64 of both."""
    return (_mix(_mix(seed & MASK_64) ^ position) >> 11) / 2**53


def _mix(value: int) -> int:
    value = (value + GOLDEN) & MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)
