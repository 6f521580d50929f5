"""Weights that are read beside generation, against the files; with real SGLang in test_transports_sglang."""

import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is in the trainer's environment")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch.nn import Module, Parameter  # noqa: E402

from penstock_rollout.engine import torch_ahead  # noqa: E402

Tensors = Iterable[tuple[str, Any]]


class Model(Module):
    """As SGLang's models: weights of several tensors, padding, and how they are loaded is the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = Parameter(torch.zeros(6, 4), requires_grad=False)
        self.embedding = Parameter(torch.zeros(5, 4, dtype=torch.bfloat16), requires_grad=False)

    def load_weights(self, tensors: Tensors) -> None:
        for name, tensor in tensors:
            if name == "embedding":
                self.embedding.data[:3].copy_(tensor)
                self.embedding.data[3:].fill_(0)
            else:
                first = 0 if name == "gate" else 3
                self.gate_up.data.narrow(0, first, 3).copy_(tensor.t())

    def holds(self, folder: Path) -> bool:
        tensors = load_file(folder / "model.safetensors")
        gate_up = torch.cat([tensors["gate"].t(), tensors["up"].t()])
        embedding = torch.cat([tensors["embedding"].bfloat16(), torch.zeros(2, 4, dtype=torch.bfloat16)])
        return bool(torch.equal(self.gate_up, gate_up) and torch.equal(self.embedding, embedding))


class Scaling(Model):
    def load_weights(self, tensors: Tensors) -> None:
        super().load_weights((name, tensor * 1) for name, tensor in tensors)


class Adding(Model):
    def load_weights(self, tensors: Tensors) -> None:
        self.gate_up.data.add_(1)
        super().load_weights(tensors)


class Tied(Model):
    def __init__(self) -> None:
        super().__init__()
        self.head = Parameter(self.embedding.data, requires_grad=False)


class Deriving(Model):
    def post_load_weights(self) -> None:
        """Makes more of them."""


class Scheduler:
    """The process of a model that SGLang updates; `num_loads` counts what SGLang did itself."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.num_loads = 0
        self.model_config = SimpleNamespace(model_path="")
        self._ahead = next(iter(torch_ahead.hooks().values()))

    def get_model(self) -> Model:
        return self.model

    def update_model_fields(self, model: Model, *, model_path: str, load_format: str, load_config: Any) -> None:
        assert (model, self.model_config.model_path, load_format) == (self.model, model_path, "auto")

    def update(self, folder: Path) -> None:
        def original(updater: Any, model_path: str, load_format: str, *, recapture_cuda_graph: bool) -> Any:
            self.num_loads += 1
            self.model.load_weights(iter(load_file(Path(model_path) / "model.safetensors").items()))
            return True, ""

        assert self._ahead(original, self, str(folder), "auto", recapture_cuda_graph=False)[0]


@pytest.fixture(autouse=True)
def address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Of the socket, one for each test."""
    monkeypatch.setenv(torch_ahead.ADDRESS, str(tmp_path))
    config = ModuleType("sglang.srt.configs.load_config")
    config.LoadConfig = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang.srt.configs.load_config", config)
    return str(tmp_path)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return list(_written(tmp_path))


def _written(root: Path) -> Iterator[Path]:
    for seed in range(4):
        torch.manual_seed(seed)
        (root / str(seed)).mkdir()
        tensors = {"gate": torch.randn(4, 3), "up": torch.randn(4, 3), "embedding": torch.randn(3, 4)}
        save_file(tensors, root / str(seed) / "model.safetensors")
        yield root / str(seed)


def read_ahead(address: str, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(f"\0{address}")
        asking.sendall(str(folder).encode())
        asking.shutdown(socket.SHUT_WR)
        asking.settimeout(10)
        assert asking.recv(1) == b""


def test_what_was_read_is_exchanged_again_and_again(folders: list[Path], address: str) -> None:
    scheduler = Scheduler(Model())
    scheduler.update(folders[0])
    for number in (1, 2, 3, 0):
        read_ahead(address, folders[number])
        assert scheduler.model.holds(folders[number - 1])  # until the update
        scheduler.update(folders[number])
        assert scheduler.model.holds(folders[number])
    assert scheduler.num_loads == 1


def test_only_the_folder_that_was_read_last_is_exchanged_and_only_once(folders: list[Path], address: str) -> None:
    scheduler = Scheduler(Model())
    scheduler.update(folders[0])
    read_ahead(address, folders[1])
    read_ahead(address, folders[2])
    for number, num_loads in ((1, 2), (2, 3), (2, 4)):
        scheduler.update(folders[number])
        assert (scheduler.model.holds(folders[number]), scheduler.num_loads) == (True, num_loads)


@pytest.mark.parametrize("missing", ["up", "file"])
def test_a_folder_that_lacks_weights_is_left_to_sglang(
    folders: list[Path], address: str, missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = Scheduler(Model())
    scheduler.update(folders[0])
    path = folders[1] / "model.safetensors"
    whole = path.read_bytes()
    if missing == "up":
        save_file({name: tensor for name, tensor in load_file(path).items() if name != "up"}, path)
    else:
        path.write_bytes(whole[:100])
    read_ahead(address, folders[1])
    path.write_bytes(whole)
    scheduler.update(folders[1])
    assert (scheduler.model.holds(folders[1]), scheduler.num_loads) == (True, 2)
    assert "could not be read beside generation" in caplog.text
    read_ahead(address, folders[2])
    scheduler.update(folders[2])
    assert (scheduler.model.holds(folders[2]), scheduler.num_loads) == (True, 2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Scaling, "is no copy of"),
        (Adding, "add_.Tensor writes to gate_up"),
        (Tied, "head shares its memory"),
        (Deriving, "it derives more from them"),
    ],
)
def test_a_model_of_more_than_copies_is_left_to_sglang(
    folders: list[Path], address: str, model: type[Model], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = Scheduler(model())
    for number in range(3):
        scheduler.update(folders[number])
        assert scheduler.model.holds(folders[number])
        with pytest.raises(ConnectionRefusedError):
            read_ahead(address, folders[number])
    assert scheduler.num_loads == 3
    assert caplog.text.count(reason) == 1


def test_no_second_copy_is_made_where_there_is_no_room(
    folders: list[Path], address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    scheduler = Scheduler(Model())
    scheduler.update(folders[0])
    with pytest.raises(ConnectionRefusedError):
        read_ahead(address, folders[1])
    assert "GiB of memory left" in caplog.text
