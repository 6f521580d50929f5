"""The locks of the CUDA environments are complete, and agree with pyproject.toml and the CPU form's constraints."""

import importlib.metadata
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deploy.locks import __main__ as command
from deploy.locks.__main__ import INTRODUCTIONS, PYTHONS, SERVICES, SGLANG, resolve_both
from deploy.locks.lockfile import Package, Resolution, plain_name, read_pins, render
from deploy.locks.resolve import FROM_SOURCE, Inputs, read_resolution, resolve
from tests.unit.repository.dockerfile import versions_file

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ENTRY = re.compile(r'[\w.-]+==[\w.!+]+( ; python_version == "[\d.]+")?( \\\n    --hash=sha256:[0-9a-f]{64})+')
# What a CUDA build of torch asks for, and a CPU build does not.
OF_CUDA = re.compile(r"(nvidia|cuda)-.*|triton|setuptools")


def pins(path: Path, python: str) -> dict[str, str]:
    return read_pins(path.read_text(), python)


def constraints(name: str, python: str) -> dict[str, str]:
    return pins(versions_file(name), python)


def target(python: str) -> dict[str, str]:
    """The environment that markers are compared with."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "os_name": "posix",
    }


def applying(lines: Iterable[str], python: str, extras: Iterable[str] = ()) -> list[Requirement]:
    """The requirements that hold on Linux x86-64, with the extras of their own project spelled out."""
    found = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker and not any(marker.evaluate({**target(python), "extra": extra}) for extra in ("", *extras)):
            continue
        if requirement.name == PROJECT["project"]["name"]:
            optional = PROJECT["project"]["optional-dependencies"]
            found += applying((line for extra in requirement.extras for line in optional[extra]), python)
        else:
            found.append(requirement)
    return found


def lacking(required: Iterable[Requirement], locked: dict[str, str]) -> list[str]:
    return [
        str(each)
        for each in required
        if not each.specifier.contains(locked.get(plain_name(each.name), "0.dev0"), prereleases=True)
    ]


@pytest.mark.parametrize("path", [SERVICES, SGLANG], ids=lambda path: path.stem)
def test_each_package_has_one_version_and_its_hashes(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("".join(f"# {line}\n" for line in INTRODUCTIONS[path]))
    options = ["--only-binary :all:"]
    if path == SERVICES:
        options += [f"--no-binary {name}" for name in FROM_SOURCE]
    lines = [line for line in text.replace("\\\n", "").splitlines() if not line.startswith("#")]
    assert lines[: len(options)] == options
    entries = ENTRY.findall(text)
    assert len(entries) == len(lines) - len(options)
    for python in PYTHONS:
        names = [
            plain_name(requirement.name)
            for line in lines[len(options) :]
            if not (requirement := Requirement(line.split(" --hash")[0])).marker
            or requirement.marker.evaluate(target(python))
        ]
        assert len(names) == len(set(names))
        assert set(names) == set(pins(path, python))


@pytest.mark.parametrize("python", PYTHONS)
def test_the_services_lock_has_all_that_pyproject_asks_for(python: str) -> None:
    required = [*PROJECT["project"]["dependencies"], "penstock[all,dev]", *PROJECT["build-system"]["requires"]]
    requirements = applying(required, python)
    assert len(requirements) > 35
    assert lacking(requirements, pins(SERVICES, python)) == []


@pytest.mark.parametrize("python", PYTHONS)
def test_the_services_have_the_versions_of_the_cpu_form_but_for_torch(python: str) -> None:
    locked, tested = pins(SERVICES, python), constraints("services.txt", python)
    assert {name for name, version in locked.items() if tested.get(name, version) != version} == {"torch"}
    added = {name for name in locked.keys() - tested.keys() if not OF_CUDA.fullmatch(name)}
    assert added <= {"async-timeout"}  # for Python before 3.11.3


@pytest.mark.parametrize("python", PYTHONS)
def test_trainer_and_engine_have_the_same_torch_with_the_same_libraries(python: str) -> None:
    services, sglang = pins(SERVICES, python), pins(SGLANG, python)
    shared = {name for name in services if OF_CUDA.fullmatch(name)} | {"torch"}
    assert {"nvidia-nccl-cu13", "triton", "torch"} <= shared
    assert {name: services[name] for name in shared} == {name: sglang.get(name) for name in shared}


@pytest.mark.parametrize("python", PYTHONS)
def test_the_engines_lock_has_what_was_asked_for(python: str) -> None:
    text = versions_file("sglang-cuda-requirements.txt").read_text()
    requirements = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    locked = pins(SGLANG, python)
    assert lacking(requirements, locked) == []
    kernels = {"sglang-kernel", "flashinfer-python", "nvidia-cuda-nvcc", "nvidia-cuda-runtime", "triton"}
    assert kernels <= locked.keys()
    assert locked["nvidia-cuda-nvcc"].split(".")[:2] == locked["cuda-toolkit"].split(".")[:2]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("path", [SERVICES, SGLANG], ids=lambda path: path.stem)
def test_what_a_locked_package_asks_for_is_locked(path: Path, python: str) -> None:
    """As far as the same versions are installed here, in either environment: their metadata names their needs."""
    locked = pins(path, python)
    folders = [str(folder) for folder in ROOT.glob(".venv-sglang/lib/python3*/site-packages")]
    installed = [*importlib.metadata.distributions(), *importlib.metadata.distributions(path=folders)]
    same = [each for each in installed if locked.get(plain_name(each.metadata["Name"])) == each.version]
    assert len({plain_name(each.metadata["Name"]) for each in same}) > 50
    missing = {
        str(each.metadata["Name"]): missed
        for each in same
        if (missed := lacking(applying(each.requires or (), python), locked))
    }
    assert missing == {}


def test_a_lock_reads_as_it_was_written() -> None:
    both = Package("both", "1.0", ("a" * 64,), 10)
    resolutions = {
        "3.11": {
            "both": both,
            "one": Package("one", "1.0", ("b" * 64,), 10),
            "old": Package("old", "1", ("e" * 64,), 0),
        },
        "3.12": {"both": Package("both", "1.0", ("c" * 64,), 10), "one": Package("one", "2.0", ("d" * 64,), 10)},
    }
    text = render(["What it is."], ("old", "absent"), resolutions)
    for python, packages in resolutions.items():
        assert read_pins(text, python) == {name: each.version for name, each in packages.items()}
    assert f"both==1.0 \\\n    --hash=sha256:{'a' * 64} \\\n    --hash=sha256:{'c' * 64}\n" in text
    assert f'one==2.0 ; python_version == "3.12" \\\n    --hash=sha256:{"d" * 64}\n' in text
    assert "--no-binary old\n" in text
    assert "absent" not in text


def test_constraints_are_read_by_plain_names() -> None:
    assert read_pins("# of old==1\nHf_Xet==1.0\ngrafana==1769699590!11.3.0\n", "3.11") == {
        "hf-xet": "1.0",
        "grafana": "1769699590!11.3.0",
    }


def test_a_resolution_has_the_wheels_that_fit_or_the_source() -> None:
    pylock = """
        [[packages]]
        name = "with-wheels"
        version = "1.0"
        wheels = [{ size = 3, hashes = { sha256 = "b" } }, { size = 5, hashes = { sha256 = "a" } }]
        [[packages]]
        name = "from_source"
        version = "2.0"
        sdist = { hashes = { sha256 = "c" } }
    """
    assert read_resolution(pylock) == {
        "with-wheels": Package("with-wheels", "1.0", ("a", "b"), 5),
        "from-source": Package("from-source", "2.0", ("c",), 0),
    }


def test_a_resolution_takes_wheels_alone_and_prefers_what_it_is_given(tmp_path: Path) -> None:
    """uv is a stand-in: it answers with what its output had, and keeps its command lines."""
    uv = tmp_path / "uv"
    uv.write_text(
        f"""#!/bin/sh
echo "$*" >> {tmp_path}/calls
while [ $# -gt 1 ]; do case "$1" in --output-file) output=$2;; --constraint) constraint=$2;; esac; shift; done
case "$output" in
*.toml) version=$(sed -n 's/^kept==//p' "$constraint"); hash=abc
  printf '[[packages]]\\nname = "kept"\\nversion = "%s"\\n' "$version" > "$output"
  printf 'wheels = [{{ hashes = {{ sha256 = "%s" }} }}]\\n' "$hash" >> "$output" ;;
*) cat "$constraint" "$output" > {tmp_path}/given ;;
esac
"""
    )
    uv.chmod(0o755)
    found = resolve(uv, Inputs([tmp_path / "in.txt"], ("--extra", "all"), {"fixed": "1"}, {"kept": "2"}), "3.12")
    assert found == {"kept": Package("kept", "2", ("abc",), 0)}
    assert (tmp_path / "given").read_text() == "fixed==1\nkept==2\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2
    for call in calls:
        assert f"{tmp_path}/in.txt --extra all" in call
        assert "--python-version 3.12 --python-platform x86_64-manylinux_2_34" in call
        assert "--only-binary :all: --no-binary cellpylib" in call


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    """What is resolved; each resolution has one package, a torch that does not exist."""
    inputs: list[Inputs] = []

    def answer(_: Path, given: Inputs, __: str) -> Resolution:
        inputs.append(given)
        return {"torch": Package("torch", "99.0", ("a" * 64,), 0)}

    monkeypatch.setattr(command, "resolve", answer)
    return inputs


def test_the_engine_fixes_torch_and_the_cpu_form_the_rest(asked: list[Inputs]) -> None:
    resolve_both(Path("uv"), keep=True)
    sglang, services = asked[:2]
    assert sglang.must == {}
    assert sglang.rather["fastapi"] == constraints("sglang.txt", "3.11")["fastapi"]
    assert sglang.rather["nvidia-nccl-cu13"] == pins(SGLANG, "3.11")["nvidia-nccl-cu13"]
    assert services.must == {**constraints("services.txt", "3.11"), "torch": "99.0"}
    assert services.options == ("--extra", "all", "--extra", "dev")


def test_an_upgrade_keeps_nothing_that_only_the_lock_says(asked: list[Inputs]) -> None:
    resolve_both(Path("uv"), keep=False)
    assert "nvidia-nccl-cu13" not in {**asked[0].rather, **asked[1].rather}
    assert asked[1].must["pydantic"] == constraints("services.txt", "3.11")["pydantic"]


def test_a_check_takes_the_locked_versions_and_nothing_else(asked: list[Inputs]) -> None:
    resolve_both(Path("uv"), keep=True, exact=True)
    assert asked[2].must == pins(SGLANG, "3.12")
    assert asked[3].must.items() >= {**pins(SERVICES, "3.12"), "torch": "99.0"}.items()


@pytest.mark.usefixtures("asked")
def test_a_check_that_finds_something_else_fails_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [path.read_text() for path in (SERVICES, SGLANG)]
    monkeypatch.setattr("sys.argv", ["deploy.locks", "--check"])
    with pytest.raises(SystemExit, match=r"sglang-cuda\.txt, constraints/services-cuda\.txt: .*run `make lock`"):
        command.main()
    assert [path.read_text() for path in (SERVICES, SGLANG)] == before
