"""The command `penstock launch ray`: its parser, and a full launch.

Imports Ray only if a launch uses it: it is an extra, and its import takes a second.
"""

import argparse
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from penstock.config import Config
from penstock.errors import ConfigError
from penstock_launch.gpus.plan import refuse_named, refuse_turns
from penstock_launch.launch import LaunchTerms, launch_run
from penstock_launch.typed import Typed


def add_ray_parser(places: "argparse._SubParsersAction[argparse.ArgumentParser]", settings_help: str) -> None:
    """The place `ray` of `penstock launch`."""
    places.add_parser(
        "ray",
        help="run all services on the nodes of a Ray cluster",
        description="Start all services as actors of a Ray cluster that this host is a node of, and follow the run.",
        epilog=settings_help,
        usage="penstock launch ray --config FILE [--key value ...]",
        allow_abbrev=False,
    )


def launch_ray(config: Config, environ: Mapping[str, str], started_at: float, typed: Typed) -> int:
    """Run to the end; returns the exit code. `started_at`: Unix seconds of the start of this process."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed: `pip install 'penstock[ray]'`, here and on every node of the cluster")
    from penstock_launch.on_ray.cluster import Cluster
    from penstock_launch.on_ray.site import RaySite

    cluster = Cluster(config.ray)
    try:
        return launch_run(for_cluster(config), RaySite(cluster), environ, started_at, LaunchTerms(typed=typed))
    finally:
        cluster.close()


def _check_gpus(config: Config) -> None:
    refuse_named(config, "Ray")
    engine, rollout, trainer = config.rollout.engine, config.ray.rollout.num_gpus, config.ray.trainer.num_gpus
    on_gpus = engine.takes_gpus and config.trainer.device != "cpu"
    may_share = on_gpus and 0 < (rollout or 0) < 1 and 0 < (trainer or 0) < 1
    if not may_share:
        refuse_turns(config, "Ray")
    if rollout is None or not engine.takes_gpus:
        return
    if rollout != engine.num_gpus and max(rollout, engine.num_gpus) > 1:
        raise ConfigError(
            f"ray.rollout.num_gpus is {rollout:g} and each server has {engine.num_gpus} GPUs by "
            "rollout.engine.tensor_parallel_size and rollout.engine.gpus_per_server: expected as many, or no num_gpus"
        )
    # In turns, `auto` is disk.
    if may_share and config.weights.transport in ("auto", "nccl") and not config.trainer.take_turns:
        raise ConfigError(
            f"ray.rollout.num_gpus is {rollout:g} and ray.trainer.num_gpus {trainer:g}, so that Ray may place a server "
            f"and a rank on one GPU, and weights.transport is {config.weights.transport}: NCCL does not connect two "
            "processes on one GPU; expected weights.transport disk or tensor"
        )


def for_cluster(config: Config) -> Config:
    """The configuration with paths that mean the same on every node, and weights in a folder that every node sees.

    ConfigError if it asks Ray for other GPUs than its processes use.
    """
    _check_gpus(config)
    root = Path(config.run.root).resolve()
    weights = config.weights
    if not (weights.folder or weights.relay_fan_out):  # the default may be the memory of one host
        weights = weights.model_copy(update={"folder": str(root / config.run.name / "weights")})
    if weights.folder:
        weights = weights.model_copy(update={"folder": str(Path(weights.folder).resolve())})
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"root": str(root)}),
            "weights": weights,
        }
    )
