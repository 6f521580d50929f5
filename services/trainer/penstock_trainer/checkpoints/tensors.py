"""The tensors of a checkpoint: copied while training pauses, written and read by torch.distributed.checkpoint.

Owns the files of a checkpoint's folder except `checkpoint.json`. Tensors are stored by name, each shard with its offset
in the full tensor, so that any number of ranks can read them. Invariants: what is written is finite; reading executes
nothing (the index is a pickle of which only known classes are accepted), and an unreadable file is a DataError.
"""

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, EnumType
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from penstock.errors import DataError, NonFiniteError, PenstockError

INDEX = ".metadata"
# Modules of the classes of an index; of torch itself only types and sizes of tensors.
INDEX_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
PLAIN_CLASSES = {("pathlib", "PosixPath"), ("torch", "Size"), ("torch.serialization", "_get_layout")}


@dataclass(frozen=True)
class StateCopy:
    """A copy of the state of one rank, on the host; `group`: the ranks that write it together, None for one rank."""

    state: dict[str, Tensor]
    group: "dist.ProcessGroup | None" = None

    def write(self, folder: Path) -> None:
        """Write and flush it into `folder`, with all ranks of the group. Blocking: call it in a thread.

        NonFiniteError if a tensor is not finite: a resume would go on from there for ever.
        """
        self._require_finite()
        if not folder.is_dir():  # torch would make it on this host, where other ranks may not see it
            raise self._unwritable(folder, "no such folder")
        _expect_single_process()
        try:
            save(
                dict(self.state),
                storage_writer=FileSystemWriter(folder, sync_files=True),
                process_group=self.group,
                no_dist=self.group is None,
            )
        except CheckpointException as error:
            raise self._unwritable(folder, _reason(error)) from error

    def _require_finite(self) -> None:
        for name, tensor in self.state.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.is_floating_point() and not bool(torch.isfinite(local).all()):
                raise NonFiniteError(
                    f"{name} is not finite after this step, and no checkpoint is written: expected finite weights and "
                    "moments; begin a new run from an earlier checkpoint, with a lower optimizer.lr"
                )

    def _unwritable(self, folder: Path, reason: str) -> PenstockError:
        num_bytes = sum(each.nbytes for each in self.state.values())
        return PenstockError(
            f"checkpoint {folder} cannot be written ({reason}); expected run.root to be a folder that all ranks share, "
            f"with room for {num_bytes / 2**30:.1f} GiB of each"
        )


def copy_state(state: Mapping[str, Tensor], mesh: DeviceMesh | None, group: "dist.ProcessGroup | None") -> StateCopy:
    """Copy to the host, pinned if it comes from a GPU. `mesh`: of the ranks' CPUs, if the state is sharded."""
    copies = {name: _copy(tensor, mesh) for name, tensor in state.items()}
    if any(tensor.device.type == "cuda" for tensor in state.values()):
        torch.cuda.current_stream().synchronize()
    return StateCopy(copies, group)


def read_shapes(folder: Path) -> dict[str, torch.Size]:
    """Names and shapes of the stored tensors."""
    with _Reading(folder):
        entries = _Reader(folder).read_metadata().state_dict_metadata
        return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_all(folder: Path) -> dict[str, Tensor]:
    """All stored tensors, in full."""
    with _Reading(folder):
        entries = _Reader(folder).read_metadata().state_dict_metadata
        stored = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    read_state(folder, state)
    return state


def read_state(folder: Path, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state` from the checkpoint, each rank its own shards."""
    _expect_single_process()
    with _Reading(folder):
        load(state, storage_reader=_Reader(folder), no_dist=True)


class _Reading:
    """Turns any error of reading into a DataError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        expected = (CheckpointException, OSError, EOFError, RuntimeError, pickle.UnpicklingError, AttributeError)
        if isinstance(error, expected):
            raise unreadable(self._folder, _reason(error)) from error


def unreadable(folder: Path, reason: str) -> DataError:
    """The error for a damaged checkpoint."""
    return DataError(
        f"checkpoint {folder} cannot be read ({reason}); expected what the trainer wrote: restore the folder, "
        "or delete it to go on from an earlier one"
    )


class _Reader(FileSystemReader):
    """Reads the index without executing code, even of a forged one."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / INDEX).open("rb") as file:
            metadata: Any = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{INDEX} holds a {type(metadata).__name__}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if (module, name) in PLAIN_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        # A name may be a path, for example to a function of a module that is imported there.
        if module in INDEX_MODULES and isinstance(found := super().find_class(module, name), type):
            return found
        raise pickle.UnpicklingError(f"{INDEX} names {module}.{name}, which no checkpoint holds")


def _enum_member(owner: object, name: str) -> Enum:
    """The only allowed use of getattr: Python 3.11.0 to 3.11.3 write a member of an enum as getattr(class, name)."""
    if isinstance(owner, EnumType) and isinstance(member := owner.__members__.get(name), Enum):
        return member
    raise pickle.UnpicklingError(f"{INDEX} asks for {name!r} of {owner!r}, which no checkpoint holds")


def _copy(tensor: Tensor, mesh: DeviceMesh | None) -> Tensor:
    if isinstance(tensor, DTensor):
        local = _copy(tensor.to_local(), None)
        return DTensor.from_local(
            local, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    if tensor.device.type == "cpu":
        return tensor.detach().clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor.detach(), non_blocking=True)


def _expect_single_process() -> None:
    """Ignore torch's warning that a single process is not distributed: that is intended."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


def _reason(error: BaseException) -> str:
    """The innermost reason in one line: torch wraps those of all ranks, with their tracebacks."""
    if isinstance(error, CheckpointException):
        return "; ".join(_reason(each) for each in {str(inner): inner for inner, _ in error.failures.values()}.values())
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
