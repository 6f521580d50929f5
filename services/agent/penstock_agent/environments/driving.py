"""From the configuration to a driver: the check at start, and the driver of each kind."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from penstock.config import AgentSection
from penstock.errors import ConfigError
from penstock.workers.guard import GroupGuard
from penstock_agent.environments.commands import CommandDriver, check_command
from penstock_agent.environments.conversations import ClassDriver
from penstock_agent.environments.episode import Driver, Environment
from penstock_agent.environments.functions import FunctionDriver
from penstock_agent.environments.pool import open_pool
from penstock_agent.environments.worker import EndedAtImportError, EnvironmentWorker, start_worker

log = logging.getLogger(__name__)

NUM_IMPORTS = 3  # a process that ends may be the host's doing, and a fault of the configuration ends the run


async def check_environment(section: AgentSection, *, needs_score: bool) -> Environment:
    """What the environment is: a worker process imports it, or the program is looked for.

    needs_score: the run's reward functions include `environment`. ConfigError that names the key and the reason if the
    environment cannot be used.
    """
    if section.command:
        check_command(section)
        return Environment("command", " ".join(section.command))
    worker = await _import(section)
    await worker.close()
    environment = worker.environment
    if environment.tools and section.template == "plain":
        raise ConfigError(
            f"agent.environment names {section.environment!r}, a class of tools, and agent.template is plain, which "
            "has no form for tools: expected agent.template model, or a class with step"
        )
    if needs_score and environment.kind == "tools" and not environment.has_get_reward:
        raise ConfigError(
            f"agent.environment names {section.environment!r}, which has no get_reward, and reward.functions names "
            "environment; expected a method get_reward() that returns the score, or other reward.functions"
        )
    return environment


async def _import(section: AgentSection) -> EnvironmentWorker:
    for _ in range(NUM_IMPORTS - 1):
        try:
            return await start_worker(section)
        except EndedAtImportError as error:
            log.warning("%s; trying again", error)
    return await start_worker(section)


@asynccontextmanager
async def open_driver(section: AgentSection, environment: Environment) -> AsyncIterator[Driver]:
    """The driver of what `check_environment` found; its processes end with it, and if this process is killed."""
    with GroupGuard() as guard:
        if environment.kind == "command":
            yield CommandDriver(section, guard)
            return
        async with open_pool(section, guard) as pool:
            if environment.kind == "function":
                yield FunctionDriver(section, pool)
            else:
                yield ClassDriver(section, environment, pool)
