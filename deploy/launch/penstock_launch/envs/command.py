"""`penstock envs`: makes SGLang's environment on this host, with the locks that came with this package.

Chooses the form as `make envs` does: what was asked for, else that of the environment in the folder, else for CUDA if
nvidia-smi shows a GPU.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from penstock.config.services import EngineSection
from penstock.config.shown import as_yaml
from penstock.errors import ConfigError, PenstockError
from penstock_launch.envs.environment import HERE, INSTALLS, InstallError, RefusedError, form_of, make
from penstock_launch.extras import installed
from penstock_launch.gpus.nvidia import Driver, read_driver
from penstock_launch.help_text import examples

FOLDER = Path(EngineSection().python).parent.parent


def add_envs_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `envs`."""
    envs = commands.add_parser(
        "envs",
        help="make SGLang's environment, which rollout.engine.python names",
        description="Make a Python environment with SGLang alone, in the versions that Penstock was tested with. Takes "
        "minutes: 3 GB on disk for CPUs, 11 GB for CUDA. After an interruption the same command goes on. The "
        "interpreter that it prints last belongs into the configuration.",
        epilog=examples("penstock envs", "penstock envs --cuda --folder /opt/sglang", settings=False),
        usage="penstock envs [--cpu | --cuda] [--folder FOLDER] [--python PYTHON]",
        allow_abbrev=False,
    )
    form = envs.add_mutually_exclusive_group()
    form.add_argument(
        "--cpu", dest="form", action="store_const", const="cpu", help="for CPUs; the default on a host without a GPU"
    )
    form.add_argument(
        "--cuda", dest="form", action="store_const", const="cuda", help="for NVIDIA GPUs; the default if there is one"
    )
    envs.add_argument(
        "--folder", type=Path, default=FOLDER, metavar="FOLDER", help=f"where it is to be; default: {FOLDER}"
    )
    envs.add_argument(
        "--python", default=sys.executable, metavar="PYTHON", help="the interpreter to make it with; default: this one"
    )


def make_envs(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Make the environment; returns the exit code. ConfigError if it cannot be made with these options."""
    try:
        form = _make(arguments, lambda: read_driver(environ))
    except RefusedError as error:
        raise ConfigError(f"envs: {error} (--folder, --python, --cpu and --cuda choose others)") from error
    except InstallError as error:
        raise PenstockError(f"envs: {error}: the lines above have its reason; the same command goes on") from error
    if form == "cuda" and (advice := _advice_on_torch(installed("torch"))):
        print(advice)
    return 0


def _make(arguments: argparse.Namespace, driver: Callable[[], Driver | None]) -> str:
    """The form that was made."""
    folder: Path = arguments.folder
    before = form_of(folder)
    form: str = arguments.form or before or ("cuda" if _has_gpu(driver()) else "cpu")
    python = make(folder, form, arguments.python, partial(print, flush=True))
    if arguments.form is None and before == "cpu" and _has_gpu(driver()):
        print("This host has an NVIDIA GPU, and the environment is for CPUs: it stays so. `--cuda` makes it anew.")
    print("In the configuration of a run, or as --rollout.engine.python:")
    print(as_yaml({"rollout": {"engine": {"python": str(python.absolute())}}}), end="")
    return form


def _has_gpu(driver: Driver | None) -> bool:
    return driver is not None and bool(driver.gpus)


def _advice_on_torch(version: str | None) -> str:
    """What to do about the services' torch: trainer and engine exchange weights through it, and must round alike."""
    [locked] = re.findall(r"^torch==([\w.]+)", (HERE / INSTALLS["cuda"][0][1][-1]).read_text(encoding="utf-8"), re.M)
    if version is None or version.partition("+")[0] == locked:
        return ""
    return f"Here is torch {version}; SGLang's is {locked}: `pip install torch=={locked}` gives the trainer the same."
