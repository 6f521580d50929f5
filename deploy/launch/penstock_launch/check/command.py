"""`penstock check`: tries what a run of this configuration would use, quickest first, and shows what to change.

    what it names    model, interpreter, data, names of rewards: `paths`, which every launch begins with too
    rewards          the user's functions, on ten rows
    prompts          all of them, two shown
    what it needs    memory, disk, ports

Owns the order and the deadlines. Invariants: nothing is written, and nothing runs on when it ends; rewards and prompts
are left out if what they need has a problem. The doctor (`penstock_launch.doctor`) looks at the host and its
environments; both have the lines of `doctor.report`, and what both look at is one function.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from penstock.config import Config
from penstock.config.load import load_config
from penstock.config.secrets import hide
from penstock.config.shown import secret_values
from penstock.errors import PenstockError
from penstock.runtime.lasting import lasting
from penstock.runtime.output import tell
from penstock_launch.check import paths, resources, rewards
from penstock_launch.doctor.report import (
    Group,
    Line,
    closing,
    exit_code,
    not_looked_at,
    problem,
    problems,
    render_group,
)
from penstock_launch.doctor.side_by_side import Look, look_at_all
from penstock_trainer.data.datasets import load_rows
from penstock_trainer.data.rows import Row

REWARDS, PROMPTS = "rewards", "prompts"
WIDTH = len("weights.folder")
REWARD_SECONDS = rewards.SECONDS + 30.0  # with the tokenizer before them
PROMPT_SECONDS = 120.0  # 100000 rows take half of it


def check(settings: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print each group as soon as it is known; returns the exit code. ConfigError: the configuration cannot be used."""
    config = load_config(settings, environ)
    secrets, found = secret_values(config), list[Group]()
    for group in groups(config, environ):
        found.append(group)
        tell(hide(line, secrets) for line in render_group(group, WIDTH))
    print(closing(found))
    return exit_code(found)


def groups(config: Config, environ: Mapping[str, str]) -> Iterator[Group]:
    """All groups, one after the other."""
    named = paths.quick(config)
    yield named
    scored = _group([named], REWARDS, lambda: reward_lines(config), REWARD_SECONDS)
    yield scored
    yield _group([named, scored], PROMPTS, lambda: prompt_lines(config), PROMPT_SECONDS)
    [needed] = look_at_all(resources.looks(config, environ), resources.SECONDS)
    yield needed


def _group(before: Sequence[Group], title: str, lines: Callable[[], Sequence[Line]], seconds: float) -> Group:
    for group in before:
        if problems(group.lines):
            return Group(title, [not_looked_at(title, f"first correct the problem in {group.title!r}")])
    [group] = look_at_all([Look(title, title, lines)], seconds)
    return group


def reward_lines(config: Config) -> list[Line]:
    """The functions on the first rows of data.train."""
    try:
        section = config.data.train
        few = section.model_copy(update={"size": min(section.size or paths.FEW_ROWS, paths.FEW_ROWS)})
        rows = load_rows(few, of_episodes=config.agent.enabled)
        samples = _samples(config, rows)
    except PenstockError as error:
        return [problem(REWARDS, str(error), "Correct the row or the key that is named.")]
    return rewards.reward_lines(config, samples)


def _samples(config: Config, rows: Sequence[Row]) -> list[rewards.Sample]:
    """Only a chat template or an environment changes a prompt; for plain text no tokenizer is loaded."""
    plain = not config.data.system_prompt and not config.agent.enabled
    if plain and all(isinstance(row.prompt, str) for row in rows):
        return [rewards.Sample(row.place, str(row.prompt), row.answer, row.reward, row.metadata) for row in rows]
    with lasting():
        from penstock_launch.check.prompts import samples_of
    return samples_of(config, rows)


def prompt_lines(config: Config) -> list[Line]:
    """All prompts; the import of transformers takes seconds."""
    with lasting():
        from penstock_launch.check import prompts
    return prompts.prompt_lines(config)
