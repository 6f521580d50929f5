"""Weights that are prefetched during generation, against the files; with real SGLang in test_transports_sglang."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock_rollout.engine.sglang.inside import prefetch as prefetch_hook
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.inside.prefetch_models import (
    Adding,
    Buffered,
    Deriving,
    Gate,
    Model,
    Remembering,
    Replacing,
    Scaling,
    Threaded,
    Tied,
    Viewing,
)


class Scheduler:
    """The process of a model that SGLang updates; `num_loads` counts what SGLang did itself."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.num_loads = 0
        self.model_config = SimpleNamespace(model_path="")
        self._hook = next(iter(prefetch_hook.hooks().values()))

    def get_model(self) -> Model:
        return self.model

    def update_model_fields(self, model: Model, *, model_path: str, load_format: str, load_config: Any) -> None:
        assert (model, self.model_config.model_path, load_format) == (self.model, model_path, "auto")

    def update(self, folder: Path) -> None:
        def original(updater: Any, model_path: str, load_format: str, *, recapture_cuda_graph: bool) -> Any:
            self.num_loads += 1
            self.model.load_weights(iter(load_file(Path(model_path) / "model.safetensors").items()))
            return True, ""

        assert self._hook(original, self, str(folder), "auto", recapture_cuda_graph=False)[0]


@pytest.fixture(autouse=True)
def address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The name of the socket, one per test."""
    monkeypatch.setenv(prefetch_hook.ADDRESS, str(tmp_path))
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


def prefetch(address: str, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(f"\0{address}")
        asking.sendall(str(folder).encode())
        asking.shutdown(socket.SHUT_WR)
        asking.settimeout(ANSWER_SECONDS)
        assert asking.recv(1) == b""


def test_what_was_read_is_exchanged_again_and_again(folders: list[Path], address: str) -> None:
    scheduler = Scheduler(Model())
    scheduler.update(folders[0])
    for number in (1, 2, 3, 0):
        prefetch(address, folders[number])
        assert scheduler.model.holds(folders[number - 1])  # until the update
        scheduler.update(folders[number])
        assert scheduler.model.holds(folders[number])
    assert scheduler.num_loads == 1


def test_only_the_folder_that_was_read_last_is_exchanged_and_only_once(folders: list[Path], address: str) -> None:
    scheduler = Scheduler(Model())
    scheduler.update(folders[0])
    prefetch(address, folders[1])
    prefetch(address, folders[2])
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
    prefetch(address, folders[1])
    path.write_bytes(whole)
    scheduler.update(folders[1])
    assert (scheduler.model.holds(folders[1]), scheduler.num_loads) == (True, 2)
    assert "could not be read during generation" in caplog.text
    os.utime(path)
    prefetch(address, folders[2])
    scheduler.update(folders[2])
    assert (scheduler.model.holds(folders[2]), scheduler.num_loads) == (True, 2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Scaling, "is no copy of"),
        (Adding, "add_.Tensor writes to gate_up"),
        (Tied, "head shares its memory"),
        (Deriving, "derives more from them"),
        (Gate, "writes to gate"),
        (Replacing, "gate_up is replaced"),
        (Remembering, ".total is made from them"),
        (Buffered, "writes to .scale"),
        (Viewing, ".transposed shares the memory of gate_up"),
        (Threaded, "is not filled by copies alone"),
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
            prefetch(address, folders[number])
    assert scheduler.num_loads == 3
    assert caplog.text.count(reason) == 1


def test_a_folder_that_was_written_again_since_is_read_anew(folders: list[Path], address: str) -> None:
    """The folder changes in place, as the local copy does when deltas are applied."""
    scheduler = Scheduler(Model())
    scheduler.update(folders[0])
    prefetch(address, folders[1])
    path = folders[1] / "model.safetensors"
    path.write_bytes((folders[2] / "model.safetensors").read_bytes())
    os.utime(path, ns=(0, 0))
    scheduler.update(folders[1])
    assert (scheduler.model.holds(folders[2]), scheduler.num_loads) == (True, 2)


def test_whoever_says_nothing_or_nonsense_is_in_nobodys_way(
    folders: list[Path], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch_hook, "CONNECTION_SECONDS", 0.1)
    scheduler = Scheduler(Model())
    scheduler.update(folders[0])
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as raving:
        silent.connect(f"\0{address}")
        raving.connect(f"\0{address}")
        raving.sendall(b"\xff\x00\xfe")
        raving.shutdown(socket.SHUT_WR)
        prefetch(address, folders[1])
    scheduler.update(folders[1])
    assert (scheduler.model.holds(folders[1]), scheduler.num_loads) == (True, 1)


def test_nothing_is_hooked_where_no_service_has_named_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(prefetch_hook.ADDRESS)
    assert prefetch_hook.hooks() == {}


def test_no_second_copy_is_made_where_a_container_has_no_room(
    folders: list[Path], address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text("max\n")
    used.write_text("1000\n")
    monkeypatch.setattr(prefetch_hook, "MEMORY_LIMIT", limit)
    monkeypatch.setattr(prefetch_hook, "MEMORY_USED", used)
    scheduler = Scheduler(Model())
    scheduler.update(folders[0])
    limit.write_text("1100\n")
    prefetch(address, folders[1])
    scheduler.update(folders[1])
    assert (scheduler.model.holds(folders[1]), scheduler.num_loads) == (True, 2)


def test_no_second_copy_is_made_where_there_is_no_room(
    folders: list[Path], address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    scheduler = Scheduler(Model())
    scheduler.update(folders[0])
    with pytest.raises(ConnectionRefusedError):
        prefetch(address, folders[1])
    assert "GiB of memory are left" in caplog.text
