"""A launched run whose servers relay weights: a real trainer and rollout services, over engines without a model."""

import re

import pytest

from tests.integration.launch.user_commands import UserCommands

pytestmark = [pytest.mark.redis, pytest.mark.slow]

NUM_SERVERS = 3
RECEIVED = re.compile(r"received (\d+)-\w+ from ([a-z]+)-")


def test_a_run_trains_on_weights_that_its_servers_relay(setup: UserCommands) -> None:
    """In a line of three servers one receives from the trainer, and the others from each other."""
    setup.use_pure_engine()
    setup.document["rollout"] |= {"num_servers": NUM_SERVERS}
    setup.document["weights"] |= {"transport": "disk", "relay_fan_out": 1}
    setup.document["total_train_epochs"] = 16
    setup.document["token"] = "a-token"
    code, output = setup.launch()
    assert code == 0, output
    logs = [path.read_text() for path in (setup.run_folder / "logs").glob("rollout*.log")]
    assert len(logs) == NUM_SERVERS
    received = [RECEIVED.findall(each) for each in logs]
    versions = {version for each in received for version, _ in each}
    assert len(versions) > 1
    senders = [sender for each in received for _, sender in each]
    assert {"rollout", "trainer"} <= set(senders)  # while servers start, versions may reach one alone
    assert not any("which is slow" in each or "which is wrong" in each for each in logs)
