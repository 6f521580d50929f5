"""Models like SGLang's. An update of `Model` only copies; the updates of the others do something else too."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import Module, Parameter

Tensors = Iterable[tuple[str, Any]]


class Model(Module):
    """Like SGLang's models: a weight may join several tensors or have padding, and the model's own code loads it."""

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


class Inner(Module):
    def post_load_weights(self) -> None:
        """Derives further tensors from its weights."""


class Deriving(Model):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()


class Gate(Model):
    """Has a weight of one element, filled as by SGLang's `default_weight_loader`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Parameter(torch.zeros(1), requires_grad=False)

    def load_weights(self, tensors: Tensors) -> None:
        for name, tensor in tensors:
            super().load_weights([(name, tensor)])
            self.gate.data.fill_(tensor.flatten()[0].item())


class Replacing(Model):
    def load_weights(self, tensors: Tensors) -> None:
        super().load_weights(tensors)
        self.gate_up.data = self.gate_up.data.clone()


class Remembering(Model):
    def load_weights(self, tensors: Tensors) -> None:
        super().load_weights(tensors)
        self.total = self.gate_up.sum(0)


class Buffered(Model):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(4))

    def load_weights(self, tensors: Tensors) -> None:
        super().load_weights(tensors)
        self.get_buffer("scale").copy_(self.gate_up[0])


class Viewing(Model):
    def __init__(self) -> None:
        super().__init__()
        self.transposed = self.gate_up.data.t()


class Threaded(Model):
    def load_weights(self, tensors: Tensors) -> None:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(super().load_weights, list(tensors)).result()
