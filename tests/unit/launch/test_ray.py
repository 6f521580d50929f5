"""What a launch on Ray decides without Ray: addresses, folders, and which ending explains the others."""

from pathlib import Path
from typing import Any

import pytest

from penstock.config import Config, RaySection
from penstock.config.load import build_config
from penstock.contracts import ServiceKind
from penstock.errors import ConfigError
from penstock_launch.on_ray.command import for_cluster
from penstock_launch.run_folder import RunFolder


def config(**sections: Any) -> Config:
    return build_config({"actor": {"path": "m"}, "data": {"train": {"path": "d.jsonl"}}, **sections}, {}, {})


def test_paths_mean_the_same_on_every_node_and_weights_are_where_all_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = for_cluster(config(run={"name": "r", "root": "runs"}))
    assert found.run.root == str(tmp_path / "runs")
    assert found.weights.folder == str(tmp_path / "runs" / "r" / "weights")
    assert for_cluster(config(weights={"folder": "w"})).weights.folder == str(tmp_path / "w")
    relayed = for_cluster(config(weights={"transport": "disk", "relay_fan_out": 2}))
    assert relayed.weights.folder == ""  # the trainer's own, in memory


def test_a_service_listens_and_registers_where_other_nodes_reach_it() -> None:
    site = pytest.importorskip("penstock_launch.on_ray.site", reason="Ray is not installed")
    plain = config().rollout
    assert site.overrides(ServiceKind.ROLLOUT, plain)("10.0.0.7") == (
        *("--rollout.host", "10.0.0.7"),
        *("--rollout.advertise_host", "10.0.0.7"),
    )
    all_addresses = config(rollout={"host": "0.0.0.0", "advertise_host": "gw"}).rollout
    assert site.overrides(ServiceKind.ROLLOUT, all_addresses)("10.0.0.7") == ()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"rollout": {"engine": {"tensor_parallel_size": 2}}, "ray": {"rollout": {"num_gpus": 1}}},
            r"ray\.rollout\.num_gpus is 1 and each server has 2 GPUs by rollout\.engine\.tensor_parallel_size",
        ),
        ({"ray": {"rollout": {"num_gpus": 2}}}, r"ray\.rollout\.num_gpus is 2 and each server has 1 GPUs"),
        ({"rollout": {"gpus": [0]}}, r"rollout\.gpus is 0, and Ray chooses the GPUs of each process"),
        ({"trainer": {"gpus": [3]}}, r"trainer\.gpus is 3, and Ray chooses the GPUs of each process"),
    ],
)
def test_gpus_that_ray_would_reserve_for_nobody_are_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        for_cluster(config(**sections))


@pytest.mark.parametrize("transport", ["auto", "nccl"])
def test_a_server_and_a_rank_on_one_gpu_need_another_transport_than_nccl(transport: str) -> None:
    half = {"rollout": {"num_gpus": 0.5}, "trainer": {"num_gpus": 0.25}}
    with pytest.raises(ConfigError, match=rf"0\.5 and ray\.trainer\.num_gpus 0\.25, .*transport is {transport}: NCCL"):
        for_cluster(config(ray=half, weights={"transport": transport}))
    assert for_cluster(config(ray=half, weights={"transport": "disk"})).ray.trainer.num_gpus == 0.25
    assert for_cluster(config(ray=half, weights={"transport": transport}, trainer={"device": "cpu"}))


def test_turns_need_gpus_that_ray_may_share() -> None:
    turns, half = {"take_turns": True}, {"rollout": {"num_gpus": 0.5}, "trainer": {"num_gpus": 0.5}}
    assert for_cluster(config(ray=half, trainer=turns, staleness={"max_staleness": 1})).trainer.take_turns
    for ray in ({}, {"rollout": {"num_gpus": 0.5}}, {**half, "trainer": {"num_gpus": 1}}):
        with pytest.raises(ConfigError, match=r"trainer\.take_turns is on, and Ray gives trainer and servers GPUs"):
            for_cluster(config(ray=ray, trainer=turns, staleness={"max_staleness": 1}))


@pytest.mark.parametrize("num_gpus", [0, 0.5, 1])
def test_a_server_with_one_gpu_may_share_it_or_do_without(num_gpus: float) -> None:
    assert for_cluster(config(ray={"rollout": {"num_gpus": num_gpus}})).ray.rollout.num_gpus == num_gpus


@pytest.mark.parametrize(
    ("has_gpus", "sections", "rollout", "trainer"),
    [
        (True, {}, 1, 1),
        (True, {"rollout": {"engine": {"tensor_parallel_size": 4}}}, 4, 1),
        (True, {"rollout": {"engine": {"device": "cpu"}}, "trainer": {"device": "cpu"}}, 0, 0),
        (True, {"rollout": {"engine": {"url": "http://h:1"}}}, 0, 1),
        (True, {"ray": {"rollout": {"num_gpus": 0.5}, "trainer": {"num_gpus": 0.5}}}, 0.5, 0.5),
        (False, {}, 0, 0),
    ],
)
def test_each_bundle_has_the_gpus_that_its_process_uses(
    tmp_path: Path, has_gpus: bool, sections: dict[str, Any], rollout: float, trainer: float
) -> None:
    site = pytest.importorskip("penstock_launch.on_ray.site", reason="Ray is not installed")
    bundles: list[dict[str, float]] = []

    class Cluster:
        def __init__(self) -> None:
            self.has_gpus = has_gpus

        def group(self, asked: list[dict[str, float]], strategy: str) -> object:
            bundles.extend(asked)
            return object()

    run = config(run={"name": "r", "root": str(tmp_path)}, **sections)
    site.RaySite(Cluster()).services(run, RunFolder(run.run), run.redis, {})
    assert [bundle.get("GPU", 0) for bundle in bundles] == [rollout, trainer]


def test_agent_services_reserve_what_their_section_says(tmp_path: Path) -> None:
    site = pytest.importorskip("penstock_launch.on_ray.site", reason="Ray is not installed")

    class Cluster:
        has_gpus = True

        def group(self, asked: list[dict[str, float]], strategy: str) -> object:
            return object()

    def members_of(**sections: Any) -> dict[str, Any]:
        run = config(run={"name": "r", "root": str(tmp_path)}, **sections)
        services = site.RaySite(Cluster()).services(run, RunFolder(run.run), run.redis, {})
        return {each.name: each.members for each in services}

    assert "agent" not in members_of(ray={"agent": {"num_cpus": 4}})
    found = members_of(
        agent={"environment": "e:E", "num_services": 2}, ray={"agent": {"num_cpus": 4, "resources": {"docker": 1}}}
    )
    assert list(found) == ["rollout", "trainer", "agent-0", "agent-1", "reward"]
    [member] = found["agent-1"]
    assert (member.options["num_cpus"], member.options["num_gpus"]) == (4, 0)
    assert member.options["resources"] == {"docker": 1}
    assert member.overrides("10.0.0.7") == ("--agent.host", "10.0.0.7", "--agent.advertise_host", "10.0.0.7")
    assert member.order.arguments[:2] == ("-m", "penstock_agent")


def test_of_several_ranks_the_one_that_failed_by_itself_is_blamed() -> None:
    remote = pytest.importorskip("penstock_launch.on_ray.remote", reason="Ray is not installed")
    host = pytest.importorskip("penstock_launch.on_ray.host", reason="Ray is not installed")
    noticed, failed = host.Ending(7, ("lost",)), host.Ending(2, ("trainer: config: why",))
    found = remote.blamed([(0, noticed), (1, failed)], 2)
    assert (found.exit_code, found.lines) == (2, ("trainer: config: why",))
    assert found.words == "rank 1 of 2: exit code 2"
    assert remote.blamed([(0, host.Ending(0)), (1, host.Ending(0))], 2).exit_code == 0
    assert remote.blamed([(0, host.Ending(-9))], 1) == host.Ending(-9)


@pytest.mark.parametrize("address", ["ray://head:10001", "head"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    cluster = pytest.importorskip("penstock_launch.on_ray.cluster", reason="Ray is not installed")
    with pytest.raises(ConfigError, match=r"ray\.address: saw .*; expected auto or host:port of the head"):
        cluster.Cluster(RaySection(address=address))


@pytest.mark.parametrize(("content", "seen"), [(None, "sees no file"), (b"of another run", "sees another file")])
async def test_a_node_that_does_not_share_the_folder_of_the_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, seen: str
) -> None:
    host = pytest.importorskip("penstock_launch.on_ray.host", reason="Ray is not installed")
    monkeypatch.setattr(host, "SHARED_SECONDS", 0.0)
    config_path = tmp_path / "config.yaml"
    if content is not None:
        config_path.write_bytes(content)
    order = host.Order(("-c", ""), {}, tmp_path / "log", str(tmp_path), config_path, "the digest of the driver's")
    with pytest.raises(ConfigError, match=rf"run\.root: node \S+ {seen} .*; set run\.root"):
        await host.ServiceHost("rollout").start(order)
