"""Writes the locks services-cuda.txt and sglang-cuda.txt: `make lock`. Needs the package index.

Owns these files: they are never edited by hand. Those of SGLang lie in penstock_launch/envs, those of the services in
constraints/. What decides their versions:

- sglang-cuda-requirements.txt: SGLang, which fixes torch for both environments. Trainer and engine exchange
  weights by NCCL, and must round alike.
- services.txt: every other version of the services is that of the CPU form, or the lock fails.
- sglang.txt: the CPU form's versions, if SGLang allows them.
- the lock itself: what is locked stays as long as it fits, except with `--upgrade`.

`--check` (`make check-locks`) changes nothing. It fails if the locked versions no longer resolve, with wheels only, to
exactly the locked packages, or if their files are not those of the index any more.
"""

import argparse
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

from deploy.locks.lockfile import Resolution, read_pins, render
from deploy.locks.resolve import FROM_SOURCE, Inputs, resolve

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "constraints"
ENVS = ROOT / "deploy" / "launch" / "penstock_launch" / "envs"  # they come with the wheel
SERVICES, SGLANG = FOLDER / "services-cuda.txt", ENVS / "sglang-cuda.txt"
PYTHONS = ("3.11", "3.12")
INTRODUCTIONS = {
    SERVICES: (
        "The services' environment (.venv) on Linux x86-64 with CUDA. Written by `make lock`; do not edit.",
        "From pyproject.toml (extras `all`, `dev`), versions as in services.txt; torch is that of sglang-cuda.txt.",
    ),
    SGLANG: (
        "SGLang's environment (.venv-sglang) on Linux x86-64 with CUDA. Written by `make lock`; do not edit.",
        "From sglang-cuda-requirements.txt, with the versions of sglang.txt if they fit.",
    ),
}

Pins = Mapping[str, str]
Resolutions = Mapping[str, Resolution]  # by version of Python


def resolve_both(uv: Path, *, keep: bool, exact: bool = False) -> dict[Path, Resolutions]:
    """Both environments. `keep`: versions that are locked stay if they fit; `exact`: they stay, or it fails."""
    with tempfile.TemporaryDirectory() as folder:
        build = Path(folder, "build-requirements.txt")  # `make envs` builds Penstock without isolation
        build.write_text("\n".join(_project()["build-system"]["requires"]), encoding="utf-8")
        both: dict[Path, dict[str, Resolution]] = {SGLANG: {}, SERVICES: {}}
        for python in PYTHONS:
            before = _versions(both[SGLANG]) | _versions(both[SERVICES])  # the same in both Pythons, if they fit
            sglang_lock, services_lock = (_pins(path, python) if keep else {} for path in (SGLANG, SERVICES))
            cpu = _pins(FOLDER / "services.txt", python)
            inputs = Inputs(
                [ENVS / "sglang-cuda-requirements.txt"],
                (),
                sglang_lock if exact else {},
                sglang_lock | before | cpu | _pins(ENVS / "sglang.txt", python),
            )
            both[SGLANG][python] = sglang = resolve(uv, inputs, python)
            must = cpu | {"torch": sglang["torch"].version}
            inputs = Inputs(
                [ROOT / "pyproject.toml", build],
                ("--extra", "all", "--extra", "dev"),
                services_lock | must if exact else must,
                services_lock | before | {name: each.version for name, each in sglang.items()},
            )
            both[SERVICES][python] = resolve(uv, inputs, python)
        return dict(both)


def _project() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _pins(path: Path, python: str) -> dict[str, str]:
    return read_pins(path.read_text(encoding="utf-8"), python) if path.exists() else {}


def _versions(resolutions: Resolutions) -> dict[str, str]:
    return {name: each.version for packages in resolutions.values() for name, each in packages.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the locks of the environments for GPUs.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if a lock does not resolve to itself"
    )
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    arguments = parser.parse_args()
    uv = Path(sys.executable).with_name("uv")
    try:
        both = resolve_both(uv, keep=not arguments.upgrade, exact=arguments.check)
    except subprocess.CalledProcessError as error:
        sys.exit(f"deploy.locks: uv ended with {error.returncode}; what does not fit together is above")
    differing = []
    for path, resolutions in both.items():
        text = render(INTRODUCTIONS[path], FROM_SOURCE, resolutions)
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
        elif text != path.read_text(encoding="utf-8"):
            differing.append(str(path.relative_to(ROOT)))
        print(
            f"{path.relative_to(ROOT)}:",
            *(f"Python {python}: {len(each)} packages." for python, each in resolutions.items()),
        )
    if differing:
        sys.exit(f"deploy.locks: {', '.join(differing)}: the index resolves to something else; run `make lock`")


if __name__ == "__main__":
    main()
