"""A real Redis Cluster of three nodes on loopback, from the server that Penstock embeds."""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import redis

from penstock.broker.embedded import HOST, find_server
from penstock.runtime.process import tied_command
from tests.patience import ANSWER_SECONDS, START_SECONDS

NUM_NODES = 3
NUM_SLOTS = 16384
BUS = 10000  # servers choose this offset
FIRST_PORT, LAST_PORT = 15000, 22000


class RedisCluster:
    """Three masters, each with a third of the slots."""

    def __init__(self, folder: Path) -> None:
        self.ports = _ports()
        self._processes = [self._spawn(folder / str(port), port) for port in self.ports]
        self.nodes: list[Any] = [
            redis.Redis(host=HOST, port=port, socket_timeout=ANSWER_SECONDS) for port in self.ports
        ]

    def _spawn(self, folder: Path, port: int) -> "subprocess.Popen[bytes]":
        folder.mkdir(parents=True)
        words = ("--bind", HOST, "--port", str(port), "--dir", str(folder), "--cluster-enabled", "yes", "--save", "")
        return subprocess.Popen(
            tied_command([str(find_server()), *words]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def form(self) -> None:
        """Assign the slots, introduce the nodes to each other, wait until they agree."""
        for index, node in enumerate(self.nodes):
            _wait(partial(_answers, node), "a node does not answer")
            first, end = NUM_SLOTS * index // NUM_NODES, NUM_SLOTS * (index + 1) // NUM_NODES
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
        for port in self.ports[1:]:
            self.nodes[0].execute_command("CLUSTER", "MEET", HOST, port)
        for node in self.nodes:
            _wait(partial(_agrees, node), "the nodes do not agree")

    def url(self, index: int) -> str:
        return f"redis://{HOST}:{self.ports[index]}/0"

    def num_keys(self) -> int:
        return sum(int(node.dbsize()) for node in self.nodes)

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        for process in self._processes:
            process.kill()
            process.wait()


def _ports() -> list[int]:
    """Free ports whose bus ports (port plus BUS) are free too."""
    found: list[int] = []
    for port in range(FIRST_PORT + os.getpid() % 1000 * NUM_NODES, LAST_PORT):
        with socket.socket() as probe, socket.socket() as bus, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            bus.bind((HOST, port + BUS))
            found.append(port)
        if len(found) == NUM_NODES:
            break
    return found


def _answers(node: Any) -> bool:
    try:
        return bool(node.ping())
    except redis.ConnectionError:
        return False


def _agrees(node: Any) -> bool:
    info = bytes(node.execute_command("CLUSTER", "INFO")).decode().splitlines()
    return {"cluster_state:ok", f"cluster_known_nodes:{NUM_NODES}"} <= set(info)


def _wait(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)
