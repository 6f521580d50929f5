"""Whether the run has its GPUs on this host and fits into them, as `penstock launch local` decides it."""

from collections.abc import Mapping

import psutil

from penstock.config import Config
from penstock.errors import ConfigError
from penstock_launch.doctor.report import Line, not_looked_at, ok, problem, warning
from penstock_launch.gpus.fit import fit
from penstock_launch.gpus.nvidia import Driver
from penstock_launch.gpus.plan import plan
from penstock_launch.gpus.shares import with_gpus
from penstock_launch.run_folder import RunFolder

WHAT = "what fits"
ADVICE = "`penstock config` with the same arguments shows the GPUs of each process, its memory, and the keys to change."


def fits_now(config: Config, driver: Driver | None, environ: Mapping[str, str]) -> list[Line]:
    """None of a look without a configuration. What a live run uses is its own."""
    if not config.actor.path:
        return []
    if (launcher := RunFolder(config.run).live_launcher()) is not None:
        return [not_looked_at(WHAT, f"run {config.run.name} is live (its launcher has pid {launcher.pid})")]
    return fits_lines(config, driver, environ)


def fits_lines(config: Config, driver: Driver | None, environ: Mapping[str, str]) -> list[Line]:
    """None without GPUs, unless the configuration names some."""
    try:
        placement = plan(config, driver, environ)
        memory = fit(with_gpus(config, placement), placement, psutil.virtual_memory().total)
    except ConfigError as error:
        return [problem(WHAT, str(error).partition("\n")[0].rstrip(":"), ADVICE)]
    if not placement.gpus:
        return []
    if not memory.by_gpu:  # then the only warning is why
        return [not_looked_at(WHAT, "; ".join(memory.warnings) or "no process uses a GPU")]
    return [ok(WHAT, "; ".join(memory.needs())), *(warning(WHAT, each, ADVICE) for each in memory.warnings)]
