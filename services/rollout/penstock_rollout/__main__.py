"""`python -m penstock_rollout --config F [--key value ...]`: the rollout service.

Wires queue, engine, weights, producer, calls and HTTP, and announces the service once its engine answers. If it dies,
its tickets go to other services, and its engine dies with it. Exit codes: `penstock.errors`.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from penstock.broker import Queue, Worker, connect
from penstock.config import Config
from penstock.contracts import ServiceKind
from penstock.contracts.services import ServiceRecord
from penstock.engine_layers import require_layers
from penstock.model_path import check_model_path
from penstock.runtime import service
from penstock.runtime.address import advertised_host
from penstock.weights.local_folder import LocalFolder, name_of_run
from penstock_rollout.admission import Admission
from penstock_rollout.app import make_rollout_app
from penstock_rollout.calls import Calls, make_admission
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.interface import EngineClient, EngineServer
from penstock_rollout.engine.sglang.client import SGLangClient
from penstock_rollout.engine.sglang.server import make_server
from penstock_rollout.generator import Generator
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.producer import Producer
from penstock_rollout.weights.local_copy import LocalCopy
from penstock_rollout.weights.relayed import RelayedVersions
from penstock_rollout.weights.snapshots import Snapshots, as_relayed
from penstock_rollout.weights.turns import TurnGate, Turns
from penstock_rollout.weights.updater import WeightUpdater

log = logging.getLogger(__name__)

MakeEngine = Callable[[Config, str], tuple[EngineServer, EngineClient]]
"""Makes the engine of the service with this name."""


def bind(config: Config) -> service.Service:
    """The server, with room for a call of every session: an agent's call holds a connection until it is answered."""
    section = config.rollout
    num_clients = config.agent.num_services * config.agent.num_connections
    return service.Service(section.host, section.port, "rollout.port", num_clients=num_clients)


def admission_of(config: Config, served: service.Service) -> Admission:
    """The room for calls. Warns if connections limit it, and not the engine."""
    most = config.rollout.engine.max_running_requests
    admission = make_admission(most, served.max_connections)
    if config.agent.enabled and admission.max_running < most:
        log.warning(
            "calls fill %d of rollout.engine.max_running_requests = %d: each needs one of the service's %d connections",
            *(admission.max_running, most, served.max_connections),
        )
    return admission


async def start(config: Config) -> None:
    """Run with an SGLang server until stopped."""
    if not config.rollout.engine.url:
        check_model_path(config.actor.path, "actor.path")  # the engine would end with a traceback
    require_layers(config.actor.path, "actor.path")
    await serve(config, bind(config), _sglang)


async def serve(config: Config, served: service.Service, make_engine: MakeEngine) -> None:
    """Run with the engine that `make_engine` returns, until `served` is stopped."""
    section = config.rollout
    queue = await connect(config, ServiceKind.ROLLOUT)
    worker = Worker(queue, f"rollout-{socket.gethostname()}-{os.getpid()}", config.staleness)

    def record() -> ServiceRecord:
        """In the state `starting` nothing is pushed."""
        return ServiceRecord(
            ServiceKind.ROLLOUT, worker.name, served.url, os.getpid(), weights.state, weights.identity, engine.name
        )

    async def register() -> None:
        await queue.register(record(), config.staleness.heartbeat_seconds)

    gate = TurnGate(queue.turn, register) if config.trainer.take_turns else None
    server, client = make_engine(config, worker.name)
    engine = Engine(server, client, start_attempts=section.engine.start_attempts, gate=gate)
    metrics = RolloutMetrics()
    copy = _local_copy(config) if config.weights.full_every else None
    relayed = _relayed(config, queue, metrics, worker.name) if config.weights.relay_fan_out else None
    weights = WeightUpdater(engine, config.weights, metrics, copy, relayed)
    files_of = as_relayed if relayed else Snapshots(queue, config.token, config.weights.push_timeout_seconds).files_of
    generator = Generator(engine, weights, metrics)
    producer = Producer(worker, queue.announced, engine, weights, generator, files_of, metrics, config, worker.name)
    calls = Calls(generator, weights, metrics, admission_of(config, served))
    turns = Turns(queue.turn, gate, engine, weights, producer.load_announced) if gate else None

    def engine_started() -> None:
        for key, tokens in config.longest_completions.items():
            engine.client.info.require_room(tokens, key)
        if config.agent.enabled:
            engine.client.info.require_length(config.agent.max_tokens)
        weights.forget()
        if engine.life > 1:
            metrics.engine_restarted()

    async def produce_then_end_engine() -> None:
        async with asyncio.TaskGroup() as work:
            work.create_task(producer.produce_groups(served.stop))
            work.create_task(calls.drain_at(served.stop))
        engine_stop.set()

    engine_stop = asyncio.Event()  # after `stop`: running groups and calls may still finish
    try:
        served.advertise(await advertised_host(ServiceKind.ROLLOUT, section, config.redis.url))
        await served.run(
            make_rollout_app(engine, weights, calls, metrics.registry, config.token, turns),
            background=[
                worker.keep_alive(record, ready=engine.up),
                *([turns.watch()] if turns else []),
            ],
            produce_groups=produce_then_end_engine(),
            keep_engine=engine.keep_engine(engine_stop, engine_started),
        )
        await worker.retire()
        await queue.unregister(worker.name)
    finally:
        await engine.close()
        for close in (each.close for each in (copy, relayed) if each is not None):
            await asyncio.to_thread(close)
        await queue.close()


def _sglang(config: Config, name: str) -> tuple[EngineServer, EngineClient]:
    log_path = Path(config.run.root) / config.run.name / "logs" / f"engine-{name}.log"
    engine, pause_mode = config.rollout.engine, config.weights.pause_mode
    server = make_server(
        engine,
        config.actor.path,
        log_path,
        pause_mode,
        gives_up_memory=config.trainer.take_turns,
        returns_experts=config.actor.router_replay,
    )
    return server, SGLangClient(engine, returns_experts=config.actor.router_replay)


def _local_copy(config: Config) -> LocalCopy:
    return LocalCopy(lambda needed_bytes: _local_folder(config, needed_bytes))


def _relayed(config: Config, queue: Queue, metrics: RolloutMetrics, name: str) -> RelayedVersions:
    return RelayedVersions(
        lambda needed_bytes: _local_folder(config, needed_bytes), queue.services, config.token, metrics, name
    )


def _local_folder(config: Config, needed_bytes: int) -> LocalFolder:
    name = f"{name_of_run(config.run.name, Path(config.run.root) / config.run.name)}-rollout"
    return LocalFolder(name, needed_bytes, config.weights.local_folder)


def main() -> NoReturn:
    """Entry point."""
    service.main(ServiceKind.ROLLOUT, start)


if __name__ == "__main__":
    main()
