"""Memory and disk that a run of this configuration needs here, and its ports.

Owns the least memory of a run on a CPU; GPUs, folders and ports are the doctor's.
"""

from collections.abc import Mapping

import psutil

from penstock.config import Config
from penstock.contracts.weight_sources import ITEM_BYTES
from penstock.weights.local_folder import shared_memory
from penstock_launch.doctor import fits, folders, network
from penstock_launch.doctor.gpus import has_gpu
from penstock_launch.doctor.model import num_weights_of
from penstock_launch.doctor.report import Line, amount, not_looked_at, ok, problem
from penstock_launch.doctor.side_by_side import Look
from penstock_launch.gpus.nvidia import read_driver

TITLE = "what it needs"
SECONDS = 30.0
SMI_SECONDS = 15.0
MEMORY = "memory"
TRAINED_BYTES = 16 + 12  # per weight: float32 weights, gradients and two moments; the copy of a checkpoint
FROZEN_BYTES = 4


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
    driver = read_driver(environ, SMI_SECONDS)
    if has_gpu(driver, environ):
        return fits.fits_now(config, driver, environ)
    return [memory_line(config, num_weights_of(config.actor.path), psutil.virtual_memory().available)]


def memory_line(config: Config, num_weights: int, available_bytes: int) -> Line:
    """The least that a run on this CPU needs, without libraries, activations and the key-value cache."""
    if not num_weights:
        return not_looked_at(MEMORY, "the number of weights of actor.path is not known")
    needed = least_bytes(config, num_weights)
    seen = f"{amount(available_bytes)} are free; weights, moments and copies take {amount(needed)}, and more is needed"
    if available_bytes < needed:
        advice = "End other processes, take a smaller model, or set actor.lora.rank: frozen weights have no moments."
        return problem(MEMORY, seen, advice)
    return ok(MEMORY, seen)


def least_bytes(config: Config, num_weights: int) -> int:
    """Trainer, engines, and the versions in memory-backed files."""
    engine = config.rollout.engine
    item = ITEM_BYTES[engine.dtype]
    per_weight = FROZEN_BYTES if config.actor.lora.rank else TRAINED_BYTES
    if config.kl_ctl and not config.actor.lora.rank:
        per_weight += FROZEN_BYTES
    engines = 0 if engine.url else config.rollout.num_servers * item
    staged = folders.staged_bytes(config, num_weights)
    in_memory = not config.weights.folder and shared_memory(staged) is not None
    return (per_weight + engines) * num_weights + (staged if in_memory else 0)
