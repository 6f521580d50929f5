"""A Redis Cluster cannot be the queue: a real one, of three nodes, is refused at start with the reason."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from penstock.broker import connect
from penstock.broker.keys import Keys, Stage
from penstock.config.load import build_config
from penstock.errors import ConfigError
from tests.integration.broker.redis_cluster import RedisCluster
from tests.patience import START_SECONDS

pytestmark = pytest.mark.redis

DOCUMENT = {"run": {"name": "t"}, "actor": {"path": "m"}, "data": {"train": {"path": "d.jsonl"}}}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    cluster = RedisCluster(Path(tmp_path_factory.mktemp("cluster")))
    try:
        cluster.form()
        yield cluster
    finally:
        cluster.close()


@pytest.mark.parametrize("node", [0, 1, 2])
@pytest.mark.parametrize("known_only", [False, True])
async def test_every_node_is_refused_with_the_reason_and_gets_no_key(
    cluster: RedisCluster, node: int, known_only: bool
) -> None:
    config = build_config({**DOCUMENT, "redis": {"url": cluster.url(node)}}, {}, {})
    with pytest.raises(ConfigError, match=r"redis\.url .*: a node of a Redis Cluster; expected a single server"):
        await connect(config, known_only=known_only)
    assert cluster.num_keys() == 0


def test_a_launch_is_refused_before_it_starts_a_service(cluster: RedisCluster, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    run = {"name": "t", "root": str(tmp_path / "runs")}
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    data = {"train": {"path": str(tmp_path / "d.jsonl")}, "batch_size": 1}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    actor = {"path": str(tmp_path / "model")}
    sections = {"run": run, "actor": actor, "redis": {"url": cluster.url(0)}, "data": data}
    elsewhere = {"rollout": {"engine": {"url": "http://127.0.0.1:1"}}}
    config.write_text(yaml.safe_dump({**DOCUMENT, **sections, **elsewhere}))
    command = [sys.executable, "-m", "penstock_launch", "launch", "local", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    assert done.returncode == 2, done.stderr
    assert "a node of a Redis Cluster; expected a single server" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs" / "t" / "logs").exists()


def test_all_keys_of_a_run_are_in_one_slot(cluster: RedisCluster) -> None:
    keys = Keys("t")
    names = [value for value in vars(keys).values() if value.startswith(keys.name(""))]
    assert len(names) >= 10
    names += [name(stage) for stage in Stage for name in (keys.stream, keys.waiting)]
    assert len({cluster.nodes[0].execute_command("CLUSTER", "KEYSLOT", name) for name in names}) == 1
