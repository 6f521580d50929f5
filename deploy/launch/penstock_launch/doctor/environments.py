"""The two Python environments: what each has, asked of its own interpreter, and what of it fits the driver.

services' environment    its packages as pyproject.toml asks for them, torch
SGLang's environment     SGLang as Penstock was tested with it, torch, SGLang's kernels for GPUs
"""

import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from packaging.requirements import Requirement

from penstock.config import Config, EngineSection
from penstock.errors import EngineStartError, PenstockError
from penstock_launch.doctor.report import Line, not_looked_at, ok, problem, warning
from penstock_launch.extras import extras_of, installed, metadata, requirements
from penstock_launch.gpus.nvidia import Driver, visible
from penstock_rollout.engine.sglang.server import TESTED_VERSIONS, find_python, require_sglang

PROBE_SECONDS = 18.0  # torch is imported in two, from a cold disk in ten
PROBE = Path(__file__).with_name("probe.py")
NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME")  # of the services' Python, in SGLang's environment
FEW_CHARACTERS = 300
UNFIT = "not compatible"  # torch's word for a GPU that its build has no code for
NO_FABRIC = "Error 802"  # CUDA's number: the switches between the GPUs of one board are not set up
SHOWN = ("torch", "transformers", "numpy")
PACKAGES, TORCH, SGLANG = "services' packages", "torch of services", "SGLang"


class Torch(msgspec.Struct, frozen=True):
    """cuda: that it was built for; empty: none. num_gpus: that it can use. problem: of its import, or of the GPUs."""

    cuda: str = ""
    num_gpus: int = 0
    problem: str = ""


class Environment(msgspec.Struct, frozen=True):
    """What an interpreter answered. versions: by package, empty if not installed.

    torch, kernels (why their import fails): None if the answer ends before. crash: how the interpreter ended early;
    late: it had not ended in time.
    """

    python: str
    headers: bool
    versions: dict[str, str]
    torch: Torch | None = None
    kernels: str | None = None
    crash: str = ""
    late: str = ""


class ProbeError(PenstockError):
    """An interpreter that gives no answer."""


def examine(python: str, packages: Sequence[str], environ: Mapping[str, str]) -> Environment:
    """Ask an interpreter; ProbeError or TimeoutError if nothing comes. Blocks for up to PROBE_SECONDS."""
    crash = late = ""
    try:
        done = subprocess.run(
            [python, "-c", PROBE.read_text(), *packages],
            capture_output=True,
            env=dict(environ),
            timeout=PROBE_SECONDS,
        )
        output = done.stdout
        if done.returncode:
            crash = f"exit code {done.returncode}: {done.stderr.decode(errors='replace')[-FEW_CHARACTERS:]}"
    except subprocess.TimeoutExpired as error:
        output, late = error.stdout or b"", f"no answer within {PROBE_SECONDS:g} s"
    except OSError as error:
        raise ProbeError(f"{python} cannot be started ({error.strerror})") from error
    found = _last(output)
    if found is not None:
        return msgspec.structs.replace(found, crash=crash, late=late)
    if late:
        raise TimeoutError(f"{python}: {late}")
    raise ProbeError(f"{python}: {crash or 'it prints nothing that can be read'}")


def _last(output: bytes) -> Environment | None:
    """The last complete line; libraries may print others."""
    for line in reversed(output.splitlines()):
        try:
            return msgspec.json.decode(line, type=Environment)
        except msgspec.DecodeError:
            continue
    return None


def examine_sglang(section: EngineSection, environ: Mapping[str, str]) -> Environment:
    """SGLang's; EngineStartError with what the rollout service would end with, or ProbeError."""
    python = find_python(section)
    environ = {name: value for name, value in environ.items() if name not in NOT_INHERITED}
    found = examine(python, ("sglang", "torch"), environ)
    require_sglang(python, found.versions["sglang"])
    return found


def packages_line(lines: Iterable[str], extras: Sequence[str], version_of: Callable[[str], str | None]) -> Line:
    """lines: what the installed package penstock asks for, with the extra that each belongs to as a marker."""
    wrong: list[str] = []
    asked = list(requirements(lines, extras))
    for requirement, extra in asked:
        wrong += _wrong(requirement, version_of(requirement.name), extra)
    if wrong:
        named = ",".join(extras)
        advice = f"make envs, or pip install 'penstock[{named}]'; a host needs only the extras of what runs on it."
        return problem(PACKAGES, "; ".join(wrong), advice)
    shown = [f"{name} {version}" for name in SHOWN if (version := version_of(name))]
    return ok(PACKAGES, f"all {len(asked)} as pyproject.toml asks, {', '.join(shown)} among them")


def packages_now(config: Config) -> Line:
    """Of this process's environment."""
    return packages_line(metadata(), extras_of(config), installed)


def _wrong(requirement: Requirement, version: str | None, extra: str) -> Iterator[str]:
    asked = f"{requirement.name}{requirement.specifier}" + (f" (extra {extra})" if extra else "")
    if version is None:
        yield f"{asked} is missing"
    elif not requirement.specifier.contains(version, prereleases=True):
        yield f"{asked}: {version} is installed"


def torch_line(what: str, found: Environment, driver: Driver | None, environ: Mapping[str, str], device: str) -> Line:
    """Whether torch fits the driver. device: auto, cpu or cuda, that it is to run on."""
    version = found.versions.get("torch", "")
    if not version:
        return problem(what, "not installed", f"{_maker(what)} makes it.")
    if found.late and found.torch is None:
        return not_looked_at(what, f"{version}: {found.late}")
    torch = found.torch or Torch(problem=found.crash)
    if torch.problem and not torch.cuda:
        advice = f"Import it by hand; if that fails, remove the environment's folder, then {_maker(what)}."
        return problem(what, f"{version}: {torch.problem}", advice)
    seen = f"{version}, {f'built for CUDA {torch.cuda}' if torch.cuda else 'built for CPUs'}"
    gpus = visible(driver.gpus, environ) if driver is not None else []
    if driver is None or not gpus or device == "cpu":
        return ok(what, seen)
    if not torch.cuda:
        line = problem if device == "cuda" else warning
        return line(what, f"{seen}, though there is a GPU", f"{_maker(what, cuda=True)} makes it anew, for CUDA.")
    reason = f": {torch.problem}" if torch.problem else ""
    if not torch.num_gpus:
        return problem(what, f"{seen}; can use no GPU{reason}", _blind(torch, driver))
    if reason:
        line = problem if UNFIT in reason else warning
        return line(what, f"{seen}{reason}", "Install a build of torch that has code for this GPU.")
    expected = 1 if any(gpu.is_mig for gpu in gpus) else len(gpus)  # CUDA gives a process one instance
    if torch.num_gpus < expected:
        advice = "Run nvidia-smi -L, and look at dmesg for a GPU that fell off the bus."
        return warning(what, f"{seen}; can use {torch.num_gpus} of {expected} GPUs", advice)
    return ok(what, f"{seen}; can use {torch.num_gpus} GPU{'s' * (torch.num_gpus > 1)}")


def _maker(what: str, *, cuda: bool = False) -> str:
    """What makes the environment of a line."""
    if what == TORCH:
        return f"make envs{' CUDA=1' * cuda} (or pip, with 'penstock[trainer]')"
    return f"penstock envs{' --cuda' * cuda}"


def _blind(torch: Torch, driver: Driver) -> str:
    """What to do if torch can use no GPU. A driver runs every CUDA of its own major version and of older ones."""
    runs, asked = (version.partition(".")[0] for version in (driver.cuda_version, torch.cuda))
    if runs.isdecimal() and asked.isdecimal() and int(runs) < int(asked):
        return (
            f"Update the driver, which runs CUDA up to {driver.cuda_version}, to one for CUDA {asked}, or install a "
            f"build of torch for CUDA {runs}."
        )
    if NO_FABRIC in torch.problem:
        return "Start the fabric manager of the driver's version: systemctl start nvidia-fabricmanager."
    return "Restart the host if the driver was updated; python -c 'import torch; torch.cuda.init()' shows the error."


def sglang_lines(
    section: EngineSection, answer: Callable[[], Environment], driver: Driver | None, environ: Mapping[str, str]
) -> Iterator[Line]:
    """answer: of `examine_sglang`."""
    if section.url:
        yield not_looked_at(SGLANG, "rollout.engine.url names a server that somebody else runs")
        return
    try:
        found = answer()
    except EngineStartError as error:
        yield problem(SGLANG, str(error), "penstock envs makes it, and prints what to set rollout.engine.python to.")
        return
    except ProbeError as error:
        advice = "Start that interpreter by hand; if it is broken, remove its folder, then penstock envs."
        yield problem(SGLANG, f"rollout.engine.python: {error}", advice)
        return
    yield _version_line(section, found)
    yield torch_line("torch of SGLang", found, driver, environ, section.device)
    if found.torch is not None and found.torch.num_gpus:
        yield _kernels_line(found)


def _version_line(section: EngineSection, found: Environment) -> Line:
    version = found.versions["sglang"]
    seen = f"{version} on Python {found.python} ({section.python})"
    if version not in TESTED_VERSIONS:
        tested = " and ".join(TESTED_VERSIONS)
        return warning(SGLANG, f"{seen}; Penstock was tested with {tested}", "penstock envs, or install one of these.")
    return ok(SGLANG, f"{seen}, as tested")


def _kernels_line(found: Environment) -> Line:
    what = "SGLang's kernels"
    if found.kernels is None and found.late:
        return not_looked_at(what, found.late)
    reason = found.crash if found.kernels is None else found.kernels
    if reason:
        advice = "penstock envs, or install the sglang-kernel that this SGLang asks for, of torch's CUDA version."
        return problem(what, f"sgl_kernel cannot be imported: {reason}", advice)
    return ok(what, "sgl_kernel can be imported")
