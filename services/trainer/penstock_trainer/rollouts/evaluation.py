"""Evaluation on sets of held-out prompts while training goes on, through the same services.

Owns its ticket numbers, its rounds, each of one set, and their results until they are taken. Each ticket is for one
completion, so that a prompt that is sampled several times needs no more room on an engine than any other. Invariant: a
round is complete when each of its tickets has a result or is lost, and its result carries the range of versions that
generated it. A completion that is lost or whose reward failed is in no mean, and never counts as wrong: it is recorded
with its reason. A prompt without any reward is counted as failed. A round without any reward has no accuracy.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from penstock.config import Config, EvalSampling, HeldOutSet
from penstock.contracts import Sampling, ScoredGroup, Ticket
from penstock.contracts.outcomes import failure_of, rewards_of
from penstock.readable import cut, without_end
from penstock_trainer.batching.rewards import function_figures, most_frequent
from penstock_trainer.data.drawing.draws import eval_ticket
from penstock_trainer.data.prompts import EncodedPrompt, digest
from penstock_trainer.rollouts.repeated import interval, mean, pass_figures
from penstock_trainer.rollouts.samples import COMPLETION_CHARACTERS, PROMPT_CHARACTERS
from penstock_trainer.telemetry.records import EvalResult, EvalSample

NUMBERS_PER_LEASE = 10_000_000  # numbers of an earlier trainer are never used again
LOST = "its ticket was dropped: no service could use its message"
MOST_FAILED = 100  # rows without a reward that a line of evals.jsonl keeps: enough to see why, and it stays below 1 MB


@dataclass(frozen=True)
class EvalSet:
    """A held-out set as it is evaluated. num_trained: prompts among them that are training prompts too."""

    held_out: HeldOutSet
    prompts: Sequence[EncodedPrompt]
    sampling: Sampling
    num_trained: int

    @property
    def name(self) -> str:
        return self.held_out.name

    @cached_property
    def digest(self) -> str:
        return digest(self.prompts)


@dataclass
class _Round:
    of: EvalSet
    steps: int
    policy_version: int
    prompts: dict[int, int] = field(default_factory=dict)
    """Ticket number -> place of its prompt."""
    lost: set[int] = field(default_factory=set)
    results: dict[int, ScoredGroup] = field(default_factory=dict)


class Evaluation:
    """The rounds of one trainer."""

    def __init__(self, sets: Sequence[EvalSet], lease: int, config: Config) -> None:
        self._sets = {each.name: each for each in sets if each.prompts}
        self._config = config
        self._next = lease * NUMBERS_PER_LEASE
        self._round_of: dict[int, _Round] = {}
        self._results: list[EvalResult] = []
        self.arrived = asyncio.Event()
        """Set when a result comes, or a ticket is lost."""

    @property
    def unreported(self) -> set[int]:
        """The steps after which rounds have begun whose results were not taken."""
        return {each.steps for each in self._round_of.values()} | {each.steps for each in self._results}

    @property
    def sets(self) -> tuple[str, ...]:
        """The names of its sets."""
        return tuple(self._sets)

    @property
    def num_waiting(self) -> int:
        """The number of results that have not arrived yet."""
        return len(self._round_of)

    def due(self, steps: int) -> bool:
        every = self._config.eval.every_steps
        return bool(self._sets) and (steps == 0 or (every > 0 and steps % every == 0))

    def start(self, steps: int, policy_version: int, sets: Sequence[str] | None = None) -> list[Ticket]:
        """Begin a round of each of these sets, or of all, and return their tickets."""
        wanted = self._sets.values() if sets is None else [self._sets[name] for name in sets]
        return [ticket for each in wanted for ticket in self._start(_Round(each, steps, policy_version))]

    def _start(self, new: _Round) -> list[Ticket]:
        tickets, of = [], new.of
        every = [place for place in range(len(of.prompts)) for _ in range(of.held_out.sampling.samples_per_prompt)]
        for place in every:
            number, self._next = self._next, self._next + 1
            self._round_of[number] = new
            new.prompts[number] = place
            tickets.append(
                eval_ticket(
                    of.prompts[place],
                    number,
                    sampling=of.sampling,
                    policy_version=new.policy_version,
                    seed=self._config.run.seed,
                    environment=self._config.agent.name,
                )
            )
        return tickets

    def record(self, group: ScoredGroup) -> None:
        """Count one group, which may complete its round. Groups of an earlier trainer are ignored."""
        number = group.group.ticket.number
        owner = self._round_of.pop(number, None)
        if owner is not None:
            owner.results[number] = group
            self._complete(owner)
            self.arrived.set()

    def give_up(self, number: int) -> None:
        """Count a ticket that became poison as failed."""
        owner = self._round_of.pop(number, None)
        if owner is not None:
            owner.lost.add(number)
            self._complete(owner)
            self.arrived.set()

    def take_results(self) -> list[EvalResult]:
        """The rounds that have been completed since the last call."""
        results, self._results = self._results, []
        return results

    def _complete(self, owner: _Round) -> None:
        if len(owner.results) + len(owner.lost) >= len(owner.prompts):
            self._results.append(self._result(owner))

    def _result(self, finished: _Round) -> EvalResult:
        groups = [finished.results[number] for number in sorted(finished.results)]
        versions = [span.policy.number for group in groups for each in group.group.trajectories for span in each.spans]
        of, sampled = finished.of, finished.of.held_out.sampling
        success, most = sampled.success, sampled.samples_per_prompt
        rewards = _rewards(finished)
        scored = [values for values in rewards if values]
        shares = [sum(value >= success for value in values) / len(values) for values in scored]
        samples = {
            number: _sample(of.prompts[place], finished.results.get(number))
            for number, place in finished.prompts.items()
        }
        failed = [each for each in samples.values() if each.reward is None]
        first = [number for number in list(samples)[::most] if number in finished.results]
        return EvalResult(
            steps=finished.steps,
            accuracy=mean(shares),
            reward_mean=mean([math.fsum(values) / len(values) for values in scored]),
            num_prompts=len(of.prompts),
            num_scored=len(scored),
            num_failed=len(rewards) - len(scored),
            oldest_version=min(versions, default=finished.policy_version),
            newest_version=max(versions, default=finished.policy_version),
            samples=tuple(samples[number] for number in first[: self._config.eval.num_shown]),
            failures=most_frequent(each.failure for each in failed),
            success=success,
            prompts=of.digest,
            num_trained=of.num_trained,
            rewards=function_figures(groups),
            failed=tuple(map(_cut, failed[:MOST_FAILED])),
            samples_per_prompt=most,
            accuracy_interval=interval(shares),
            pass_at=_passes(scored, sampled),
            set=of.name,
        )


def _passes(scored: Sequence[Sequence[float]], sampled: EvalSampling) -> dict[str, dict[str, float]]:
    """pass@k of prompts with these rewards; none if each has one completion, of which the accuracy says all."""
    most = sampled.samples_per_prompt
    right = [sum(value >= sampled.success for value in values) for values in scored]
    return pass_figures(list(zip(map(len, scored), right, strict=True)), most) if most > 1 else {}


def _rewards(finished: _Round) -> list[list[float]]:
    """Of each prompt: the rewards of its completions that have one."""
    rewards: list[list[float]] = [[] for _ in finished.of.prompts]
    for number, group in finished.results.items():
        rewards[finished.prompts[number]] += [value for value in rewards_of(group) if value is not None]
    return rewards


def _sample(prompt: EncodedPrompt, group: ScoredGroup | None) -> EvalSample:
    """The first completion or episode of a group; without one, that there is none."""
    if group is None:
        return EvalSample(prompt.question, "", prompt.answer, None, LOST)
    trajectory, score = group.group.trajectories[0], group.scores[0]
    text, reward = without_end(trajectory.text), rewards_of(group)[0]
    return EvalSample(prompt.question, text, group.group.ticket.answer, reward, failure_of(trajectory, score))


def _cut(sample: EvalSample) -> EvalSample:
    return replace(
        sample,
        prompt=cut(sample.prompt, PROMPT_CHARACTERS),
        completion=cut(sample.completion, COMPLETION_CHARACTERS),
        answer=cut(sample.answer, PROMPT_CHARACTERS),
        failure=cut(sample.failure, PROMPT_CHARACTERS),
    )
