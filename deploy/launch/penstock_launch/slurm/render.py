"""The job script of a run, from its configuration and a template.

Pure, except that it reads the template. Invariant: the template has every placeholder, and all of them are filled.
"""

import shlex
import string
import sys
from importlib import resources
from pathlib import Path

from penstock.config import Config
from penstock.errors import ConfigError
from penstock_launch.gpus.plan import refuse_named, refuse_turns
from penstock_launch.run_folder import RunFolder
from penstock_launch.slurm.shares import COMPONENTS, section_of, share_of

TEMPLATE = "job.sh"
JOB_LOG = "slurm.log"
JOB_MODULE = "penstock_launch.slurm.job"
PLACEHOLDERS = frozenset({"run", "setup", "launcher", *COMPONENTS})


class JobTemplate(string.Template):
    """A template with a delimiter that no shell uses."""

    delimiter = "@@"


def render(config: Config, working_folder: Path) -> str:
    """The job script. `working_folder`: the job's; relative paths are resolved from there."""
    refuse_named(config, "Slurm")
    refuse_turns(config, "Slurm")
    for kind in config.num_services:
        share_of(config, kind)
    folder = RunFolder(config.run)
    values = {
        "run": config.run.name,
        "setup": "\n".join(config.slurm.setup) or ":",
        "launcher": shlex.join([sys.executable, "-m", JOB_MODULE, "--config", str(folder.config_path)]),
        **{component: "\n".join(_directives(config, component)) for component in COMPONENTS},
    }
    values["services"] = "\n".join([*_job_directives(config, folder, working_folder), values["services"]])
    return _template(config).substitute(values)


def _template(config: Config) -> JobTemplate:
    path = config.slurm.template
    try:
        text = Path(path).read_text("utf-8") if path else _built_in()
    except OSError as error:
        raise ConfigError(f"slurm.template: {path} cannot be read ({error.strerror}); expected a job script") from None
    template = JobTemplate(text)
    found = set(template.get_identifiers()) if template.is_valid() else set()
    if found != PLACEHOLDERS:
        raise ConfigError(
            f"slurm.template: {path} has the placeholders {', '.join(sorted(found)) or 'none that can be read'}; "
            f"expected each of {', '.join(f'@@{{{name}}}' for name in sorted(PLACEHOLDERS))}"
        )
    return template


def _built_in() -> str:
    return resources.files("penstock_launch.slurm").joinpath(TEMPLATE).read_text("utf-8")


def _job_directives(config: Config, folder: RunFolder, working_folder: Path) -> list[str]:
    """The #SBATCH options that hold for the full job; they go into its first component."""
    log = str(folder.logs / JOB_LOG).replace("%", "%%")
    lines = [
        f"--job-name={shlex.quote(f'penstock-{config.run.name}')}",
        f"--chdir={shlex.quote(str(working_folder))}",
        f"--output={shlex.quote(log)}",
        "--open-mode=append",
    ]
    if config.slurm.signal_seconds:
        lines.append(f"--signal=B:USR1@{config.slurm.signal_seconds}")
    return [f"#SBATCH {line}" for line in lines]


def _directives(config: Config, component: str) -> list[str]:
    """The #SBATCH options of a component."""
    slurm, section = config.slurm, section_of(config, component)
    gpu = f"gpu:{section.gpu_type}" if section.gpu_type else "gpu"
    options = {
        "partition": section.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time_limit,
        "nodes": str(section.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(section.cpus_per_node),
        "mem": section.memory_per_node,
        "gres": f"{gpu}:{section.gpus_per_node}" if section.gpus_per_node else "",
    }
    lines = [f"--{name}={shlex.quote(value)}" for name, value in options.items() if value]
    lines.append("--requeue" if slurm.requeue else "--no-requeue")
    return [f"#SBATCH {line}" for line in (*lines, *section.sbatch)]
