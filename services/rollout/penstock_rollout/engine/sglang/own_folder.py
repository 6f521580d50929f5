"""The folder of one start of an engine: its sockets and other temporary files, and a record of its shared memory.

Owns its place, its name and its end. Invariants: a socket's path in it is short enough for the kernel; it is removed
with the engine, and after a service that was killed by the next start on this host; nothing else is removed: a folder
counts as left over only if its owner lived in this container, under this user, and is gone.
"""

import contextlib
import getpass
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from penstock.errors import EngineStartError
from penstock.runtime.process import ProcessIdentity, this_machine

PREFIX = "penstock-eng-"
NAME = f"/{PREFIX}12345678"  # as long as those of mkdtemp
OWNER, SHARED = "owner", "shared_memory"
MAX_BYTES = 80  # of its path: the kernel takes 107 of a socket's, and SGLang adds up to 25
OTHERS = ("/tmp", "/dev/shm")  # mkdtemp makes a folder there that nobody else can enter


class Owner(msgspec.Struct, frozen=True):
    """The service whose engine has the folder. place: host, boot and namespace, within which a pid has a meaning."""

    place: str
    pid: int
    started: str


class OwnFolder:
    """The folder of an engine that this process starts."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Make it; EngineStartError if there is no place for it. environ: what the engine inherits."""
        self._inherited = environ.get("TMPDIR") or tempfile.gettempdir()
        for left in left_over(self._places):
            remove(left)
        self.path = self._made()

    def variables(self, device: str) -> dict[str, str]:
        """With which the engine uses it. What torch compiles for a GPU outlives an engine, and stays where it was."""
        found = {"TMPDIR": str(self.path)}
        if device != "cpu":
            with contextlib.suppress(KeyError, OSError):  # a user without a name
                found["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(self._inherited, f"torchinductor_{getpass.getuser()}")
        return found

    @property
    def _places(self) -> list[str]:
        return list(dict.fromkeys((self._inherited, *OTHERS)))

    def _made(self) -> Path:
        for place in self._places:
            if len(os.fsencode(place)) + len(NAME) > MAX_BYTES:
                continue
            try:
                path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
                (path / OWNER).write_bytes(msgspec.json.encode(this_owner()))
            except OSError:
                continue
            return path
        raise EngineStartError(
            f"no folder for the engine's sockets: tried {', '.join(self._places)}; expected TMPDIR to name a folder "
            f"that can be written, with a path of at most {MAX_BYTES - len(NAME)} bytes: the kernel takes no longer "
            "path of a socket"
        )

    def record(self, files: Iterable[Path]) -> None:
        """The files in shared memory that the engine has, so that they can be removed whatever ends it."""
        with contextlib.suppress(OSError):
            lines = [f"{path.stat().st_ino} {path}\n" for path in files]
            (self.path / SHARED).write_text("".join(lines))

    def remove(self) -> None:
        remove(self.path)


def this_owner() -> Owner:
    """This process."""
    identity = ProcessIdentity.of(os.getpid())
    return Owner(_place(), os.getpid(), "" if identity is None else identity.started)


def left_over(places: Iterable[str]) -> Iterator[Path]:
    """Folders in these places whose owner is gone."""
    for place in places:
        for path in Path(place).glob(f"{PREFIX}*/{OWNER}"):
            try:
                owner = msgspec.json.decode(path.read_bytes(), type=Owner)
                is_own = path.stat().st_uid == os.getuid() and owner.place == _place()
            except (OSError, msgspec.MsgspecError):  # somebody else's, or being made
                continue
            if is_own and owner.started and not ProcessIdentity(owner.pid, owner.started).alive:
                yield path.parent


def remove(folder: Path) -> None:
    """A folder, and the files in shared memory that it names, if they are the same still."""
    with contextlib.suppress(OSError):
        for line in (folder / SHARED).read_text().splitlines():
            inode, _, path = line.partition(" ")
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == int(inode):
                    os.unlink(path)
    shutil.rmtree(folder, ignore_errors=True)


def _place() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{this_machine()} {namespace}"
