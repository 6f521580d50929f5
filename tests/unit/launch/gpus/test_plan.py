"""Which process gets which GPU: on every size of host, by name or by itself, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from penstock.config import Config
from penstock.errors import ConfigError
from penstock_launch.gpus.nvidia import Driver, Gpu, read_driver
from penstock_launch.gpus.plan import Placement, plan
from tests.gpus import FakeGpu, gpu_uuid, host_with_gpus, mig_uuid

GIB = 2**30
H100 = "NVIDIA H100 80GB HBM3"


def config(**sections: Any) -> Config:
    return Config.model_validate({"actor": {"path": "m"}, "data": {"train": {"path": "d.jsonl"}}, **sections})


def run_of(servers: int, ranks: int, tensors: int = 1, **sections: Any) -> Config:
    """With so many servers, ranks, and GPUs for each server."""
    rollout = {"num_servers": servers, "engine": {"tensor_parallel_size": tensors}, **sections.pop("rollout", {})}
    return config(rollout=rollout, trainer={"num_ranks": ranks, **sections.pop("trainer", {})}, **sections)


def host(number: int, *, nodes: int = 1, used: tuple[int, ...] = ()) -> Driver:
    """A host with GPUs, spread evenly over NUMA nodes; those with the numbers `used` are half full."""
    gpus = tuple(
        Gpu(index, gpu_uuid(index), H100, 80 * GIB, 40 * GIB * (index in used), index * nodes // number)
        for index in range(number)
    )
    return Driver("580.95.05", "13.0", gpus)


def divided_host(folder: Path) -> tuple[Driver, dict[str, str]]:
    """GPU 0 in two instances, GPU 1 undivided, by the stand-in driver."""
    environ = host_with_gpus(folder, (FakeGpu(mig_mib=(9728, 19968)), FakeGpu()))
    driver = read_driver(environ)
    assert driver is not None
    return driver, environ


def placed(
    config: Config, driver: Driver | None, environ: dict[str, str] | None = None
) -> tuple[list[list[str]], list[str]]:
    """The names of each server's GPUs and of the trainer's."""
    found = plan(config, driver, environ or {})
    return [list(found.names(server)) for server in found.servers], list(found.names(found.trainer))


@pytest.mark.parametrize(
    ("number", "run", "servers", "trainer"),
    [
        (1, run_of(1, 1), [["0"]], ["0"]),
        (2, run_of(1, 1), [["0"]], ["1"]),
        (8, run_of(1, 1), [["0"]], ["1"]),
        (8, run_of(4, 4), [["0"], ["1"], ["2"], ["3"]], ["4", "5", "6", "7"]),
        (8, run_of(2, 4, 2), [["0", "1"], ["2", "3"]], ["4", "5", "6", "7"]),
        (8, run_of(1, 4, 4), [["0", "1", "2", "3"]], ["4", "5", "6", "7"]),
        (8, run_of(6, 2), [["0"], ["1"], ["2"], ["3"], ["4"], ["5"]], ["6", "7"]),
    ],
)
def test_each_process_has_gpus_of_its_own(
    number: int, run: Config, servers: list[list[str]], trainer: list[str]
) -> None:
    assert placed(run, host(number)) == (servers, trainer)
    assert [gpu.index for gpu in plan(run, host(number), {}).shared] == ([0] if number == 1 else [])


@pytest.mark.parametrize(
    ("run", "servers", "trainer"),
    [
        (run_of(1, 4, 2), [["0", "1"]], ["4", "5", "6", "7"]),
        (run_of(3, 2), [["0"], ["1"], ["2"]], ["4", "5"]),
        (run_of(1, 6, 2), [["0", "1"]], ["2", "3", "4", "5", "6", "7"]),
    ],
)
def test_who_uses_several_has_them_of_one_numa_node_if_one_suffices(
    run: Config, servers: list[list[str]], trainer: list[str]
) -> None:
    assert placed(run, host(8, nodes=2)) == (servers, trainer)


@pytest.mark.parametrize(
    ("visible", "servers", "trainer"),
    [("4,5", [["4"]], ["5"]), ("5,4", [["5"]], ["4"]), ("3", [["3"]], ["3"]), (gpu_uuid(6), [["6"]], ["6"])],
)
def test_what_is_visible_to_the_launcher_is_what_there_is(
    visible: str, servers: list[list[str]], trainer: list[str]
) -> None:
    """As Slurm and Ray set it too."""
    assert placed(run_of(1, 1), host(8), {"CUDA_VISIBLE_DEVICES": visible}) == (servers, trainer)


def test_in_a_container_there_is_what_nvidia_smi_shows() -> None:
    """Its runtime has given it GPUs of the host, and numbers them from 0."""
    assert placed(run_of(1, 1), host(2), {"NVIDIA_VISIBLE_DEVICES": "4,5"}) == ([["0"]], ["1"])


@pytest.mark.parametrize("driver", [None, Driver("580.95.05", "13.0"), host(2)])
def test_without_a_visible_gpu_nothing_is_placed(driver: Driver | None) -> None:
    found = plan(run_of(2, 2), driver, {"CUDA_VISIBLE_DEVICES": ""})
    assert found == Placement(servers=((), ()))


def test_what_stays_on_the_cpu_has_none() -> None:
    assert placed(run_of(2, 2, trainer={"device": "cpu"}), host(2)) == ([["0"], ["1"]], [])
    assert placed(config(rollout={"engine": {"device": "cpu"}}), host(2)) == ([[]], ["0"])
    assert placed(config(rollout={"engine": {"url": "http://127.0.0.1:1"}}), host(2)) == ([[]], ["0"])
    both = config(rollout={"num_servers": 3, "engine": {"device": "cpu"}}, trainer={"device": "cpu"})
    assert placed(both, host(1)) == ([[], [], []], [])


@pytest.mark.parametrize(
    ("run", "servers", "trainer"),
    [
        (run_of(2, 1, rollout={"gpus": [7, 3]}, trainer={"gpus": 5}), [["7"], ["3"]], ["5"]),
        (run_of(1, 2, 2, trainer={"gpus": [1, 0]}), [["2", "3"]], ["1", "0"]),
        (run_of(1, 2, 2, rollout={"gpus": [0, gpu_uuid(2)]}), [["0", "2"]], ["1", "3"]),
        (run_of(1, 1, rollout={"gpus": 2}, trainer={"gpus": 2}), [["2"]], ["2"]),
        (run_of(2, 1, rollout={"gpus": [2, 3]}, trainer={"gpus": gpu_uuid(3)}), [["2"], ["3"]], ["3"]),
    ],
)
def test_gpus_by_name(run: Config, servers: list[list[str]], trainer: list[str]) -> None:
    assert placed(run, host(8)) == (servers, trainer)


def test_only_what_both_lists_name_is_shared() -> None:
    both = run_of(2, 2, rollout={"gpus": [0, 1]}, trainer={"gpus": [1, 2]})
    assert [gpu.index for gpu in plan(both, host(4), {}).shared] == [1]
    with pytest.raises(ConfigError, match="do not suffice"):
        plan(run_of(2, 1, rollout={"gpus": [0, 1]}), host(2), {})


def test_a_gpu_in_use_comes_last_and_is_named() -> None:
    assert placed(run_of(1, 2), host(4, used=(0,))) == ([["1"]], ["2", "3"])
    assert plan(run_of(1, 2), host(4, used=(0,)), {}).warnings == ()
    found = plan(run_of(1, 2), host(3, used=(1,)), {})
    assert [gpu.index for gpu in (*found.servers[0], *found.trainer)] == [0, 1, 2]
    assert found.warnings == (
        f"GPU 1 ({H100}): other processes have 40.0 of its 80.0 GiB; end them, or choose others (rollout.gpus, "
        "trainer.gpus, CUDA_VISIBLE_DEVICES)",
    )


@pytest.mark.parametrize(("value", "noted"), [("", False), ("-1", False), ("7", True), ("cuda:0", True)])
def test_a_variable_that_hides_all_gpus_by_mistake_is_named(value: str, noted: bool) -> None:
    seen = f"nvidia-smi shows 2 GPUs, of which CUDA_VISIBLE_DEVICES={value} leaves 0: no process is given a GPU"
    assert plan(run_of(1, 1), host(2), {"CUDA_VISIBLE_DEVICES": value}).warnings == (seen,) * noted


@pytest.mark.parametrize(
    ("num_gpus", "num_servers", "rollout", "servers", "trainer"),
    [(1, 1, {}, [[0]], [0]), (2, 1, {}, [[0]], [0]), (2, 2, {}, [[0], [1]], [0]), (2, 1, {"gpus": 1}, [[1]], [1])],
)
def test_a_trainer_that_takes_turns_is_on_a_gpu_of_the_first_server(
    num_gpus: int, num_servers: int, rollout: dict[str, Any], servers: list[list[int]], trainer: list[int]
) -> None:
    found = plan(run_of(num_servers, 1, rollout=rollout, trainer={"take_turns": True}), host(num_gpus), {})
    assert [[gpu.index for gpu in server] for server in found.servers] == servers
    assert [gpu.index for gpu in found.trainer] == trainer
    assert found.warnings == ()


def test_turns_without_a_shared_gpu_are_named() -> None:
    turns = {"take_turns": True, "gpus": 1}
    (warning,) = plan(run_of(1, 1, trainer=turns, rollout={"gpus": 0}), host(2), {}).warnings
    assert "share no GPU" in warning
    assert "in both rollout.gpus and trainer.gpus" in warning


def test_a_driver_that_fails_places_nothing_and_is_named() -> None:
    found = plan(run_of(1, 1), Driver(problem="exit code 9"), {})
    assert found == Placement(servers=((),), warnings=("nvidia-smi fails (exit code 9): no process is given a GPU",))


def test_instances_of_a_divided_gpu_have_one_process_each(tmp_path: Path) -> None:
    driver, _ = divided_host(tmp_path)
    assert placed(run_of(1, 1), driver) == ([[mig_uuid(0, 0)]], [mig_uuid(0, 1)])
    assert placed(run_of(2, 1), driver) == ([[mig_uuid(0, 0)], [mig_uuid(0, 1)]], [gpu_uuid(1)])
    one = {"CUDA_VISIBLE_DEVICES": mig_uuid(0, 1)}
    assert placed(run_of(1, 1), driver, one) == ([[mig_uuid(0, 1)]], [mig_uuid(0, 1)])
    named = run_of(1, 1, rollout={"gpus": mig_uuid(0, 1)}, trainer={"gpus": "1"})
    assert placed(named, driver) == ([[mig_uuid(0, 1)]], [gpu_uuid(1)])


def test_several_instances_are_no_gpu_of_one_process(tmp_path: Path) -> None:
    driver, _ = divided_host(tmp_path)
    instances = [mig_uuid(0, 0), mig_uuid(0, 1)]
    for run in (run_of(1, 1, 2), run_of(1, 2), run_of(1, 1, 2, rollout={"gpus": instances})):
        with pytest.raises(ConfigError, match=r"do not suffice:(.|\n)*cannot have instances of MIG"):
            plan(run, driver, {})
    with pytest.raises(ConfigError, match="'0' is no GPU here; expected one of the instances of GPU 0, by UUID"):
        plan(run_of(1, 1, rollout={"gpus": 0}), driver, {})


def test_too_few_are_refused_with_a_picture() -> None:
    with pytest.raises(ConfigError) as refused:
        plan(run_of(4, 4), host(8, used=(5,)), {"CUDA_VISIBLE_DEVICES": "4,5"})
    assert str(refused.value).splitlines() == [
        "the GPUs do not suffice:",
        "  asked  4 servers x 1 + 4 ranks = 8 GPUs",
        "  there  nvidia-smi shows 8 GPUs, of which CUDA_VISIBLE_DEVICES=4,5 leaves 2",
        f"    4  {H100}  80.0 GiB",
        f"    5  {H100}  80.0 GiB, 40.0 GiB in use",
        "lower rollout.num_servers, rollout.engine.tensor_parallel_size or trainer.num_ranks, let more be visible, "
        "or set rollout.engine.device or trainer.device to cpu",
    ]
    with pytest.raises(
        ConfigError, match=r"asked  1 server x 1 \+ 2 ranks = 3 GPUs\n  there  nvidia-smi shows 1 GPU\n"
    ):
        plan(run_of(1, 2), host(1), {})
    with pytest.raises(ConfigError, match=r"80.0 GiB, in rollout.gpus\n.*\na GPU in both .* is shared"):
        plan(run_of(1, 1, 2, rollout={"gpus": [0, 1]}), host(2), {})


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (run_of(2, 1, rollout={"gpus": [0]}), r"rollout.gpus names 1 GPUs \(0\) and its processes use 2"),
        (run_of(1, 2, trainer={"gpus": [0, 1, 2]}), r"trainer.gpus names 3 GPUs \(0, 1, 2\) and its processes use 2"),
        (run_of(1, 1, trainer={"gpus": 0, "device": "cpu"}), "trainer.gpus names 1 GPUs .* use 0"),
        (config(rollout={"gpus": 0, "engine": {"device": "cpu"}}), "rollout.gpus names 1 GPUs .* use 0"),
        (run_of(1, 1, trainer={"gpus": 9}), "'9' is no GPU here; expected a number or UUID .* shows 8 GPUs, of which"),
        (run_of(1, 1, trainer={"gpus": 4}), "'4' is no GPU here; .* of which CUDA_VISIBLE_DEVICES=0,1,2,3 leaves 4"),
        (run_of(1, 1, rollout={"gpus": "GPU-9"}), "rollout.gpus: 'GPU-9' is no GPU here"),
        (run_of(1, 2, trainer={"gpus": [0, gpu_uuid(0)]}), "names GPU 0 twice; expected each GPU once"),
        (
            run_of(1, 1, rollout={"gpus": 0}, trainer={"gpus": 0}, weights={"transport": "nccl"}),
            "weights.transport is nccl, and the trainer and rollout server 0 are on GPU 0: NCCL does not connect",
        ),
    ],
)
def test_lists_that_do_not_fit_are_refused(run: Config, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(run, host(8), {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})


def test_nccl_is_refused_wherever_trainer_and_server_are_on_one_gpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the trainer and rollout server 0 are on GPU 0"):
        plan(run_of(1, 1, weights={"transport": "nccl"}), host(1), {})
    with pytest.raises(ConfigError, match="the trainer and rollout server 0 are on GPU 0"):
        plan(run_of(1, 1, weights={"transport": "nccl"}), divided_host(tmp_path)[0], {})
    assert plan(run_of(1, 1, weights={"transport": "nccl"}), host(2), {}).shared == ()


@pytest.mark.parametrize(
    ("run", "driver", "words"),
    [
        (run_of(1, 1, trainer={"gpus": 0}), None, "trainer.gpus is 0, and no nvidia-smi is on PATH"),
        (
            run_of(1, 1, rollout={"gpus": 0}),
            Driver(problem="exit code 9"),
            r"nvidia-smi fails \(exit code 9\): expected",
        ),
        (run_of(1, 1, trainer={"device": "cuda"}), host(2), "trainer.device is cuda, .*CUDA_VISIBLE_DEVICES= leaves 0"),
        (config(rollout={"engine": {"device": "cuda"}}), Driver(), "rollout.engine.device is cuda, .* shows 0 GPUs"),
    ],
)
def test_a_gpu_that_is_named_but_not_there_is_refused(run: Config, driver: Driver | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(run, driver, {"CUDA_VISIBLE_DEVICES": ""})


def test_a_device_of_a_host_without_a_driver_is_left_to_its_process() -> None:
    """Some hosts with GPUs have no nvidia-smi."""
    cuda = config(rollout={"engine": {"device": "cuda"}}, trainer={"device": "cuda"})
    assert plan(cuda, None, {}) == Placement(servers=((),))
