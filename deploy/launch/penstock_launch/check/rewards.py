"""The run's rewards on a few rows: real functions, in the reward service's worker processes, on texts of known worth.

Owns the texts and what is said of their scores. Invariant: whatever a function does, the look ends in time, and its
process and all that it started end with it. Retries and breakers are the service's; here each call is made once.

    texts of a row: nothing, the row's answer, words without meaning
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from penstock.config import Config
from penstock.contracts.vocabulary import ENVIRONMENT_REWARD
from penstock.errors import PenstockError, RewardError
from penstock_launch.doctor.agents import environment_lines
from penstock_launch.doctor.report import Line, not_looked_at, ok, problem, warning
from penstock_reward.metrics import RewardMetrics
from penstock_reward.processes.messages import Call, Outcome
from penstock_reward.processes.pool import Pool, open_pool
from penstock_reward.scoring.scoring import Scoring

WHAT = "rewards"
SECONDS = 60.0
LOST = ("timeout", "died")  # such a function is not called again: each call costs its deadline
EMPTY, ANSWER, RANDOM = "no text", "the row's answer", "random words"
NUM_RANDOM_WORDS = 12


@dataclass(frozen=True)
class Sample:
    """The inputs of a row's reward, as a reward service gets them. place: of the row, for messages."""

    place: str
    prompt: str
    answer: str
    reward: str
    metadata: Mapping[str, Any]

    @property
    def texts(self) -> dict[str, str]:
        """By what they are. An answer of "" is no text of its own."""
        answer = {ANSWER: self.answer} if self.answer else {}
        return {EMPTY: "", **answer, RANDOM: random_words(self.place)}


@dataclass(frozen=True)
class Scored:
    """One call."""

    function: str
    place: str
    text: str
    outcome: Outcome


@dataclass
class Scores:
    """The calls so far; late: the deadline came before the last of them."""

    calls: list[Scored] = field(default_factory=list)
    late: bool = False


def random_words(seed: str) -> str:
    """Lower-case words that mean nothing; equal seeds give equal words."""
    random = Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(random.choices(letters, k=random.randint(2, 8))) for _ in range(NUM_RANDOM_WORDS))


def reward_lines(config: Config, samples: Sequence[Sample], seconds: float = SECONDS) -> list[Line]:
    """A line for each function, and one for the environment of a run with agents. Blocks for up to `seconds`."""
    lines = environment_lines(config)
    try:
        scores = asyncio.run(score(config, samples, seconds))
    except PenstockError as error:
        advice = "Correct the function, or reward.functions; reward.modules_path is the folder of its module."
        return [*lines, problem(WHAT, str(error), advice)]
    names = dict.fromkeys(each.function for each in scores.calls)
    lines += [function_line(name, [each for each in scores.calls if each.function == name]) for name in names]
    if scores.late:
        advice = "Make the functions faster: training waits for them, and for each call up to reward.timeout_seconds."
        lines.append(warning(WHAT, f"not all rows were scored within {seconds:g} s", advice))
    return lines or [not_looked_at(WHAT, "every function is called only for rows that name it, and none does")]


async def score(config: Config, samples: Iterable[Sample], seconds: float) -> Scores:
    """Score the texts of all samples, in one worker process at a time. RewardError if functions cannot be loaded."""
    section, scores = config.reward, Scores()
    try:
        async with asyncio.timeout(seconds), open_pool(section.model_copy(update={"num_workers": 1})) as pool:
            scoring, lost = Scoring(section, pool, RewardMetrics()), set[str]()
            for sample in samples:
                names = scoring.weights(sample.reward, of_episodes=config.agent.enabled)
                called = [name for name in names if name != ENVIRONMENT_REWARD and name not in lost]
                for name in called:
                    scores.calls += await _call(pool, name, sample)
                    if scores.calls[-1].outcome.kind in LOST:
                        lost.add(name)
    except TimeoutError:
        if not scores.calls:
            raise RewardError(f"no reward function answered within {seconds:g} s") from None
        scores.late = True
    return scores


async def _call(pool: Pool, function: str, sample: Sample) -> list[Scored]:
    """A call for each text, until one is lost."""
    found: list[Scored] = []
    for kind, text in sample.texts.items():
        [outcome] = await pool.run(sample.prompt, [text], sample.answer, dict(sample.metadata), [Call(function, 0)])
        found.append(Scored(function, sample.place, kind, outcome))
        if outcome.kind in LOST:
            break
    return found


def function_line(name: str, calls: Sequence[Scored]) -> Line:
    """What the scores of one function say of it."""
    failed = [each for each in calls if each.outcome.value is None]
    shown = f"{name}: {means(calls)}"
    if failed:
        first = failed[0]
        seen = (
            f"{name}: {len(failed)} of {len(calls)} calls failed; the first, on {first.text} of {first.place}: "
            f"{first.outcome.reason}"
        )
        if len(failed) == len(calls) or any(each.outcome.kind in LOST for each in failed):
            return problem(WHAT, seen, "Correct the function: no completion would get a reward from it.")
        advice = "Correct the function: a completion whose call fails is not trained on."
        return warning(WHAT, f"{seen}. The others: {means(calls)}", advice)
    values = {each.outcome.value for each in calls}
    if len(values) == 1 and len(calls) > 1:
        advice = (
            "Expected different scores: a group whose completions all get the same one has no gradient. Correct the "
            "function, or go on if your model's completions can score otherwise."
        )
        return warning(WHAT, f"{name} gives {values.pop():g} to each of {len(calls)} texts ({means(calls)})", advice)
    return ok(WHAT, shown)


def means(calls: Iterable[Scored]) -> str:
    """The mean score of each kind of text."""
    by_kind: dict[str, list[float]] = {}
    for each in calls:
        if each.outcome.value is not None:
            by_kind.setdefault(each.text, []).append(each.outcome.value)
    if not by_kind:
        return "no scores"
    return ", ".join(f"{kind} {sum(values) / len(values):.2f}" for kind, values in by_kind.items())
