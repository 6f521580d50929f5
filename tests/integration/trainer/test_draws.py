"""Several sets with a curriculum: a run that is killed draws, trains and drops what the undisturbed one does.

Queue, loop, ledger, step files and learner are real; the test answers tickets, with rewards that depend on the prompt.
"""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from penstock.broker import Queue, Stage
from penstock.broker.lease import Lease, acquire_lease
from penstock.broker.trainer import read_ledger
from penstock.config import Config
from penstock.contracts import ScoredGroup, Ticket, decode, pack_int32
from penstock.contracts.ledger import DropRecord, LedgerState, Outcome, RunRecord, StepRecord, WeightsRecord
from penstock.errors import DataError
from penstock.records import RunRecords
from penstock.records.draws import compared_draws, drawn
from penstock.seeds import sampling_seed
from penstock_trainer.data.prompts import EncodedPrompt
from penstock_trainer.data.run_prompts import Prompts
from penstock_trainer.offline.draws import check_draws
from penstock_trainer.offline.recording import open_run
from tests.integration.broker.queue_setup import put, stored_scored
from tests.integration.trainer.consumer_setup import scored
from tests.integration.trainer.loop_setup import SECONDS, Life
from tests.unit.trainer.data.chat_models import characters
from tests.unit.trainer.trainer_groups import save_tiny_model

pytestmark = pytest.mark.redis

NUM_STEPS, BATCH_SIZE, NUM_EASY, NUM_PROMPTS = 12, 2, 4, 12
PROMPTS = [
    EncodedPrompt(f"p{n}", (n + 3,), str(n), "", {}, dataset="easy" if n < NUM_EASY else "hard")
    for n in range(NUM_PROMPTS)
]


def config_of(queue_config: Config, model: Path, root: Path) -> Config:
    given = queue_config.model_dump()
    given["actor"] = {"path": str(model), "dtype": "float32", "group_size": 2}
    given["run"] |= {"root": str(root), "stall_seconds": SECONDS, "max_steps": NUM_STEPS}
    given["total_train_epochs"] = 20
    given["data"] = {
        "train_sets": {"easy": {"path": "easy.jsonl", "weight": 1}, "hard": {"path": "hard.jsonl", "weight": 2}},
        "batch_size": BATCH_SIZE,
        "curriculum": {"priority": "failure"},
    }
    given["loss"]["dynamic_sampling"] = True
    given["optimizer"]["lr"] = 1e-3
    given["rollout"]["engine"]["dtype"] = "float32"
    given["weights"]["push_timeout_seconds"] = SECONDS
    given["checkpoint"]["every_steps"] = 4
    return Config.model_validate(given)


def group_of(ticket: Ticket, life: Life) -> ScoredGroup:
    """Two completions, whose tokens and rewards follow from the ticket; for a third, the rewards are equal."""
    kind = sampling_seed(int(ticket.answer), ticket.number, 7) % 6
    rewards = {0: (1.0, 1.0), 1: (0.0, 0.0)}.get(kind, (1.0, 0.0))
    made = scored(ticket, rewards, life.versions.known[ticket.policy_version])
    first, second = made.group.completions
    tokens = [pack_int32([10 + kind]), pack_int32([20 + ticket.number % 9])]
    completions = tuple(
        msgspec.structs.replace(each, token_ids=ids) for each, ids in zip((first, second), tokens, strict=True)
    )
    return msgspec.structs.replace(made, group=msgspec.structs.replace(made.group, completions=completions))


@dataclass(frozen=True)
class Drawn:
    """What a run has drawn and made of it."""

    prompts: dict[int, str]
    steps: list[tuple[tuple[int, ...], tuple[Outcome, ...]]]
    drops: dict[int, Outcome | None]
    weights: dict[int, str]
    num_lives: int


async def run(config: Config, queue: Queue, lease: Lease, chance: Random, kills: Sequence[tuple[str, int]]) -> Drawn:
    """Train to the end, over a life more than there are kills. A kill is an event of a life, and its count."""
    prompts: dict[int, str] = {}
    unanswered: list[Ticket] = []
    last: bytes | str = "0"

    async def answer(life: Life) -> None:
        """Every ticket that comes, those that come together in any order."""
        nonlocal last
        while True:
            found: Any = await queue.client.xread({queue.keys.stream(Stage.TICKETS): last}, block=200)
            for _, entries in found:
                unanswered.extend(decode(fields[b"p"], Ticket) for _, fields in entries)
                last = entries[-1][0]
            chance.shuffle(unanswered)
            while unanswered:
                ticket = unanswered[-1]
                assert prompts.setdefault(ticket.number, ticket.prompt) == ticket.prompt
                await put(queue, Stage.SCORED, ticket.key, stored_scored(group_of(ticket, life)))
                unanswered.pop()

    lives: list[tuple[str, int] | None] = [*kills, None]
    num_lives = 0
    for kill in lives:
        num_lives += 1
        life = Life(config, queue, lease)
        life.prompts = Prompts(PROMPTS, {}, (2,), PROMPTS[0].token_ids, characters())
        async with life.training() as training:
            answering = asyncio.create_task(answer(life))
            try:
                await ended_or_due(life, training, kill)
            finally:
                answering.cancel()
                await asyncio.gather(answering, return_exceptions=True)
        if life.requests.stop.is_set() or life.book.finished:
            break
    records = await read_ledger(queue)
    return Drawn(
        prompts,
        [(each.tickets, each.outcomes) for each in records if isinstance(each, StepRecord)],
        {each.ticket: each.outcome for each in records if isinstance(each, DropRecord)},
        {each.steps: each.policy.digest for each in records if isinstance(each, WeightsRecord)},
        num_lives,
    )


async def ended_or_due(life: Life, training: "asyncio.Task[None]", kill: tuple[str, int] | None) -> None:
    """Wait until a life is to be killed, or its run has ended: a loaded machine may notice an event late."""
    try:
        async with asyncio.timeout(SECONDS):
            while not training.done() and (kill is None or life.watch[kill[0]] < kill[1]):
                await asyncio.wait([training], timeout=0.005)
    except TimeoutError:
        outstanding, work = life.book.outstanding, life.status.work
        pytest.fail(f"waiting for {kill}: {life.book.num_steps} steps, {work}, outstanding {outstanding}")
    if training.done():
        await training


async def test_a_killed_run_draws_and_trains_what_the_undisturbed_one_does(
    queue_config: Config, queue: Queue, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model")
    calm_config = config_of(queue_config, model, tmp_path / "calm")
    lease = await acquire_lease(queue, calm_config)
    calm = await run(calm_config, queue, lease, Random(1), [])
    (begun, *_) = await read_ledger(queue)
    assert isinstance(begun, RunRecord)
    assert begun.draws.startswith(
        "sets: easy 4 prompts of weight 1.0, hard 8 prompts of weight 2.0; curriculum by fail"
    )
    assert begun.set_sizes == {"easy": 4, "hard": 8}
    await asyncio.to_thread(lease.release)

    await queue.delete_run()
    await queue.check_server()
    config = config_of(queue_config, model, tmp_path / "killed")
    lease = await acquire_lease(queue, config, above=lease.number)
    kills = [("gradient", 2), ("announced", 3), ("begun", 1), ("written", 2)]
    killed = await run(config, queue, lease, Random(2), kills)
    await asyncio.to_thread(lease.release)

    assert killed.num_lives > 2
    assert len(calm.steps) == NUM_STEPS
    assert len(calm.drops) > 2, "dynamic sampling has dropped tickets"
    common = calm.prompts.keys() & killed.prompts.keys()
    assert {n: killed.prompts[n] for n in common} == {n: calm.prompts[n] for n in common}
    assert (killed.steps, killed.weights) == (calm.steps, calm.weights)
    last = calm.steps[-1][0][-1]
    assert {n: each for n, each in killed.drops.items() if n < last} == {
        n: each for n, each in calm.drops.items() if n < last
    }
    outcomes = dict(calm.drops) | {
        n: each for tickets, some in calm.steps for n, each in zip(tickets, some, strict=True)
    }
    assert all(each is not None and PROMPTS[each.prompt].text == calm.prompts[n] for n, each in outcomes.items())

    figures = RunRecords(tmp_path / "killed" / config.run.name).figures()
    trained = [n for tickets, _ in killed.steps for n in tickets]
    by_set = {"easy": 0, "hard": 0}
    for number in trained:
        by_set["easy" if int(killed.prompts[number][1:]) < NUM_EASY else "hard"] += 1
    assert {name: each["prompts"] for name, each in figures["sets"].items()} == by_set
    dropped = sum(sum(each["dropped"].values()) for each in figures["sets"].values())
    assert dropped == len(killed.drops)
    ledgers = [drawn(RunRecords(tmp_path / name / config.run.name).ledger()) for name in ("calm", "killed")]
    assert ledgers[0] is not None
    assert ledgers[1] is not None
    num_ended = len(ledgers[0].outcomes.keys() & ledgers[1].outcomes.keys())
    assert num_ended >= NUM_STEPS * BATCH_SIZE
    assert (
        compared_draws(ledgers[0], ledgers[1])
        == f"all {num_ended} tickets that have ended in both draw the same prompt"
    )
    prove_draws(config)


def prove_draws(config: Config) -> None:
    """The folder alone proves the draws; another prompt, or another outcome, in one record does not fit."""
    recording = open_run(config, ask_ledger=LedgerState)
    assert re.fullmatch(r"the prompts of all \d+ tickets that ended are those .* draws", check_draws(recording))
    step = recording.ledger.steps[2]
    first, *others = step.outcomes
    prompt = next(n for n in range(NUM_PROMPTS) if n != first.prompt)
    hopeless = tuple(each._replace(successes=0) for each in step.outcomes)
    for outcomes in ((first._replace(prompt=prompt), *others), hopeless):
        recording.ledger.steps[2] = msgspec.structs.replace(step, outcomes=outcomes)
        with pytest.raises(DataError, match=r"ticket \d+ draws prompt .* records that it drew"):
            check_draws(recording)
    recording.ledger.steps[2] = step
    other = config.data.model_copy(update={"curriculum": config.data.curriculum.model_copy(update={"decay": 0.9})})
    changed = replace(recording, config=config.model_copy(update={"data": other}))
    assert "data.curriculum is another one" in check_draws(changed)
    del recording.ledger.steps[0]
    assert "some are not recorded here" in check_draws(recording)
