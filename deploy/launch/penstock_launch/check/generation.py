"""`penstock check --generate`: one group of the run, before an hour is spent: its engine, its sampling, its rewards.

    first row of the training prompts -> ticket -> engine -> actor.group_size completions -> reward workers -> lines

Each part is started and asked as its service does it, on the GPU that a launch here would give it. Invariants: every
wait has a deadline; however the look ends, by Ctrl-C and SIGTERM too, the engine has ended before it does, with all of
its processes; its log is in a temporary folder. Call it from the main thread, to which the engine is
tied.
"""

import asyncio
import contextlib
import re
import signal
import tempfile
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from penstock.config import Config
from penstock.config.loss import AdvantageSection
from penstock.contracts import Score, Ticket, unpack_int32
from penstock.errors import EngineDiedError, PenstockError, RewardError, TransientStartError
from penstock.runtime.output import tell
from penstock.runtime.process import heeded
from penstock_launch.check.rewards import SECONDS as SCORE_SECONDS
from penstock_launch.doctor.report import Line, ok, problem, warning
from penstock_reward.metrics import RewardMetrics
from penstock_reward.processes.pool import open_pool
from penstock_reward.scoring.scoring import Scoring
from penstock_rollout.engine.interface import EngineServer
from penstock_rollout.engine.sglang.client import SGLangClient
from penstock_rollout.engine.sglang.server import make_server
from penstock_rollout.engine.types import Answer, CompletionRequest, GroupAnswer
from penstock_trainer.data.datasets import load_training_rows
from penstock_trainer.data.drawing.draws import Draws
from penstock_trainer.data.run_prompts import encode_prompts

ENGINE, PROMPT, REWARDS, LENGTHS, SPEED = "engine", "prompt", "rewards", "completions", "speed"
NUM_SHOWN = 3
SHOWN_CHARACTERS = 300
REASON_SECONDS = 5.0  # for the reason of a server that has ended
LOG_BEGINS = "; the end of "  # how the engine's errors go on with lines of its log
EXCEPTION = re.compile(r"[\w.]*(Error|Exception): ")
START_ATTEMPTS = 2  # a start may fail for a reason that passes, such as memory that others took meanwhile

T = TypeVar("T")


@dataclass(frozen=True)
class Generated:
    """What an engine answered. engine: its name and version; start_seconds: until it could be asked."""

    answers: GroupAnswer
    engine: str
    start_seconds: float
    seconds: float


@dataclass(frozen=True)
class Found:
    """log: the end of the engine's, if it failed."""

    lines: Sequence[Line]
    log: Sequence[str] = ()


def try_group(config: Config, environ: Mapping[str, str]) -> Found:
    """Generate and score one group. Blocks; KeyboardInterrupt after Ctrl-C, SystemExit after another signal.

    environ: what the engine inherits.
    """
    engine = config.rollout.engine
    try:
        ticket = first_ticket(config)
        with tempfile.TemporaryDirectory(prefix="check-") as folder:
            server = make_server(
                engine,
                config.actor.path,
                Path(folder) / "engine.log",
                config.weights.pause_mode,
                gives_up_memory=config.trainer.take_turns,
                environ=environ,
            )
            generated = _until_stopped(_generate(config, ticket, server))
    except (PenstockError, TimeoutError) as error:
        return engine_failed(str(error))
    try:
        scores = _until_stopped(_score(config, ticket, generated.answers))
    except PenstockError as error:
        advice = "Correct the function, or reward.functions."
        return Found([*_made(ticket, generated), problem(REWARDS, str(error), advice)])
    return Found(group_lines(config, ticket, generated, scores))


def first_ticket(config: Config) -> Ticket:
    """What a run would ask an engine for the first row of its data."""
    rows = load_training_rows(config.data, first=config.data.batch_size)
    prompts = encode_prompts(config, rows, {})
    return Draws(prompts.train[:1], prompts.sampling(config), config).ticket(0, attempt=0, policy_version=0)


def _until_stopped(work: Coroutine[Any, Any, T]) -> T:
    """asyncio ends the work on Ctrl-C; this, on the signals that would end the process without a clean-up."""
    asked: list[int] = []

    async def run() -> T:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None

        def stop(number: int) -> None:
            asked.append(number)
            task.cancel()

        for number in (signal.SIGTERM, *heeded(signal.SIGHUP)):
            loop.add_signal_handler(number, stop, number)
        return await work

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        raise SystemExit(128 + asked[0]) from None


async def _generate(config: Config, ticket: Ticket, server: EngineServer) -> Generated:
    client = SGLangClient(config.rollout.engine)
    began = time.monotonic()
    try:
        await _start(server, min(START_ATTEMPTS, config.rollout.engine.start_attempts))
        info = await client.connect(server.url)
        info.require_room(ticket.sampling.max_new_tokens)
        ready = time.monotonic()
        answers = await _complete(client, server, ticket)
        return Generated(answers, f"{info.name} on {info.device}", ready - began, time.monotonic() - ready)
    finally:
        await client.close()
        await server.stop()


async def _start(server: EngineServer, attempts: int) -> None:
    for left in range(attempts - 1, -1, -1):
        try:
            return await server.start()
        except TransientStartError as error:
            if not left:
                raise
            tell([f"the engine did not start: {_reason(str(error))}; once more ..."])


async def _complete(client: SGLangClient, server: EngineServer, ticket: Ticket) -> GroupAnswer:
    sampling = ticket.sampling
    prompt_ids = tuple(unpack_int32(ticket.prompt_ids))
    requests = [CompletionRequest(prompt_ids, seed, sampling.max_new_tokens) for seed in ticket.seeds]
    try:
        return await client.generation.complete(requests, sampling)
    except EngineDiedError as error:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REASON_SECONDS):
                raise EngineDiedError(await server.died()) from error
        raise


async def _score(config: Config, ticket: Ticket, answers: GroupAnswer) -> list[Score]:
    texts = [answer.text for answer in answers]
    try:
        async with asyncio.timeout(SCORE_SECONDS), open_pool(config.all_rewards) as pool:
            scoring = Scoring(config.all_rewards, pool, RewardMetrics(), own=config.own_functions)
            verdicts = await scoring.score(ticket.prompt, texts, ticket.answer, ticket.reward, ticket.metadata)
    except TimeoutError:
        raise RewardError(f"{len(texts)} completions were not scored within {SCORE_SECONDS:g} s") from None
    return [verdict.score for verdict in verdicts]


def engine_failed(error: str) -> Found:
    """The reason in a line, and the lines of the log that came with it."""
    advice = "Correct the key that is named, or look at `penstock doctor --config FILE`: a run would fail too."
    return Found([problem(ENGINE, _reason(error), advice)], error.splitlines()[1:])


def _reason(error: str) -> str:
    """One line: of an error that holds the end of a log, with the last exception in it, or else its last line."""
    first, *log = error.splitlines()
    lines = [line.strip() for line in log if line.strip()]
    if not lines:
        return first
    last = next((line for line in reversed(lines) if EXCEPTION.match(line)), lines[-1])
    return f"{first.partition(LOG_BEGINS)[0]}: {last}"


def _made(ticket: Ticket, generated: Generated) -> list[Line]:
    return [
        ok(ENGINE, f"{generated.engine}, ready after {generated.start_seconds:.0f} s"),
        ok(PROMPT, f"{shown(ticket.prompt)} ({len(unpack_int32(ticket.prompt_ids))} tokens)"),
    ]


def group_lines(config: Config, ticket: Ticket, generated: Generated, scores: Sequence[Score]) -> list[Line]:
    """All lines of a group that was generated and scored."""
    answers = generated.answers
    return [
        *_made(ticket, generated),
        *(_completion_line(index, answers[index], scores[index]) for index in _chosen(scores)),
        rewards_line(answers, scores, config.loss.advantage),
        lengths_line(answers, ticket.sampling.max_new_tokens),
        _speed_line(config, generated),
    ]


def _chosen(scores: Sequence[Score]) -> list[int]:
    """The completions to show: the best, one from the middle and the worst, each once; of none, the failed."""
    worth = [-float("inf") if score.value is None else score.value for score in scores]
    order = sorted(range(len(scores)), key=lambda index: -worth[index])
    return sorted({order[0], order[len(order) // 2], order[-1]})


def _completion_line(index: int, answer: Answer, score: Score) -> Line:
    got = "failed" if score.value is None else f"{score.value:g}"
    tokens = f"{len(answer.token_ids)} tokens, {'cut' if answer.finish_reason == 'length' else answer.finish_reason}"
    return ok(f"completion {index + 1}", f"{shown(answer.text)} ({tokens}): reward {got}")


def rewards_line(answers: Sequence[Answer], scores: Sequence[Score], advantage: AdvantageSection) -> Line:
    """Whether the group has a signal."""
    failed = [score for score in scores if score.value is None]
    values = [score.value for score in scores if score.value is not None]
    if not values:
        advice = "Correct the function: no completion would get a reward from it."
        return problem(REWARDS, f"all {len(scores)} rewards failed; the first: {failed[0].failure}", advice)
    spread = f"{min(values):g} to {max(values):g}, mean {sum(values) / len(values):.3g}"
    if failed:
        seen = f"{len(failed)} of {len(scores)} rewards failed; the first: {failed[0].failure}; the others: {spread}"
        return warning(REWARDS, seen, "Correct the function: a completion whose call fails is not trained on.")
    if max(values) - min(values) > advantage.tolerance or advantage.trains_equal_rewards:
        return ok(REWARDS, f"{len(values)} from {spread}")
    same = "; the completions are the same, too" if len({answer.text for answer in answers}) == 1 else ""
    advice = (
        "One prompt proves little, but if most are so, nothing is learnt: give part of the reward for part of the "
        "answer (reward.functions), take easier prompts, or raise actor.group_size or sampling.temperature."
    )
    seen = f"all {len(values)} are {values[0]:g}"
    if len(set(values)) > 1:
        seen = f"{len(values)} from {spread}, within loss.advantage.tolerance {advantage.tolerance:g}"
    return warning(REWARDS, f"{seen}{same}: such a group has no gradient", advice)


def lengths_line(answers: Sequence[Answer], max_new_tokens: int) -> Line:
    """How many completions were cut at the limit."""
    lengths = [len(answer.token_ids) for answer in answers]
    num_cut = sum(answer.finish_reason == "length" for answer in answers)
    seen = (
        f"{min(lengths)} to {max(lengths)} tokens; {num_cut} of {len(answers)} cut at "
        f"sampling.max_new_tokens = {max_new_tokens}"
    )
    if 2 * num_cut > len(answers):
        advice = "Raise sampling.max_new_tokens, or ask for short answers: what is cut is scored without its end."
        return warning(LENGTHS, seen, advice)
    return ok(LENGTHS, seen)


def _speed_line(config: Config, generated: Generated) -> Line:
    num_tokens = sum(len(answer.token_ids) for answer in generated.answers)
    speed = num_tokens / max(generated.seconds, 1e-9)
    return ok(
        SPEED,
        f"{num_tokens} tokens in {generated.seconds:.1f} s: {speed:.3g} tokens/s, for one group on one engine; "
        f"a step needs {config.data.batch_size} groups (data.batch_size), many of them at once",
    )


def shown(text: str) -> str:
    """A text with visible line breaks; the middle of a long one is left out."""
    text = repr(text)
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
