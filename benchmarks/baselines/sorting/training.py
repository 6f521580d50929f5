"""One run of the sorting task: the trainer's own learner, on groups that are as old as the run says.

Owns the order of events. A queue holds lag + 1 batches, as the loop's tickets do when servers keep up: a step trains
the oldest, and the weights that it makes sample the next. So from step `lag` on, every token is trained `lag` versions
late, in every run alike; before that, all batches are of the first weights.

The gradient, the objective and the optimizer are those of the product (`penstock_trainer.learner`). The sampler is
plain PyTorch in this process, in float32, so that lag is the only difference between sampler and trainer.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3ForCausalLM

from benchmarks.baselines.sorting.sampler import Sampled, Sampler
from benchmarks.baselines.sorting.task import END, MAX_NEW_TOKENS, draw_prompt, ids_of, score, text_of
from benchmarks.tickets import make_ticket
from penstock.config import Config
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
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.update import StepResult

BATCH_SIZE = 16
GROUP_SIZE = 16
NUM_STEPS = 80
EVAL_EVERY = 10
NUM_HELD_OUT = 512
HELD_OUT_SEED = 20_000  # of no run's prompts
SAMPLING = Sampling(1.0, MAX_NEW_TOKENS, (END,))


@dataclass
class Curve:
    """What a run measured.

    reward: mean of each trained batch; held_out: share of greedy answers to held-out prompts that are right, after 0,
    EVAL_EVERY, ... steps; the others are of each step: versions that its tokens are late, effective sample size ratio,
    KL from the trainer to the sampler, share of clipped tokens, entropy; all but the first nan without a trained token.
    """

    reward: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    lag: list[float] = field(default_factory=list)
    effective_sample_size: list[float] = field(default_factory=list)
    behaviour_kl: list[float] = field(default_factory=list)
    clipped: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)


def train(model: Path, keys: Mapping[str, Any], *, lag: int, seed: int, num_steps: int = NUM_STEPS) -> Curve:
    """Train `model` with the configuration's `keys` (nested, as in YAML)."""
    run = SortingRun(model, keys, seed=seed)
    waiting = deque(run.sample(0) for _ in range(lag + 1))
    curve = Curve(held_out=[run.held_out_accuracy()])
    for version in range(num_steps):
        batch = waiting.popleft()
        curve.lag.append(version - batch.version)
        curve.reward.append(float(np.mean([each.value for group in batch.groups for each in group.scores])))
        _note(curve, run.update(batch.groups, version))
        waiting.append(run.sample(version + 1))
        if (version + 1) % EVAL_EVERY == 0:
            curve.held_out.append(run.held_out_accuracy())
    return curve


def _note(curve: Curve, result: StepResult) -> None:
    statistics = result.statistics
    curve.effective_sample_size.append(statistics.effective_sample_size_ratio)
    curve.behaviour_kl.append(statistics.behaviour_kl)
    curve.clipped.append(statistics.clipped_ratio)
    curve.entropy.append(statistics.entropy)


@dataclass(frozen=True)
class Batch:
    """Groups that the weights of `version` sampled."""

    groups: Sequence[ScoredGroup]
    version: int


class SortingRun:
    """A learner, a sampler that follows it, and the prompts of one seed."""

    def __init__(self, model: Path, keys: Mapping[str, Any], *, seed: int) -> None:
        torch.manual_seed(seed)
        self._learner = Learner(_config(model, keys))
        self._sampler = Sampler(Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32), seed)
        self._prompts = np.random.default_rng(seed)
        held_out = np.random.default_rng(HELD_OUT_SEED)
        self._held_out = [draw_prompt(held_out) for _ in range(NUM_HELD_OUT)]
        self._num_tickets = 0

    def sample(self, version: int) -> Batch:
        """A batch of groups by the weights as they are, which `version` names."""
        prompts = [draw_prompt(self._prompts) for _ in range(BATCH_SIZE)]
        sampled = self._sampler.sample([ids_of(prompt) for prompt in prompts for _ in range(GROUP_SIZE)])
        groups = []
        for index, prompt in enumerate(prompts):
            own = sampled[index * GROUP_SIZE : (index + 1) * GROUP_SIZE]
            groups.append(_group(self._num_tickets, prompt, own, version))
            self._num_tickets += 1
        return Batch(groups, version)

    def update(self, groups: Sequence[ScoredGroup], version: int) -> StepResult:
        """Train; the sampler has the new weights afterwards."""
        result = self._learner.update(groups, version=version)
        self._sampler.load(dict(self._learner.weights()))
        return result

    def held_out_accuracy(self) -> float:
        """Share of held-out prompts whose greedy answer is right."""
        sampled = self._sampler.sample([ids_of(prompt) for prompt in self._held_out], greedy=True)
        return float(np.mean([score(p, text_of(each.ids)) for p, each in zip(self._held_out, sampled, strict=True)]))


def _config(model: Path, keys: Mapping[str, Any]) -> Config:
    return Config.model_validate(
        {
            "actor": {"path": str(model), "dtype": "float32", "group_size": GROUP_SIZE, "num_threads": 1},
            "data": {"batch_size": BATCH_SIZE, "train": {"path": "none"}},
            "sampling": {"max_new_tokens": MAX_NEW_TOKENS},
            "staleness": {"max_staleness": 0},  # what is trained here is the study's matter
            "kl_ctl": 0.0,
            **keys,
        }
    )


def _group(number: int, prompt: str, sampled: Sequence[Sampled], version: int) -> ScoredGroup:
    ticket = make_ticket(number, range(len(sampled)), SAMPLING, prompt_ids=pack_int32(ids_of(prompt)))
    completions = tuple(_completion(each, version) for each in sampled)
    scores = tuple(Score(score(prompt, text_of(each.ids))) for each in sampled)
    return ScoredGroup(RolloutGroup(ticket, completions, "benchmark", 0.0, 1.0), scores)


def _completion(sampled: Sampled, version: int) -> Completion:
    return Completion(
        token_ids=pack_int32(sampled.ids),
        loss_mask=None,
        logprobs=pack_float32(sampled.logprobs),
        spans=(VersionSpan(PolicyIdentity(version, "0" * 16), 0, len(sampled.ids)),),
        text="",
        finish_reason="stop" if sampled.ids[-1] == END else "length",
    )
