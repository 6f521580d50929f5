"""Which tokens of a group are young enough to be trained, if `staleness.on_stale` is mask.

Owns the definition. With v the version under training and u_it the version that the engine asserted for token t of
trajectory i (a completion or an episode), both recorded with the step, so that a replay masks the same tokens:

    m_it = loss_mask_it * [ v - u_it <= max_lag ]          loss = sum_it weight_i * m_it * loss_it

* All terms of the loss lose a masked token: surrogate, KL, entropy. It stays context of the tokens after it, as a
  prompt is; ratios of full completions (GSPO, sequence weights, gates) use the tokens that are left.
* weight_i and every denominator count loss_mask, not m: masking takes tokens away and never scales the others up, as
  for tokens that a correction drops. A completion without any m_it = 1 adds nothing and needs no forward pass.
* Rewards, baselines, advantages and a KL term in the reward use full completions: they do not depend on the age.

Of an episode, loss_mask is 1 for the tokens of its trained nodes. Weights only get newer while a completion or a path
of an episode is generated, so the masked tokens are its beginning. Pure.
"""

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from penstock.contracts import Completion, Episode, Node, ScoredGroup, Trajectory, VersionSpan
from penstock.contracts.outcomes import rewards_of


def token_lags(sampled: Completion | Node, version: int) -> npt.NDArray[np.int32]:
    """v - u of every token."""
    lags = np.empty(sampled.num_tokens, dtype=np.int32)
    for span in sampled.spans:  # they cover all tokens
        lags[span.start : span.end] = version - span.policy.number
    return lags


def trained_mask(sampled: Completion | Node, version: int, max_lag: int | None) -> npt.NDArray[np.bool_]:
    """m of every token; `max_lag` None masks none."""
    if isinstance(sampled, Node):
        mask = np.full(sampled.num_tokens, sampled.is_trained)
    elif sampled.loss_mask is None:
        mask = np.ones(sampled.num_tokens, dtype=np.bool_)
    else:
        mask = np.frombuffer(sampled.loss_mask, dtype=np.uint8) != 0
    for span in sampled.spans:
        if not _is_young(span, version, max_lag):
            mask[span.start : span.end] = False
    return mask


def num_trained_tokens(trajectory: Trajectory, version: int, max_lag: int | None) -> int:
    """Tokens with m = 1."""
    masked = b"" if isinstance(trajectory, Episode) else trajectory.loss_mask or b""
    young = [span for span in _trained_spans(trajectory) if _is_young(span, version, max_lag)]
    return sum(span.end - span.start - masked.count(0, span.start, span.end) for span in young)


def is_all_masked(
    group: ScoredGroup, version: int, max_lag: int, *, leaves_out: Callable[[Trajectory], bool] = lambda _: False
) -> bool:
    """Whether no trajectory with a reward that is not left out has a token left."""
    pairs = zip(rewards_of(group), group.group.trajectories, strict=True)
    counted = [each for reward, each in pairs if reward is not None and not leaves_out(each)]
    return not any(num_trained_tokens(each, version, max_lag) for each in counted)


def oldest_trained_version(trajectory: Trajectory, version: int, max_lag: int | None) -> int | None:
    """The lowest version among its spans that are trained and not fully masked; None without any."""
    young = (span for span in _trained_spans(trajectory) if _is_young(span, version, max_lag))
    return min((span.policy.number for span in young), default=None)


def _trained_spans(trajectory: Trajectory) -> Iterable[VersionSpan]:
    if isinstance(trajectory, Episode):
        return (span for node in trajectory.nodes if node.is_trained for span in node.spans)
    return trajectory.spans


def _is_young(span: VersionSpan, version: int, max_lag: int | None) -> bool:
    return max_lag is None or version - span.policy.number <= max_lag
