"""What the doctor says of ports and of the queue's program."""

import socket
from typing import Any

import pytest

from penstock.config import Config
from penstock.errors import QueueError
from penstock_launch.doctor import network
from penstock_launch.doctor.network import fixed_ports, port_lines, queue_line
from tests.unit.launch.doctor.test_folders import config_with


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ports_of(config: Config) -> list[tuple[str, int]]:
    return [(each.key, each.port) for each in fixed_ports(config)]


def test_ports_that_are_not_fixed_are_free_ones() -> None:
    (line,) = port_lines(fixed_ports(config_with()))
    assert (line.verdict, line.seen) == ("ok", "none is fixed: services take free ones")


def test_the_fixed_ports_of_a_launch() -> None:
    document: dict[str, Any] = {
        "rollout": {"port": 7000, "num_servers": 2, "engine": {"port": 7100}},
        "trainer": {"port": 7200},
        "reward": {"port": 7300, "num_services": 2},
        "weights": {"rendezvous_port": 7400},
    }
    assert ports_of(config_with(**document)) == [
        ("trainer.port", 7200),
        ("rollout.port", 7000),
        ("rollout.port", 7001),
        ("reward.port", 7300),
        ("reward.port", 7301),
        ("weights.rendezvous_port", 7400),
        ("rollout.engine.port", 7100),
        ("rollout.engine.port", 7101),
    ]
    document["agent"] = {"port": 7500, "num_services": 2}
    assert not any(key == "agent.port" for key, _ in ports_of(config_with(**document)))  # there is none
    document["agent"]["environment"] = "my_envs:Guess"
    assert {("agent.port", 7500), ("agent.port", 7501)} <= {*ports_of(config_with(**document))}
    document["rollout"]["engine"]["url"] = "http://host:1"
    assert not any(key == "rollout.engine.port" for key, _ in ports_of(config_with(**document)))


@pytest.mark.parametrize("key", ["trainer.port", "rollout.port", "rollout.engine.port", "weights.rendezvous_port"])
def test_a_busy_port_is_named_with_its_key(key: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        value: Any = port
        for name in reversed(key.split(".")):
            value = {name: value}
        (line,) = port_lines(fixed_ports(config_with(**value)))
    assert line.verdict == "problem"
    assert f"127.0.0.1:{port}" in line.seen
    assert f"set {key} to another port" in line.advice


def test_no_port_stays_bound() -> None:
    port = free_port()
    ports = fixed_ports(config_with(trainer={"port": port}))
    assert [line.verdict for line in (*port_lines(ports), *port_lines(ports))] == ["ok", "ok"]
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", port))


def test_a_port_of_two_services_is_a_warning() -> None:
    port = free_port()
    (line,) = port_lines(fixed_ports(config_with(trainer={"port": port}, reward={"port": port})))
    assert line.verdict == "warning"
    assert f"{port} is in trainer.port and reward.port" in line.seen


def test_a_port_beyond_the_highest_is_a_problem() -> None:
    lines = port_lines(fixed_ports(config_with(rollout={"port": 65535, "num_servers": 2})))
    assert any(line.verdict == "problem" and "goes up to 65536" in line.seen for line in lines)


def test_the_program_of_an_embedded_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    assert queue_line(config_with()).verdict == "ok"

    def none() -> None:
        raise QueueError("no queue server: neither is on PATH")

    monkeypatch.setattr(network, "find_server", none)
    line = queue_line(config_with())
    assert (line.verdict, line.seen) == ("problem", "no queue server: neither is on PATH")
    assert "redis.url" in line.advice


def test_a_queue_that_does_not_answer_is_named_without_its_password() -> None:
    port = free_port()
    line = queue_line(config_with(redis={"url": f"redis://:hush@127.0.0.1:{port}/0"}))
    assert line.verdict == "problem"
    assert f"127.0.0.1:{port}" in line.seen
    assert "hush" not in line.seen
