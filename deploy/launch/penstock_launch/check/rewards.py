"""The run's rewards on a few rows: real functions, in the reward service's worker processes, on texts of known worth.

Owns the texts and what is said of their scores. Invariant: whatever a function does, the look ends in time, and its
process and all that it started end with it. Retries and breakers are the service's; here each call is made once.

    texts of a row: nothing, the row's answer, words without meaning
"""

import asyncio
from collections import Counter
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
LOST = ("timeout", "died")
MOST_LOST = 2  # calls, before a function is called no more: each costs its deadline, and a service may fail once
MOST_REASONS = 3
EMPTY, ANSWER, RANDOM = "no text", "the row's answer", "random words"
NUM_RANDOM_WORDS = 12


@dataclass(frozen=True)
class Sample:
    """The inputs of a row's reward, as a reward service gets them. place: of the row, for messages.

    key: of its set's section; "" if the run has no other.
    """

    place: str
    prompt: str
    answer: str
    reward: str
    metadata: Mapping[str, Any]
    key: str = ""

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
    key: str = ""


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
    """A line for each function of each set, and one for the environment of a run with agents.

    Blocks for up to `seconds`.
    """
    lines = environment_lines(config)
    try:
        scores = asyncio.run(score(config, samples, seconds))
    except PenstockError as error:
        advice = "Correct the function, or reward.functions; reward.modules_path is the folder of its module."
        return [*lines, problem(WHAT, str(error), advice)]
    by_set: dict[tuple[str, str], list[Scored]] = {}
    for call in scores.calls:
        by_set.setdefault((call.key, call.function), []).append(call)
    keys = [*dict.fromkeys(call.key for call in scores.calls)]
    for key, name in sorted(by_set, key=lambda pair: keys.index(pair[0])):
        lines.append(function_line(name, by_set[key, name], key))
    if scores.late:
        advice = "Make the functions faster: training waits for them, and for each call up to reward.timeout_seconds."
        lines.append(warning(WHAT, f"not all rows were scored within {seconds:g} s", advice))
    return lines or [not_looked_at(WHAT, "every function is called only for rows that name it, and none does")]


async def score(config: Config, samples: Iterable[Sample], seconds: float) -> Scores:
    """Score the texts of all samples, in one worker process at a time. RewardError if functions cannot be loaded."""
    section, scores = config.all_rewards, Scores()
    try:
        async with asyncio.timeout(seconds), open_pool(section.model_copy(update={"num_workers": 1})) as pool:
            scoring, lost = Scoring(section, pool, RewardMetrics(), own=config.own_functions), Counter[str]()
            for sample in samples:
                names = scoring.weights(sample.reward, of_episodes=config.agent.enabled)
                for name in names:
                    for kind, text in sample.texts.items():
                        if name != ENVIRONMENT_REWARD and lost[name] < MOST_LOST:
                            scores.calls.append(await _call(pool, name, sample, kind, text))
                            lost[name] += scores.calls[-1].outcome.kind in LOST
    except TimeoutError:
        if not scores.calls:
            raise RewardError(f"no reward function answered within {seconds:g} s") from None
        scores.late = True
    return scores


async def _call(pool: Pool, function: str, sample: Sample, kind: str, text: str) -> Scored:
    [outcome] = await pool.run(sample.prompt, [text], sample.answer, dict(sample.metadata), [Call(function, 0)])
    return Scored(function, sample.place, kind, outcome, sample.key)


def function_line(function: str, calls: Sequence[Scored], key: str = "") -> Line:
    """What the scores of one function say of it. key: of the set whose rows they are of, if there are several."""
    name = f"{function} on {key}" if key else function
    failed = [each for each in calls if each.outcome.value is None]
    shown = f"{name}: {means(calls)}"
    if failed:
        seen = f"{name}: {len(failed)} of {len(calls)} calls failed: {_reasons(failed)}"
        if len(failed) == len(calls) or sum(each.outcome.kind in LOST for each in failed) >= MOST_LOST:
            return problem(WHAT, seen, "Correct the function, or see to the service that it asks.")
        advice = (
            "Correct the function, or see to the service that it asks. A run makes such a call up to "
            "reward.max_attempts times; a completion without a reward is not trained on."
        )
        return warning(WHAT, f"{seen}. The others: {means(calls)}", advice)
    values = {each.outcome.value for each in calls}
    if len(values) == 1 and len(calls) > 1:
        advice = (
            "Expected different scores: a group whose completions all get the same one has no gradient. Correct the "
            "function, or go on if your model's completions can score otherwise."
        )
        return warning(WHAT, f"{name} gives {values.pop():g} to each of {len(calls)} texts ({means(calls)})", advice)
    return ok(WHAT, shown)


def _reasons(failed: Sequence[Scored]) -> str:
    """The most frequent reasons with their numbers, and where each was seen first."""
    seen: dict[str, list[Scored]] = {}
    for each in failed:
        seen.setdefault(each.outcome.reason, []).append(each)
    frequent = sorted(seen.items(), key=lambda item: -len(item[1]))
    shown = [f"{len(of)} x {reason} (on {of[0].text} of {of[0].place})" for reason, of in frequent[:MOST_REASONS]]
    return "; ".join(shown + ["..."] * (len(frequent) > MOST_REASONS))


def means(calls: Iterable[Scored]) -> str:
    """The mean score of each kind of text."""
    by_kind: dict[str, list[float]] = {}
    for each in calls:
        if each.outcome.value is not None:
            by_kind.setdefault(each.text, []).append(each.outcome.value)
    if not by_kind:
        return "no scores"
    return ", ".join(f"{kind} {sum(values) / len(values):.2f}" for kind, values in by_kind.items())
