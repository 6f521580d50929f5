"""Scores for completions: which functions apply, their calls, retries, and the sum.

Owns the choice of functions and the retries. Invariant: every completion gets exactly one verdict, and none waits
longer than functions * reward.max_attempts * reward.timeout_seconds once its call has begun. Called by `worker` for
groups from the queue and by `app` for requests.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, Protocol

from penstock.config import RewardSection
from penstock.errors import RewardError
from penstock_reward.messages import Call, Outcome
from penstock_reward.metrics import RewardMetrics
from penstock_reward.registry import builtins
from penstock_reward.scorer import Verdict, combine, failed


class Runner(Protocol):
    """What runs calls: `pool.Pool`."""

    async def run(
        self, prompt: str, completions: Sequence[str], answer: str, metadata: dict[str, Any], calls: Sequence[Call]
    ) -> list[Outcome]: ...


class Scoring:
    """The scorer behind the queue and behind HTTP."""

    def __init__(self, section: RewardSection, runner: Runner, metrics: RewardMetrics) -> None:
        check_weights(section.functions)
        self._section = section
        self._runner = runner
        self._metrics = metrics
        self._known = frozenset(builtins()) | frozenset(section.functions)

    def weights(self, reward: str) -> Mapping[str, float]:
        """Functions and weights for a row that names `reward`, or none (""); RewardError where it cannot be used."""
        if not reward:
            weights = {name: weight for name, weight in self._section.functions.items() if weight != 0}
            if not weights:
                raise RewardError(
                    "unknown reward: the row names none, and every weight in reward.functions is 0; "
                    "expected one function with another weight, or a reward in each row"
                )
            return weights
        if reward not in self._known:
            raise RewardError(
                f"unknown reward {reward[:80]!r}; expected one of {', '.join(sorted(self._known))}, "
                "or a function that is listed in reward.functions (weight 0: only for rows that name it)"
            )
        return {reward: 1.0}

    async def score(
        self, prompt: str, completions: Sequence[str], answer: str, reward: str, metadata: dict[str, Any]
    ) -> list[Verdict]:
        """One verdict per completion, in order."""
        try:
            weights = self.weights(reward)
        except RewardError as error:
            self._metrics.failed_without_call("unknown_reward")
            return [failed("unknown_reward", str(error)) for _ in completions]
        outcomes: dict[Call, Outcome] = {}
        calls = [Call(name, index) for index in range(len(completions)) for name in weights]
        for _ in range(self._section.max_attempts):
            for call, outcome in zip(
                calls, await self._runner.run(prompt, completions, answer, metadata, calls), strict=True
            ):
                outcomes[call] = outcome
                self._metrics.call_ended(call.function, outcome)
            calls = [call for call in calls if outcomes[call].value is None]
            if not calls:
                break
        return [
            combine(weights, {name: outcomes[Call(name, index)] for name in weights})
            for index in range(len(completions))
        ]


def check_weights(functions: Mapping[str, float]) -> None:
    """RewardError for a weight that makes every sum useless."""
    for name, weight in functions.items():
        if not isfinite(weight):
            raise RewardError(f"reward.functions gives {name!r} the weight {weight}; expected a finite number")
