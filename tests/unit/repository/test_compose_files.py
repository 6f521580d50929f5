"""Promises of docker-compose.yml and the Dockerfile, checked without a container engine."""

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.config.identity import identifying_keys, keys_of
from penstock.config.load import build_config
from penstock.config.sources import read_yaml
from penstock.contracts import ServiceKind
from penstock_launch.services import TUNING
from tests.patience import START_SECONDS

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
COMPOSE_FILES = ("docker-compose.yml", "compose.gpu.yaml")
OWN = ("rollout", "reward", "trainer")
SECRETS = ("PENSTOCK_TOKEN", "PENSTOCK_REDIS__PASSWORD", "GRAFANA_PASSWORD")
ONCE = {"model"}  # ends when it has done its work


@cache
def read(name: str) -> dict[str, Any]:
    document = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def services() -> dict[str, Any]:
    found: dict[str, Any] = read("docker-compose.yml")["services"]
    return found


def environment_of(service: str, *files: str) -> dict[str, str]:
    """A service's settings, with later files over earlier ones and all variables filled in."""
    variables: dict[str, str] = {}
    for name in files:
        variables |= read(name)["services"].get(service, {}).get("environment", {})
    return {name: re.sub(r"\$\{(\w+)[^}]*\}", "filled-in", value) for name, value in variables.items()}


@pytest.mark.parametrize("name", sorted(services()))
def test_a_container_may_do_no_more_than_it_needs(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"mem_limit", "pids_limit"} <= service.keys()
    assert "privileged" not in service
    assert "ulimits" not in service  # a host may not grant them
    for port in service.get("ports", []):
        assert port.startswith("${BIND:-127.0.0.1}:")
    for volume in service.get("volumes", []):
        assert not volume.startswith("./") or volume.endswith(":ro")


@pytest.mark.parametrize("name", sorted(services()))
def test_a_container_is_watched_and_started_again(name: str) -> None:
    service = services()[name]
    if name in ONCE:
        assert service["restart"] == "no"
        return
    assert service["restart"] == ("on-failure" if name == "trainer" else "unless-stopped")
    assert service["healthcheck"]["test"]
    assert service["init"] is True
    for condition in service.get("depends_on", {}).values():
        assert condition["condition"] in ("service_healthy", "service_completed_successfully")


def test_own_images_run_as_nobody_of_the_host() -> None:
    assert [name for name in OWN if services()[name]["user"] != "10001:10001"] == []
    assert services()["valkey"]["user"] == "valkey"
    finals = re.findall(r"^FROM (?:base|\$\{SGLANG_IMAGE\}) AS (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert sorted(finals) == ["reward", "rollout", "rollout-gpu", "trainer"]
    assert DOCKERFILE.read_text().count("\nUSER 10001:10001\n") == 2  # base, and the image that has another base


@pytest.mark.parametrize("files", [COMPOSE_FILES[:1], COMPOSE_FILES], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", OWN)
def test_the_environment_holds_keys_of_the_configuration(name: str, files: tuple[str, ...]) -> None:
    environment = environment_of(name, *files)
    config = build_config(read_yaml(ROOT / "examples" / "demo" / "config.yaml"), {}, environment)
    assert config.redis.url == "redis://valkey:6379/0"
    assert config.token is not None
    assert {config.rollout.port, config.reward.port, config.trainer.port} == {8000}
    assert config.rollout.host == config.reward.host == config.trainer.host == "0.0.0.0"
    trainer = build_config(read_yaml(ROOT / "examples" / "demo" / "config.yaml"), {}, environment_of("trainer", *files))
    own, others = (keys_of(ServiceKind(name), identifying_keys(each)) for each in (config, trainer))
    assert own == others  # else it is a stranger to the run
    assert config.weights.folder == "/penstock/weights"


def test_every_variable_is_explained_and_no_secret_is_committed() -> None:
    text = (ROOT / "docker-compose.yml").read_text() + (ROOT / "compose.gpu.yaml").read_text()
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text))
    lines = [line.partition("=") for line in (ROOT / ".env.example").read_text().splitlines() if line[:1].isupper()]
    assert used - {name for name, _, _ in lines} == set()
    assert {name for name, _, _ in lines} - used == {"COMPOSE_PROFILES"}
    assert {name: value for name, _, value in lines if name in SECRETS} == dict.fromkeys(SECRETS, "")
    assert all(f"${{{name}:?" in text for name in SECRETS)


def test_make_env_writes_secrets_once(tmp_path: Path) -> None:
    for name in ("Makefile", ".env.example"):
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run(["make", "env"], cwd=tmp_path, check=True, capture_output=True)
    written = tmp_path / ".env"
    values = dict(line.split("=", 1) for line in written.read_text().splitlines() if line[:1].isupper())
    assert all(re.fullmatch(r"[0-9a-f]{48}", values[name]) for name in SECRETS)
    assert len({values[name] for name in SECRETS}) == len(SECRETS)
    assert written.stat().st_mode & 0o077 == 0
    before = written.read_bytes()
    again = subprocess.run(["make", "env"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "stays as it is" in again.stdout
    assert written.read_bytes() == before


def test_the_build_sees_no_secrets_and_no_models() -> None:
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    assert patterns[1] == "*"  # after a comment: exclude everything that is not named
    named = {pattern.removeprefix("!") for pattern in patterns[2:] if pattern.startswith("!")}
    copied = set(re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE))
    sources = {source for line in copied for source in line.split()}
    assert [source for source in sources if not any(source.startswith(allowed) for allowed in named)] == []
    assert not any(name.startswith((".env", "models", "runs")) for name in named)


def test_images_have_the_tuning_of_the_launcher() -> None:
    text = DOCKERFILE.read_text()
    assert [f"{name}={value}" for name, value in TUNING.items() if f" {name}={value}" not in text] == []


def test_the_dockerfile_passes_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("no hadolint beside this Python: the extra `dev` has it for Linux on x86-64")
    ran = subprocess.run([str(hadolint), str(DOCKERFILE)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def compose(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """docker compose, without this checkout's .env; the test is skipped if there is no docker compose."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("no docker compose: what it says about docker-compose.yml is not checked")
    return subprocess.run(
        [docker, "compose", *arguments], cwd=folder, capture_output=True, text=True, timeout=START_SECONDS
    )


@pytest.mark.parametrize("files", [COMPOSE_FILES[:1], COMPOSE_FILES], ids=["cpu", "gpu"])
def test_compose_accepts_the_files(tmp_path: Path, files: tuple[str, ...]) -> None:
    settings = tmp_path / "settings"
    text = (ROOT / ".env.example").read_text()
    settings.write_text(re.sub(rf"^({'|'.join(SECRETS)})=$", r"\1=secret", text, flags=re.MULTILINE))
    chosen = [part for name in files for part in ("--file", name)]
    ran = compose("--env-file", str(settings), *chosen, "config", "--quiet")
    assert ran.returncode == 0, ran.stderr


def test_compose_says_what_to_do_where_secrets_are_missing(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docker-compose.yml", tmp_path)
    ran = compose("config", "--quiet", folder=tmp_path)
    assert ran.returncode != 0
    assert 'run "make env" once' in ran.stderr
