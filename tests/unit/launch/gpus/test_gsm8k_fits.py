"""The GSM8K example's configurations for one H200 are valid, and the estimate of memory says that they fit."""

import json
from pathlib import Path

import pytest

from penstock.config import Config
from penstock.config.load import load_config
from penstock.errors import ConfigError
from penstock_launch.gpus.shares import place
from tests.gpus import FakeGpu, host_with_gpus

EXAMPLE = Path(__file__).parents[4] / "examples" / "gsm8k"
H200 = FakeGpu(name="NVIDIA H200", memory_mib=143771)
# What the hub's config.json of each model says.
SHAPES = {
    "h200-0.5b.yaml": {"hidden_size": 896, "intermediate_size": 4864, "layers": 24, "num_attention_heads": 14},
    "h200-1.5b.yaml": {"hidden_size": 1536, "intermediate_size": 8960, "layers": 28, "num_attention_heads": 12},
}


def model(folder: Path, name: str) -> str:
    """A folder with the config.json of a Qwen2.5 and no weights."""
    shape = dict(SHAPES[name])
    document = {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "num_hidden_layers": shape.pop("layers"),
        "num_key_value_heads": 2,
        **shape,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(document))
    return str(folder)


def on_one_h200(folder: Path, name: str, *words: str) -> tuple[Config, list[str]]:
    """The configuration, and what the launcher says of its memory on a host with one H200."""
    files = [word for path in ("config.yaml", name) for word in ("--config", str(EXAMPLE / path))]
    here = ["--actor.path", model(folder / "model", name), "--trainer.device", "auto"]  # torch may be a build for CPUs
    config = load_config([*files, *here, *words], {})
    return config, place(config, host_with_gpus(folder / "bin", [H200])).lines()


@pytest.mark.parametrize("name", SHAPES)
def test_a_configuration_fits_one_h200(tmp_path: Path, name: str) -> None:
    config, lines = on_one_h200(tmp_path, name)
    assert [line for line in lines if "GPU 0: trainer" in line and "of 140.4 GiB" in line]
    assert not any("may run out" in line or "fewer than" in line for line in lines), lines
    assert config.rollout.engine.context_length >= 1024 + config.sampling.max_new_tokens
    assert config.data.eval is not None
    assert config.data.eval.size == 0


def test_a_batch_that_is_too_large_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not fit side by side"):
        on_one_h200(tmp_path, "h200-1.5b.yaml", "--actor.max_tokens_per_micro_batch", "2000000")


def test_the_values_are_those_of_areals_example(tmp_path: Path) -> None:
    config, _ = on_one_h200(tmp_path, "h200-1.5b.yaml")
    assert (config.optimizer.lr, config.actor.group_size, config.sampling.max_new_tokens) == (1.7e-5, 4, 1024)
    assert (config.staleness.max_staleness, config.data.batch_size, config.loss.eps_clip) == (2, 256, 0.4)
