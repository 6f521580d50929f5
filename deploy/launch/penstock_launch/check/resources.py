"""Memory and disk that a run of this configuration needs here, and its ports.

Owns the least memory of a run on a CPU; GPUs, folders and ports are the doctor's.
"""

from collections.abc import Mapping

import psutil

from penstock.config import Config
from penstock.contracts.weight_sources import ITEM_BYTES
from penstock.weights.local_folder import shared_memory
from penstock_launch.doctor import fits, folders, network
from penstock_launch.doctor.model import num_weights_of
from penstock_launch.doctor.report import Line, amount, not_looked_at, ok, problem
from penstock_launch.doctor.side_by_side import Look
from penstock_launch.gpus.model_shape import ModelShape, NoShapeError, read_shape
from penstock_launch.gpus.nvidia import LOOK_SECONDS, has_gpu, read_driver
from penstock_launch.gpus.trainer_memory import CHECKPOINT_COPY, host_need, trainer_need

TITLE = "what it needs"
SECONDS = 30.0
MEMORY = "memory"


def looks(config: Config, environ: Mapping[str, str]) -> list[Look]:
    """In the order of the table."""
    return [
        Look(TITLE, MEMORY, lambda: memory_lines(config, environ)),
        Look(TITLE, "run.root", lambda: [folders.run_root_now(config, num_weights_of(config.actor.path))]),
        Look(TITLE, "weights.folder", lambda: [folders.weights_now(config, num_weights_of(config.actor.path))]),
        Look(TITLE, network.PORTS, lambda: network.ports_now(config)),
    ]


def memory_lines(config: Config, environ: Mapping[str, str]) -> list[Line]:
    """What fits into the GPUs if there are some, else what the host's memory must hold."""
    driver = read_driver(environ, LOOK_SECONDS)
    if has_gpu(driver, environ):
        return fits.fits_now(config, driver, environ)
    try:
        shape = read_shape(config.actor.path)
        teacher = read_shape(config.teacher.path) if config.teacher.path else None
    except NoShapeError as reason:
        return [not_looked_at(MEMORY, str(reason))]
    return [memory_line(least_bytes(config, shape, teacher), psutil.virtual_memory().available)]


def memory_line(needed_bytes: int, available_bytes: int) -> Line:
    """needed_bytes: the least that a run on this CPU needs, without libraries, activations and the key-value cache."""
    needed = amount(needed_bytes)
    seen = f"{amount(available_bytes)} are free; this run takes more than {needed}: weights, moments and copies"
    if available_bytes < needed_bytes:
        advice = "End other processes, take a smaller model, or set actor.lora.rank: frozen weights have no moments."
        return problem(MEMORY, seen, advice)
    return ok(MEMORY, seen)


def least_bytes(config: Config, shape: ModelShape, teacher: ModelShape | None = None) -> int:
    """What ranks hold in any step, a checkpoint's copy, the engines' weights, and versions in memory-backed files."""
    engine, num_weights = config.rollout.engine, shape.num_weights
    ranks = config.trainer.num_ranks * trainer_need(config, shape, teacher=teacher, device="cpu").certain_bytes
    copy = host_need(config, shape).of(CHECKPOINT_COPY)
    engines = 0 if engine.url else config.rollout.num_servers * num_weights * ITEM_BYTES[engine.dtype]
    staged = folders.staged_bytes(config, num_weights)
    in_memory = not config.weights.folder and shared_memory(staged) is not None
    return ranks + copy + engines + (staged if in_memory else 0)
