"""What each process is given of its host: the GPUs that it sees, CPUs near them, threads; and how that is shown."""

import os
from pathlib import Path
from typing import Any

import pytest

import penstock_launch.gpus.shares as shares
from penstock.config import Config
from penstock.contracts import ServiceKind
from penstock.errors import ConfigError
from penstock_launch.gpus.plan import plan
from penstock_launch.gpus.shares import PlacedRun, Share, place, read_node_cpus, shown_placement
from tests.gpus import FakeGpu, gpu_uuid, host_with_gpus, mig_uuid
from tests.unit.launch.gpus.test_plan import H100, divided_host, host, run_of

NOT_SET = Share()
CPUS = {0: frozenset(range(16)), 1: frozenset(range(16, 32))}


def placed(config: Config, number: int, *, nodes: int = 1, cpus: dict[int, frozenset[int]] | None = None) -> PlacedRun:
    """On a host with GPUs and CPUs spread evenly over NUMA nodes; `cpus`: those of each node."""
    cpus = cpus or (CPUS if nodes == 2 else {0: frozenset(range(32))})
    placement = plan(config, host(number, nodes=nodes), {})
    return PlacedRun(config, placement, frozenset().union(*cpus.values()), lambda node: cpus.get(node, frozenset()))


def seen_by(run: PlacedRun) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES of each process."""
    servers = [run.share(ServiceKind.ROLLOUT, index) for index in range(len(run.placement.servers))]
    others = {"trainer": run.share(ServiceKind.TRAINER), "reward": run.share(ServiceKind.REWARD, 3)}
    found = {f"rollout-{index}": share for index, share in enumerate(servers)} | others
    assert {share.variables["CUDA_DEVICE_ORDER"] for share in found.values()} == {"PCI_BUS_ID"}
    return {name: share.variables["CUDA_VISIBLE_DEVICES"] for name, share in found.items()}


def test_each_process_sees_its_own_gpus_and_no_others() -> None:
    run = placed(run_of(2, 4, 2), 8)
    assert seen_by(run) == {"rollout-0": "0,1", "rollout-1": "2,3", "trainer": "4,5,6,7", "reward": ""}
    assert seen_by(placed(run_of(1, 1), 1)) == {"rollout-0": "0", "trainer": "0", "reward": ""}
    assert seen_by(placed(run_of(1, 1, trainer={"device": "cpu"}), 1)) == {
        "rollout-0": "0",
        "trainer": "",
        "reward": "",
    }


def test_instances_are_seen_by_uuid_and_so_are_the_gpus_next_to_them(tmp_path: Path) -> None:
    run = place(run_of(2, 1), divided_host(tmp_path)[1])
    assert seen_by(run) == {
        "rollout-0": mig_uuid(0, 0),
        "rollout-1": mig_uuid(0, 1),
        "trainer": gpu_uuid(1),
        "reward": "",
    }


def test_without_gpus_nothing_is_set(tmp_path: Path) -> None:
    for environ in (
        {"PATH": str(tmp_path)},
        host_with_gpus(tmp_path / "bin", [FakeGpu()], {"CUDA_VISIBLE_DEVICES": ""}),
    ):
        run = place(run_of(2, 1), environ)
        assert [run.share(kind, 0) for kind in ServiceKind] == [NOT_SET] * len(ServiceKind)
        assert run.lines() == []


@pytest.mark.parametrize(
    ("number", "sections", "overrides", "transport"),
    [
        (2, {}, ("--trainer.gpus", "1", "--rollout.gpus", "0"), "nccl"),
        (1, {}, ("--trainer.gpus", "0", "--rollout.gpus", "0"), "disk"),
        (1, {"weights": {"transport": "tensor"}}, ("--trainer.gpus", "0", "--rollout.gpus", "0"), "tensor"),
        (2, {"rollout": {"engine": {"device": "cpu"}}}, ("--trainer.gpus", "0"), "disk"),
        (2, {"trainer": {"device": "cpu"}}, ("--rollout.gpus", "0"), "disk"),
        (3, {"trainer": {"num_ranks": 2}}, ("--trainer.gpus", "1,2", "--rollout.gpus", "0"), "nccl"),
    ],
)
def test_the_trainer_chooses_its_transport_by_the_gpus_of_both_sides(
    tmp_path: Path, number: int, sections: dict[str, Any], overrides: tuple[str, ...], transport: str
) -> None:
    config = Config.model_validate({"actor": {"path": "m"}, "data": {"train": {"path": "d.jsonl"}}, **sections})
    run = placed(config, number)
    assert run.share(ServiceKind.TRAINER).overrides == overrides
    assert run.share(ServiceKind.ROLLOUT).overrides == ()
    assert f"weights: by {transport}" in run.lines()[2]


def test_processes_on_gpus_divide_the_cpus_into_threads() -> None:
    run = placed(run_of(4, 4), 8)
    assert run.share(ServiceKind.TRAINER).gpu_threads == 4  # 32 CPUs, 8 processes
    assert placed(run_of(1, 1), 2).share(ServiceKind.ROLLOUT).gpu_threads == 16
    assert placed(run_of(4, 4), 8, cpus={0: frozenset({0})}).share(ServiceKind.TRAINER).gpu_threads == 1
    assert run.share(ServiceKind.REWARD).gpu_threads == 0


def test_a_process_runs_on_the_cpus_of_its_gpus_node() -> None:
    run = placed(run_of(3, 4), 8, nodes=2)
    assert run.share(ServiceKind.ROLLOUT, 2).cpus == CPUS[0]
    assert run.share(ServiceKind.ROLLOUT, 2).gpu_threads == 5  # 16 CPUs, 3 processes
    assert (run.share(ServiceKind.TRAINER).cpus, run.share(ServiceKind.TRAINER).gpu_threads) == (CPUS[1], 4)
    assert run.share(ServiceKind.REWARD).cpus == frozenset()


@pytest.mark.parametrize(
    ("nodes", "cpus"),
    [
        (1, {0: CPUS[0]}),  # they are all there are
        (2, {0: frozenset(range(30)), 1: frozenset({30, 31})}),  # 2 for 4 ranks
        (2, {0: CPUS[0]}),  # of the other node the kernel says nothing, or this process may use none
    ],
)
def test_a_process_runs_anywhere_if_the_cpus_near_it_are_no_fewer_or_too_few(
    nodes: int, cpus: dict[int, frozenset[int]]
) -> None:
    share = placed(run_of(4, 4), 8, nodes=nodes, cpus=cpus).share(ServiceKind.TRAINER)
    assert share.cpus == frozenset()
    assert share.gpu_threads == sum(map(len, cpus.values())) // 8


def test_a_trainer_on_both_nodes_runs_anywhere() -> None:
    run = placed(run_of(1, 7), 8, nodes=2)
    assert run.share(ServiceKind.TRAINER).cpus == frozenset()


def test_the_cpus_of_a_node_are_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for node, text in ((0, "0-2,8-9\n"), (1, "\n"), (2, "x")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(text)
    monkeypatch.setattr(shares, "NODES", tmp_path)
    assert [read_node_cpus(node) for node in range(4)] == [frozenset({0, 1, 2, 8, 9}), *[frozenset[int]()] * 3]


def test_the_plan_is_shown_line_by_line() -> None:
    assert placed(run_of(2, 4, 2), 8, nodes=2).lines() == [
        "rollout-0: GPU 0, 1; 4 threads for each, on the 16 CPUs of NUMA node 0",
        "rollout-1: GPU 2, 3; 4 threads for each, on the 16 CPUs of NUMA node 0",
        "trainer: GPU 4, 5, 6, 7; 4 threads for each, on the 16 CPUs of NUMA node 1",
        "weights: by nccl",
    ]
    assert placed(run_of(1, 1), 1).lines() == [
        "rollout: GPU 0; 16 threads",
        "trainer: GPU 0; 16 threads",
        "weights: by disk, on a GPU that trainer and server share",
    ]


@pytest.mark.parametrize(
    ("version", "device", "warned"), [("2.13.0+cpu", "auto", 1), ("2.13.0", "auto", 0), ("2.13.0+cpu", "cpu", 0)]
)
def test_a_gpu_that_the_trainers_torch_cannot_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, device: str, warned: int
) -> None:
    monkeypatch.setattr("importlib.metadata.version", {"torch": version}.__getitem__)
    lines = place(run_of(1, 1, trainer={"device": device}), host_with_gpus(tmp_path, [FakeGpu()])).lines()
    found = [line for line in lines if line.startswith("the trainer's torch 2.13.0+cpu is built without CUDA")]
    assert len(found) == warned


def test_a_trainer_that_must_have_a_gpu_is_refused_if_its_torch_can_use_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", {"torch": "2.13.0+cpu"}.__getitem__)
    with pytest.raises(ConfigError, match=r"trainer\.device is cuda, and its torch 2\.13\.0\+cpu .*make envs CUDA=1"):
        place(run_of(1, 1, trainer={"device": "cuda"}), host_with_gpus(tmp_path, [FakeGpu()]))


def test_a_configuration_is_shown_with_what_a_launch_would_do(tmp_path: Path) -> None:
    one = host_with_gpus(tmp_path, [FakeGpu(used_mib=40000)])
    threads = min(16, len(os.sched_getaffinity(0)))
    assert shown_placement(run_of(1, 1, trainer={"device": "cpu"}), one) == [
        "GPUs on this host:",
        f"rollout: GPU 0; {threads} thread{'s' * (threads > 1)}",
        "trainer: no GPU",
        "weights: by disk",
        "no estimate of memory: 'm' is a hub name, and this host has not loaded it yet",
        f"GPU 0 ({H100}): other processes have 39.1 of its 79.6 GiB; end them, or choose others (rollout.gpus, "
        "trainer.gpus, CUDA_VISIBLE_DEVICES)",
    ]
    refused = shown_placement(run_of(1, 2), one)
    assert refused[:3] == [
        "GPUs on this host: `penstock launch local` is refused:",
        "the GPUs do not suffice:",
        "  asked  1 server x 1 + 2 ranks = 3 GPUs",
    ]
    assert shown_placement(run_of(1, 1), {"PATH": str(tmp_path / "none")}) == ["GPUs on this host: none is visible"]
