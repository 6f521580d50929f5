"""`penstock launch slurm` on a real Slurm of four nodes: to its end, and through every event that ends a job early."""

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.deploy.letters import AGENT
from tests.deploy.slurm_cluster import SlurmCluster, until, why_not
from tests.deploy.slurm_setup import BATCH_SIZE, LOOPBACK, SlurmSetup
from tests.gsm8k_run import RUN_SECONDS, require_two_steps, write_small_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

# To the job, a container engine is a program that gets the command as its arguments.
CONTAINER = """#!/bin/sh
echo "in a container" >&2
exec "$@"
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    if reason := why_not():
        pytest.skip(f"Slurm cannot be started here: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path is short
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        print(cluster.logs())
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture
def setup(cluster: SlurmCluster, tmp_path: Path) -> Iterator[SlurmSetup]:
    setup = SlurmSetup(cluster, tmp_path)
    try:
        yield setup
    finally:
        print(setup.logs())
        cluster.clear()


def require_every_step_once(setup: SlurmSetup, num_steps: int) -> None:
    assert [step["step"] for step in setup.steps()] == list(range(num_steps))
    summary = setup.summary()
    assert summary["exit"]["code"] == 0
    tickets = summary["tickets"]
    assert (tickets["trained"], tickets["dropped"], tickets["outstanding"]) == (num_steps * BATCH_SIZE, {}, 0)


def process_of(module: str, setup: SlurmSetup) -> psutil.Process:
    """The newest process of the run with `-m module` in its command line."""
    found = [
        process
        for process in psutil.process_iter(["cmdline", "create_time"])
        if module in (words := process.info["cmdline"] or [])
        and str(setup.run_folder / "config.yaml") in words
        and "penstock_launch.slurm.node" not in words
        and "lifeline.py" not in " ".join(words)
    ]
    return max(found, key=lambda each: float(each.info["create_time"]))


def test_two_ranks_on_two_nodes_run_to_the_end_and_the_dead_come_back_in_place(setup: SlurmSetup) -> None:
    container = setup.folder / "container"
    container.write_text(CONTAINER)
    container.chmod(0o755)
    setup.write(
        num_steps=16,
        trainer={"num_ranks": 2},
        slurm={
            "partition": "cpu",
            "listen_host": "127.0.0.1",
            "rollout": {"prefix": [str(container)]},
            "trainer": {"partition": "gpu", "gpus_per_node": 1, "nodes": 2},
        },
    )
    setup.slow_down(0.05)
    job_id = setup.submit()
    setup.wait_for_step(1)
    status = setup.penstock("status")
    for text in (f"trainer   Slurm job {job_id}+2: RUNNING on gpu[1-2]", "rollout-", "reward-", "phase "):
        assert text in status
    process_of("penstock_reward", setup).kill()
    until(lambda: "reward: died (killed by SIGKILL)" in setup.log(), "the reward service's death is noticed")
    rank = next(each for each in ranks_of(setup) if each.environ()["RANK"] == "1")
    assert (rank.environ()["CUDA_VISIBLE_DEVICES"], rank.environ().get("MALLOC_MMAP_MAX_")) == ("0", None)
    rank.send_signal(signal.SIGKILL)
    until(lambda: "trainer: died (killed by SIGKILL)" in setup.log(), "the rank's death is noticed")
    setup.slow_down(0)
    assert setup.cluster.wait_for(job_id, "COMPLETED", "FAILED") == "COMPLETED"
    require_every_step_once(setup, 16)
    restarts = setup.summary()["restarts"]
    assert (restarts["reward"], restarts["trainer"], restarts["rollout"], restarts["queue"]) == (1, 1, 0, 0)
    assert "in a container" in setup.log("rollout")
    assert "in a container" not in setup.log("reward")


def ranks_of(setup: SlurmSetup) -> list[psutil.Process]:
    """The trainer's ranks on all nodes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "penstock_trainer" in words and str(setup.run_folder / "config.yaml") in words:
            found.append(process)
    return [each for each in found if "RANK" in each.environ()]


def test_agent_services_run_beside_the_reward_service_and_come_back(setup: SlurmSetup) -> None:
    setup.write(num_steps=8, agent=AGENT)
    setup.slow_down(0.05)
    job_id = setup.submit()
    setup.wait_for_step(1)
    status = setup.penstock("status")
    assert status.count("  agent-") == 2
    assert "are up" not in status
    [first] = setup.cluster.nodes_of(f"{job_id}+0").split()
    process = process_of("penstock_agent", setup)
    assert process.environ()["SLURMD_NODENAME"] == first
    process.kill()
    until(lambda: "died (killed by SIGKILL)" in setup.log(), "the agent service's death is noticed")
    setup.slow_down(0)
    assert setup.cluster.wait_for(job_id, "COMPLETED", "FAILED") == "COMPLETED"
    require_every_step_once(setup, 8)
    summary = setup.summary()
    assert {summary["restarts"]["agent-0"], summary["restarts"]["agent-1"]} == {0, 1}
    assert summary["restarts"]["reward"] == summary["restarts"]["trainer"] == 0
    assert summary["episodes"]["turns"] == 2


def test_the_signal_before_the_time_limit_queues_the_job_again_and_it_goes_on(setup: SlurmSetup) -> None:
    setup.write(num_steps=12, checkpoint={"every_steps": 0})
    setup.slow_down(0.05)
    job_id = setup.submit()
    setup.wait_for_step(2)
    # Slurm sends this signal_seconds before the limit; a test cannot wait that long.
    setup.cluster.run("scancel", "--batch", "--signal=USR1", job_id)
    until(lambda: "is queued again" in setup.log(), "the job is queued again")
    num_steps = len(setup.steps())
    assert num_steps < 12
    assert list((setup.run_folder / "checkpoints").iterdir())
    assert setup.summary()["exit"]["reason"] == "the time limit is near"
    setup.cluster.start_now(job_id)
    setup.slow_down(0)
    assert setup.cluster.wait_for(job_id, "COMPLETED", "FAILED") == "COMPLETED"
    require_every_step_once(setup, 12)
    assert f"job {job_id}: starts again" in setup.log()
    assert "is trained again" not in setup.log("trainer")  # the checkpoint was the last thing of the life before


def test_the_job_of_a_killed_node_goes_on_elsewhere(setup: SlurmSetup) -> None:
    setup.write(num_steps=12)
    setup.slow_down(0.05)
    job_id = setup.submit()
    setup.wait_for_step(2)
    setup.cluster.kill_node(setup.cluster.nodes_of(f"{job_id}+2"))  # the trainer's
    setup.cluster.start_now(job_id)
    setup.slow_down(0)
    assert setup.cluster.wait_for(job_id, "COMPLETED", "FAILED") == "COMPLETED"
    require_every_step_once(setup, 12)


def test_a_cancelled_run_goes_on_with_the_same_command(setup: SlurmSetup) -> None:
    setup.write(num_steps=12, checkpoint={"every_steps": 0})
    setup.slow_down(0.05)
    first = setup.submit()
    assert f"is running already (Slurm job {first}" in setup.penstock("launch", "slurm", exit_code=2)
    setup.wait_for_step(2)
    assert f"Slurm job {first} has ended" in setup.penstock("cancel")
    assert "stopped by SIGTERM" in setup.log()
    assert list((setup.run_folder / "checkpoints").iterdir())
    assert "stopped by SIGTERM at step" in setup.penstock("status")
    known = len(setup.steps())
    second = setup.submit()
    setup.wait_for_step(known + 1)
    setup.cluster.run("scancel", second)
    setup.cluster.wait_for(second, "CANCELLED")
    setup.slow_down(0)
    third = setup.submit()
    assert setup.cluster.wait_for(third, "COMPLETED", "FAILED") == "COMPLETED"
    require_every_step_once(setup, 12)


def test_what_cannot_work_ends_the_job_with_its_reason(setup: SlurmSetup) -> None:
    setup.write(num_steps=4, actor={"path": str(setup.folder / "nothing")})
    job_id = setup.submit()
    assert setup.cluster.wait_for(job_id, "COMPLETED", "FAILED") == "FAILED"
    assert setup.cluster.shown(job_id)["ExitCode"] == "2:0"
    ending = setup.summary()["exit"]
    assert "actor.path is" in ending["lines"][0]
    assert not any(line.startswith("srun:") for line in ending["lines"])


def test_a_job_that_waits_is_shown_and_taken_out_of_the_queue(setup: SlurmSetup) -> None:
    setup.write(num_steps=4, slurm={"sbatch": ["--hold"]})
    job_id = setup.submit()
    assert f"Slurm job {job_id}+0: PENDING" in setup.penstock("status")
    assert f"Slurm job {job_id} is out of the queue" in setup.penstock("cancel")
    assert setup.cluster.wait_for(job_id, "CANCELLED")


@pytest.mark.timeout(2 * RUN_SECONDS)
def test_two_steps_of_gsm8k_are_trained_with_sglang(setup: SlurmSetup) -> None:
    partitions = {"partition": "cpu", "time_limit": "30:00", "trainer": {"partition": "gpu", "gpus_per_node": 1}}
    setup.config = write_small_run(setup.folder, "job", slurm={**partitions, "listen_host": LOOPBACK})
    job_id = setup.submit()
    assert setup.cluster.wait_for(job_id, "COMPLETED", "FAILED", timeout_seconds=RUN_SECONDS) == "COMPLETED"
    require_two_steps(setup.run_folder)
