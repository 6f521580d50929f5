"""Episodes on their way from a real queue to a batch: held, issued again, dropped, evaluated, and a run that fails."""

import asyncio
from collections.abc import Sequence

import pytest

from penstock.broker import Queue
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import ActorSection, Config
from penstock.config.agent import AgentSection
from penstock.contracts import (
    Episode,
    EpisodeCounts,
    Node,
    PolicyIdentity,
    RolloutGroup,
    Score,
    ScoredGroup,
    Ticket,
    VersionSpan,
    pack_float32,
    pack_int32,
)
from penstock.contracts.ledger import RunRecord
from penstock.errors import StallError
from tests.integration.broker.queue_setup import stored_scored
from tests.integration.trainer.consumer_setup import BATCH_SIZE, NUM_PROMPTS, OLD, POLICY, ConsumerSetup
from tests.patience import ANSWER_SECONDS

pytestmark = pytest.mark.redis


@pytest.fixture
def config(queue_config: Config) -> Config:
    agent = AgentSection(environment="my_envs:Guess", max_failure_share=0.25)
    return queue_config.model_copy(update={"actor": ActorSection(path="m", group_size=4), "agent": agent})


@pytest.fixture
async def setup(queue: Queue, config: Config) -> ConsumerSetup:
    trainer_queue = TrainerQueue(queue, await acquire_lease(queue, config.model_copy(deep=True)))
    await trainer_queue.append(RunRecord("d" * 16, NUM_PROMPTS, BATCH_SIZE, 4, 0))
    setup = ConsumerSetup(trainer_queue, config)
    await setup.issue()
    return setup


def finished(value: float | None, *policies: PolicyIdentity) -> Episode:
    """A turn by each policy; a failure without a node if there is no value."""
    if value is None:
        return Episode((), Score(None, "the tool hung"), "failure", EpisodeCounts(num_attempts=3), 0.0, 1.0)
    nodes = [Node(-1, pack_int32([4, 5]))]
    for number, policy in enumerate(policies):
        nodes.append(Node(number, pack_int32([6]), pack_float32([-0.5]), (VersionSpan(policy, 0, 1),)))
    return Episode(tuple(nodes), Score(value), "done", EpisodeCounts(num_turns=len(policies)), 0.0, 1.0, text="4 5 6")


async def answer(
    setup: ConsumerSetup, ticket: Ticket, values: Sequence[float | None], *policies: PolicyIdentity
) -> ScoredGroup:
    episodes = tuple(finished(value, *(policies or (POLICY,))) for value in values)
    group = RolloutGroup(ticket, (), "agent-1", 1.0, 2.0, episodes)
    scored = ScoredGroup(group, tuple(episode.score for episode in episodes))
    await setup.deliver(ticket.key, stored_scored(scored))
    return scored


def ticket(setup: ConsumerSetup, number: int) -> Ticket:
    return setup.draws.ticket(number, attempt=0, policy_version=1)


async def test_groups_of_episodes_become_a_batch_without_their_texts(setup: ConsumerSetup) -> None:
    async with setup.consuming():
        sent = [await answer(setup, ticket(setup, number), (1.0, 0.0, 0.5, None)) for number in (1, 0)]
        await setup.until(lambda: setup.arrived == [0, 1])
    batch = await setup.consumer.next_batch(1)
    assert batch is not None
    assert [arrival.group.group for arrival in batch] == [each.group.without_text() for each in reversed(sent)]
    assert setup.generation.take_tokens() == 6
    assert setup.consumer.last_failure == "the tool hung"


async def test_an_episode_of_which_one_turn_is_too_old_or_unknown_is_not_trained(setup: ConsumerSetup) -> None:
    async with setup.consuming():
        await answer(setup, ticket(setup, 1), (1.0, 0.0, 1.0, 1.0), POLICY, PolicyIdentity(1, "f" * 16))
        await setup.until(lambda: setup.count("tickets", state="reissued", reason="version") == 1)
        await answer(setup, ticket(setup, 0), (1.0, 0.0, 1.0, 1.0), OLD, POLICY)
        await answer(setup, ticket(setup, 1), (1.0, 0.0, 1.0, 1.0))
        await setup.until(lambda: setup.arrived == [0, 1])
    assert await setup.consumer.next_batch(2) is None
    assert setup.count("tickets", state="reissued", reason="stale") == 1


async def test_a_group_with_fewer_than_two_valid_episodes_is_dropped(setup: ConsumerSetup) -> None:
    async with setup.consuming():
        await answer(setup, ticket(setup, 0), (1.0, None, None, None))
        await setup.until(lambda: 0 not in setup.book.outstanding)
    assert (await setup.trainer_queue.ledger()).dropped == {0: "reward_failed"}
    assert setup.consumer.last_failure == "the tool hung"


async def test_held_out_rows_have_one_episode_each(setup: ConsumerSetup) -> None:
    [held_out] = setup.evaluation.start(0, 1)
    assert (held_out.environment, len(held_out.seeds), held_out.sampling.temperature) == ("my_envs:Guess", 1, 0.0)
    async with setup.consuming():
        await answer(setup, held_out, (1.0,), OLD, POLICY)
        await setup.until(lambda: not setup.consumer.is_evaluating)
    [result] = setup.evaluation.take_results()
    assert (result.accuracy, result.oldest_version, result.newest_version) == (1.0, 0, 1)
    assert [(sample.completion, sample.reward) for sample in result.samples] == [("4 5 6", 1.0)]


async def test_too_many_failed_episodes_end_the_run_by_name(setup: ConsumerSetup) -> None:
    """Each group could be trained: half of its episodes are valid."""
    setup.book.restore(NUM_PROMPTS, range(NUM_PROMPTS), 0)  # no credits hold them back
    for number in range(NUM_PROMPTS):
        await answer(setup, ticket(setup, number), (1.0, 0.0, None, None))
    expected = r"26% of the episodes of the last 20 steps failed.*; the last one: the tool hung"
    with pytest.raises(StallError, match=expected):
        async with asyncio.timeout(ANSWER_SECONDS):
            await setup.consumer.consume_groups()
