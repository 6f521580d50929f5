"""Evaluation on held-out prompts while training goes on, through the same services.

Owns its ticket numbers, its rounds and their results until they are taken. Invariant: a round is complete when each of
its prompts has one result or is lost, and its result carries the range of versions that generated it; lost prompts and
failed rewards count as not accurate and are reported. A round of which all is lost has no result.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from penstock.config import Config
from penstock.contracts import Sampling, ScoredGroup, Ticket
from penstock.contracts.outcomes import failure_of, rewards_of
from penstock.readable import without_end
from penstock_trainer.batching.rewards import function_figures, most_frequent
from penstock_trainer.data.draws import eval_ticket
from penstock_trainer.data.prompts import EncodedPrompt, digest
from penstock_trainer.telemetry.records import EvalResult, EvalSample

NUMBERS_PER_LEASE = 10_000_000  # numbers of an earlier trainer are never used again
LOST = "its ticket was dropped: no service could use its message"


@dataclass
class _Round:
    steps: int
    num_prompts: int
    questions: dict[int, str] = field(default_factory=dict)
    num_lost: int = 0
    results: dict[int, ScoredGroup] = field(default_factory=dict)


class Evaluation:
    """The rounds of one trainer."""

    def __init__(
        self,
        prompts: Sequence[EncodedPrompt],
        stop_token_ids: tuple[int, ...],
        lease: int,
        config: Config,
        *,
        num_trained: int,
    ) -> None:
        """num_trained: prompts among them that are training prompts too."""
        self._prompts = prompts
        self._num_trained = num_trained
        self._config = config
        self._sampling = Sampling(config.eval.temperature, config.sampling.max_new_tokens, stop_token_ids)
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
        new = _Round(steps, len(self._prompts))
        tickets = []
        for prompt in self._prompts:
            number, self._next = self._next, self._next + 1
            self._round_of[number] = new
            new.questions[number] = prompt.question
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
        """Count a ticket that became poison as failed: its prompt stays in the denominator."""
        owner = self._round_of.pop(number, None)
        if owner is not None:
            owner.num_lost += 1
            self._complete(owner)

    def take_results(self) -> list[EvalResult]:
        """The rounds that have been completed since the last call."""
        results, self._results = self._results, []
        return results

    def _complete(self, owner: _Round) -> None:
        if owner.results and len(owner.results) + owner.num_lost >= owner.num_prompts:
            self._results.append(self._result(owner))

    def _result(self, finished: _Round) -> EvalResult:
        numbers = sorted(finished.results)
        groups = [finished.results[number] for number in numbers]
        values = [rewards_of(group)[0] for group in groups]
        versions = [span.policy.number for group in groups for each in group.group.trajectories for span in each.spans]
        valid = [value for value in values if value is not None]
        success = self._config.eval.success
        failures = [failure_of(group.group.trajectories[0], group.scores[0]) for group in groups]
        return EvalResult(
            steps=finished.steps,
            accuracy=sum(value >= success for value in valid) / finished.num_prompts,
            reward_mean=sum(valid) / len(valid) if valid else 0.0,
            num_prompts=finished.num_prompts,
            num_failed=finished.num_prompts - len(valid),
            oldest_version=min(versions, default=0),
            newest_version=max(versions, default=0),
            samples=tuple(
                _sample(finished.questions[number], finished.results[number])
                for number in numbers[: self._config.eval.num_shown]
            ),
            failures=most_frequent([*filter(None, failures), *[LOST] * finished.num_lost]),
            success=success,
            prompts=self._digest,
            num_trained=self._num_trained,
            rewards=function_figures(groups),
        )


def _sample(question: str, group: ScoredGroup) -> EvalSample:
    """The first completion or episode of a group."""
    text = without_end(group.group.trajectories[0].text)
    return EvalSample(question, text, group.group.ticket.answer, rewards_of(group)[0])
