"""`penstock launch slurm`: prepares the run's folder, renders the job script and submits it.

Owns what happens before the job exists; the job itself does the rest.
"""

from collections.abc import Mapping
from pathlib import Path

from penstock.config import Config
from penstock.durable import write_durably
from penstock.errors import ConfigError
from penstock_launch.run_folder import RunFolder
from penstock_launch.services import job_environment
from penstock_launch.slurm import scheduler
from penstock_launch.slurm.attempt import FOLDER
from penstock_launch.slurm.known import is_active, job_states, known_job, remember_beginning, remember_job
from penstock_launch.slurm.render import JOB_LOG, TEMPLATE, render
from penstock_launch.slurm.shares import idle_gpus

LOOPBACK = "127.0.0.1"


def launch_slurm(config: Config, environ: Mapping[str, str], *, render_only: bool) -> list[str]:
    """Submit the run; returns the lines to print: the script if `render_only`, else the job and how to follow it."""
    config = for_cluster(config)
    script = render(config, Path.cwd())
    if render_only:
        return script.splitlines()
    folder = RunFolder(config.run)
    _require_no_job(folder)
    events: list[str] = []
    with folder.locked():
        continues = folder.prepare(events.append)
        folder.forget_queue()  # the address that a killed job left behind
        folder.write_config(config)
        (folder.path / FOLDER).mkdir(exist_ok=True)
        remember_beginning(folder)
        path = folder.path / FOLDER / TEMPLATE
        write_durably(path, script.encode())
        job_id = scheduler.submit(path, job_environment(config, environ))
        remember_job(folder, job_id)
    return [
        *events,
        f"run {config.run.name}: {'continues' if continues else 'new'}, in {folder.path}",
        f"submitted as Slurm job {job_id}",
        *idle_gpus(config),
        f"  logs        {folder.logs} ({JOB_LOG}: the launcher's)",
        "  state       penstock status --config FILE",
        "  to end it   penstock cancel --config FILE; to continue after that, the same command again",
    ]


def for_cluster(config: Config) -> Config:
    """The configuration for services on several nodes: addresses that they can reach, weights where all can read."""
    root = Path(config.run.root).resolve()
    weights = config.weights
    if not (weights.folder or weights.relay_fan_out):  # the default may be the memory of one host
        weights = weights.model_copy(update={"folder": str(root / config.run.name / "weights")})

    def reachable(host: str) -> dict[str, str]:
        return {"host": config.slurm.listen_host} if host == LOOPBACK else {}

    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"root": str(root)}),
            "weights": weights,
            "rollout": config.rollout.model_copy(update=reachable(config.rollout.host)),
            "agent": config.agent.model_copy(update=reachable(config.agent.host)),
            "reward": config.reward.model_copy(update=reachable(config.reward.host)),
            "trainer": config.trainer.model_copy(update=reachable(config.trainer.host)),
        }
    )


def _require_no_job(folder: RunFolder) -> None:
    states = job_states(folder)
    if is_active(states):
        raise ConfigError(
            f"run.name: {folder.run.name!r} is running already (Slurm job {known_job(folder)}, {states[0].state}); "
            "end it with `penstock cancel`, or choose another run.name"
        )
