"""Wires the trainer service and runs it.

Owns no decision: every part gets the section of the configuration that it needs.
"""

import asyncio
import logging
import os
import time
from pathlib import Path

from penstock.broker import Queue, Worker, check_memory, connect, needed_bytes
from penstock.broker.lease import Lease, acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import Sampling
from penstock.contracts.ledger import RunRecord
from penstock.contracts.services import Announcement
from penstock.durable import write_durably
from penstock.runtime.address import advertised_host
from penstock.runtime.service import Service
from penstock.tickets import TicketBook, TicketLimits
from penstock_trainer.app import trainer_app
from penstock_trainer.checkpoints.folders import Checkpoints
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.checkpoints.writer import CheckpointWriter
from penstock_trainer.control import Requests
from penstock_trainer.data.datasets import Row
from penstock_trainer.data.draws import Draws, stop_token_ids
from penstock_trainer.data.prompts import EncodedPrompt, digest, encode_rows, require_batch
from penstock_trainer.data.tokenizer import Vocabulary, load_vocabulary
from penstock_trainer.distributed.rank import CPU_NICENESS, Place
from penstock_trainer.distributed.ranks import Ranks
from penstock_trainer.heartbeat import Sampler
from penstock_trainer.learner.keep_memory import keep_freed_memory
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.rank_commands import LeadingLearner
from penstock_trainer.learner.recipe import gradient_test
from penstock_trainer.loop import Trainer
from penstock_trainer.parts import Parts
from penstock_trainer.releases import Releases
from penstock_trainer.reports import Reports
from penstock_trainer.rollouts.consumer import Consumer
from penstock_trainer.rollouts.evaluation import Evaluation
from penstock_trainer.rollouts.lost_writes import Continuity
from penstock_trainer.rollouts.stragglers import Stragglers
from penstock_trainer.telemetry.metrics import TrainerMetrics
from penstock_trainer.telemetry.progress import Progress
from penstock_trainer.telemetry.scrape_targets import ScrapeTargets
from penstock_trainer.telemetry.status import Status, expected_steps
from penstock_trainer.telemetry.summary import make_summary, summary_bytes
from penstock_trainer.telemetry.tracking import make_tracking
from penstock_trainer.watchdog import Watchdog
from penstock_trainer.weight_sync.canary import CanaryMaker
from penstock_trainer.weight_sync.choose import make_transport
from penstock_trainer.weight_sync.publisher import Publisher
from penstock_trainer.weight_sync.rollout_client import RolloutClient

log = logging.getLogger(__name__)

SUMMARY_FILE = "trainer_summary.json"


async def run_trainer(
    config: Config, service: Service, place: Place, train_rows: list[Row], held_out_rows: list[Row]
) -> None:
    """Run the trainer until its run has ended or it is stopped: as its only rank, or as rank 0 of several."""
    folder = Path(config.run.root) / config.run.name
    keep_freed_memory()
    # The tokenizer first: a prompt that is too long is told before a large model is loaded.
    vocabulary = await asyncio.to_thread(load_vocabulary, config.actor.path)
    train, held_out = await asyncio.to_thread(_encode, config, vocabulary, train_rows, held_out_rows)
    ranks = await asyncio.to_thread(Ranks, place) if place.num_ranks > 1 else None
    learner = await asyncio.to_thread(_learner, config, ranks, _num_steps(config, len(train)))
    if learner.on_cpu:
        os.nice(CPU_NICENESS)
    queue = await connect(config)
    lease: Lease | None = None
    try:
        service.advertise(await advertised_host("trainer", config.trainer, config.redis.url))
        await check_memory(queue, needed_bytes(config))
        _warn_of_idle_servers(config)
        step_files = StepFiles(folder / "steps", config.checkpoint.keep_step_bytes)
        lease = await acquire_lease(queue, config, above=step_files.highest_lease())
        status = _status(config, folder, len(train))
        await _Run(
            config, service, queue, lease, learner, vocabulary, train, held_out, status, folder, step_files
        ).run()
        await asyncio.to_thread(learner.close)
        if ranks is not None:
            await asyncio.to_thread(ranks.leave)
    finally:
        if lease is not None:
            await asyncio.to_thread(lease.release)
        await queue.close()


class _Run:
    """The parts of one life of the trainer, made in the order in which they need each other."""

    def __init__(
        self,
        config: Config,
        service: Service,
        queue: Queue,
        lease: Lease,
        learner: Learner,
        vocabulary: Vocabulary,
        train: list[EncodedPrompt],
        held_out: list[EncodedPrompt],
        status: Status,
        folder: Path,
        step_files: StepFiles,
    ) -> None:
        self._config, self._service, self._queue, self._lease = config, service, queue, lease
        self._status, self._folder = status, folder
        self._metrics = metrics = TrainerMetrics()
        self._requests = Requests(stop=service.stop)
        trainer_queue = TrainerQueue(queue, lease)
        self._worker = Worker(queue, "trainer", config.staleness, take_over=True)
        stop_ids = stop_token_ids(vocabulary.tokenizer, config.sampling.stop, vocabulary.end_of_text_ids)
        sampling = Sampling(config.sampling.temperature, config.sampling.max_new_tokens, stop_ids)
        draws = Draws(train, sampling, config)
        batch_size = config.data.batch_size
        staleness = config.staleness
        self._book = TicketBook(
            TicketLimits(batch_size, config.max_outstanding, draws.num_draws, config.run.max_steps, staleness.order)
        )
        evaluation = Evaluation(held_out, stop_ids, lease.number, config)
        self._consumer = Consumer(
            trainer_queue,
            self._worker,
            self._book,
            draws,
            evaluation,
            metrics,
            has_gradient=gradient_test(config),
            dynamic_sampling=config.loss.dynamic_sampling,
            max_staleness=staleness.max_staleness,
            order=staleness.order,
            max_lag=staleness.max_lag,
        )
        self._client = RolloutClient(config)
        transport = make_transport(config, learner, folder, self._client, service.url)
        publisher = Publisher(queue, self._client, transport, config.weights.push_timeout_seconds)
        self._releases = Releases(
            trainer_queue, publisher, self._book, draws, self._consumer, evaluation, metrics, status
        )
        self._watchdog = Watchdog(trainer_queue, self._book, status, config.run.stall_seconds)
        metrics.watch_progress(lambda: self._watchdog.idle_seconds)
        metrics.show_limits(config, status.total_steps)
        self._targets = ScrapeTargets(config.run)
        self._sampler = Sampler(
            queue,
            self._book,
            Stragglers(queue, self._book, straggler_seconds=staleness.straggler_seconds),
            self._releases.fences,
            self._targets,
            metrics,
            status,
            self._name,
            service.url,
            staleness.heartbeat_seconds,
        )
        self._continuity = Continuity(trainer_queue, self._book, self._consumer, config.staleness.heartbeat_seconds)
        self._tracking = make_tracking(config, folder, status.progress, metrics.tracking_dropped)
        checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
        self._checkpoint_writer = CheckpointWriter(trainer_queue, learner, checkpoints, step_files, metrics)
        self._parts = Parts(
            config=config,
            trainer_queue=trainer_queue,
            book=self._book,
            draws=draws,
            consumer=self._consumer,
            evaluation=evaluation,
            releases=self._releases,
            learner=learner,
            transport=transport,
            canary=CanaryMaker(learner.sequence_logprobs, train[0].token_ids, config),
            step_files=step_files,
            checkpoints=checkpoints,
            checkpoint_writer=self._checkpoint_writer,
            reports=Reports(status.progress, metrics, status, self._consumer, self._tracking),
            status=status,
            watchdog=self._watchdog,
            metrics=metrics,
            run_record=RunRecord(digest(train), len(train), batch_size, config.actor.group_size, config.run.seed),
            final_folder=folder / "final",
        )

    async def run(self) -> None:
        lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()
        self._lease.start_renewing(lambda error: _fail_from_thread(loop, lost, error))
        self._tracking.start()
        app = trainer_app(self._status, self._requests, self._snapshot, self._metrics.registry, self._config.token)
        try:
            await self._service.run(
                app,
                background=(
                    _watch(lost),
                    self._worker.keep_alive(),
                    self._consumer.consume_groups(),
                    self._releases.publish_versions(),
                    self._checkpoint_writer.write_checkpoints(),
                    self._watchdog.watch_progress(),
                    self._continuity.watch_queue(),
                    self._sampler.sample(),
                ),
                train=self._train(),
            )
            await asyncio.to_thread(self._targets.remove)
        finally:
            await asyncio.to_thread(self._tracking.close)
            await self._client.close()
            await self._worker.retire()
            await self._queue.unregister(self._name)

    def _snapshot(self) -> Announcement:
        return self._parts.canary.beside(self._parts.transport.snapshot())

    @property
    def _name(self) -> str:
        """With the lease's number: a trainer that has lost it neither replaces nor removes its successor's record."""
        return f"trainer-{self._lease.number}"

    async def _train(self) -> None:
        await Trainer(self._parts, self._requests).train()
        if not self._requests.stop.is_set():
            await self._write_summary()

    async def _write_summary(self) -> None:
        servers = [each for each in await self._queue.services() if each.kind == "rollout"]
        first = self._status.progress.first_started_at
        summary = make_summary(
            self._status.progress,
            await self._parts.trainer_queue.counters(),
            engine=servers[0].engine if servers else "",
            model=self._config.actor.path,
            max_staleness=self._config.staleness.max_staleness,
            training_started_at=time.time() if first is None else first,
        )
        write_durably(self._folder / SUMMARY_FILE, summary_bytes(summary))


def _fail_from_thread(loop: asyncio.AbstractEventLoop, future: "asyncio.Future[None]", error: Exception) -> None:
    loop.call_soon_threadsafe(_fail, future, error)


def _fail(future: "asyncio.Future[None]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


async def _watch(future: "asyncio.Future[None]") -> None:
    await future


def _learner(config: Config, ranks: Ranks | None, num_steps: int) -> Learner:
    return LeadingLearner(config, ranks, num_steps=num_steps) if ranks else Learner(config, num_steps=num_steps)


def _encode(
    config: Config, vocabulary: Vocabulary, train_rows: list[Row], held_out_rows: list[Row]
) -> tuple[list[EncodedPrompt], list[EncodedPrompt]]:
    context = config.rollout.engine.context_length or vocabulary.context_length
    longest = context - config.sampling.max_new_tokens
    train = encode_rows(train_rows, vocabulary.tokenizer, config.data.system_prompt, longest)
    require_batch(train, config.data.batch_size, config.data.train.path)
    return train, encode_rows(held_out_rows, vocabulary.tokenizer, config.data.system_prompt, longest)


def _warn_of_idle_servers(config: Config) -> None:
    at_once = config.rollout.num_servers * config.rollout.engine.max_running_requests
    credited = config.max_outstanding * config.actor.group_size
    if credited < at_once:
        log.warning(
            "only %d completions can be outstanding, and the servers can run %d at once: raise data.batch_size or "
            "staleness.max_staleness, or lower rollout.engine.max_running_requests",
            credited,
            at_once,
        )


def _status(config: Config, folder: Path, num_prompts: int) -> Status:
    return Status(
        run=config.run.name,
        max_staleness=config.staleness.max_staleness,
        batch_size=config.data.batch_size,
        num_prompts=num_prompts,
        total_steps=_num_steps(config, num_prompts),
        progress=Progress(folder),
    )


def _num_steps(config: Config, num_prompts: int) -> int:
    return expected_steps(config.total_train_epochs * num_prompts, config.data.batch_size, config.run.max_steps)
