"""The processes of a run: the command line and the environment of each service.

Secrets and the queue's address travel in the environment, everything else in the resolved YAML file.
"""

import sys
from collections.abc import Callable, Mapping

from penstock.config import Config, RedisSection
from penstock.config.shown import secret_settings
from penstock.config.sources import without_settings
from penstock.contracts import ServiceKind
from penstock_launch.gpus.shares import Share
from penstock_launch.run_folder import RunFolder
from penstock_launch.supervise.child import Command

# With spinning threads the processes of one host slow each other down many times over.
COMMON_TUNING = {
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
# Of a process that computes on the CPU. With one thread pool per process for all cores they would slow each other down
# too. By default glibc returns freed memory to the kernel at once: a training step then spends much of its time in the
# kernel, which clears the same pages again and again. A process on a GPU computes in other memory; it would only keep
# what it needed to load the model, and load it with one thread.
TUNING = {
    **COMMON_TUNING,
    "OMP_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_MMAP_MAX_": "0",
}

HINTS = {
    "penstock_rollout": "SGLang starts and loads the model",
    "penstock_trainer": "imports torch and loads the model",
    "penstock_trainer.torchrun": "starts its ranks, which import torch and load the model",
    "penstock_agent": "loads the tokenizer and the environment",
    "penstock_reward": "loads the reward functions",
}


def commands(
    config: Config,
    folder: RunFolder,
    redis: RedisSection,
    environ: Mapping[str, str],
    share_of: Callable[[ServiceKind, int], Share] = lambda kind, index: Share(),
) -> list[Command]:
    """All services of a run except the queue. `redis`: the section with the queue's address.

    `share_of`: what of the host the service number `index` of a kind is given.
    """
    settings = secret_settings(config, redis)

    def command(kind: ServiceKind, index: int, count: int, module: str, *overrides: str) -> Command:
        name, share = str(kind) if count == 1 else f"{kind}-{index}", share_of(kind, index)
        arguments = (sys.executable, "-m", module, "--config", str(folder.config_path), *overrides, *share.overrides)
        environment = {**tuned_environment(environ, settings, share.gpu_threads), **share.variables}
        return Command(name, arguments, environment, folder.logs / f"{name}.log", HINTS[module], share.cpus)

    engine = config.rollout.engine
    rollouts = [
        command(
            ServiceKind.ROLLOUT,
            index,
            config.rollout.num_servers,
            "penstock_rollout",
            *_port("rollout.port", config.rollout.port, index),
            *_port("rollout.engine.port", engine.port, index),
        )
        for index in range(config.rollout.num_servers)
    ]

    def alike(kind: ServiceKind, first_port: int) -> list[Command]:
        count = config.num_services.get(kind, 0)
        return [
            command(kind, index, count, f"penstock_{kind}", *_port(f"{kind}.port", first_port, index))
            for index in range(count)
        ]

    trainer = "penstock_trainer" if config.trainer.num_ranks == 1 else "penstock_trainer.torchrun"
    # The slowest first: the inference engine.
    return [
        *rollouts,
        command(ServiceKind.TRAINER, 0, 1, trainer),
        *alike(ServiceKind.AGENT, config.agent.port),
        *alike(ServiceKind.REWARD, config.reward.port),
    ]


def job_environment(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """This environment for a launcher elsewhere: with secrets, without what config.yaml holds and what depends on a
    process's device, since services inherit it.
    """
    return {**COMMON_TUNING, **without_settings(environ), **secret_settings(config, config.redis)}


def tuned_environment(environ: Mapping[str, str], settings: Mapping[str, str], gpu_threads: int = 0) -> dict[str, str]:
    """An environment with these settings as the only ones of Penstock, and with tuning for unset variables.

    `gpu_threads`: of a process that computes on a GPU; 0: on the CPU.
    """
    tuning = {**COMMON_TUNING, "OMP_NUM_THREADS": str(gpu_threads)} if gpu_threads else TUNING
    return {**tuning, **without_settings(environ), **settings}


def _port(key: str, first: int, index: int) -> tuple[str, ...]:
    """An override for the further services of a kind; those without a fixed port need none."""
    return (f"--{key}", str(first + index)) if first and index else ()
