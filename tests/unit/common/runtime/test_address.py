"""Which address a service registers: the configured one, or one that others can reach."""

import httpx
import pytest
from prometheus_client import CollectorRegistry

from penstock.config import RewardSection
from penstock.errors import ConfigError
from penstock.runtime.address import advertised_host
from penstock.runtime.http import make_app
from penstock.runtime.service import Service

QUEUE = "redis://127.0.0.1:6379"


async def advertised(host: str, advertise_host: str = "", queue_url: str = QUEUE) -> str:
    return await advertised_host("reward", RewardSection(host=host, advertise_host=advertise_host), queue_url)


async def test_it_is_the_configured_one_else_what_it_listens_on() -> None:
    assert await advertised("127.0.0.1") == "127.0.0.1"
    assert await advertised("0.0.0.0", "node-7") == "node-7"
    assert await advertised("10.0.0.1", queue_url="") == "10.0.0.1"


@pytest.mark.parametrize(("host", "advertise_host"), [("127.0.0.1", "auto"), ("0.0.0.0", ""), ("::", "")])
async def test_auto_is_the_address_on_the_way_to_the_queue(host: str, advertise_host: str) -> None:
    # All of 127.0.0.0/8 is this host; a connection comes from the address that was asked for, or from 127.0.0.1.
    assert await advertised(host, advertise_host) == "127.0.0.1"
    assert await advertised(host, advertise_host, "redis://:secret@localhost/0") in ("127.0.0.1", "::1")
    assert await advertised(host, advertise_host, "unix:///run/valkey.sock") == "127.0.0.1"


async def test_without_a_way_to_the_queue_the_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"reward.advertise_host: .*no-such-host.invalid.* set reward.advertise_host"):
        await advertised("0.0.0.0", queue_url="redis://no-such-host.invalid:6379")


async def test_a_service_is_known_by_what_it_advertises() -> None:
    service = Service("127.0.0.1", 0, "reward.port")
    port = service.url.rpartition(":")[2]

    async def look() -> None:
        service.advertise("node-7")
        assert service.url == f"http://node-7:{port}"
        service.advertise("fd00::1")
        assert service.url == f"http://[fd00::1]:{port}"
        async with httpx.AsyncClient() as client:  # it still listens there
            assert (await client.get(f"http://127.0.0.1:{port}/health")).status_code == 200

    await service.run(make_app("test", not_ready=lambda: None, metrics=CollectorRegistry()), look=look())
