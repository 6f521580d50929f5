"""What a run needs of this host: the least memory, from the formulas that placement uses."""

from pathlib import Path

import pytest

from penstock.config import Config
from penstock_launch.check.resources import MEMORY, least_bytes, memory_line, memory_lines
from penstock_launch.gpus.model_shape import read_shape

NO_GPU = {"PATH": "/nonexistent"}


def config_of(model: Path, **sections: object) -> Config:
    return Config.model_validate(
        {
            "actor": {"path": str(model), "dtype": "float32", **sections.pop("actor", {})},  # type: ignore[dict-item]
            "data": {"train": {"path": "unused"}},
            "rollout": {"engine": {"dtype": "float32"}},
            "weights": {"folder": str(model.parent / "weights")},  # on disk: it counts for none
            **sections,
        }
    )


def test_each_weight_is_held_with_its_gradient_and_moments_copied_and_in_each_engine(each_model: Path) -> None:
    shape = read_shape(str(each_model))
    trained, copy, engine = 4 + 4 + 8, 4 + 8, 4
    assert least_bytes(config_of(each_model), shape) == (trained + copy + engine) * shape.num_weights
    with_reference = config_of(each_model, kl_ctl=0.1)
    assert least_bytes(with_reference, shape) == (trained + 4 + copy + engine) * shape.num_weights


def test_an_adapter_alone_has_gradients_and_moments(qwen3: Path) -> None:
    shape = read_shape(str(qwen3))
    adapted = least_bytes(config_of(qwen3, actor={"lora": {"rank": 1}}), shape)
    assert adapted < least_bytes(config_of(qwen3), shape) / 2


def test_versions_in_memory_and_engines_of_others(qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, on_disk = read_shape(str(qwen3)), config_of(qwen3)
    monkeypatch.setattr("penstock_launch.check.resources.shared_memory", lambda _: Path("/dev/shm"))
    in_memory = config_of(qwen3, weights={})
    assert least_bytes(in_memory, shape) - least_bytes(on_disk, shape) == 3 * 4 * shape.num_weights
    given = config_of(qwen3, rollout={"engine": {"url": "http://127.0.0.1:1", "dtype": "float32"}})
    assert least_bytes(on_disk, shape) - least_bytes(given, shape) == 4 * shape.num_weights


def test_too_little_memory_is_a_problem_and_an_unknown_model_is_not() -> None:
    assert memory_line(2**30, 2**31).verdict == "ok"
    short = memory_line(2**31, 2**30)
    assert short.verdict == "problem"
    assert "actor.lora.rank" in short.advice
    [unknown] = memory_lines(config_of(Path("owner/of-the-hub")), NO_GPU)
    assert (unknown.verdict, unknown.what) == ("not looked at", MEMORY)
