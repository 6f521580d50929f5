"""Promises of docker-compose.yml and the Dockerfile, checked without a container engine."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.config.identity import identifying_keys, keys_of
from penstock.config.load import build_config
from penstock.config.sources import read_yaml
from penstock.contracts import ServiceKind
from penstock_launch.services import COMMON_TUNING, TUNING
from penstock_trainer.telemetry.scrape_targets import SUFFIX
from tests.patience import START_SECONDS
from tests.unit.repository.dockerfile import environment_of as environment_of_image
from tests.unit.repository.dockerfile import finals, lineage, value_of

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
COMPOSE_FILES = ("docker-compose.yml", "compose.gpu.yaml")
OWN = ("rollout", "agent", "reward", "trainer")
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


def filled_in(text: str, settings: Mapping[str, str]) -> str:
    """A text of a compose file with the variables of an .env file in it, by compose's rules; secrets are made up."""

    def value(found: re.Match[str]) -> str:
        name, rule, word = found.groups()
        is_set = bool(settings.get(name))
        if rule == ":+":
            return str(word) if is_set else ""
        return settings[name] if is_set else "secret" if rule == ":?" else str(word)

    return re.sub(r"\$\{(\w+)(:[-+?])([^}]*)\}", value, text)


def environment_of(service: str, *files: str, **settings: str) -> dict[str, str]:
    """A service's variables, those of later files over earlier ones, with an .env file's settings in them."""
    variables: dict[str, str | None] = {}
    for name in files:
        variables |= read(name)["services"].get(service, {}).get("environment", {})
    return {
        name: filled_in(value, settings)
        for name, value in variables.items()
        if value is not None  # not set in .env either
    }


def gpu_services() -> dict[str, Any]:
    """The services that have GPUs, as compose.gpu.yaml states them."""
    found: dict[str, Any] = read("compose.gpu.yaml")["services"]
    return found


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
    images = {name: value_of(name, "USER") for name in finals()}
    assert images == dict.fromkeys(
        ("reward", "agent", "trainer", "model", "rollout", "trainer-gpu", "rollout-gpu"), "10001:10001"
    )


@pytest.mark.parametrize("files", [COMPOSE_FILES[:1], COMPOSE_FILES], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", OWN)
def test_the_environment_holds_keys_of_the_configuration(name: str, files: tuple[str, ...]) -> None:
    environment = environment_of(name, *files)
    config = build_config(read_yaml(ROOT / "examples" / "demo" / "config.yaml"), {}, environment)
    assert config.redis.url == "redis://valkey:6379/0"
    assert config.token is not None
    sections = (config.rollout, config.agent, config.reward, config.trainer)
    assert {(each.host, each.port) for each in sections} == {("0.0.0.0", 8000)}
    trainer = build_config(read_yaml(ROOT / "examples" / "demo" / "config.yaml"), {}, environment_of("trainer", *files))
    own, others = (keys_of(ServiceKind(name), identifying_keys(each)) for each in (config, trainer))
    assert own == others  # else it is a stranger to the run
    assert config.weights.folder == "/penstock/weights"


def test_a_run_without_episodes_has_no_agent_service() -> None:
    assert services()["agent"]["profiles"] == ["agent"]
    assert [name for name, service in services().items() if "profiles" in service] == ["model", "agent"]
    assert not [name for name, service in services().items() if "agent" in service.get("depends_on", {})]
    settings = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert settings["COMPOSE_PROFILES"] == "demo"


def test_prometheus_reads_the_list_of_services_that_the_trainer_keeps() -> None:
    folder = ROOT / "deploy" / "prometheus"
    [job] = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    [pattern] = job["file_sd_configs"][0]["files"]
    mounted = dict(volume.split(":")[:2] for volume in services()["prometheus"]["volumes"])
    lists = os.path.normpath(os.path.join(mounted["./deploy/prometheus"], pattern))
    written = dict(volume.split(":")[:2] for volume in services()["trainer"]["volumes"])
    config = build_config(read_yaml(ROOT / "examples/demo/config.yaml"), {}, environment_of("trainer", *COMPOSE_FILES))
    assert written["runs"] == f"/penstock/{config.run.root}"
    assert lists == f"{mounted['runs']}/*{SUFFIX}"


def test_environments_and_reward_functions_are_found_in_the_same_folder() -> None:
    files = "./${FILES:-examples}:/penstock/${FILES:-examples}:ro"
    assert [name for name in OWN if files not in services()[name]["volumes"]] == []
    assert "${MODELS:-models}:/penstock/models:ro" in services()["agent"]["volumes"]  # its tokenizer


def test_every_variable_is_explained_and_no_secret_is_committed() -> None:
    text = (ROOT / "docker-compose.yml").read_text() + (ROOT / "compose.gpu.yaml").read_text()
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text))
    lines = [line.partition("=") for line in (ROOT / ".env.example").read_text().splitlines() if line[:1].isupper()]
    assert used - {name for name, _, _ in lines} == set()
    assert {name for name, _, _ in lines} - used == {"COMPOSE_PROFILES"}
    passed = {name for each in gpu_services().values() for name, value in each["environment"].items() if value is None}
    examples = re.findall(r"^# (\w+)=\S+$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert sorted(passed) == sorted(examples)  # set and empty would be a value
    assert {name: value for name, _, value in lines if name in SECRETS} == dict.fromkeys(SECRETS, "")
    assert all(f"${{{name}:?" in text for name in SECRETS)


LAYOUTS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "the defaults": ({}, {"rollout": "0", "trainer": "1"}),
    "one GPU for both": ({"TRAINER_GPUS": "0"}, {"rollout": "0", "trainer": "0"}),
    "two for each": (
        {"ROLLOUT_GPUS": "0,1", "TRAINER_GPUS": "2,3"},
        {"rollout": "0,1", "trainer": "2,3"},
    ),
    "four servers and four ranks": (
        {"ROLLOUT_2_GPUS": "1", "ROLLOUT_3_GPUS": "2", "ROLLOUT_4_GPUS": "3", "TRAINER_GPUS": "4,5,6,7"},
        {"rollout": "0", "rollout-2": "1", "rollout-3": "2", "rollout-4": "3", "trainer": "4,5,6,7"},
    ),
    "UUIDs and parts": (
        {"ROLLOUT_GPUS": "MIG-8f2c", "ROLLOUT_2_GPUS": "", "TRAINER_GPUS": "GPU-51d0,GPU-77aa"},
        {"rollout": "MIG-8f2c", "trainer": "GPU-51d0,GPU-77aa"},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_settings_alone_place_the_services_on_gpus(layout: str) -> None:
    settings, expected = LAYOUTS[layout]
    running = {
        name: filled_in(service["environment"]["CUDA_VISIBLE_DEVICES"], settings)
        for name, service in gpu_services().items()
        if int(filled_in(service.get("scale", "1"), settings)) == 1
    }
    assert running == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_travel_as_the_gpus_allow(layout: str) -> None:
    settings, running = LAYOUTS[layout]
    servers = [gpu for name, gpus in running.items() if name != "trainer" for gpu in gpus.split(",")]
    for name in ("rollout", "trainer"):
        environment = environment_of(name, *COMPOSE_FILES, **settings)
        config = build_config(read_yaml(ROOT / "examples" / "demo" / "config.yaml"), {}, environment)
        assert list(config.rollout.gpus) == servers
        assert list(config.trainer.gpus) == running["trainer"].split(",")
        assert config.transport_from("cuda") == (
            "disk" if layout in ("one GPU for both", "UUIDs and parts") else "nccl"
        )


@pytest.mark.parametrize("name", sorted(gpu_services()))
def test_every_way_to_give_a_container_gpus_works(name: str) -> None:
    """Docker joins several ids in one mode of the Container Toolkit only; `all` and CUDA's own variable always work."""
    service = gpu_services()[name]
    [device] = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert service["environment"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "NVIDIA_VISIBLE_DEVICES" not in service["environment"]


def test_further_rollout_servers_are_like_the_first() -> None:
    first = gpu_services()["rollout"]
    further = {name: each for name, each in gpu_services().items() if name not in ("rollout", "trainer")}
    assert list(further) == [f"rollout-{number}" for number in range(2, 8)]
    for name, service in further.items():
        variable = f"ROLLOUT_{name.removeprefix('rollout-')}_GPUS"
        assert service["extends"] == {"file": "docker-compose.yml", "service": "rollout"}
        assert service["scale"] == f"0${{{variable}:+1}}"
        assert service["environment"] == first["environment"] | {"CUDA_VISIBLE_DEVICES": f"${{{variable}:-}}"}
        same = service.keys() - {"extends", "scale", "environment"}
        assert {key: service[key] for key in same} == {key: first[key] for key in first if key != "environment"}


@pytest.mark.parametrize("name", sorted(gpu_services()))
def test_compiled_kernels_lie_where_they_may_be_executed(name: str) -> None:
    """And where they outlive the container. /tmp is neither; a read-only container has no other place."""
    service = gpu_services()[name]
    image = environment_of_image(service["build"]["target"])
    set_here = {name: value for name, value in service["environment"].items() if value is not None}
    [volume] = service["volumes"]
    source, _, target = volume.partition(":")
    assert source in read("compose.gpu.yaml")["volumes"]
    assert (image | set_here)["HOME"] == target
    caches = {name: value for name, value in (image | set_here).items() if "CACHE" in name}
    assert [name for name, value in caches.items() if not value.startswith(f"{target}/")] == []
    others = [each for other, each in gpu_services().items() if other.partition("-")[0] != name.partition("-")[0]]
    assert [each for each in others if volume in each["volumes"]] == []  # one side cannot change what another executes


def test_only_images_that_compile_kernels_hold_a_compiler() -> None:
    """SGLang's own image, the base of rollout-gpu, brings one with CUDA's."""
    installed = {
        name: {
            word for stage in lineage(name) for line in stage.all_of("RUN") for word in line.split() if "apt" in line
        }
        for name in finals()
    }
    assert {"g++", "libc6-dev"} <= installed["trainer-gpu"]
    assert {name for name, words in installed.items() if words} == {"trainer-gpu"}


@pytest.mark.parametrize("stage", ["trainer", "trainer-gpu"])
def test_a_trainer_starts_any_number_of_ranks(stage: str) -> None:
    assert value_of(stage, "ENTRYPOINT") == '["python", "-m", "penstock_trainer.torchrun"]'
    assert [name for name in COMPOSE_FILES if "entrypoint" in read(name)["services"]["trainer"]] == []


def test_torch_takes_the_caches_of_the_image(tmp_path: Path) -> None:
    """What torch and Triton make of the variables, in a process of their own."""
    image = environment_of_image("trainer-gpu")
    own = {name: value.replace("/penstock/cache", str(tmp_path)) for name, value in image.items() if name != "PATH"}
    asked = (
        "from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir; "
        "print(cache_dir(), triton_cache_dir(0), sep='\\n')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", asked], env=own, check=True, capture_output=True, text=True, timeout=START_SECONDS
    )
    assert [Path(line).relative_to(tmp_path).name for line in ran.stdout.splitlines()] == ["inductor", "triton"]


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
    for stage in ("reward", "agent", "rollout", "trainer"):
        assert environment_of_image(stage) == environment_of_image(stage) | TUNING
    on_gpu = environment_of_image("trainer-gpu")
    assert on_gpu == on_gpu | COMMON_TUNING
    assert [name for name in TUNING.keys() - COMMON_TUNING.keys() if name in on_gpu] == []


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
