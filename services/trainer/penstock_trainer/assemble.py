"""The objects of one life of the trainer, and their dependencies.

Owns which object gets which. Each object is made when another first needs it. No object gets the assembly itself:
each gets what it uses.
"""

import asyncio
from collections.abc import Coroutine
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from penstock.broker import Queue, Worker
from penstock.broker.dead import DeadLetters
from penstock.broker.lease import Lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import Sampling, ServiceKind
from penstock.contracts.weight_sources import Parent
from penstock.records import RunRecords
from penstock.records.files import DEAD_FILE, DROPPED_FILE, FINAL_MODEL
from penstock.runtime.relay_route import add_relay
from penstock.runtime.service import Service
from penstock.tickets import TicketBook, TicketLimits
from penstock.view.app import add_page
from penstock.view.runs import Runs
from penstock.weights.relay import Relay
from penstock_trainer.app import trainer_app
from penstock_trainer.batching.training_sets import set_figures
from penstock_trainer.checkpoints.best import KeepBest
from penstock_trainer.checkpoints.folders import Checkpoints
from penstock_trainer.checkpoints.history import History
from penstock_trainer.checkpoints.settings import StepConfigs
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.checkpoints.writer import CheckpointWriter
from penstock_trainer.control import Requests
from penstock_trainer.data.drawing.draws import Draws
from penstock_trainer.data.run_prompts import Prompts
from penstock_trainer.early_stop import EarlyStop
from penstock_trainer.heartbeat import Sampler
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.non_finite import NonFiniteSteps
from penstock_trainer.learner.recipe import advantage_test, gradient_test, make_recipe, signal_test
from penstock_trainer.loop import Trainer
from penstock_trainer.releases import Origin, Releases
from penstock_trainer.reports import Reports
from penstock_trainer.resume import resume
from penstock_trainer.rollouts.buried import BuriedMessages
from penstock_trainer.rollouts.consumer import Consumer
from penstock_trainer.rollouts.evaluation import EvalSet, Evaluation
from penstock_trainer.rollouts.generation_time import GenerationTime
from penstock_trainer.rollouts.issuing import Issuer
from penstock_trainer.rollouts.judge import Rules
from penstock_trainer.rollouts.lost_writes import LostWrites
from penstock_trainer.rollouts.samples import SampleWriter
from penstock_trainer.rollouts.stragglers import Stragglers
from penstock_trainer.rollouts.versions import Versions
from penstock_trainer.telemetry.last_lines import LastLines
from penstock_trainer.telemetry.metrics import TrainerMetrics
from penstock_trainer.telemetry.progress import Progress
from penstock_trainer.telemetry.samples import SampleFile
from penstock_trainer.telemetry.scrape_targets import ScrapeTargets
from penstock_trainer.telemetry.status import Status
from penstock_trainer.telemetry.tracking import Tracking, make_tracking
from penstock_trainer.watchdog import Watchdog
from penstock_trainer.weight_sync.canary import CanaryMaker
from penstock_trainer.weight_sync.choose import make_transport
from penstock_trainer.weight_sync.publisher import Publisher
from penstock_trainer.weight_sync.relay import RelayTransport
from penstock_trainer.weight_sync.relay_tree import RelayTree
from penstock_trainer.weight_sync.rollout_client import RolloutClient
from penstock_trainer.weight_sync.transport import Transport
from penstock_trainer.weight_sync.turns import Holder, Turns
from penstock_trainer.weights.files import published_format


class Assembly:
    """One life of the trainer."""

    def __init__(
        self,
        config: Config,
        service: Service,
        queue: Queue,
        lease: Lease,
        learner: Learner,
        prompts: Prompts,
        step_files: StepFiles,
    ) -> None:
        self.config = config
        self.service = service
        self.queue = queue
        self.lease = lease
        self.learner = learner
        self.prompts = prompts
        self.step_files = step_files
        self.folder = Path(config.run.root) / config.run.name
        self.changed = asyncio.Event()
        """Set when a batch or an evaluation may be complete, or the run at its end."""

    # The run: its loop and its background tasks.

    async def train(self) -> None:
        """Resume, and train until the run has ended or is stopped."""
        if self.turns is not None:
            self.reports.phase("waiting for the engines to leave the GPUs")
            await self.turns.take()
        start = await resume(self.learner, self.history, self.releases, self.consumer, self.reports)
        await self.trainer.train(start)

    def background(self) -> tuple[Coroutine[Any, Any, None], ...]:
        """The tasks that run until the process ends."""
        return (
            self.worker.keep_alive(),
            self.consumer.consume_groups(),
            self.checkpoint_writer.write_checkpoints(),
            self.watchdog.watch_progress(),
            self.lost_writes.watch_queue(),
            self.sampler.sample(),
        )

    @cached_property
    def trainer(self) -> Trainer:
        return Trainer(
            self.learner,
            self.consumer,
            self.releases,
            self.history,
            self.reports,
            self.requests,
            NonFiniteSteps(self.config.optimizer.max_non_finite_steps),
            self.early_stop,
            self.turns,
        )

    @cached_property
    def early_stop(self) -> EarlyStop:
        progress, history = self.status.progress, self.history
        return EarlyStop(
            self.config.eval,
            self.book,
            progress.compared_evals,
            progress.reward_range,
            lambda: history.num_steps,
            history.end_early,
        )

    @cached_property
    def app(self) -> FastAPI:
        token = self.config.token
        app = trainer_app(self.status, self.requests, self.releases.snapshot, self.metrics.registry, token)
        if self.relay_tree is not None:
            add_relay(app, self.relay)
        add_page(app, Runs([RunRecords(self.folder)]), token)
        return app

    @cached_property
    def requests(self) -> Requests:
        return Requests(stop=self.service.stop)

    @property
    def name(self) -> str:
        """With the lease's number: a trainer without its lease does not replace or remove its successor's record."""
        return f"trainer-{self.lease.number}"

    # Tickets and groups.

    @cached_property
    def trainer_queue(self) -> TrainerQueue:
        return TrainerQueue(self.queue, self.lease)

    @cached_property
    def worker(self) -> Worker:
        return Worker(self.queue, ServiceKind.TRAINER, self.config.staleness, take_over=True)

    @cached_property
    def draws(self) -> Draws:
        return Draws(self.prompts.train, self.sampling, self.config)

    @cached_property
    def sampling(self) -> Sampling:
        return self.prompts.sampling(self.config)

    @cached_property
    def book(self) -> TicketBook:
        config = self.config
        return TicketBook(
            TicketLimits(
                config.data.batch_size,
                config.max_outstanding,
                self.draws.num_draws,
                config.run.max_steps,
                config.staleness.order,
                config.agent.max_failure_share if config.agent.enabled else 1.0,
                self.draws.delay,
            )
        )

    @cached_property
    def versions(self) -> Versions:
        return Versions()

    @cached_property
    def issuer(self) -> Issuer:
        return Issuer(self.trainer_queue, self.draws, self.book, self.versions, self.metrics.queue)

    @cached_property
    def evaluation(self) -> Evaluation:
        prompts = self.prompts
        sets = [
            EvalSet(
                each,
                prompts.held_out[each.name],
                prompts.eval_sampling(self.config, each),
                len(prompts.shared[each.name]),
            )
            for each in self.config.held_out_sets
        ]
        return Evaluation(sets, self.lease.number, self.config)

    @cached_property
    def generation(self) -> GenerationTime:
        return GenerationTime()

    @cached_property
    def rules(self) -> Rules:
        staleness = self.config.staleness
        return Rules(
            has_gradient=gradient_test(self.config),
            has_advantage=advantage_test(self.config),
            sampling=self.sampling,
            dynamic_sampling=self.config.loss.dynamic_sampling,
            max_staleness=staleness.max_staleness,
            order=staleness.order,
            max_lag=staleness.max_lag,
            truncated=make_recipe(self.config).rules.truncated,
            success=self.config.eval.success,
            served_teacher=bool(self.config.teacher.urls),
        )

    @cached_property
    def consumer(self) -> Consumer:
        return Consumer(
            self.trainer_queue,
            self.worker,
            self.book,
            self.issuer,
            self.versions,
            self.evaluation,
            self.generation,
            self.changed,
            self.rules,
            self.metrics.queue,
            drop=self.history.drop,
            dropped=self.reports.dropped,
            buried=self.buried.note,
            with_outcome=self.draws.with_outcome,
        )

    @cached_property
    def buried(self) -> BuriedMessages:
        return BuriedMessages(DeadLetters(self.queue), LastLines(self.folder / DEAD_FILE))

    @cached_property
    def lost_writes(self) -> LostWrites:
        seconds = self.config.staleness.heartbeat_seconds
        return LostWrites(self.trainer_queue, self.book, self.consumer, self.versions, seconds)

    # Durable state.

    @cached_property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.folder / "checkpoints", self.config.checkpoint.keep)

    @cached_property
    def checkpoint_writer(self) -> CheckpointWriter:
        return CheckpointWriter(
            self.trainer_queue, self.learner, self.checkpoints, self.step_files, self.metrics, self.keep_best
        )

    @cached_property
    def keep_best(self) -> KeepBest | None:
        """None if the best checkpoint is kept like any other."""
        if not self.config.checkpoint.keep_best:
            return None
        return KeepBest(self.config.eval, self.status.progress.compared_evals, lambda: self.evaluation.unreported)

    @cached_property
    def configs(self) -> StepConfigs:
        return StepConfigs(self.config, len(self.prompts.train), self.step_files.settings)

    @cached_property
    def history(self) -> History:
        return History(
            self.trainer_queue,
            self.book,
            self.step_files,
            self.checkpoints,
            self.checkpoint_writer,
            self.prompts.run_record(self.config),
            self.configs,
            self.draws,
            final_folder=self.folder / FINAL_MODEL,
        )

    # New weights on their way to the servers.

    @cached_property
    def client(self) -> RolloutClient:
        return RolloutClient(self.config)

    @cached_property
    def transport(self) -> Transport:
        files = make_transport(self.config, self.learner, self.folder, self.client, self.service.url)
        return files if self.relay_tree is None else RelayTransport(files, self.relay, self.relay_tree)

    @cached_property
    def relay(self) -> Relay:
        return Relay(self.metrics.relay_sent)

    @cached_property
    def relay_tree(self) -> RelayTree | None:
        """None if servers do not pass versions on."""
        fan_out = self.config.weights.relay_fan_out
        return RelayTree(fan_out, Parent(self.name, self.service.url)) if fan_out else None

    @cached_property
    def canary(self) -> CanaryMaker:
        return CanaryMaker(self.learner.sequence_logprobs, self.prompts.first_ids, self.config)

    @cached_property
    def releases(self) -> Releases:
        seconds = self.config.weights.push_timeout_seconds
        return Releases(
            self.trainer_queue,
            self.transport,
            self.canary,
            Publisher(self.queue, self.client, self.transport, seconds, self.relay_tree),
            self.issuer,
            self.versions,
            self.history,
            self.evaluation,
            origin=Origin(self.learner.num_ranks, self.learner.device, str(published_format(self.config))),
            changed=self.changed,
            computing=self.watchdog.computing,
            metrics=self.metrics,
            status=self.status,
            turns=self.turns,
            stop=self.requests.stop if self.config.checkpoint.keep_best else None,
        )

    @cached_property
    def turns(self) -> Turns | None:
        """None if the trainer has GPUs of its own."""
        if not self.config.trainer.take_turns:
            return None
        return Turns(
            self.trainer_queue, self.client, self.learner, computing=self.watchdog.computing, show=self._show_turn
        )

    def _show_turn(self, holder: Holder, seconds: float, following: Holder) -> None:
        self.metrics.turn_ended(holder, seconds)
        self.status.turn = following

    # Reports.

    @cached_property
    def metrics(self) -> TrainerMetrics:
        metrics = TrainerMetrics(of_episodes=self.config.agent.enabled)
        metrics.watch_progress(lambda: self.watchdog.idle_seconds)
        metrics.show_limits(self.config, self.status.total_steps)
        return metrics

    @cached_property
    def status(self) -> Status:
        config = self.config
        return Status(
            run=config.run.name,
            max_staleness=config.staleness.max_staleness,
            batch_size=config.data.batch_size,
            num_prompts=len(self.prompts.train),
            total_steps=self.configs.num_steps(config),
            progress=Progress(self.folder),
            kl_of=_kl_of(config),
            is_stopping=self.service.stop.is_set,
        )

    @cached_property
    def watchdog(self) -> Watchdog:
        return Watchdog(self.trainer_queue, self.book, self.status, self.config.stall_seconds)

    @cached_property
    def tracking(self) -> Tracking:
        dropped = self.metrics.tracking_dropped
        return make_tracking(self.config, self.folder, self.status.progress, self.samples, dropped)

    @cached_property
    def samples(self) -> SampleFile:
        return SampleFile(self.folder)

    @cached_property
    def sample_writer(self) -> SampleWriter:
        return SampleWriter(
            self.prompts.tokenizer,
            self.prompts.stop_token_ids,
            self.prompts.stop,
            most=self.config.tracking.samples_per_step,
            skip_special_tokens=self.config.rollout.engine.skip_special_tokens,
        )

    @cached_property
    def reports(self) -> Reports:
        return Reports(
            self.status.progress,
            self.metrics,
            self.status,
            self.watchdog,
            self.generation,
            self.evaluation,
            self.tracking,
            self.samples,
            LastLines(self.folder / DROPPED_FILE),
            self.sample_writer,
            max_lag=self.config.staleness.max_lag,
            set_figures=partial(set_figures, set_of=self.draws.set_of, has_signal=signal_test(self.config)),
        )

    @cached_property
    def targets(self) -> ScrapeTargets:
        return ScrapeTargets(self.config.run)

    @cached_property
    def sampler(self) -> Sampler:
        staleness = self.config.staleness
        return Sampler(
            self.queue,
            self.book,
            Stragglers(self.queue, self.book, straggler_seconds=staleness.straggler_seconds),
            self.releases.fences,
            self.targets,
            self.metrics,
            self.status,
            self.name,
            self.service.url,
            staleness.heartbeat_seconds,
        )


def _kl_of(config: Config) -> str:
    """From what the steps show the divergence of the policy: from what it is to come near, or not to leave."""
    if config.teacher.teaches:
        return "teacher"
    return "reference" if config.kl_ctl > 0 and config.loss.kl.place == "loss" else "behaviour"
