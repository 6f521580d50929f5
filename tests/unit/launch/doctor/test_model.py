"""What the doctor says of actor.path."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from penstock.errors import WeightsError
from penstock.weights.manifest import tensor_shapes
from penstock_launch.doctor.model import model_line, num_weights_of

TWO = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F32", "shape": [5], "data_offsets": [24, 44]},
}


def safetensors(path: Path, header: Mapping[str, object] = TWO, num_bytes: int = 44) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_bytes))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    safetensors(tmp_path / "model-00001-of-00002.safetensors")
    safetensors(tmp_path / "model-00002-of-00002.safetensors")
    return tmp_path


def test_a_complete_folder_is_counted(folder: Path) -> None:
    line = model_line(str(folder))
    assert line.verdict == "ok", line
    assert "0.0 million weights" in line.seen
    assert num_weights_of(str(folder)) == 22


def test_a_real_model_has_as_many_weights_as_torch_counts(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert num_weights_of(str(tiny_model)) == sum(each.numel() for each in model.parameters())


def test_a_hub_name_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_line("owner/name").verdict == "not looked at"
    assert num_weights_of("owner/name") == 0
    assert "--config" in model_line("").seen


def test_a_missing_folder_is_refused_as_services_do(tmp_path: Path) -> None:
    line = model_line(str(tmp_path / "gone"))
    assert (line.verdict, num_weights_of(str(tmp_path / "gone"))) == ("problem", 0)
    assert "does not exist: expected a Hugging Face model folder" in line.seen
    assert "actor.path" in line.advice


@pytest.mark.parametrize("num_bytes", [0, 20])
def test_a_copy_that_was_cut_is_found(folder: Path, num_bytes: int) -> None:
    path = safetensors(folder / "model-00002-of-00002.safetensors", num_bytes=num_bytes)
    line = model_line(str(folder))
    assert line.verdict == "problem"
    assert f"{path} holds {num_bytes} bytes of tensors: expected 44" in line.seen
    assert "copy the model again" in line.advice


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x02\x00\x00\x00\x00\x00\x00\x00[]"])
def test_a_file_of_something_else_is_found(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="expected a safetensors file"):
        tensor_shapes(path)


def test_a_malformed_record_is_found(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "model.safetensors", {"a": {"dtype": "F32", "shape": [2]}})
    with pytest.raises(WeightsError, match="record of a tensor is malformed"):
        tensor_shapes(path)


def test_a_broken_config_json_is_found(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    line = model_line(str(folder))
    assert (line.verdict, "is not JSON" in line.seen) == ("problem", True)


def test_a_folder_without_weights_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert model_line(str(tmp_path)).verdict == "warning"
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(2**20))
    assert model_line(str(tmp_path)).seen.endswith(": 1 MiB of files")
