"""What a configuration names is looked at: each model that the trainer loads, each server, and no other."""

import asyncio
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock_launch.check.paths import REFERENCE, TEACHER, looks, require_paths
from penstock_launch.doctor.model import WHAT as MODEL
from penstock_launch.doctor.report import Verdict
from tests.unit.reward.teacher.teacher_setup import FakeTeacher, serving
from tests.unit.trainer.model.families import save_family
from tests.unit.trainer.trainer_groups import config_for


@pytest.mark.parametrize(
    ("section", "kl_ctl", "expected"),
    [
        ("ref", 0.0, {}),  # without a KL term it is not loaded
        ("ref", 0.1, {REFERENCE: "ref.path is"}),
        ("teacher", 0.0, {TEACHER: "teacher.path is"}),
    ],
)
def test_a_model_that_is_not_there_is_named_by_its_key(
    qwen3: Path, tmp_path: Path, section: str, kl_ctl: float, expected: dict[str, str]
) -> None:
    config = config_for(qwen3, kl_ctl=kl_ctl, **{section: {"path": str(tmp_path / "absent")}})
    found = {each.what: each.lines() for each in looks(config) if each.what in (REFERENCE, TEACHER)}
    assert found.keys() == expected.keys()
    for what, words in expected.items():
        (line,) = found[what]
        assert line.verdict is Verdict.PROBLEM
        assert line.seen.startswith(words)
        assert "does not exist" in line.seen


async def test_each_server_of_a_teacher_is_asked_what_it_serves(qwen3: Path) -> None:
    async with serving(FakeTeacher()) as gone:
        absent = gone.url
    async with serving(FakeTeacher()) as fake:
        found = looks(config_for(qwen3, teacher={"urls": [fake.url, absent]}))
        first, second = [each.lines for each in found if each.what == TEACHER]
        (line,), (other,) = await asyncio.to_thread(first), await asyncio.to_thread(second)
    assert (line.verdict, other.verdict) == (Verdict.OK, Verdict.PROBLEM)
    assert line.seen == f"{fake.url} serves large, and reads sequences of up to 94 tokens"
    assert other.seen.startswith(f"teacher.urls names {absent}, which gave no answer to /server_info")


@pytest.mark.parametrize("url", ["", "http://elsewhere:30000"])
def test_a_model_that_the_engine_would_build_otherwise_is_a_problem(url: str, tmp_path: Path) -> None:
    """Whoever starts the engine."""
    folder = save_family("qwen3_moe with a dense layer", tmp_path)
    config = config_for(folder, rollout={"engine": {"url": url}})
    (line,) = next(each for each in looks(config) if each.what == MODEL).lines()
    assert line.verdict is Verdict.PROBLEM
    assert "config.json has mlp_only_layers [0]" in line.seen
    with pytest.raises(ConfigError, match="mlp_only_layers"):
        require_paths(config)


def test_the_same_family_with_experts_in_all_layers_is_none(tmp_path: Path) -> None:
    config = config_for(save_family("qwen3_moe", tmp_path))
    (line,) = next(each for each in looks(config) if each.what == MODEL).lines()
    assert line.verdict is Verdict.OK
