"""What makes the episodes of a run: whether it can be used, as the agent service decides it when it starts."""

import asyncio

from penstock.config import Config
from penstock.contracts.vocabulary import ENVIRONMENT_REWARD
from penstock.errors import ConfigError
from penstock_agent.environments.driving import check_environment
from penstock_launch.doctor.report import Line, ok, problem

WHAT = "episodes"
ADVICE = "Correct it, or set agent.environment, agent.command and agent.modules_path to what this host has."


def environment_lines(config: Config) -> list[Line]:
    """None if the run makes no episodes. A worker process of its own imports the environment, and ends."""
    section = config.agent
    if not section.enabled:
        return []
    needs_score = ENVIRONMENT_REWARD in config.reward.functions
    try:
        environment = asyncio.run(check_environment(section, needs_score=needs_score))
    except ConfigError as error:
        return [problem(WHAT, str(error), ADVICE)]
    if environment.kind == "command":
        return [ok(WHAT, f"agent.command: {section.name}")]
    tools = ", ".join(tool["function"]["name"] for tool in environment.tools)
    return [ok(WHAT, f"agent.environment: {section.name} ({environment.kind}{f': {tools}' if tools else ''})")]
