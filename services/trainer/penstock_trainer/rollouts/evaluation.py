"""Evaluation on held-out prompts while training goes on, through the same services.

Owns its ticket numbers, its rounds and their results until they are taken. Invariant: a round is complete when each of
its prompts has one result or is lost, and its result carries the range of versions that generated it. A prompt that is
lost or whose reward failed is in no mean, and never counts as wrong: it is counted, and recorded with its reason. A
round without any reward has no accuracy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from penstock.config import Config
from penstock.contracts import Sampling, ScoredGroup, Ticket
from penstock.contracts.outcomes import failure_of, rewards_of
from penstock.readable import cut, without_end
from penstock_trainer.batching.rewards import function_figures, most_frequent
from penstock_trainer.data.draws import eval_ticket
from penstock_trainer.data.prompts import EncodedPrompt, digest
from penstock_trainer.rollouts.samples import COMPLETION_CHARACTERS, PROMPT_CHARACTERS
from penstock_trainer.telemetry.records import EvalResult, EvalSample

NUMBERS_PER_LEASE = 10_000_000  # numbers of an earlier trainer are never used again
LOST = "its ticket was dropped: no service could use its message"
MOST_FAILED = 100  # rows without a reward that a line of evals.jsonl keeps: enough to see why, and it stays below 1 MB


@dataclass
class _Round:
    steps: int
    policy_version: int
    prompts: dict[int, EncodedPrompt] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)
    results: dict[int, ScoredGroup] = field(default_factory=dict)


class Evaluation:
    """The rounds of one trainer."""

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: Sampling,
        lease: int,
        config: Config,
        *,
        num_trained: int,
    ) -> None:
        """num_trained: prompts among them that are training prompts too."""
        self._prompts = prompts
        self._num_trained = num_trained
        self._config = config
        self._sampling = sampling
        self._next = lease * NUMBERS_PER_LEASE
        self._round_of: dict[int, _Round] = {}
        self._results: list[EvalResult] = []

    @cached_property
    def _digest(self) -> str:
        return digest(self._prompts)

    @property
    def enabled(self) -> bool:
        return bool(self._prompts)

    @property
    def num_waiting(self) -> int:
        """The number of results that have not arrived yet."""
        return len(self._round_of)

    def due(self, steps: int) -> bool:
        every = self._config.eval.every_steps
        return self.enabled and (steps == 0 or (every > 0 and steps % every == 0))

    def start(self, steps: int, policy_version: int) -> list[Ticket]:
        """Begin a round, and return its tickets."""
        new = _Round(steps, policy_version)
        tickets = []
        for prompt in self._prompts:
            number, self._next = self._next, self._next + 1
            self._round_of[number] = new
            new.prompts[number] = prompt
            tickets.append(
                eval_ticket(
                    prompt,
                    number,
                    sampling=self._sampling,
                    policy_version=policy_version,
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

    def give_up(self, number: int) -> None:
        """Count a ticket that became poison as failed."""
        owner = self._round_of.pop(number, None)
        if owner is not None:
            owner.lost.add(number)
            self._complete(owner)

    def take_results(self) -> list[EvalResult]:
        """The rounds that have been completed since the last call."""
        results, self._results = self._results, []
        return results

    def _complete(self, owner: _Round) -> None:
        if len(owner.results) + len(owner.lost) >= len(owner.prompts):
            self._results.append(self._result(owner))

    def _result(self, finished: _Round) -> EvalResult:
        numbers = sorted(finished.results)
        groups = [finished.results[number] for number in numbers]
        values = [rewards_of(group)[0] for group in groups]
        versions = [span.policy.number for group in groups for each in group.group.trajectories for span in each.spans]
        valid = [value for value in values if value is not None]
        success = self._config.eval.success
        samples = [_sample(prompt, finished.results.get(number)) for number, prompt in finished.prompts.items()]
        failed = [each for each in samples if each.reward is None]
        shown = numbers[: self._config.eval.num_shown]
        return EvalResult(
            steps=finished.steps,
            accuracy=sum(value >= success for value in valid) / len(valid) if valid else None,
            reward_mean=sum(valid) / len(valid) if valid else None,
            num_prompts=len(finished.prompts),
            num_scored=len(valid),
            num_failed=len(failed),
            oldest_version=min(versions, default=finished.policy_version),
            newest_version=max(versions, default=finished.policy_version),
            samples=tuple(_sample(finished.prompts[number], finished.results[number]) for number in shown),
            failures=most_frequent(each.failure for each in failed),
            success=success,
            prompts=self._digest,
            num_trained=self._num_trained,
            rewards=function_figures(groups),
            failed=tuple(map(_cut, failed[:MOST_FAILED])),
        )


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
