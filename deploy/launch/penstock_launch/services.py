"""The processes of a run: the command line and the environment of each service.

Secrets and the queue's address travel in the environment, everything else in the resolved YAML file.
"""

import sys
from collections.abc import Mapping

from penstock.config import Config, RedisSection
from penstock.config.secrets import url_secrets
from penstock.contracts import ServiceKind
from penstock_launch.run_folder import RunFolder
from penstock_launch.supervise.child import Command

SETTINGS_PREFIX = "PENSTOCK_"

# With spinning threads, or one thread pool per process for all cores, the processes of one host slow each other down
# many times over. By default glibc returns freed memory to the kernel at once: a training step then spends much of its
# time in the kernel, which clears the same pages again and again.
TUNING = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_MMAP_MAX_": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}

HINTS = {
    "penstock_rollout": "SGLang starts and loads the model",
    "penstock_trainer": "imports torch and loads the model",
    "penstock_trainer.torchrun": "starts its ranks, which import torch and load the model",
    "penstock_reward": "loads the reward functions",
}


def commands(config: Config, folder: RunFolder, redis: RedisSection, environ: Mapping[str, str]) -> list[Command]:
    """All services of a run except the queue. `redis`: the section with the queue's address."""
    environment = service_environment(config, redis, environ)

    def command(name: str, module: str, *overrides: str) -> Command:
        arguments = (sys.executable, "-m", module, "--config", str(folder.config_path), *overrides)
        return Command(name, arguments, environment, folder.logs / f"{name}.log", HINTS[module])

    engine = config.rollout.engine
    rollouts = [
        command(
            _name(ServiceKind.ROLLOUT, index, config.rollout.num_servers),
            "penstock_rollout",
            *_port("rollout.port", config.rollout.port, index),
            *_port("rollout.engine.port", engine.port, index),
        )
        for index in range(config.rollout.num_servers)
    ]
    rewards = [
        command(
            _name(ServiceKind.REWARD, index, config.reward.num_services),
            "penstock_reward",
            *_port("reward.port", config.reward.port, index),
        )
        for index in range(config.reward.num_services)
    ]
    trainer = "penstock_trainer" if config.trainer.num_ranks == 1 else "penstock_trainer.torchrun"
    # The slowest first: the inference engine.
    return [*rollouts, command(str(ServiceKind.TRAINER), trainer), *rewards]


def service_environment(config: Config, redis: RedisSection, environ: Mapping[str, str]) -> dict[str, str]:
    """This environment with secrets and tuning, without the settings that config.yaml already holds."""
    return tuned_environment(environ, secret_settings(config, redis))


def tuned_environment(environ: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    """An environment with these settings as the only ones of Penstock, and with tuning for unset variables."""
    kept = {name: value for name, value in environ.items() if not name.upper().startswith(SETTINGS_PREFIX)}
    return {**TUNING, **kept, **settings}


def secret_settings(config: Config, redis: RedisSection) -> dict[str, str]:
    """The settings that are not in config.yaml, as environment variables."""
    engine_url = config.rollout.engine.url
    secrets = {
        "PENSTOCK_REDIS__URL": redis.url,
        "PENSTOCK_REDIS__PASSWORD": redis.password.get_secret_value() if redis.password else "",
        "PENSTOCK_ROLLOUT__ENGINE__URL": engine_url if any(url_secrets(engine_url)) else "",
        "PENSTOCK_TOKEN": config.token.get_secret_value() if config.token else "",
    }
    return {name: value for name, value in secrets.items() if value}


def _name(kind: ServiceKind, index: int, count: int) -> str:
    return str(kind) if count == 1 else f"{kind}-{index}"


def _port(key: str, first: int, index: int) -> tuple[str, ...]:
    """An override for the further services of a kind; those without a fixed port need none."""
    return (f"--{key}", str(first + index)) if first and index else ()
