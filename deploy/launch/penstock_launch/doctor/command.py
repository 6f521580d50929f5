"""`penstock doctor`: looks at this host as the one of `penstock launch local`, and shows what to do.

Owns which looks there are, and what each gets. Invariant: nothing on the host is changed.
"""

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from socket import gethostname

from penstock.config import Config
from penstock.config.load import load_config
from penstock.config.secrets import hide
from penstock.config.shown import secret_values
from penstock.config.sources import parse_arguments
from penstock.errors import PenstockError
from penstock_launch.doctor import agents, environments, fits, folders, gpus, network
from penstock_launch.doctor.cgroup import Limits, read_limits
from penstock_launch.doctor.machine import MACHINE_LINES
from penstock_launch.doctor.model import model_line, num_weights_of
from penstock_launch.doctor.report import Line, exit_code, render
from penstock_launch.doctor.side_by_side import Look, later, look_at_all
from penstock_launch.extras import installed
from penstock_launch.gpus.nvidia import LOOK_SECONDS, has_gpu, read_driver

WITHOUT_FILE = {"actor": {"path": ""}, "data": {"train": {"path": "none"}}}  # the keys without a default
MACHINE, GPUS, ENVIRONMENTS, CONFIGURATION = "machine", "GPUs", "environments", "configuration"


def doctor(settings: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print the table; returns the exit code. ConfigError if the configuration cannot be used."""
    config = load_config(settings, environ, without_file=WITHOUT_FILE)
    groups = look_at_all(looks(config, environ))
    secrets = secret_values(config)
    print("\n".join(hide(line, secrets) for line in [title(settings), "", *render(groups)]))
    return exit_code(groups)


def title(settings: Sequence[str]) -> str:
    """What a bug report begins with. Values are left out: some are secret."""
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    paths, pairs = parse_arguments(settings, needs_file=False)
    given = [*map(str, paths), *(f"--{key}" for key, _ in pairs)]
    version = installed("penstock") or "(not installed)"
    return f"penstock {version} on {gethostname()}, {now}; configuration: {' '.join(given) or 'defaults'}"


class Observations:
    """What several looks need: read once, beginning now, each in a thread of its own."""

    def __init__(self, config: Config, environ: Mapping[str, str]) -> None:
        self.config = config
        self.environ = environ
        self.driver = later(lambda: read_driver(environ, LOOK_SECONDS))
        self.num_weights = later(lambda: num_weights_of(config.actor.path))
        self.services = later(lambda: environments.examine(sys.executable, ("torch",), environ))
        self.sglang = later(lambda: environments.examine_sglang(config.rollout.engine, environ))

    def headers(self) -> dict[str, bool]:
        """Whether there is Python.h, by interpreter that answered."""
        found = {}
        for python, answer in ((sys.executable, self.services), (self.config.rollout.engine.python, self.sglang)):
            with contextlib.suppress(PenstockError, TimeoutError):  # a line of its own has the reason
                found[python] = answer.result().headers
        return found


def looks(config: Config, environ: Mapping[str, str]) -> list[Look]:
    """All looks, in the order of the table."""
    seen, limits = Observations(config, environ), later(read_limits)
    return [
        *(Look(MACHINE, what, partial(_one, look, limits)) for what, look in MACHINE_LINES.items()),
        Look(MACHINE, "shared memory", lambda: [folders.shared_memory_now(config, seen.num_weights.result())]),
        Look(GPUS, gpus.WHAT, lambda: _driver(seen)),
        Look(GPUS, "compiled code", lambda: _compiling(seen)),
        Look(ENVIRONMENTS, environments.PACKAGES, lambda: [environments.packages_now(config)]),
        Look(ENVIRONMENTS, environments.TORCH, lambda: [_torch(seen)]),
        Look(ENVIRONMENTS, environments.SGLANG, lambda: _sglang(seen)),
        Look(CONFIGURATION, "model", lambda: [model_line(config.actor.path)]),
        Look(CONFIGURATION, agents.WHAT, lambda: agents.environment_lines(config)),
        Look(CONFIGURATION, fits.WHAT, lambda: fits.fits_now(config, seen.driver.result(), environ)),
        Look(CONFIGURATION, "run.root", lambda: [folders.run_root_now(config, seen.num_weights.result())]),
        Look(CONFIGURATION, "weights.folder", lambda: [folders.weights_now(config, seen.num_weights.result())]),
        Look(CONFIGURATION, network.PORTS, lambda: network.ports_now(config)),
        Look(CONFIGURATION, network.QUEUE, lambda: [network.queue_line(config)]),
    ]


def _one(look: Callable[[Limits], Line], limits: "Future[Limits]") -> list[Line]:
    return [look(limits.result())]


def _driver(seen: Observations) -> list[Line]:
    return gpus.driver_lines(seen.driver.result(), seen.environ, gpus.keys_for_cuda(seen.config))


def _compiling(seen: Observations) -> list[Line]:
    """Only for GPUs: on a CPU nothing is compiled."""
    if not has_gpu(seen.driver.result(), seen.environ):
        return []
    environ = seen.environ
    compiler = environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    places = folders.compiled_folders(environ, Path(tempfile.gettempdir()), Path.home())
    rooms = {variable: folders.Room.of(folder) for variable, folder in places.items()}
    return [gpus.compiler_line(compiler, seen.headers()), folders.compiled_line(rooms)]


def _torch(seen: Observations) -> Line:
    found, driver = seen.services.result(), seen.driver.result()
    return environments.torch_line(environments.TORCH, found, driver, seen.environ, seen.config.trainer.device)


def _sglang(seen: Observations) -> list[Line]:
    driver = seen.driver.result()
    return list(environments.sglang_lines(seen.config.rollout.engine, seen.sglang.result, driver, seen.environ))
