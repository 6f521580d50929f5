"""Which tokens of a group are young enough to be trained, where `staleness.on_stale` is mask.

Owns the definition. With v the version under training and u_it the version that the engine asserted for token t of
completion i, both recorded with the step, so that a replay masks the same tokens:

    m_it = loss_mask_it * [ v - u_it <= max_lag ]          loss = sum_it weight_i * m_it * loss_it

* All terms of the loss lose a masked token: surrogate, KL, entropy. It stays context of the tokens after it, as a
  prompt is; ratios of whole completions (GSPO, sequence weights, gates) are those of the tokens that are left.
* weight_i and every denominator count loss_mask, not m: masking takes tokens away and never scales the others up, as
  for tokens that a correction drops. A completion without any m_it = 1 adds nothing and needs no forward pass.
* Rewards, baselines, advantages and a KL term in the reward are of whole completions: they are known whatever the age.

Weights only move on while a completion is generated, so what is masked is its beginning. Pure.
"""

from penstock.contracts import Completion, ScoredGroup


def token_lags(completion: Completion, version: int) -> tuple[int, ...]:
    """v - u of every token."""
    return tuple(version - span.policy.number for span in completion.spans for _ in range(span.start, span.end))


def trained_mask(completion: Completion, version: int, max_lag: int | None) -> tuple[bool, ...]:
    """m of every token; `max_lag` None masks none."""
    if completion.loss_mask is None:
        loss_mask = (True,) * completion.num_tokens
    else:
        loss_mask = tuple(map(bool, completion.loss_mask))
    if max_lag is None:
        return loss_mask
    return tuple(m and lag <= max_lag for m, lag in zip(loss_mask, token_lags(completion, version), strict=True))


def is_all_masked(group: ScoredGroup, version: int, max_lag: int) -> bool:
    """Whether no completion with a reward has a token left."""
    pairs = zip(group.scores, group.group.completions, strict=True)
    return not any(any(trained_mask(each, version, max_lag)) for score, each in pairs if score.value is not None)


def oldest_trained_version(completion: Completion, version: int, max_lag: int | None) -> int | None:
    """The lowest version among its spans that are not masked as a whole; None without any."""
    numbers = (span.policy.number for span in completion.spans)
    return min((number for number in numbers if max_lag is None or version - number <= max_lag), default=None)
