"""How the rollout service is wired."""

import json
import resource
from pathlib import Path

import pytest

from penstock.config import Config
from penstock.errors import ConfigError
from penstock.runtime.connections import MOST_FILES, max_connections
from penstock_rollout.__main__ import admission_of, bind, start
from penstock_rollout.calls import RESERVED_CONNECTIONS


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the socket, which a server that runs closes
def test_it_has_room_for_a_call_of_every_session() -> None:
    document = {"actor": {"path": "m"}, "data": {"train": {"path": "d"}}}
    assert bind(Config.model_validate(document)).max_connections == max_connections()
    agents = {"environment": "m:E", "sessions": 300, "num_services": 2}
    assert bind(Config.model_validate({**document, "agent": agents})).max_connections == max_connections(4 * 600)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_calls_of_agents_fill_the_engine_and_all_connections_that_were_made_for_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (MOST_FILES, MOST_FILES))
    document = {"actor": {"path": "m"}, "data": {"train": {"path": "d"}}}
    agents = {"environment": "m:E", "sessions": 300, "num_services": 2}
    for most, is_short in ((1024, False), (4096, True)):
        config = Config.model_validate(
            {**document, "agent": agents, "rollout": {"engine": {"max_running_requests": most}}}
        )
        served = bind(config)
        room = served.max_connections - RESERVED_CONNECTIONS
        admission = admission_of(config, served)
        assert admission.max_running == min(most, room)
        assert admission.max_running + admission.max_waiting == min(2 * most, room)
        assert bool(caplog.messages) == is_short


@pytest.mark.parametrize("url", ["", "http://127.0.0.1:1"])
async def test_a_model_that_the_engine_would_build_otherwise_is_refused(url: str, tmp_path: Path) -> None:
    """Before anything is asked of a queue or of the engine, whoever starts it."""
    dense = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "decoder_sparse_step": 2}
    (tmp_path / "config.json").write_text(json.dumps(dense))
    document = {"actor": {"path": str(tmp_path)}, "data": {"train": {"path": "d"}}}
    config = Config.model_validate({**document, "rollout": {"engine": {"url": url}}})
    with pytest.raises(ConfigError, match=r"actor\.path is .* has decoder_sparse_step 2: expected 1"):
        await start(config)
