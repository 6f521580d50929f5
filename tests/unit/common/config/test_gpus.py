"""The keys that name GPUs: how they may be written, and which do not fit together."""

from pathlib import Path

import pytest

from penstock.config import Config
from penstock.config.load import load_config
from penstock.errors import ConfigError

YAML = "actor: {path: some/model}\ndata: {train: {path: prompts.jsonl}}\n"
UUID = "GPU-00000001-1111-2222-3333-444444444444"
MIG = "MIG-00000001-1111-2222-3333-444444444444"


def load(folder: Path, *arguments: str, yaml: str = "") -> Config:
    path = folder / "config.yaml"
    path.write_text(YAML + yaml)
    return load_config(["--config", str(path), *arguments], {})


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("[0, 1]", ("0", "1")),
        ("0", ("0",)),
        ("0,1", ("0", "1")),
        ("'0, 1'", ("0", "1")),
        ("[]", ()),
        ("''", ()),
        ("", ()),
        (UUID, (UUID,)),
        (f"[{UUID}, 3, {MIG}]", (UUID, "3", MIG)),
        ("MIG-GPU-00000001-1111-2222-3333-444444444444/1/0", ("MIG-GPU-00000001-1111-2222-3333-444444444444/1/0",)),
    ],
)
def test_gpus_are_named_as_nvidia_smi_shows_them(tmp_path: Path, yaml: str, expected: tuple[str, ...]) -> None:
    assert load(tmp_path, yaml=f"trainer:\n  gpus: {yaml}\n").trainer.gpus == expected
    assert load(tmp_path, "--rollout.gpus", yaml).rollout.gpus == expected


@pytest.mark.parametrize("value", ["-1", "cuda:0", "true", "[0, 0]", "1.5", "all", "[[0]]"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.gpus"):
        load(tmp_path, "--trainer.gpus", value)


def test_a_name_that_is_none_is_answered_with_what_is_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"saw 'cuda:0'; expected a number as nvidia-smi shows it, or a UUID"):
        load(tmp_path, "--trainer.gpus", "cuda:0")


def test_a_server_has_a_gpu_for_each_shard_unless_more_are_given(tmp_path: Path) -> None:
    assert load(tmp_path).rollout.engine.num_gpus == 1
    two = load(tmp_path, "--rollout.engine.tensor_parallel_size", "2")
    assert two.rollout.engine.num_gpus == 2
    pipeline = ("--rollout.engine.gpus_per_server", "4", "--rollout.engine.extra_args", "[--pp-size, '2']")
    four = load(tmp_path, "--rollout.engine.tensor_parallel_size", "2", *pipeline)
    assert four.rollout.engine.num_gpus == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--rollout.engine.extra_args", "[--tp-size, '2']"), "holds --tp-size.*rollout.engine.tensor_parallel_size"),
        (("--rollout.engine.extra_args", "[--tensor-parallel-size=2]"), "rollout.engine.tensor_parallel_size instead"),
        (("--rollout.engine.extra_args", "[--tp, '2']"), "holds --tp-size.*rollout.engine.tensor_parallel_size"),
        (("--rollout.engine.extra_args", "[--base-gpu-id=1]"), "expected rollout.gpus instead"),
        (
            ("--rollout.engine.tensor_parallel_size", "2", "--rollout.engine.gpus_per_server", "3"),
            "gpus_per_server is 3 and tensor_parallel_size 2: expected a multiple",
        ),
        (
            ("--rollout.engine.tensor_parallel_size", "2", "--rollout.engine.gpus_per_server", "1"),
            "gpus_per_server is 1 and tensor_parallel_size 2: expected a multiple",
        ),
        (("--rollout.engine.gpus_per_server", "2"), "the server would not use the others; raise tensor_parallel_size"),
    ],
)
def test_an_engine_has_the_gpus_that_the_keys_say(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, *arguments)


@pytest.mark.parametrize(
    "flag", ['["--mem-fraction-static", "0.4"]', '["--mem-fraction", "0.4"]', '["--mem-fraction-static=0.4"]']
)
def test_an_engines_share_of_memory_is_said_once(tmp_path: Path, flag: str) -> None:
    arguments = ("--rollout.engine.extra_args", flag)
    assert load(tmp_path, *arguments).rollout.engine.memory_fraction == 0
    with pytest.raises(ConfigError, match=r"memory_fraction is 0\.5, and extra_args hold --mem-fraction-static too"):
        load(tmp_path, *arguments, "--rollout.engine.memory_fraction", "0.5")


@pytest.mark.parametrize(
    ("device", "arguments", "expected"),
    [
        ("cpu", ("--trainer.host", "10.0.0.1"), "disk"),
        ("cuda", (), "disk"),
        ("cuda", ("--trainer.host", "::1"), "disk"),
        ("cuda", ("--trainer.host", "10.0.0.1"), "nccl"),
        ("cuda", ("--trainer.gpus", "1", "--rollout.gpus", "0"), "nccl"),
        ("cuda", ("--trainer.gpus", "0,1", "--rollout.gpus", "1", "--trainer.host", "10.0.0.1"), "disk"),
        ("cuda", ("--trainer.gpus", MIG, "--rollout.gpus", UUID), "disk"),
        ("cuda", ("--trainer.gpus", "0"), "disk"),
        ("cpu", ("--trainer.gpus", "1", "--rollout.gpus", "0"), "disk"),
        ("cuda", ("--trainer.host", "10.0.0.1", "--weights.transport", "tensor"), "tensor"),
        ("cpu", ("--weights.transport", "nccl"), "nccl"),
    ],
)
def test_auto_is_nccl_only_between_gpus_of_their_own(
    tmp_path: Path, device: str, arguments: tuple[str, ...], expected: str
) -> None:
    assert load(tmp_path, *arguments).transport_from(device) == expected
