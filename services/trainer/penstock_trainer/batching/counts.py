"""What a batch holds, as numbers: groups, completions, tokens, rewards, advantages, lengths, and what is too old.

Owns their definitions. Pure.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from penstock.contracts import ScoredGroup
from penstock_trainer.batching.masking import trained_mask


@dataclass(frozen=True)
class BatchCounts:
    """What a batch holds, counted before anything is left out.

    num_groups: with at least two valid rewards: the denominator. num_failed_groups: the others.
    num_degenerate_groups: of the former, those whose rewards are all equal.
    num_loss_tokens: of valid completions; masked_stale: share of them that is too old (`masking`).
    num_stale_completions, num_stale_groups: valid completions all of whose loss tokens are too old; groups with an
    advantage that have no gradient for that reason.
    reward_*: over valid completions, as scored; nan without any.
    advantage_*: over the valid completions of the counted groups. length_*: mean loss tokens of valid completions
    (generated) and of what is not masked of those with an advantage (trained); length_bias is trained over generated, 1
    without bias.
    """

    num_groups: int
    num_failed_groups: int
    num_degenerate_groups: int
    num_completions: int
    num_failed_completions: int
    num_loss_tokens: int
    masked_stale: float
    num_stale_completions: int
    num_stale_groups: int
    reward_mean: float
    reward_std: float
    reward_min: float
    reward_max: float
    advantage_std: float
    advantage_min: float
    advantage_max: float
    length_generated: float
    length_trained: float
    length_bias: float


def count_batch(
    groups: Sequence[ScoredGroup],
    chosen: list[int],
    advantage_of: Mapping[tuple[int, int], float],
    age: tuple[int, int | None],
    *,
    num_degenerate_groups: int,
) -> BatchCounts:
    """The counts of a batch. chosen: groups with at least two valid rewards; advantage_of: by (group, completion).

    age: version under training and the largest lag that is trained.
    """
    values = [score.value for group in groups for score in group.scores if score.value is not None]
    mean = math.fsum(values) / len(values) if values else math.nan
    lengths = {(b, g): groups[b].group.completions[g].num_loss_tokens for b, g in advantage_of}
    left = {(b, g): sum(trained_mask(groups[b].group.completions[g], *age)) for b, g in advantage_of}
    trained = [length for place, length in left.items() if advantage_of[place] and length]
    moving = {b for (b, _), value in advantage_of.items() if value}
    generated_mean = _mean(list(lengths.values()))
    trained_mean = _mean(trained)
    return BatchCounts(
        num_groups=len(chosen),
        num_failed_groups=len(groups) - len(chosen),
        num_degenerate_groups=num_degenerate_groups,
        num_completions=len(advantage_of),
        num_failed_completions=sum(score.value is None for group in groups for score in group.scores),
        num_loss_tokens=sum(lengths.values()),
        masked_stale=1 - sum(left.values()) / max(1, sum(lengths.values())) if any(lengths.values()) else 0.0,
        num_stale_completions=sum(lengths[place] > 0 == left[place] for place in lengths),
        num_stale_groups=sum(_is_stale(b, advantage_of, lengths, left) for b in moving),
        reward_mean=mean,
        reward_std=math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values)) if values else math.nan,
        reward_min=min(values, default=math.nan),
        reward_max=max(values, default=math.nan),
        advantage_std=math.sqrt(_mean([value**2 for value in advantage_of.values()])),
        advantage_min=min(advantage_of.values(), default=0.0),
        advantage_max=max(advantage_of.values(), default=0.0),
        length_generated=generated_mean,
        length_trained=trained_mean,
        length_bias=trained_mean / generated_mean if trained_mean else 1.0,
    )


def _is_stale(
    b: int,
    advantage_of: Mapping[tuple[int, int], float],
    lengths: Mapping[tuple[int, int], int],
    left: Mapping[tuple[int, int], int],
) -> bool:
    """Whether masking took the group's gradient."""
    places = [place for place, value in advantage_of.items() if place[0] == b and value]
    return any(lengths[place] for place in places) and not any(left[place] for place in places)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
