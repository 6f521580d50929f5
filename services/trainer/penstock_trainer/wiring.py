"""Runs the trainer service: the inputs of one life of it, that life, and its end.

Owns the order of start and end: prompts, and a run that cannot be continued, before a large model; memory and lease
before anything is written.
"""

import asyncio
import logging
import os
from pathlib import Path

from transformers.utils.hub import cached_file

from penstock.broker import check_memory, connect, needed_bytes
from penstock.broker.lease import Lease, acquire_lease
from penstock.config import Config
from penstock.contracts import ServiceKind
from penstock.durable import write_durably
from penstock.engine_layers import CONFIG_FILE, require_layers
from penstock.records.files import TRAINER_SUMMARY_FILE
from penstock.records.run import RunRecords
from penstock.run_home import RunHome
from penstock.runtime.address import advertised_host
from penstock.runtime.service import Service
from penstock_trainer.assemble import Assembly
from penstock_trainer.checkpoints.history import refuse_other_run
from penstock_trainer.checkpoints.settings import StepConfigs
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.data.datasets import BegunRows
from penstock_trainer.data.prompt_table import PromptTables
from penstock_trainer.data.rows import Row
from penstock_trainer.data.run_prompts import encode_prompts
from penstock_trainer.distributed.rank import CPU_NICENESS, RankInfo
from penstock_trainer.distributed.ranks import Ranks, rank_device
from penstock_trainer.learner.keep_memory import keep_freed_memory
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.rank_commands import LeadingLearner
from penstock_trainer.telemetry.summary import make_summary, summary_bytes

log = logging.getLogger(__name__)


async def run_trainer(
    config: Config, service: Service, info: RankInfo, train_rows: BegunRows, held_out_rows: dict[str, list[Row]]
) -> None:
    """Run the trainer until its run has ended or it is stopped: as its only rank, or as rank 0 of several."""
    if rank_device(config.trainer.device, info).type == "cpu":
        keep_freed_memory()
    tables = PromptTables.of_cache() if train_rows.are_many else None
    folder = Path(config.run.root) / config.run.name
    step_files = StepFiles(folder / "steps", config.checkpoint.keep_step_bytes)
    has_begun = step_files.journal.exists
    prompts = await asyncio.to_thread(encode_prompts, config, train_rows, held_out_rows, tables, has_begun=has_begun)
    train_rows.close()
    prompts.warn(config)
    await asyncio.to_thread(_require_served, config.actor.path)
    queue = await connect(config)
    lease: Lease | None = None
    try:
        await refuse_other_run(queue, step_files.journal, prompts.run_record(config))
        ranks = await asyncio.to_thread(Ranks, info, config.trainer.device) if info.num_ranks > 1 else None
        num_steps = StepConfigs(config, len(prompts.train), step_files.settings).num_steps(config)
        learner = await asyncio.to_thread(_learner, config, ranks, num_steps)
        if learner.on_cpu:
            os.nice(CPU_NICENESS)
        service.advertise(await advertised_host(ServiceKind.TRAINER, config.trainer, config.redis.url))
        await check_memory(queue, needed_bytes(config))
        _warn_of_idle_servers(config)
        home = RunHome(folder, ServiceKind.TRAINER)
        lease = await acquire_lease(queue, config, home)
        await _live(Assembly(config, service, queue, lease, learner, prompts, step_files))
        await asyncio.to_thread(learner.close)
        if ranks is not None:
            await asyncio.to_thread(ranks.leave)
    finally:
        if lease is not None:  # engines that share its GPU may wake once the lease is gone: not before this process is
            await asyncio.to_thread(lease.abandon if learner.has_gpu_turn else lease.release)
        await queue.close()


def _require_served(path: str) -> None:
    """ConfigError if the engine would build another model. Only here are the files of a name on the hub."""
    without_errors = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    require_layers(path, "actor.path", cached_file(path, CONFIG_FILE, **without_errors))


async def _live(life: Assembly) -> None:
    """Serve and train until the run has ended, is stopped, or the lease is lost."""
    loop = asyncio.get_running_loop()
    lost: asyncio.Future[None] = loop.create_future()

    def lose(error: Exception) -> None:  # in the lease's thread
        loop.call_soon_threadsafe(_fail, lost, error)

    life.lease.start_renewing(lose)
    life.tracking.start()
    try:
        await life.service.run(life.app, background=(_result_of(lost), *life.background()), train=_train(life))
        await asyncio.to_thread(life.targets.remove)
    finally:
        await asyncio.to_thread(life.tracking.close)
        await life.client.close()
        await life.worker.retire()
        await life.queue.unregister(life.name)


async def _train(life: Assembly) -> None:
    await life.train()
    if not life.requests.stop.is_set():
        await _summarize(life)
    life.reports.ending("closing the trackers")
    await asyncio.to_thread(life.tracking.close)


async def _summarize(life: Assembly) -> None:
    life.reports.ending("writing the summary")
    servers = [each for each in await life.queue.services() if each.kind is ServiceKind.ROLLOUT]
    counters = await life.trainer_queue.counters()
    summary = await asyncio.to_thread(  # it reads the lines of the full run
        make_summary,
        RunRecords(life.folder),
        counters,
        engine=servers[0].engine if servers else "",
        model=life.config.actor.path,
        max_staleness=life.config.staleness.max_staleness,
        too_long={each.key: each.count for each in life.prompts.too_long},
    )
    await asyncio.to_thread(write_durably, life.folder / TRAINER_SUMMARY_FILE, summary_bytes(summary))


def _fail(future: "asyncio.Future[None]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


async def _result_of(future: "asyncio.Future[None]") -> None:
    await future


def _learner(config: Config, ranks: Ranks | None, num_steps: int) -> Learner:
    if ranks:
        return LeadingLearner(config, ranks, num_steps=num_steps)
    return Learner(config, num_steps=num_steps, starts_on_host=config.trainer.take_turns)


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
