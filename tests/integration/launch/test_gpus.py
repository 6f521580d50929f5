"""Launches on hosts with GPUs: the real launcher, services and torchrun, by a stand-in for nvidia-smi."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import yaml

from penstock.records.processes import KnownProcess, KnownProcesses
from penstock.runtime.process import ProcessIdentity, this_machine
from tests.gpus import FakeGpu, host_with_gpus, host_with_smi
from tests.integration.launch.launch_setup import LaunchSetup, until, wait_for_text
from tests.integration.launch.test_local import ranks_of
from tests.integration.launch.user_commands import UserCommands
from tests.patience import START_SECONDS

pytestmark = pytest.mark.redis

GPUS = "CUDA_VISIBLE_DEVICES"
RECORD = 'echo "$@" > "$0.$PPID.arguments"; env > "$0.$PPID.environment"'


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[LaunchSetup]:
    setup = LaunchSetup(tmp_path)
    yield setup
    setup.end()


def seen_by(pid: int) -> str | None:
    return psutil.Process(pid).environ().get(GPUS)


@pytest.mark.slow
def test_a_launch_gives_each_process_its_gpus_and_says_so(setup: LaunchSetup) -> None:
    """A launcher that a scheduler has left five of eight: the ranks have theirs together."""
    setup.environ = host_with_gpus(setup.folder / "bin", [FakeGpu()] * 8, {GPUS: "2,3,4,5,6"})
    words = ("--rollout.num_servers", "2", "--trainer.num_ranks", "2", "--run.max_steps", "1000")
    process = setup.launch(*words)
    until(lambda: len([each for each in setup.processes() if each.service.startswith("rollout")]) == 2)
    wait_for_text(setup, "trainer: ready")
    trainer = setup.identity("trainer")
    assert [seen_by(setup.identity(name).pid) for name in ("rollout-0", "rollout-1", "reward")] == ["2", "3", ""]
    assert [seen_by(each.pid) for each in (trainer, *ranks_of(trainer).values())] == ["4,5"] * 3
    environment = psutil.Process(trainer.pid).environ()
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "MALLOC_MMAP_MAX_" not in environment
    assert psutil.Process(setup.identity("reward").pid).environ()["MALLOC_MMAP_MAX_"] == "0"
    assert "--trainer.gpus 4,5 --rollout.gpus 2,3" in " ".join(psutil.Process(trainer.pid).cmdline())
    log = (setup.run_folder / "logs" / "launcher.log").read_text()
    for line in ("rollout-0: GPU 2;", "rollout-1: GPU 3;", "trainer: GPU 4, 5;", "weights: by nccl"):
        assert line in log
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=START_SECONDS)


def test_a_launch_without_enough_gpus_deletes_and_starts_nothing(setup: LaunchSetup) -> None:
    setup.environ = host_with_gpus(setup.folder / "bin", [FakeGpu()] * 2)
    (setup.run_folder / "steps").mkdir(parents=True)
    process = setup.launch("--rollout.num_servers", "2", "--run.existing", "replace")
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 2
    assert "penstock: config: the GPUs do not suffice:\n  asked  2 servers x 1 + 1 rank = 3 GPUs\n" in output
    assert {entry.name for entry in setup.run_folder.iterdir()} == {".lock", "steps"}


def test_gpus_are_chosen_when_what_an_earlier_launch_left_has_ended(setup: LaunchSetup) -> None:
    full, free = setup.folder / "full", setup.folder / "free"
    host_with_gpus(full, [FakeGpu(used_mib=60000)])
    host_with_gpus(free, [FakeGpu()])
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]) as left:
        identity = ProcessIdentity.of(left.pid)
        assert identity is not None
        known = KnownProcesses("t", this_machine(), (KnownProcess("rollout", left.pid, identity.started),))
        setup.run_folder.mkdir(parents=True)
        (setup.run_folder / "processes.json").write_bytes(msgspec.json.encode(known))
        lives = f"grep -q . /proc/{left.pid}/cmdline"  # empty as soon as it has ended, though nobody waits for it
        script = f'if {lives}; then exec {full}/nvidia-smi "$@"; else exec {free}/nvidia-smi "$@"; fi'
        setup.environ = host_with_smi(setup.folder / "bin", script)
        output, _ = setup.launch().communicate(timeout=START_SECONDS)
    assert f"ended a process of an earlier launch: rollout (pid {left.pid})" in output
    assert "trainer: GPU 0;" in output
    assert "other processes have" not in output


def test_without_visible_gpus_a_launch_is_what_it_was(setup: LaunchSetup) -> None:
    setup.environ = host_with_gpus(setup.folder / "bin", [FakeGpu()], {GPUS: ""})
    process = setup.launch("--run.max_steps", "1000")
    wait_for_text(setup, "trainer: ready")
    trainer = psutil.Process(setup.identity("trainer").pid)
    assert trainer.environ()[GPUS] == ""
    assert "CUDA_DEVICE_ORDER" not in trainer.environ()
    assert "--trainer.gpus" not in trainer.cmdline()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=START_SECONDS)
    assert "GPU" not in output


def test_config_prints_the_plan_after_the_tree(setup: LaunchSetup) -> None:
    setup.environ = host_with_gpus(setup.folder / "bin", [FakeGpu()] * 2)
    output, _ = setup.command("config", "--config", "config.yaml").communicate(timeout=START_SECONDS)
    assert yaml.safe_load(output)["trainer"]["gpus"] == []
    lines = output.splitlines()
    first = lines.index("# GPUs on this host:") + 1
    assert [line.partition(";")[0] for line in lines[first : first + 3]] == [
        "# rollout: GPU 0",
        "# trainer: GPU 1",
        "# weights: by nccl",
    ]
    words = ("config", "--config", "config.yaml", "--trainer.num_ranks", "2")
    process = setup.command(*words)
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0
    assert yaml.safe_load(output)["trainer"]["num_ranks"] == 2
    assert "# GPUs on this host: `penstock launch local` is refused:\n# the GPUs do not suffice:\n" in output


@pytest.mark.slow
def test_each_engine_is_given_the_gpus_over_which_it_shards_the_model(tmp_path: Path, tiny_model: Path) -> None:
    """A whole run of real services with engines that record what they were started with."""
    run = UserCommands(tmp_path, tiny_model)
    run.environ = host_with_gpus(tmp_path / "bin", [FakeGpu()] * 8)
    run.document["rollout"]["num_servers"] = 2
    run.use_pure_engine(RECORD)
    run.document["rollout"]["engine"] |= {"tensor_parallel_size": 3, "device": "cuda"}
    try:
        code, output = run.launch()
    finally:
        run.end()
    assert code == 0, output
    environments = [path.read_text().splitlines() for path in tmp_path.glob("python.*.environment")]
    assert sorted(line for lines in environments for line in lines if line.startswith(GPUS)) == [
        f"{GPUS}=0,1,2",
        f"{GPUS}=3,4,5",
    ]
    assert all("--tp-size 3" in path.read_text() for path in tmp_path.glob("python.*.arguments"))
    assert "trainer: GPU 6;" in output
    assert len((run.run_folder / "steps.jsonl").read_text().splitlines()) == 8
