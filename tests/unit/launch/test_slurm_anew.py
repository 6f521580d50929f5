"""A try in a Slurm job that failed before its first step: the next job begins anew, and knows it."""

import json
import os
from pathlib import Path

import pytest

from penstock.config import Config
from penstock_launch.run_folder import RunFolder
from penstock_launch.slurm.job import prepare
from penstock_launch.slurm.submit import for_cluster, launch_slurm
from tests.unit.launch.test_slurm_render import make_config


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """With commands of Slurm that take a job, and know of none."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, answer in (("sbatch", "7"), ("squeue", ""), ("sacct", "")):
        (commands / name).write_text(f"#!/bin/sh\necho {answer}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return make_config(tmp_path / "runs")


def submit(config: Config) -> str:
    return "\n".join(launch_slurm(config, os.environ, render_only=False))


def life(config: Config) -> tuple[bool, bool]:
    """What a life of the job finds: whether a run continues, and whether what a try left may be deleted."""
    folder = RunFolder(for_cluster(config).run)
    continues = prepare(folder, print)
    return continues, folder.begins_anew


def test_the_job_after_a_try_without_a_step_may_delete_what_it_left_until_there_are_steps(config: Config) -> None:
    assert "new" in submit(config)
    assert life(config) == (False, False)
    folder = RunFolder(config.run)
    (folder.path / "steps").mkdir()
    (folder.path / "summary.json").write_text(json.dumps({"steps": 0, "exit": {"code": 3, "reason": "x"}}))
    assert "begins anew" in submit(config)
    assert life(config) == (False, True)
    assert life(config) == (False, True)  # the node failed, and Slurm has queued the job again
    (folder.path / "steps").mkdir()
    assert life(config) == (True, False)
    assert "continues" in submit(config)
    (folder.path / "steps").rmdir()
    assert life(config) == (False, False)


def test_weights_that_servers_relay_need_no_shared_folder(config: Config) -> None:
    assert for_cluster(config).weights.folder != ""
    weights = config.weights.model_copy(update={"transport": "disk", "relay_fan_out": 2})
    assert for_cluster(config.model_copy(update={"weights": weights})).weights.folder == ""
