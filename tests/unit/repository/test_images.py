"""Each image starts: its entry point finds all that it imports in exactly what the Dockerfile installs."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from penstock_launch.envs.environment import INSTALLS
from tests.unit.repository.containers import IMPORT_ALL, SITE, Containers, left_out
from tests.unit.repository.dockerfile import (
    PREFIX,
    ROOT,
    defaults,
    finals,
    installs,
    project,
    stages,
    value_of,
    versions_file,
)
from tests.unit.repository.installed import closure, here, normalized

SERVICES = ("rollout", "agent", "reward", "trainer")  # extras that their images cannot do without


def entry_of(stage: str) -> str:
    """The module that an image runs."""
    python, option, module = json.loads(value_of(stage, "ENTRYPOINT"))
    assert (python, option) == ("python", "-m")
    return str(module)


def versions_in(name: str) -> dict[str, str]:
    """The pins of a list of versions."""
    lines = versions_file(name).read_text(encoding="utf-8").splitlines()
    return {normalized(pin[1]): pin[2] for line in lines if (pin := re.match(r"([\w.-]+)==([^\s;]+)", line))}


@pytest.mark.parametrize("stage", sorted(finals()))
def test_an_image_holds_all_that_its_entry_point_imports(stage: str, containers: Containers) -> None:
    names = closure(SITE, installs(stage, PREFIX))
    assert project()["name"] in names
    entry = entry_of(stage)
    module = entry if "." in entry else f"{entry}.__main__"
    ran = containers.run_once(names, str(IMPORT_ALL), module, *left_out(names, SERVICES))
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("stage", sorted(finals().keys() - {"model"}))
def test_an_image_starts_as_far_as_its_configuration(stage: str, containers: Containers) -> None:
    ran = containers.run_once(closure(SITE, installs(stage, PREFIX)), "-m", entry_of(stage), "--config", "absent.yaml")
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert "absent.yaml" in ran.stderr


def test_no_image_holds_tools_of_the_developers() -> None:
    """And so a test of an image would fail if its folder held more than the image does."""
    for stage in finals():
        assert closure(SITE, installs(stage, PREFIX)) & {"pytest", "mypy", "ruff", "pip", "hatchling"} == set()


TOKENIZES = """
import importlib.util
import renderers  # imports an OpenAI client
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained("model")
loaded = AutoTokenizer.from_pretrained("model", local_files_only=True)
template = "{% for message in messages %}{{ message.content }}{% endfor %}"
messages = [{"role": "user", "content": "b"}]
print(loaded.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=False))
print(importlib.util.find_spec("torch"))
"""


def test_the_agent_image_tokenizes_without_torch(containers: Containers) -> None:
    ran = containers.run(closure(SITE, installs("agent", PREFIX)), "-c", TOKENIZES)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-2:] == ["[1]", "None"]


def test_a_module_outside_the_lists_cannot_be_imported(containers: Containers) -> None:
    names = closure(SITE, installs("reward", PREFIX))
    ran = containers.run(names, "-c", "import torch")
    assert ran.returncode == 1
    assert "No module named 'torch'" in ran.stderr


def test_make_envs_makes_the_environment_of_sglang_that_the_image_has() -> None:
    """So the tests that start a real engine also show that the image's engine starts."""
    sites = list((ROOT / ".venv-sglang").glob("lib/python3*/site-packages"))
    if not sites:
        pytest.skip("no .venv-sglang: `make envs` makes it")
    [site] = sites
    if "sglang-kernel" in here(site):
        pytest.skip("this .venv-sglang is for CUDA; the image for GPUs is SGLang's own")
    assert here(site).keys() - closure(site, installs("rollout", "/opt/sglang")) <= {"pip", "setuptools"}


def test_the_image_installs_sglang_in_the_order_of_make_envs() -> None:
    asked = [" ".join(words) for _, words in INSTALLS["cpu"]]
    found = [
        f"--constraint {each.constraint} {'' if each.with_dependencies else '--no-deps '}{' '.join(each.requirements)}"
        for each in installs("sglang-env", "/opt/sglang")
    ]
    listed = " ".join(versions_file("sglang-requirements.txt").read_text(encoding="utf-8").splitlines()[1:])
    assert found == [words.replace("--requirement sglang-requirements.txt", listed) for words in asked]


def test_sglang_has_one_python_in_all_images() -> None:
    engine = "/opt/sglang/bin/python"
    [copied] = [line for line in stages()["rollout"].all_of("COPY") if line.endswith(" /opt/sglang")]
    assert copied == "--from=sglang-env /opt/sglang /opt/sglang"
    assert any(f"{engine} -c 'from importlib.metadata" in line for line in stages()["rollout-gpu"].all_of("RUN"))
    for name in ("docker-compose.yml", "compose.gpu.yaml"):
        paths = re.findall(r"PENSTOCK_ROLLOUT__ENGINE__PYTHON: (\S+)", (ROOT / name).read_text(encoding="utf-8"))
        assert set(paths) <= {engine}


def test_every_file_names_the_same_image_of_sglang() -> None:
    """With the version that the lock for CUDA has: the one that was resolved together with torch."""
    image = defaults()["SGLANG_IMAGE"]
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("compose.gpu.yaml", ".env.example")}
    assert {name: set(re.findall(r"lmsysorg/sglang:[\w.-]+", text)) for name, text in texts.items()} == {
        name: {image} for name in texts
    }
    assert image == f"lmsysorg/sglang:v{versions_in('sglang-cuda.txt')['sglang']}"


def test_the_trainer_for_gpus_has_the_versions_of_the_lock(tmp_path: Path) -> None:
    """Those of the lock for CUDA, as the stage's own command takes them from it."""
    [install] = [each for each in installs("trainer-gpu", PREFIX) if each.with_dependencies]
    [script] = [run for run in stages()["trainer-gpu-env"].all_of("RUN") if f"> {install.constraint}" in run]
    [command] = [part for part in script.split("&&") if f"> {install.constraint}" in part]
    shutil.copy(ROOT / "constraints" / "services-cuda.txt", tmp_path)
    subprocess.run(["sh", "-ec", command[command.index("sed") :]], cwd=tmp_path, check=True)
    pins = (tmp_path / install.constraint).read_text(encoding="utf-8").splitlines()
    names = {normalized(Requirement(pin).name) for pin in pins}
    assert names == versions_in("services-cuda.txt").keys()
    assert closure(SITE, [install]) - names <= {project()["name"]}  # nothing is installed in a version of pip's choice
    assert f"torch=={versions_in('sglang-cuda.txt')['torch']}" in pins
