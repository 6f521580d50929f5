"""A trainer's staging with deltas, and servers that read it, without processes."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from penstock.contracts import PolicyIdentity
from penstock.weights.local_folder import LocalFolder
from penstock.weights.manifest import read_manifest, verify
from penstock_rollout.weights.local_copy import LocalCopy
from penstock_trainer.weights.deltas import DeltaWriter
from penstock_trainer.weights.files import WEIGHTS_NAME, Format, LiveWeights, write_weights
from penstock_trainer.weights.staging import Staging

BF16 = Format("bfloat16", "dithered")


class Source:
    """Weights that a test changes in place."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.held: dict[str, Tensor] = {
            "model.embed.weight": torch.randn(300, 250, generator=self.generator) * 0.04,
            "model.norm.weight": torch.ones(17),
            "model.scalar": torch.tensor(2.5),
        }

    def weights(self) -> LiveWeights:
        return LiveWeights(self.held)

    def config_json(self, dtype: str) -> bytes:
        return json.dumps({"dtype": dtype}).encode()

    def step(self, name: str = "model.embed.weight", lr: float = 1e-6, share: float = 1.0) -> None:
        """Like Adam's first step: each weight moves by the learning rate, up or down."""
        weight = self.held[name]
        signs = torch.randint(0, 2, weight.shape, generator=self.generator) * 2 - 1
        weight += lr * signs * (torch.rand(weight.shape, generator=self.generator) < share)


class World:
    """A trainer's staging with deltas, and servers that read it."""

    def __init__(self, folder: Path, form: Format = BF16, full_every: int = 4) -> None:
        self.folder = folder
        self.form = form
        self.full_every = full_every
        self.source = Source()
        self.lease = 0
        self.deltas: DeltaWriter | None = None
        self.copies: list[LocalCopy] = []
        self.identities: dict[int, PolicyIdentity] = {}
        self.start_trainer()

    def start_trainer(self) -> None:
        """A new life of the trainer, with a new lease."""
        if self.deltas is not None:
            self.deltas.close()
        self.lease += 1
        self.deltas = DeltaWriter(self.claim("trainer"), self.form, self.full_every)
        self.staging = Staging(self.source, self.folder / "weights", self.form, deltas=self.deltas)

    def claim(self, name: str) -> Callable[[int], LocalFolder]:
        return lambda needed_bytes: LocalFolder(name, needed_bytes, str(self.folder / "local"))

    def server(self) -> LocalCopy:
        copy = LocalCopy(self.claim("rollout"))
        self.copies.append(copy)
        return copy

    def write(self, version: int) -> Path:
        self.identities[version] = self.staging.write(version, self.lease)
        return self.staging.folder_of(version, self.lease)

    def full(self) -> bytes:
        """The present weights as a full file."""
        path = self.folder / "expected.safetensors"
        write_weights(path, self.source.weights(), self.form, durable=False)
        return path.read_bytes()

    def check(self, copy: LocalCopy, staged: Path, expected: bytes) -> None:
        manifest = read_manifest(staged)
        folder = copy.bring(staged, manifest)
        assert (folder / WEIGHTS_NAME).read_bytes() == expected
        assert (folder / "config.json").exists()
        verify(folder, manifest)

    def close(self) -> None:
        for copy in self.copies:
            copy.close()
        self.staging.close()
        assert list((self.folder / "local").iterdir()) == []


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
