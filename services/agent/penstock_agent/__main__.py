"""`python -m penstock_agent --config F [--key value ...]`: the agent service.

Wires queue, environment, gateway, rollout servers, loop and HTTP, and registers the service once its environment is
loaded. If it dies, its tickets go to other services with all episodes that are finished, and its environments die with
it. Exit codes: `penstock.errors`.
"""

import os
import socket
from typing import NoReturn

from penstock.broker import Queue, Worker, connect
from penstock.config import AgentSection, Config
from penstock.contracts import ServiceKind
from penstock.contracts.services import ServiceRecord
from penstock.contracts.vocabulary import ENVIRONMENT_REWARD
from penstock.errors import CallRefusedError, ConfigError
from penstock.runtime import service
from penstock.runtime.address import advertised_host
from penstock_agent.app import make_agent_app
from penstock_agent.capture.make import make_rendering
from penstock_agent.capture.rendering import Rendering
from penstock_agent.environments.driving import check_environment, open_driver
from penstock_agent.environments.episode import Environment
from penstock_agent.episodes.attempts import Attempts
from penstock_agent.episodes.breaker import Breaker
from penstock_agent.episodes.producer import Producer
from penstock_agent.episodes.room import Room
from penstock_agent.episodes.watch import Watch
from penstock_agent.gateway.sessions import Sessions
from penstock_agent.generation.servers import Servers
from penstock_agent.metrics import AgentMetrics

READY = "ready"


async def start(config: Config) -> None:
    """Run until stopped."""
    section = config.agent
    if not section.enabled:
        raise ConfigError(
            "neither agent.environment nor agent.command is set: expected one of them; without agents there is no "
            "agent service to start"
        )
    served = bind(section)
    environment = await check_environment(section, needs_score=ENVIRONMENT_REWARD in config.reward.functions)
    rendering = make_rendering(section, config.actor.path)  # after what fails sooner: it takes seconds
    require_tools(rendering, environment, section.environment)
    queue = await connect(config, ServiceKind.AGENT)
    try:
        served.advertise(await advertised_host(ServiceKind.AGENT, section, config.redis.url))
        await serve(config, served, queue, rendering, environment)
    finally:
        await queue.close()


def bind(section: AgentSection) -> service.Service:
    """The server, with room for the connections of all sessions."""
    return service.Service(section.host, section.port, "agent.port", num_clients=section.num_connections)


def require_tools(rendering: Rendering, environment: Environment, name: str) -> None:
    """ConfigError if the model cannot be shown the environment's tools."""
    try:
        rendering.render([{"role": "user", "content": "?"}], environment.tools)
    except CallRefusedError as error:
        if environment.tools:
            raise ConfigError(f"agent.environment names {name!r}, a class of tools, and {error}") from None


async def serve(
    config: Config, served: service.Service, queue: Queue, rendering: Rendering, environment: Environment
) -> None:
    """Make episodes until stopped; what the service opens ends with it."""
    section = config.agent
    worker = Worker(queue, f"agent-{socket.gethostname()}-{os.getpid()}", config.staleness)
    metrics, watch = AgentMetrics(), Watch()
    breaker = Breaker(metrics.breaker_changed)
    servers = Servers(
        queue.services, config.token, config.rollout.engine.max_running_requests, asked_again=metrics.asked_again
    )
    metrics.watch(running=lambda: watch.num_running, waiting=lambda: servers.waits.num_waiting)
    sessions = Sessions(section, url=served.url, rendering=rendering, servers=servers, metrics=metrics)
    room = Room(config.actor.group_size, section.sessions, int(config.eval.max_share * section.sessions))
    app = make_agent_app(
        sessions,
        metrics,
        config.token,
        not_ready=lambda: not_ready(servers),
        model=config.actor.path,
        text_of=rendering.token_text,
    )

    def record() -> ServiceRecord:
        return ServiceRecord(ServiceKind.AGENT, worker.name, served.url, os.getpid(), state(servers, breaker, watch))

    try:
        async with open_driver(section, environment) as driver:
            attempts = Attempts(section, sessions, driver, breaker, watch, metrics, lambda: servers.waits.seconds)
            producer = Producer(
                worker, queue.announced, attempts, room, metrics, environment=section.name, server=worker.name
            )
            await served.run(
                app,
                background=[
                    worker.keep_alive(record),
                    servers.follow(),
                ],
                produce_groups=producer.produce_groups(served.stop),
            )
        await worker.retire()
        await queue.unregister(worker.name)
    finally:
        await servers.close()


def not_ready(servers: Servers) -> str | None:
    """Why no episode can run now; None if one can. The environment was loaded before the service answers at all."""
    return None if servers.num_known else "no rollout server is registered in the queue"


def state(servers: Servers, breaker: Breaker, watch: Watch) -> str:
    """What the service does, in the record that others show: what keeps its episodes, if anything does."""
    if breaker.is_open:
        return f"the environment fails: {breaker}; {breaker.num_waiting} attempts wait"
    return servers.waiting_for or watch.longest_wait() or READY


def main() -> NoReturn:
    """Entry point."""
    service.main(ServiceKind.AGENT, start)


if __name__ == "__main__":
    main()
