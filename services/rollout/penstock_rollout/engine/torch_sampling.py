"""Sampling on a CPU that honours `sampling_seed`, by inversion: one uniform number per token.

SGLang honours seeds only in deterministic mode, which needs kernels that plain CPUs lack. Here the number is a hash of
the request's seed and the token's position, and the token is the one where the cumulated probability passes it: the
same distribution as `torch.multinomial`, at a tenth of its time. A request without a seed gets a random one. The same
seed gives the same token unless rounding, which depends on the rest of the batch, moves the number over an edge.

Runs inside SGLang's scheduler; registered by `engine.launcher` through SGLang's hook registry.

Shapes: B sequences, V vocabulary.
"""

import secrets
from collections.abc import Callable
from typing import Any

import torch

SEED_BITS = 63
MASK_64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # of splitmix64

Replace = Callable[..., Any]


def after_hooks() -> dict[str, Replace]:
    """Hooks that see a result."""
    return {"sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch": with_seeds}


def around_hooks() -> dict[str, Replace]:
    """Hooks that decide whether the original runs."""
    return {
        "sglang.srt.layers.sampler.multinomial_with_seed": sample,
        "sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch": sample_or_greedy,
    }


def with_seeds(info: Any, _: type, batch: Any, *__: Any) -> None:
    """Give every request of a new batch its seed."""
    seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
    chosen = [secrets.randbits(SEED_BITS) if seed is None else seed for seed in seeds]
    info.sampling_seed = torch.tensor(chosen, dtype=torch.int64)


def sample(_: Replace, logprobs_BV: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One token per row of (possibly not normalised) log-probabilities, as int64[B, 1]."""
    return _invert(logprobs_BV.exp(), seed, positions)


def sample_or_greedy(original: Replace, probs_BV: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor,
                     min_ps: torch.Tensor, need_min_p_sampling: bool, sampling_seed: torch.Tensor,
                     positions: torch.Tensor, **options: Any) -> Any:  # fmt: skip
    """Greedy rows (top_k 1) among unrestricted ones need no sorted vocabulary; any other mixture does."""
    greedy = top_ks == 1
    unrestricted = (top_ks >= probs_BV.shape[-1]) & (top_ps >= 1)
    if any(options.values()) or need_min_p_sampling or not bool((greedy | unrestricted).all()):
        return original(
            probs_BV, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions, **options
        )  # fmt: skip
    sampled = _invert(probs_BV, sampling_seed, positions).view(-1)
    return torch.where(greedy, probs_BV.argmax(-1), sampled).to(torch.int32)


def _invert(weights_BV: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    cumulated_BV = weights_BV.cumsum(-1, dtype=torch.float64)
    uniform = [_uniform(*pair) for pair in zip(seed.tolist(), positions.tolist(), strict=True)]
    threshold = torch.tensor(uniform, dtype=torch.float64)[:, None] * cumulated_BV[:, -1:]
    return torch.searchsorted(cumulated_BV, threshold, right=True).clamp_(max=weights_BV.shape[-1] - 1)


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a seed and a position: splitmix64 of both."""
    return (_mix(_mix(seed & MASK_64) ^ position) >> 11) / 2**53


def _mix(value: int) -> int:
    value = (value + GOLDEN) & MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)
