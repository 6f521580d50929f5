"""`penstock launch slurm` on a real Slurm of four nodes: to the end, and through all that ends a job early."""

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.deploy.slurm_cluster import SlurmCluster, until, why_not
from tests.deploy.slurm_setup import BATCH_SIZE, SlurmBench

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

# What a container engine is to the job: a program that gets the command as its arguments.
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
def bench(cluster: SlurmCluster, tmp_path: Path) -> Iterator[SlurmBench]:
    bench = SlurmBench(cluster, tmp_path)
    try:
        yield bench
    finally:
        print(bench.logs())
        cluster.clear()


def require_every_step_once(bench: SlurmBench, num_steps: int) -> None:
    assert [step["step"] for step in bench.steps()] == list(range(num_steps))
    summary = bench.summary()
    assert summary["exit"]["code"] == 0
    tickets = summary["tickets"]
    assert (tickets["trained"], tickets["dropped"], tickets["outstanding"]) == (num_steps * BATCH_SIZE, {}, 0)


def process_of(module: str, bench: SlurmBench) -> psutil.Process:
    """The newest process of the run with `-m module` in its command line."""
    found = [
        process
        for process in psutil.process_iter(["cmdline", "create_time"])
        if module in (words := process.info["cmdline"] or [])
        and str(bench.run_folder / "config.yaml") in words
        and "penstock_launch.slurm.node" not in words
        and "lifeline.py" not in " ".join(words)
    ]
    return max(found, key=lambda each: float(each.info["create_time"]))


def test_two_ranks_on_two_nodes_run_to_the_end_and_the_dead_come_back_in_place(bench: SlurmBench) -> None:
    container = bench.folder / "container"
    container.write_text(CONTAINER)
    container.chmod(0o755)
    bench.write(
        num_steps=16,
        trainer={"num_ranks": 2},
        slurm={
            "partition": "cpu",
            "listen_host": "127.0.0.1",
            "rollout": {"prefix": [str(container)]},
            "trainer": {"partition": "gpu", "gpus_per_node": 1, "nodes": 2},
        },
    )
    bench.slow_down(0.05)
    job_id = bench.submit()
    bench.wait_for_step(1)
    status = bench.penstock("status")
    for text in (f"trainer   Slurm job {job_id}+2: RUNNING on gpu[1-2]", "rollout-", "reward-", "phase "):
        assert text in status
    process_of("penstock_reward", bench).kill()
    until(lambda: "reward: died (killed by SIGKILL)" in bench.log(), "the reward service's death is noticed")
    rank = next(each for each in ranks_of(bench) if each.environ()["RANK"] == "1")
    rank.send_signal(signal.SIGKILL)
    until(lambda: "trainer: died (killed by SIGKILL)" in bench.log(), "the rank's death is noticed")
    bench.slow_down(0)
    assert bench.cluster.wait_for(job_id, "COMPLETED", "FAILED") == "COMPLETED"
    require_every_step_once(bench, 16)
    restarts = bench.summary()["restarts"]
    assert (restarts["reward"], restarts["trainer"], restarts["rollout"], restarts["queue"]) == (1, 1, 0, 0)
    assert "in a container" in bench.log("rollout")
    assert "in a container" not in bench.log("reward")


def ranks_of(bench: SlurmBench) -> list[psutil.Process]:
    """The trainer's ranks on all nodes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "penstock_trainer" in words and str(bench.run_folder / "config.yaml") in words:
            found.append(process)
    return [each for each in found if "RANK" in each.environ()]


def test_the_signal_before_the_time_limit_queues_the_job_again_and_it_goes_on(bench: SlurmBench) -> None:
    bench.write(num_steps=12, checkpoint={"every_steps": 0})
    bench.slow_down(0.05)
    job_id = bench.submit()
    bench.wait_for_step(2)
    # As Slurm does signal_seconds before the limit, which no test can wait for.
    bench.cluster.run("scancel", "--batch", "--signal=USR1", job_id)
    until(lambda: "is queued again" in bench.log(), "the job is queued again")
    num_steps = len(bench.steps())
    assert num_steps < 12
    assert list((bench.run_folder / "checkpoints").iterdir())
    assert bench.summary()["exit"]["reason"] == "the time limit is near"
    bench.cluster.start_now(job_id)
    bench.slow_down(0)
    assert bench.cluster.wait_for(job_id, "COMPLETED", "FAILED") == "COMPLETED"
    require_every_step_once(bench, 12)
    assert f"job {job_id}: starts again" in bench.log()
    assert "is trained again" not in bench.log("trainer")  # the checkpoint was the last thing of the life before


def test_the_job_of_a_killed_node_goes_on_elsewhere(bench: SlurmBench) -> None:
    bench.write(num_steps=12)
    bench.slow_down(0.05)
    job_id = bench.submit()
    bench.wait_for_step(2)
    bench.cluster.kill_node(bench.cluster.nodes_of(f"{job_id}+2"))  # the trainer's
    bench.cluster.start_now(job_id)
    bench.slow_down(0)
    assert bench.cluster.wait_for(job_id, "COMPLETED", "FAILED") == "COMPLETED"
    require_every_step_once(bench, 12)


def test_a_cancelled_run_goes_on_with_the_same_command(bench: SlurmBench) -> None:
    bench.write(num_steps=12, checkpoint={"every_steps": 0})
    bench.slow_down(0.05)
    first = bench.submit()
    assert f"is running already (Slurm job {first}" in bench.penstock("launch", "slurm", exit_code=2)
    bench.wait_for_step(2)
    assert f"Slurm job {first} has ended" in bench.penstock("cancel")
    assert "stopped by SIGTERM" in bench.log()
    assert list((bench.run_folder / "checkpoints").iterdir())
    assert "is not running" in bench.penstock("status", exit_code=1)
    known = len(bench.steps())
    second = bench.submit()
    bench.wait_for_step(known + 1)
    bench.cluster.run("scancel", second)
    bench.cluster.wait_for(second, "CANCELLED")
    bench.slow_down(0)
    third = bench.submit()
    assert bench.cluster.wait_for(third, "COMPLETED", "FAILED") == "COMPLETED"
    require_every_step_once(bench, 12)


def test_what_cannot_work_ends_the_job_with_its_reason(bench: SlurmBench) -> None:
    bench.write(num_steps=4, actor={"path": str(bench.folder / "nothing")})
    job_id = bench.submit()
    assert bench.cluster.wait_for(job_id, "COMPLETED", "FAILED") == "FAILED"
    assert bench.cluster.shown(job_id)["ExitCode"] == "2:0"
    ending = bench.summary()["exit"]
    assert "actor.path is" in ending["lines"][0]
    assert not any(line.startswith("srun:") for line in ending["lines"])


def test_a_job_that_waits_is_shown_and_taken_out_of_the_queue(bench: SlurmBench) -> None:
    bench.write(num_steps=4, slurm={"sbatch": ["--hold"]})
    job_id = bench.submit()
    assert f"Slurm job {job_id}+0: PENDING" in bench.penstock("status")
    assert f"Slurm job {job_id} is out of the queue" in bench.penstock("cancel")
    assert bench.cluster.wait_for(job_id, "CANCELLED")
