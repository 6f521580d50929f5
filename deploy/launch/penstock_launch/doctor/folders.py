"""Folders that a run writes into: whether they can be written, and whether there is room.

Owns nothing of them: the sizes are those of docs/operations.md, and the choice of the folder of weights is the
trainer's.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from penstock.config import Config
from penstock.contracts.weight_sources import ITEM_BYTES
from penstock.weights.local_folder import SHARED_MEMORY, is_memory_backed, shared_memory
from penstock.weights.manifest import KEPT_VERSIONS
from penstock_launch.doctor.report import Line, amount, ok, problem, warning
from penstock_launch.launch import LITTLE_ROOM_BYTES

CHECKPOINT_BYTES = 12  # per weight: float32, and two moments
DOCKER_SHARED_MEMORY_BYTES = 2**26  # docker's size of /dev/shm unless it is given another one


@dataclass(frozen=True)
class Room:
    """A folder, which need not exist yet. place: the nearest one that does."""

    folder: Path
    place: Path
    total_bytes: int
    free_bytes: int
    writable: bool
    executable: bool

    @classmethod
    def of(cls, folder: Path) -> "Room":
        """Blocks if its file system does."""
        resolved = folder.resolve()
        place = next(path for path in (resolved, *resolved.parents) if os.path.exists(path))  # False without the right
        usage = shutil.disk_usage(place)
        may_execute = not os.statvfs(place).f_flag & os.ST_NOEXEC
        return cls(folder, place, usage.total, usage.free, place.is_dir() and os.access(place, os.W_OK), may_execute)

    @property
    def seen(self) -> str:
        return f"{amount(self.free_bytes)} of {amount(self.total_bytes)} are free in {self.folder}"

    @property
    def not_writable(self) -> str:
        return f"{self.folder} cannot be written: {self.place} is no folder of this user's"


def run_bytes(config: Config, num_weights: int) -> int:
    """What a run's folder grows to, without logs: checkpoints, one being written, step files, the final model.

    With checkpoint.keep_best also the best one, and one whose evaluation has not ended.
    """
    trained = 0 if config.actor.lora.rank else num_weights  # an adapter is small
    more = 3 if config.checkpoint.keep_best else 1
    checkpoints = (config.checkpoint.keep + more) * CHECKPOINT_BYTES * trained
    return checkpoints + config.checkpoint.keep_step_bytes + num_weights * ITEM_BYTES["float32"]


def run_root_line(room: Room, needed_bytes: int) -> Line:
    """Of run.root."""
    what = "run.root"
    if not room.writable:
        return problem(what, room.not_writable, "Set run.root to a folder that this user may write.")
    if room.free_bytes < LITTLE_ROOM_BYTES:
        return problem(what, room.seen, "Make room there, or set run.root to a folder on another disk.")
    if room.free_bytes < needed_bytes:
        advice = "Make room, set run.root to another disk, or lower checkpoint.keep or checkpoint.keep_step_bytes."
        return warning(what, f"{room.seen}; a long run can take {amount(needed_bytes)}", advice)
    return ok(what, room.seen)


def staged_bytes(config: Config, num_weights: int) -> int:
    """All versions of the weights that the trainer keeps as files."""
    return KEPT_VERSIONS * num_weights * ITEM_BYTES[config.rollout.engine.dtype]


def weights_line(config: Config, needed_bytes: int) -> Line:
    """Of weights.folder, or of the place that the trainer takes without it. needed_bytes: 0 if unknown."""
    what, run_folder = "weights.folder", Path(config.run.root) / config.run.name
    needed = f"; {KEPT_VERSIONS} versions of the weights take {amount(needed_bytes)}" if needed_bytes else ""
    memory = None if config.weights.folder else shared_memory(needed_bytes)
    room = Room.of(Path(config.weights.folder) if config.weights.folder else memory or run_folder / "weights")
    if not room.writable:
        return problem(what, room.not_writable, "Set weights.folder to a folder that this user may write.")
    if room.total_bytes < needed_bytes:
        return problem(what, f"{room.seen}{needed}", "Set weights.folder to a larger file system.")
    if room.free_bytes < needed_bytes:
        return warning(what, f"{room.seen}{needed}", "Make room there, or set weights.folder to another one.")
    if memory is None and not config.weights.folder:
        advice = "Make /dev/shm larger (docker: --shm-size, host: mount -o remount,size=...), or set weights.folder."
        return warning(what, f"on disk, since /dev/shm has no room: {room.seen}{needed}", advice)
    return ok(what, f"{room.seen}{needed}")


def run_root_now(config: Config, num_weights: int) -> Line:
    """As it is now. num_weights: 0 if unknown."""
    return run_root_line(Room.of(Path(config.run.root)), run_bytes(config, num_weights) if num_weights else 0)


def weights_now(config: Config, num_weights: int) -> Line:
    """As it is now. num_weights: 0 if unknown."""
    return weights_line(config, staged_bytes(config, num_weights))


def shared_memory_line(room: Room, memory_backed: bool, copy_bytes: int) -> Line:
    """Of /dev/shm, which torch, NCCL and the tensor transport use. copy_bytes: of the weights, if it must hold them."""
    what, advice = (
        "shared memory",
        "Make /dev/shm larger: docker's --shm-size 16g, or as root mount -o remount,size=16g.",
    )
    if not memory_backed or not room.writable:
        return warning(what, f"{SHARED_MEMORY} is no memory that this user may write", f"Mount a tmpfs there. {advice}")
    if room.free_bytes < copy_bytes:
        seen = f"{room.seen}; weights.transport tensor puts {amount(copy_bytes)} there"
        return problem(what, seen, f"{advice[:-1]}; or set weights.transport to disk.")
    if room.total_bytes <= DOCKER_SHARED_MEMORY_BYTES:
        return warning(what, f"{room.seen}, docker's default", advice)
    return ok(what, room.seen)


def shared_memory_now(config: Config, num_weights: int) -> Line:
    """As it is now."""
    copy = num_weights * ITEM_BYTES[config.rollout.engine.dtype] if config.weights.transport == "tensor" else 0
    return shared_memory_line(Room.of(SHARED_MEMORY), is_memory_backed(SHARED_MEMORY), copy)


def compiled_folders(environ: Mapping[str, str], temporary: Path, home: Path) -> dict[str, Path]:
    """By variable: where torch and Triton put compiled code, and run it."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": Path(environ.get("TORCHINDUCTOR_CACHE_DIR") or temporary),
        "TRITON_CACHE_DIR": Path(environ.get("TRITON_CACHE_DIR") or home / ".triton"),
    }


def compiled_line(rooms: Mapping[str, Room]) -> Line:
    """By variable. Only GPUs need it: on a CPU nothing is compiled."""
    what = "compiled code"
    for variable, room in rooms.items():
        if not room.writable or not room.executable:
            seen = (
                room.not_writable if not room.writable else f"{room.folder} is mounted noexec: nothing runs from there"
            )
            return problem(what, seen, f"Set {variable} to a folder that can be written and run from.")
    return ok(what, "in " + " and ".join(str(room.folder) for room in rooms.values()))
