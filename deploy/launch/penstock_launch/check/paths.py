"""The quick part of the check: what a configuration names is there. It imports no torch and runs no code of the user's.

`penstock check` and every launch begin with it, and `penstock config` warns of what it finds. Owns no rule: a model, an
interpreter, a row and the name of a reward are judged by the functions with which the services judge them.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from penstock.absent_path import looked_for
from penstock.config import AgentSection, Config, DatasetSection, HeldOutSet, TrainingSet
from penstock.engine_layers import require_layers
from penstock.errors import ConfigError, PenstockError
from penstock.model_path import check_model_path
from penstock.workers.source_names import why_absent
from penstock_launch.check.hub import cached_config, hub_line
from penstock_launch.check.precision import WHAT as PRECISION
from penstock_launch.check.precision import precision_now
from penstock_launch.doctor.model import WHAT as MODEL
from penstock_launch.doctor.model import model_line
from penstock_launch.doctor.report import Group, Line, Verdict, not_looked_at, ok, problem, problems
from penstock_launch.doctor.side_by_side import Look, look_at_all
from penstock_launch.extras import missing
from penstock_launch.run_folder import RunFolder

TITLE = "what it names"
QUICK_SECONDS = 10.0  # a file system or an interpreter that has not answered by then
PROBE_SECONDS = 3 * QUICK_SECONDS  # the look at it ends first: a machine under load is no reason to refuse a launch
FEW_ROWS = 10
REFERENCE, TEACHER, INTERPRETER, RUN = "reference", "teacher", "SGLang", "earlier run"
TRAIN, REWARDS, ENVIRONMENT = "data.train", "reward names", "environment"


def quick(config: Config) -> Group:
    """All lines of the quick part; each look has a deadline."""
    [group] = look_at_all(looks(config), QUICK_SECONDS)
    return group


def looks(config: Config) -> list[Look]:
    """In the order of the table."""
    has_reference, teacher = config.ref.path and config.kl_ctl, config.teacher.path
    return [
        Look(TITLE, MODEL, lambda: [_policy(config.actor.path)]),
        *([Look(TITLE, REFERENCE, partial(_other, config.ref.path, "ref.path", REFERENCE))] if has_reference else []),
        *([Look(TITLE, TEACHER, partial(_other, teacher, "teacher.path", TEACHER))] if teacher else []),
        *(Look(TITLE, TEACHER, partial(_teacher_server, url)) for url in config.teacher.urls),
        Look(TITLE, INTERPRETER, lambda: [interpreter_line(config)]),
        *(Look(TITLE, each.key, partial(_training, config, each)) for each in config.data.training_sets),
        *(Look(TITLE, each.key, partial(_held_out, config, each)) for each in config.held_out_sets),
        Look(TITLE, REWARDS, lambda: [rewards_line(config)]),
        *([Look(TITLE, ENVIRONMENT, partial(_environment, config.agent))] if config.agent.environment else []),
        Look(TITLE, PRECISION, lambda: precision_now(config)),
        Look(TITLE, RUN, lambda: run_lines(config)),
    ]


def _policy(path: str) -> Line:
    """Of the model that the engine serves, too."""
    line = _model(path, "actor.path", MODEL)
    by_name = path and not Path(path).is_dir() and not missing(["trainer"])
    if line.verdict is Verdict.PROBLEM:
        return line
    try:
        require_layers(path, "actor.path", cached_config(path) if by_name else None)
    except ConfigError as error:
        return problem(MODEL, str(error), "Set actor.path to a model whose layers SGLang builds (docs/models.md).")
    return line


def _other(path: str, key: str, what: str) -> list[Line]:
    return [_model(path, key, what)]


def _teacher_server(url: str) -> list[Line]:
    if missing(["trainer"]):
        return [not_looked_at(TEACHER, "the extra `trainer`, which asks it, is not installed here")]
    from penstock_trainer.data.teacher_servers import describe

    try:
        info = describe(url)
    except PenstockError as error:
        return [problem(TEACHER, str(error), "Start the server, or correct teacher.urls.")]
    return [ok(TEACHER, f"{url} serves {info.model}, and reads sequences of up to {info.longest} tokens")]


def _model(path: str, key: str, what: str) -> Line:
    line = model_line(path, key, what)
    if line.verdict is not Verdict.NOT_LOOKED_AT or not path or missing(["trainer"]):
        return line
    return hub_line(path, key, what)


def interpreter_line(config: Config) -> Line:
    """Of rollout.engine.python, asked as the rollout service asks it, but for GPUs: that imports torch."""
    from penstock_rollout.engine.sglang.server import find_python, probe_python

    engine = config.rollout.engine
    if engine.url:
        return not_looked_at(INTERPRETER, "rollout.engine.url names a server that somebody else runs")
    try:
        python = find_python(engine)
        asyncio.run(probe_python(python, "cpu", PROBE_SECONDS))
    except PenstockError as error:
        advice = "`penstock envs` makes an environment with SGLang, and prints the key."
        return problem(INTERPRETER, str(error), advice)
    return ok(INTERPRETER, f"{engine.python} has it")


def _training(config: Config, each: TrainingSet) -> Sequence[Line]:
    return [rows_line(config, each.section, each.key, reward=each.section.reward)]


def _held_out(config: Config, held_out: HeldOutSet) -> Sequence[Line]:
    return [rows_line(config, held_out.dataset, held_out.key, held_out)]


def rows_line(
    config: Config, section: DatasetSection, key: str, held_out: HeldOutSet | None = None, *, reward: str = ""
) -> Line:
    """Of the first rows of a file. What takes longer than a second to open is left to the look at all prompts.

    reward: the function of training rows that name none.
    """
    if missing(["trainer"]):
        return not_looked_at(key, "the extra `trainer`, which reads data, is not installed here")
    from penstock_trainer.data.datasets import load_rows, source_of
    from penstock_trainer.data.held_out import with_rewards_of
    from penstock_trainer.data.prompts import require_batch
    from penstock_trainer.data.rows import require_rewards

    if section.kind == "reasoning_gym":
        return not_looked_at(key, f"task {section.path} of reasoning-gym, which is loaded with the prompts")
    if section.kind == "huggingface":
        return _dataset(section, key)
    wanted = max(FEW_ROWS, config.data.batch_size)
    few = section.model_copy(update={"size": min(section.size or wanted, wanted)})
    advice = f"Correct {section.path}, or set {key}.path and {key}.columns to what it holds."
    if not Path(section.path).is_file():
        advice = f"Set {key}.path to a JSONL file that is there, or {key}.kind to what it names."
    try:
        rows = load_rows(few, key, of_episodes=config.agent.enabled)
        advice = f"Correct the rewards that {section.path} names, or reward.functions."
        if held_out is not None:
            with_rewards_of(held_out, config, rows)
        else:
            named = [replace(row, reward=row.reward or reward) for row in rows]
            require_rewards(named, config.all_rewards.functions)
        if key == TRAIN:
            is_limited = 0 < section.size < config.data.batch_size
            more = f"raise {key}.size" if is_limited else f"add rows to {section.path}"
            advice = f"Set data.batch_size to at most {len(rows)}, or {more}."
            require_batch(len(rows), config.data.batch_size, source_of(config.data))
    except PenstockError as error:
        return problem(key, str(error), advice)
    return ok(key, f"{section.path}: the first {len(rows)} rows can be read")


def _dataset(section: DatasetSection, key: str) -> Line:
    if Path(section.path).exists():
        return ok(key, f"{section.path} exists; it is loaded with the prompts")
    try:
        check_model_path(section.path, f"{key}.path")  # the same rule tells a folder from a name on the hub
    except ConfigError:
        seen = (
            f"{key}.path is {section.path!r}, which does not exist: expected a dataset's folder or file, or a hub "
            f"name; {looked_for(section.path)}"
        )
        return problem(key, seen, f"Set {key}.path to a dataset that is there.")
    return not_looked_at(key, f"{section.path} is a name on Hugging Face's hub, loaded with the prompts")


def rewards_line(config: Config) -> Line:
    """Of the names in reward.functions, and of the sources of the user's own; nothing is imported."""
    from penstock_reward.functions.registry import check_names, check_sources
    from penstock_reward.processes.pool import modules_path

    section = config.all_rewards
    try:
        check_names(section.functions, section.modules_path)
        folder = modules_path(section)
        check_sources(section.functions, folder)
    except PenstockError as error:
        return problem(REWARDS, str(error), "Set reward.functions and reward.modules_path to functions that are there.")
    return ok(REWARDS, ", ".join(section.functions) + (f", from {folder}" if folder else ""))


def _environment(section: AgentSection) -> list[Line]:
    """Of the class or function that makes episodes; nothing is imported."""
    from penstock_agent.environments.worker import modules_folder

    try:
        folder = modules_folder(section)
    except PenstockError as error:
        return [problem(ENVIRONMENT, str(error), "Set agent.modules_path to the folder of the module.")]
    if ":" in section.environment and (reason := why_absent(section.environment, str(folder))):
        seen = f"agent.environment names {section.environment!r}, which cannot be imported: {reason}"
        advice = f"Set agent.environment to module:name, with the module under agent.modules_path ({folder})."
        return [problem(ENVIRONMENT, seen, advice)]
    return [ok(ENVIRONMENT, f"{section.environment}, from {folder}")]


def run_lines(config: Config) -> list[Line]:
    """Of the run that this one would go on with; none if it would begin."""
    folder = RunFolder(config.run)
    if config.run.existing != "resume" or missing(["trainer"]) or folder.ended_before_a_step():
        return []
    from penstock_trainer.checkpoints.journal import Journal
    from penstock_trainer.checkpoints.same_run import check_settings

    journal = Journal(folder.path / "steps")
    try:
        goes_on = journal.exists and check_settings(journal, config)
    except ConfigError as error:
        return [problem(RUN, str(error), "Set the keys back, or choose another run.name.")]
    return [ok(RUN, f"{folder.path} holds steps, which this run goes on with")] if goes_on else []


def require_paths(config: Config) -> list[str]:
    """Warnings, a line each; ConfigError if something that the configuration names is not there."""
    found = quick(config)
    if wrong := problems(found.lines):
        shown = "".join(f"\n  {line.what}: {' '.join(line.seen.split())}" for line in wrong)
        raise ConfigError(f"the run would fail:{shown}\nnothing was started; `penstock check` shows what to do")
    return [f"{line.what}: {line.seen}. {line.advice}" for line in found.lines if line.verdict is Verdict.WARNING]


def shown_paths(config: Config) -> list[str]:
    """For a look at a configuration that may be meant for another host: all that would keep it from running here."""
    lines = quick(config).lines
    bad = [line for line in lines if line.verdict in (Verdict.PROBLEM, Verdict.WARNING)]
    return [f"{line.what}: {' '.join(line.seen.split())}" for line in bad]
