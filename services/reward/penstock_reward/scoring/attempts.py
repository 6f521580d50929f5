"""The calls of one prompt's completions until all have verdicts: attempts, retries, and the wait for open breakers.

Owns the calls and their outcomes. Invariants: every completion gets exactly one verdict; a call that was answered is
not repeated for it; no call fails because a breaker is open: only its own attempts can fail it. A pure function that
exceeded its deadline would do so again: that failure is final, and the completion's own. An episode that its
environment could not score has failed, and no function is called for it.

    run --> attempt --> failed as in an outage --> back-off --> attempt ... --> verdicts
     |                                                             '-- breaker opened --> None --.
     '-- breaker is open --> None --> `breakers_closed` (waits, probes) --> run again <-----------------'
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any, Protocol

from penstock.config import RewardSection
from penstock.contracts import Score
from penstock.contracts.vocabulary import ENVIRONMENT_REWARD
from penstock_reward.metrics import RewardMetrics
from penstock_reward.processes.messages import OUTAGE_KINDS, Call, Outcome
from penstock_reward.scoring.breaker import AnsweredCall, Breaker, Breakers
from penstock_reward.scoring.combine import Verdict, combine, failed

LEAST_BACK_OFF = 0.5  # of the full one: jitter, so that services do not return to a server all at once

Sleep = Callable[[float], Awaitable[None]]


class Runner(Protocol):
    """Runs calls: `pool.Pool.run`."""

    async def run(
        self,
        prompt: str,
        completions: Sequence[str],
        answer: str,
        metadata: dict[str, Any],
        calls: Sequence[Call],
        *,
        on_outcome: Callable[[Call, Outcome], None],
        is_test: bool = False,
    ) -> list[Outcome]: ...


class Attempts:
    """The calls of one group, or of one request."""

    def __init__(
        self,
        request: tuple[str, Sequence[str], str, dict[str, Any]],
        weights: Mapping[str, float],
        place: int,
        section: RewardSection,
        runner: Runner,
        breakers: Breakers,
        metrics: RewardMetrics,
        pure: Collection[str],
        sleep: Sleep = asyncio.sleep,
        environment: Sequence[Score] = (),
    ) -> None:
        """`request`: prompt, completions, answer, metadata. `place`: its order among groups that wait for a breaker.

        `pure`: functions whose outcome depends on their arguments alone. `environment`: the score of each episode by
        its environment, which is one more function of `weights`; none if these are no episodes.
        """
        self._request = request
        self._weights = weights
        self._place = place
        self._section = section
        self._runner = runner
        self._breakers = breakers
        self._metrics = metrics
        self._pure = pure
        self._sleep = sleep
        self._random = Random(place)
        self._environment = environment
        self._outcomes = {
            Call(ENVIRONMENT_REWARD, index): Outcome(score.value, 0.0) for index, score in enumerate(environment)
        }
        called = [name for name in weights if name != ENVIRONMENT_REWARD]
        unscored = {index for index, score in enumerate(environment) if score.value is None}
        self._due = [Call(name, index) for index in range(len(request[1])) if index not in unscored for name in called]
        self._num_probes = 0

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions of the scores, in the order of their values."""
        return tuple(self._weights)

    @property
    def blocked_by(self) -> str:
        """The open breaker that blocks it, and why that is open; empty if there is none."""
        breaker = self._breakers.blocking(call.function for call in self._due)
        return "" if breaker is None else str(breaker)

    async def run(self, *, may_park: bool = True) -> list[Verdict] | None:
        """One verdict per completion; None if an open breaker blocks a call: `breakers_closed`, then run again."""
        if self.blocked_by:
            return None
        due = list(self._due)
        for attempt in range(self._section.max_attempts):
            if attempt:
                await self._sleep(back_off_seconds(attempt, self._section, self._random))
            failed: list[Call] = []
            for some in self._rounds(due):
                if may_park:
                    if (still_failed := await self._call_until_blocked(some)) is None:
                        return None
                    failed += still_failed
                else:
                    failed += await self._call(some)
            due = failed
            if not due:
                break
        if due and may_park and self.blocked_by:
            return None
        self._due = []
        return [self._verdict(index) for index in range(len(self._request[1]))]

    def _verdict(self, completion: int) -> Verdict:
        if self._environment and (reason := self._environment[completion].failure):
            self._metrics.failed_without_call("environment")
            return failed("environment", f"{ENVIRONMENT_REWARD}: {reason}")
        outcomes = {name: self._outcomes[Call(name, completion)] for name in self._weights}
        verdict = combine(self._weights, outcomes, self._section.max_magnitude, self._section.gates)
        for kind in verdict.kinds - {outcome.kind for outcome in outcomes.values()}:
            self._metrics.failed_without_call(kind)
        return verdict

    async def breakers_closed(self) -> None:
        """Return when no breaker blocks it any more; probes if it is its turn."""
        while (breaker := self._breakers.blocking(call.function for call in self._due)) is not None:
            if not await breaker.admission(self._place, self._num_probes):
                continue
            self._num_probes += 1
            try:
                probe = next(call for call in self._due if call.function == breaker.function)
                if await self._call([probe], is_test=True):  # the next probe uses another completion
                    self._due.remove(probe)
                    self._due.append(probe)
                    await self._repeat_reference(breaker)
            finally:
                breaker.probe_ended()

    def _rounds(self, calls: Sequence[Call]) -> list[Sequence[Call]]:
        """At most as many calls at once as open a breaker: a long group then stops soon after an outage begins."""
        size = self._section.breaker_failures or max(1, len(calls))
        return [calls[first : first + size] for first in range(0, len(calls), size)]

    async def _call_until_blocked(self, calls: Sequence[Call]) -> list[Call] | None:
        """As `_call`; None if a breaker is open, or opens meanwhile: what has not been answered by then stays due."""
        if self.blocked_by:
            return None
        breakers = [self._breakers.of(name) for name in dict.fromkeys(call.function for call in calls)]
        called = asyncio.create_task(self._call(calls))
        opened = [asyncio.create_task(breaker.opened.wait()) for breaker in breakers]
        try:
            await asyncio.wait({called, *opened}, return_when=asyncio.FIRST_COMPLETED)
            return called.result() if called.done() else None
        finally:
            for task in (called, *opened):
                task.cancel()
            await asyncio.gather(called, *opened, return_exceptions=True)

    async def _call(self, calls: Sequence[Call], *, is_test: bool = False) -> list[Call]:
        """The calls that failed as in an outage; the others are settled. Each counts as soon as it is answered."""
        failed: list[Call] = []
        tests: list[asyncio.Task[None]] = []

        def ended(call: Call, outcome: Outcome) -> None:
            if not self._settle(call, outcome):
                failed.append(call)
                breaker = self._breakers.of(call.function)
                if breaker.is_suspect:
                    tests.append(asyncio.create_task(self._test(breaker)))

        try:
            await self._runner.run(*self._request, calls, on_outcome=ended, is_test=is_test)
            await asyncio.gather(*tests)
        finally:
            for test in tests:
                test.cancel()
            await asyncio.gather(*tests, return_exceptions=True)
        return failed

    def _settle(self, call: Call, outcome: Outcome) -> bool:
        """Whether the call needs no other attempt: it was answered, or has failed for good."""
        self._outcomes[call] = outcome
        self._metrics.call_ended(call.function, outcome)
        breaker = self._breakers.of(call.function)
        hung = outcome.kind == "timeout"
        if outcome.kind in OUTAGE_KINDS and not (hung and call.function in self._pure):
            declared = outcome.kind == "transient"
            breaker.failed(outcome.reason, self._place, declared=declared, hung=hung)
            return False
        self._due.remove(call)
        if not hung:
            prompt, completions, answer, metadata = self._request
            breaker.answered(AnsweredCall(prompt, completions[call.completion], answer, metadata, outcome.seconds))
        return True

    async def _test(self, breaker: Breaker) -> None:
        """Open a breaker if a call that was answered before is not answered now."""
        if not breaker.is_suspect:  # another group has begun the same
            return
        with breaker.tested():
            if not await self._repeat_reference(breaker) and breaker.has_too_many:
                breaker.open()

    async def _repeat_reference(self, breaker: Breaker) -> bool:
        """Whether a call that was answered before is answered again: then the failures are the completions' own."""
        if (known := breaker.reference) is None:
            return False
        [outcome] = await self._runner.run(
            known.prompt,
            (known.completion,),
            known.answer,
            known.metadata,
            [Call(breaker.function, 0)],
            on_outcome=lambda call, outcome: None,
            is_test=True,
        )
        self._metrics.call_ended(breaker.function, outcome)
        if outcome.kind in OUTAGE_KINDS:
            return False
        breaker.answered(replace(known, seconds=outcome.seconds))
        return True


class Settled:
    """Attempts without a call: all scores failed for one reason."""

    blocked_by = ""
    functions: tuple[str, ...] = ()

    def __init__(self, verdict: Verdict, num_completions: int) -> None:
        self._verdicts = [Verdict(Score(None, verdict.score.failure), verdict.kinds)] * num_completions

    async def run(self, *, may_park: bool = True) -> list[Verdict] | None:
        return self._verdicts

    async def breakers_closed(self) -> None:
        return


def back_off_seconds(attempt: int, section: RewardSection, random: Random) -> float:
    """The wait before attempt `attempt` (from 1): doubled each time, capped, and shortened at random by up to half."""
    longest: float = min(section.retry_cap_seconds, section.retry_seconds * 2.0 ** (attempt - 1))
    return longest * random.uniform(LEAST_BACK_OFF, 1.0)
