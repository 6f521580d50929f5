"""Scores for completions: the functions that apply to a row, and the objects that their calls need.

Owns the choice of functions and the breakers. Invariant: every completion gets exactly one verdict.
"""

import asyncio
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from penstock.config import RewardSection
from penstock.contracts import Score
from penstock.contracts.vocabulary import ENVIRONMENT_REWARD
from penstock.errors import RewardError, RewardUnavailableError
from penstock_reward.functions.registry import builtins
from penstock_reward.metrics import RewardMetrics
from penstock_reward.scoring.attempts import Attempts, Runner, Settled, Sleep
from penstock_reward.scoring.breaker import Breakers
from penstock_reward.scoring.combine import Verdict, failed


class Scoring:
    """The scorer of both the queue and HTTP."""

    def __init__(
        self,
        section: RewardSection,
        runner: Runner,
        metrics: RewardMetrics,
        *,
        own: Mapping[str, Mapping[str, float]] | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """own: functions and weights of held-out sets, by what their rows name as reward. `section` has them, too."""
        self._section = section
        self._runner = runner
        self._metrics = metrics
        self._own = {name: _with_weight(functions) for name, functions in (own or {}).items()}
        self._sleep = sleep
        self._pure = frozenset(builtins())
        self._known = self._pure | frozenset(section.functions)
        self._places = count()
        self.breakers = Breakers(section.breaker_failures, section.breaker_seconds, metrics.breaker_changed)
        for name in section.functions:
            metrics.breaker_changed(name, is_open=False)

    def weights(self, reward: str, *, of_episodes: bool = False) -> Mapping[str, float]:
        """Functions and weights for a row that names `reward`, or no reward (""); RewardError if there is none.

        of_episodes: an environment has scored what is to be scored.
        """
        weights = self._weights(reward)
        if ENVIRONMENT_REWARD in weights and not of_episodes:
            raise RewardError(
                f"the reward {ENVIRONMENT_REWARD!r} is the score of an episode's environment, and this is no episode; "
                "expected a reward that names another function"
            )
        return weights

    def _weights(self, reward: str) -> Mapping[str, float]:
        if not reward:
            weights = _with_weight(self._section.functions)
            if not weights:
                raise RewardError(
                    "unknown reward: the row names none, and every weight in reward.functions is 0; "
                    "expected one function with another weight, or a reward in each row"
                )
            return weights
        if reward in self._own:
            return self._own[reward]
        if reward not in self._known:
            raise RewardError(
                f"unknown reward {reward[:80]!r}; expected one of {', '.join(sorted(self._known))}, "
                "or a function that is listed in reward.functions (weight 0: only for rows that name it)"
            )
        return {reward: 1.0}

    def attempts(
        self,
        prompt: str,
        completions: Sequence[str],
        answer: str,
        reward: str,
        metadata: dict[str, Any],
        environment: Sequence[Score] = (),
    ) -> Attempts | Settled:
        """The calls that these completions need. environment: the scores of its own, if they are episodes."""
        try:
            weights = self.weights(reward, of_episodes=bool(environment))
        except RewardError as error:
            self._metrics.failed_without_call("unknown_reward")
            return Settled(failed("unknown_reward", str(error)), len(completions))
        return Attempts(
            (prompt, completions, answer, metadata),
            weights,
            next(self._places),
            self._section,
            self._runner,
            self.breakers,
            self._metrics,
            self._pure,
            self._sleep,
            environment,
        )

    async def score(
        self, prompt: str, completions: Sequence[str], answer: str, reward: str, metadata: dict[str, Any]
    ) -> list[Verdict]:
        """One verdict per completion, in order; RewardUnavailableError while a breaker is open."""
        attempts = self.attempts(prompt, completions, answer, reward, metadata)
        verdicts = await attempts.run(may_park=False)
        if verdicts is None:
            raise RewardUnavailableError(
                f"the circuit breaker of reward function {attempts.blocked_by} is open; expected it to close again "
                f"after a successful call, tried every {self._section.breaker_seconds:g} s (reward.breaker_seconds)"
            )
        return verdicts


def _with_weight(functions: Mapping[str, float]) -> dict[str, float]:
    return {name: weight for name, weight in functions.items() if weight != 0}
