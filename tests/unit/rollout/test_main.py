"""How the rollout service is wired."""

import pytest

from penstock.config import Config
from penstock.runtime.connections import max_connections
from penstock_rollout.__main__ import bind


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the socket, which a server that runs closes
def test_it_has_room_for_a_call_of_every_session() -> None:
    document = {"actor": {"path": "m"}, "data": {"train": {"path": "d"}}}
    assert bind(Config.model_validate(document)).max_connections == max_connections()
    agents = {"environment": "m:E", "sessions": 300, "num_services": 2}
    assert bind(Config.model_validate({**document, "agent": agents})).max_connections == max_connections(4 * 600)
