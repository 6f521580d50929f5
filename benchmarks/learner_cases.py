"""The batches that both sides of the learner's benchmark train on.

Owns their shapes. Invariant: they are drawn from a seed, so every process has the same ones. No advantage is 0, so both
sides compute every completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from benchmarks.tickets import make_ticket
from penstock.contracts import (
    Completion,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    VersionSpan,
    pack_float32,
    pack_int32,
)

GROUP_SIZE = 8
TOKENS = range(1000, 40000)  # ordinary ones of SmolLM2's vocabulary
SHORTEST, MEDIAN, LONGEST, SPREAD = 16, 64, 512, 0.8  # completions of the ragged case, log-normal
REWARDS = tuple(index / 10 + 0.05 * (index == 7) for index in range(GROUP_SIZE))  # none is the mean


@dataclass(frozen=True)
class Case:
    """prompts: ids; completions: GROUP_SIZE lists of ids per prompt."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_loss_tokens(self) -> int:
        return sum(len(ids) for group in self.completions for ids in group)

    @property
    def num_sequence_tokens(self) -> int:
        """Tokens of all sequences, prompts counted for each: the work that is asked for, without padding."""
        prompts = sum(len(prompt) for prompt in self.prompts) * GROUP_SIZE
        return prompts + self.num_loss_tokens


def _draw(random: Random, length: int) -> tuple[int, ...]:
    return tuple(random.choices(TOKENS, k=length))


def ragged_case(num_prompts: int, scale: int = 1) -> Case:
    """Prompts of about 100 tokens, completions of 16 to 512 tokens times `scale`: a reasoning task, scaled down."""
    random = Random(0)
    prompts = tuple(_draw(random, random.randint(80, 120)) for _ in range(num_prompts))
    lengths = [
        [
            scale * min(LONGEST, max(SHORTEST, round(MEDIAN * random.lognormvariate(0, SPREAD))))
            for _ in range(GROUP_SIZE)
        ]
        for _ in prompts
    ]
    return Case("ragged", prompts, tuple(tuple(_draw(random, length) for length in each) for each in lengths))


def short_case() -> Case:
    """Half a batch of the demo's shape: a common few-shot prefix, completions of 2 or 3 tokens, many of them equal."""
    random = Random(1)
    few_shot = _draw(random, 14)
    prompts = tuple(few_shot + _draw(random, 4) for _ in range(4))
    answers = [[_draw(random, length) for length in (2, 2, 3)] for _ in prompts]
    return Case("short", prompts, tuple(tuple(random.choices(each, k=GROUP_SIZE)) for each in answers))


def _completion(ids: Sequence[int], logprobs: Sequence[float], num_masked: int) -> Completion:
    """`num_masked`: of its first tokens."""
    return Completion(
        token_ids=pack_int32(ids),
        loss_mask=bytes(int(place >= num_masked) for place in range(len(ids))) if num_masked else None,
        logprobs=pack_float32(logprobs),
        spans=(VersionSpan(PolicyIdentity(0, "0" * 16), 0, len(ids)),),
        text="",
        finish_reason="stop",
    )


def scored_groups(
    case: Case, behaviour: Sequence[Sequence[Sequence[float]]], *, shared: bool = True
) -> list[ScoredGroup]:
    """The case as messages from the reward service; `behaviour` is shaped like its completions.

    Without `shared` no two sequences begin alike, so that a pack holds each in full: the prompt is one token, and each
    completion is a token of its own, the prompt, both masked, and the completion.
    """
    groups = []
    for number, prompt in enumerate(case.prompts):
        pairs = zip(case.completions[number], behaviour[number], strict=True)
        if shared:
            completions = tuple(_completion(ids, logprobs, 0) for ids, logprobs in pairs)
        else:
            firsts = (TOKENS[number * GROUP_SIZE + index] for index in range(GROUP_SIZE))
            masked = len(prompt) + 1
            completions = tuple(
                _completion((first, *prompt, *ids), (*[0.0] * masked, *logprobs), masked)
                for first, (ids, logprobs) in zip(firsts, pairs, strict=True)
            )
            prompt = prompt[:1]
        ticket = make_ticket(number, range(GROUP_SIZE), Sampling(1.0, LONGEST, ()), prompt_ids=pack_int32(prompt))
        scores = tuple(Score(reward) for reward in REWARDS)
        groups.append(ScoredGroup(RolloutGroup(ticket, completions, "benchmark", 0.0, 1.0), scores))
    return groups
