"""The file of a removed version is reused, but never while a process reads it."""

import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from penstock.weights.manifest import read_manifest, verify
from penstock_trainer.weights import staging
from penstock_trainer.weights.files import WEIGHTS_NAME, Format, LiveWeights
from penstock_trainer.weights.spare_file import LEASES, SpareFile
from penstock_trainer.weights.staging import SPARE_NAME, Staging

pytestmark = pytest.mark.skipif(not LEASES, reason="file leases are Linux's")
FP32 = Format("float32", "nearest")


class Source:
    """Weights that grow with each version."""

    def __init__(self, sizes: tuple[int, ...] = (1000, 10)) -> None:
        self.number = 0.0
        self.sizes = sizes

    def weights(self) -> LiveWeights:
        tensors: dict[str, Tensor] = {f"w{i}": torch.full((size,), self.number) for i, size in enumerate(self.sizes)}
        return LiveWeights(tensors)

    def config_json(self, dtype: str) -> bytes:
        return json.dumps({"dtype": dtype}).encode()


@pytest.fixture
def memory_backed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat any folder as one that need not be flushed."""
    monkeypatch.setattr(staging, "is_memory_backed", lambda _: True)


def write(versions: Staging, source: Source, number: int) -> Path:
    source.number = float(number)
    versions.write(number, lease=1)
    return versions.folder_of(number, 1)


def test_a_version_that_nobody_reads_gives_its_file_to_a_later_one(memory_backed: None, tmp_path: Path) -> None:
    source = Source()
    versions = Staging(source, tmp_path / "weights", FP32, keep=2)
    first = (write(versions, source, 1) / WEIGHTS_NAME).stat().st_ino
    write(versions, source, 2)
    third = write(versions, source, 3)
    assert (third / WEIGHTS_NAME).stat().st_ino == first
    verify(third, read_manifest(third))
    assert load_file(third / WEIGHTS_NAME)["w0"].unique().tolist() == [3.0]
    source.sizes = (20,)  # a shorter file must not keep the end of the longer one
    fourth = write(versions, source, 4)
    verify(fourth, read_manifest(fourth))
    versions.close()
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize("how", ["opened", "mapped", "elsewhere"])
def test_whoever_reads_a_removed_version_still_sees_it(memory_backed: None, tmp_path: Path, how: str) -> None:
    source = Source()
    versions = Staging(source, tmp_path / "weights", FP32, keep=1)
    path = write(versions, source, 1) / WEIGHTS_NAME
    expected = path.read_bytes()
    if how == "elsewhere":
        program = (
            "import sys; f = open(sys.argv[1], 'rb'); print(flush=True); input(); sys.stdout.buffer.write(f.read())"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as reader:
            assert reader.stdout is not None
            reader.stdout.readline()
            for number in (2, 3, 4):
                write(versions, source, number)
            seen = reader.communicate(b"\n")[0]
    else:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            if how == "mapped":
                file.close()
            for number in (2, 3, 4):
                write(versions, source, number)
            seen = mapped[:]
    assert seen == expected


def test_a_spare_that_a_killed_trainer_left_is_taken_or_removed(memory_backed: None, tmp_path: Path) -> None:
    source = Source()
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / SPARE_NAME).write_bytes(b"x" * 100_000)
    versions = Staging(source, folder, FP32)
    version = write(versions, source, 1)
    verify(version, read_manifest(version))
    assert not (folder / SPARE_NAME).exists()
    SpareFile(folder / SPARE_NAME).give(version / "other")
    assert not (version / "other").exists()


def test_a_folder_on_a_disk_gets_new_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(staging, "is_memory_backed", lambda _: False)
    versions = Staging(Source(), tmp_path / "weights", FP32, keep=1)
    versions.write(1, lease=1)
    versions.write(2, lease=1)
    assert not (tmp_path / "weights" / SPARE_NAME).exists()
