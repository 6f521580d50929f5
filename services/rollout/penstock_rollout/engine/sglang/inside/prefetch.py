"""Prefetches the next weights on a CPU while requests run, so that an update only swaps them.

SGLang copies the files of a version into the model while generation is paused, half a gigabyte in 0.14 s. Here a thread
reads them into a second copy during generation, and the update swaps the two. Only the model's loader knows which part
of a file fills which parameter, so we record the copies of one ordinary update and replay them. If an update does more
than copy (`Recorder.besides`), or there is no room for a second copy, SGLang's own code does all updates.

    the first update              SGLang's own; its copies are recorded
    a path P on the socket        P is read into the second copy; then the connection is closed
    an update from P              swaps the copies, if P was read last; else SGLang's own

The hint comes over a socket, since a request to SGLang would wait for the running forward pass. Runs inside SGLang's
scheduler; `launcher` registers it in SGLang's hook registry.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

Hook = Callable[..., Any]
Tensors = dict[str, torch.Tensor]

ADDRESS = "PENSTOCK_PREFETCH"  # the variable with the socket's name; it is no file, so nothing is left behind
FREE_SHARE = 2  # a second copy is made only if the host has room for this many
UPDATE = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_disk"
CONSTANTS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.fill_.Tensor, torch.ops.aten.zero_.default)
CONNECTION_SECONDS = 5.0  # for a service to send the path of the folder
MEMORY_LIMIT, MEMORY_USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")  # of a container

log = logging.getLogger(__name__)


def hooks() -> dict[str, Hook]:
    """The hooks around SGLang's methods, by their full names; empty if no service has named a socket."""
    return {UPDATE: Prefetch(os.environ[ADDRESS]).update} if ADDRESS in os.environ else {}


@dataclass(frozen=True)
class TensorView:
    """Part of a tensor: its elements from `start` on, with this shape and these strides."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, part: torch.Tensor, start: Any) -> "TensorView":
        return cls(int(start), tuple(part.shape), part.stride())

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.start)


@dataclass(frozen=True)
class Copy:
    """One copy from a tensor of a file into a weight."""

    weight: str
    source: TensorView
    target: TensorView


Plan = dict[str, list[Copy]]  # by the tensor's name in the file


@dataclass(frozen=True)
class FolderState:
    """A folder as it was when it was read. The path is not enough: a local copy keeps it when a delta is applied."""

    folder: Path
    files: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, folder: Path) -> "FolderState":
        stats = {path.name: path.stat() for path in sorted(folder.glob("*.safetensors"))}
        return cls(folder, tuple((name, each.st_size, each.st_mtime_ns) for name, each in stats.items()))


class Recorder(TorchDispatchMode):
    """Records how an update fills the weights, and what else it does."""

    def __init__(self, model: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan: Plan = {}
        self._why_not = ""
        self._model = model
        self._weights, self._others = _weights(model), _others(model)
        self._owners = {_memory(each): name for name, each in {**self._others, **self._weights}.items()}
        self._num_written = dict.fromkeys(self._weights, 0)
        self._loaded: tuple[str, torch.Tensor] | None = None

    def watch(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Hand the tensors of the files on to the model, and note each."""
        for name, tensor in tensors:
            self._loaded, self.plan[name] = (name, tensor), []
            yield name, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = func._schema.arguments
        if func._schema.is_mutable:
            given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | (kwargs or {})
            for argument in arguments:
                target = given.get(argument.name)
                if argument.is_write and isinstance(target, torch.Tensor) and target.numel():
                    self._note(func, target, args)
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, target: torch.Tensor, args: Sequence[Any]) -> None:
        owner = self._owners.get(_memory(target))
        if owner is None:
            return
        if owner in self._num_written:
            self._num_written[owner] += target.numel()
            if func in CONSTANTS and target.numel() < self._weights[owner].numel():  # padding, which is in no file
                return
        source = args[1] if func is torch.ops.aten.copy_.default and owner in self._num_written else None
        if source is None or self._loaded is None:
            self._why_not = f"{func} writes to {owner}"
            return
        name, tensor = self._loaded
        start = source.storage_offset() - tensor.storage_offset()
        if _memory(source) != _memory(tensor) or source.dtype != tensor.dtype or start < 0:
            self._why_not = f"{owner} is no copy of {name}"
            return
        self.plan[name].append(
            Copy(owner, TensorView.of(source, start), TensorView.of(target, target.storage_offset()))
        )

    def besides(self) -> str:
        """What a swap of the weights would miss, in the update or in the model; empty if nothing."""
        if self._why_not:
            return self._why_not
        weights, others = _weights(self._model), _others(self._model)
        memory: dict[int, str] = {}
        for name, weight in weights.items():
            if memory.setdefault(_memory(weight), name) != name or weight.untyped_storage().nbytes() != weight.nbytes:
                return f"{name} shares its memory"
        for name, weight in weights.items():
            if _memory(weight) != _memory(self._weights[name]):
                return f"{name} is replaced"
            if self._num_written[name] < weight.numel():
                return f"{name} is not filled by copies alone"
        for name, other in others.items():
            if _memory(other) in memory:
                return f"{name} shares the memory of {memory[_memory(other)]}"
            if name not in self._others or _memory(other) != _memory(self._others[name]):
                return f"{name} is made from them"
        return ""


class Prefetch:
    """The second copy of one model's weights."""

    def __init__(self, address: str) -> None:
        """`address`: the name of the abstract socket to listen on."""
        self._address = address
        self._model: Any = None
        self._plan: Plan = {}
        self._twins: Tensors = {}
        self._holds: FolderState | None = None  # what was read since the last update
        self._reading = threading.Lock()

    def update(self, original: Hook, updater: Any, model_path: str, load_format: str, **options: Any) -> Any:
        """Replace all weights by those of a folder; returns what SGLang's own update does: (success, message)."""
        model = updater.get_model()
        if self._model is None:
            self._model = model
            return self._first(partial(original, updater, model_path, load_format, **options))
        with self._reading:
            held, self._holds = self._holds, None
            if held is None or held != FolderState.of(Path(model_path)) or model is not self._model:
                return original(updater, model_path, load_format, **options)
            for name, weight in model.named_parameters():
                weight.data, self._twins[name] = self._twins[name], weight.data
        return _note_update(updater, model, model_path, load_format)

    def _first(self, update: Callable[[], Any]) -> Any:
        """Record the first update, and listen for hints from then on."""
        if why_not := _obstacle(self._model):
            answer = update()
        else:
            answer, recorder = _recorded(self._model, update)
            why_not = recorder.besides() if answer[0] else answer[1]
        if not why_not:
            self._plan = recorder.plan
            try:
                self._listen()
            except OSError as error:
                why_not = str(error)
        if why_not:
            log.warning("weights are not read during generation: %s", why_not)
        return answer

    def _listen(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0{self._address}")
        listener.listen()
        threading.Thread(target=self._serve, args=(listener,), daemon=True, name="prefetch").start()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            connection.settimeout(CONNECTION_SECONDS)
            with connection, connection.makefile("rb") as request:
                try:
                    self._read(Path(os.fsdecode(request.read())))
                except Exception as error:
                    log.warning("weights could not be read during generation: %r", error)

    def _read(self, folder: Path) -> None:
        with self._reading:
            self._holds, held = None, FolderState.of(folder)
            self._fill(folder)
            self._holds = held

    def _fill(self, folder: Path) -> None:
        """Read the folder into the second copy."""
        if not self._twins:
            if why_not := _obstacle(self._model):
                raise MemoryError(why_not)
            self._twins = {name: weight.clone() for name, weight in _weights(self._model).items()}
        left = dict(self._plan)
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_tensor(name)
                    for copy in left.pop(name):
                        copy.target.take(self._twins[copy.weight]).copy_(copy.source.take(tensor))
        if left:
            raise ValueError(f"{folder} lacks {next(iter(left))}")


def _recorded(model: Any, update: Callable[[], Any]) -> tuple[Any, Recorder]:
    """Run an update; returns its answer, and the recorder of what it did."""
    recorder, load_weights = Recorder(model), model.load_weights
    model.load_weights = lambda tensors, *rest: load_weights(recorder.watch(tensors), *rest)
    try:
        with recorder:
            answer = update()
    finally:
        del model.load_weights
    return answer, recorder


def _weights(model: Any) -> Tensors:
    return {name: weight.data for name, weight in model.named_parameters()}


def _others(model: Any) -> Tensors:
    """Tensors that modules hold besides their weights."""
    return {
        f"{prefix}.{name}": each
        for prefix, module in model.named_modules()
        for name, each in {**vars(module), **module._buffers}.items()
        if isinstance(each, torch.Tensor)
    }


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _obstacle(model: Any) -> str:
    """Why the weights of a model cannot be swapped; empty if nothing is known to prevent it."""
    if any(hasattr(module, "post_load_weights") for module in model.modules()) or "load_weights" in vars(model):
        return "the model derives more from them"
    if any(getattr(module, "use_intel_amx_backend", False) for module in model.modules()):
        return "they are packed for AMX"
    needed = FREE_SHARE * sum(weight.nbytes for weight in _weights(model).values())
    free = _free_bytes()
    return "" if free >= needed else f"{free / 2**30:.1f} GiB of memory are left, {needed / 2**30:.1f} are needed"


def _free_bytes() -> int:
    """Free memory of this host, or of this container if that is less."""
    free = int(psutil.virtual_memory().available)
    try:
        return min(free, int(MEMORY_LIMIT.read_text()) - int(MEMORY_USED.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return free


def _note_update(updater: Any, model: Any, model_path: str, load_format: str) -> tuple[bool, str]:
    """Do what SGLang's own update does besides replacing the weights; returns its answer."""
    from sglang.srt.configs.load_config import LoadConfig

    updater.model_config.model_path = model_path
    config = LoadConfig(load_format=load_format)
    updater.update_model_fields(model, model_path=model_path, load_format=load_format, load_config=config)
    return True, "Succeeded to update model weights, which had been read before."
